"""vmdk: the descriptor, a text of lines ``name=value``, of extents, and the disk data base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from diskwright.errors import CorruptImage, UnsupportedFeature

NO_PARENT: Final = 0xFFFFFFFF
_FIELD: Final = re.compile(r"^[ \t]*(CID|parentCID|createType)[ \t]*=[ \t]*(.*?)[ \t\r]*$", re.M)
_EXTENT: Final = re.compile(r'^[ \t]*(RW|RDONLY|NOACCESS)[ \t]+(\d{1,19})[ \t]+(\w+)(?:[ \t]+"([^"\n]*)")?', re.M)
_HEADS: Final = {"ide": 16}


@dataclass(frozen=True)
class Descriptor:
    cid: int
    parent_cid: int
    create_type: str
    filename: str
    """Of the one extent."""
    text: bytes


def parse(path: str, raw: bytes) -> Descriptor:
    """The descriptor in a monolithicSparse image. Raises CorruptImage, UnsupportedFeature."""
    text = raw.split(b"\0", 1)[0]
    lines = text.decode("utf-8", "surrogateescape")
    fields = dict(_FIELD.findall(lines))
    numbers = []
    for name in ("CID", "parentCID"):
        value = fields.get(name, "")
        if not re.fullmatch(r"[0-9a-fA-F]{1,8}", value):
            raise CorruptImage(path, name, repr(value[:40]), None, "it must be a hexadecimal number of 32 bits")
        numbers.append(int(value, 16))
    kind = fields.get("createType", "").strip('"')
    if kind != "monolithicSparse":
        raise UnsupportedFeature(f"{path}: is of the type {kind[:40]!r}; only monolithicSparse is supported")
    if numbers[1] != NO_PARENT:
        raise UnsupportedFeature(f"{path}: has a parent (parentCID {numbers[1]:08x}), which is not supported")
    extents = _EXTENT.findall(lines)
    if len(extents) != 1 or extents[0][2] != "SPARSE":
        raise CorruptImage(path, "the extents", len(extents), None, "there must be one, and it must be SPARSE")
    return Descriptor(numbers[0], numbers[1], kind, extents[0][3], text)


def with_cid(text: bytes, cid: int) -> bytes:
    """The descriptor with another CID; a few bytes longer when the old one was written shorter."""
    return re.sub(rb"(?m)^([ \t]*CID[ \t]*=[ \t]*)[0-9a-fA-F]+", lambda found: found[1] + b"%08x" % cid, text, count=1)


def new(name: str, sectors: int, cid: int, *, adapter: str, hwversion: str, tools: str) -> bytes:
    heads = _HEADS.get(adapter, 255)
    return "\n".join([
        "# Disk DescriptorFile", "version=1", f"CID={cid:08x}", "parentCID=ffffffff",
        'createType="monolithicSparse"', "", "# Extent description", f'RW {sectors} SPARSE "{name}"', "",
        "# The Disk Data Base", "#DDB", "", f'ddb.virtualHWVersion = "{hwversion}"',
        f'ddb.geometry.cylinders = "{sectors // (63 * heads)}"', f'ddb.geometry.heads = "{heads}"',
        'ddb.geometry.sectors = "63"', f'ddb.adapterType = "{adapter}"', f'ddb.toolsVersion = "{tools}"', "",
    ]).encode("utf-8", "surrogateescape")  # fmt: skip
