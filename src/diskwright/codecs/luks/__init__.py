"""LUKS, versions 1 and 2: headers, key slots, and the volume key they guard.

Specifications: LUKS On-Disk Format Specification 1.2.3; LUKS2 On-Disk Format Specification 1.1.0. Nothing here
opens a file: a header is read through an ``Area``, which a format driver makes of its child (luks) or of
some of its clusters (qcow2).
"""

from __future__ import annotations

from diskwright.codecs.luks.area import Area
from diskwright.codecs.luks.luks1 import MAGIC, Luks1
from diskwright.codecs.luks.luks2 import MAGIC_SECOND, Luks2

__all__ = ["MAGIC", "MAGIC_SECOND", "Area", "Luks1", "Luks2", "read_header"]


def read_header(area: Area) -> Luks1 | Luks2:
    """The checked header in ``area``, of whichever version. Raises CorruptImage, LimitExceeded, UnsupportedFeature."""
    head = area.read(0, 8, "the LUKS header") if area.size >= 8 else b""
    if head[:6] == MAGIC and head[6:] == b"\0\2":
        return Luks2.read(area)
    if (head[:6] != MAGIC or head[6:] != b"\0\1") and Luks2.has_second(area):
        return Luks2.read(area)  # the first copy is lost, beginning and all
    return Luks1.read(area)
