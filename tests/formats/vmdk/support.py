"""Images of several files for the tests of vmdk."""

from __future__ import annotations

from pathlib import Path

TEXT = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="{kind}"

# Extent description
{lines}

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
"""


def descriptor(path: Path, *lines: str, kind: str = "twoGbMaxExtentFlat") -> Path:
    """A descriptor with these extent lines."""
    path.write_text(TEXT.format(kind=kind, lines="\n".join(lines)))
    return path
