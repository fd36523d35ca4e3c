"""vmdk: the descriptor, a text of lines ``name=value``, of extents, and the disk data base.

After "Virtual Disk Format 5.0", section "The Descriptor File". What is not understood is kept when a descriptor is
changed: only the bytes of the changed values differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.units import SECTOR

if TYPE_CHECKING:
    from diskwright.core.node import Node

NO_PARENT: Final = 0xFFFFFFFF
MAX_DESCRIPTOR: Final = 1 << 20
"""Longest descriptor in bytes; real ones have less than a thousand, and 70 more for each extent."""
MAX_EXTENTS: Final = 4096
"""Extents of a disk at most: 8 TiB in files of 2 GiB."""
_MOST_SECTORS: Final = (1 << 63) // SECTOR - 1

_SIGNATURE: Final = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*[ \t]*version[ \t]*=[ \t]*[123][ \t]*\r?(?:\n|\Z)")
_FIELD: Final = re.compile(r"^[ \t]*(CID|parentCID|createType|parentFileNameHint)[ \t]*=(.*)$", re.M | re.I)
_EXTENT_LINE: Final = re.compile(r"^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t].*$", re.M)
_EXTENT: Final = re.compile(
    r'[ \t]*(RW|RDONLY|NOACCESS)[ \t]+(\d{1,19})[ \t]+(\w+)(?:[ \t]+"([^"]*)"(?:[ \t]+(-?\d{1,19})(?=\s|$))?)?(?:\s|$)'
)
_CID: Final = re.compile(rb"^([ \t]*CID[ \t]*=[ \t]*)([0-9a-fA-F]{1,8})[ \t\r]*$", re.M | re.I)
_HEADS: Final = {"ide": 16}
_KEPT_DIGITS: Final = 6
"""A CID written with as many digits keeps their number; with fewer, a new one might too easily be the old one."""


@dataclass(frozen=True)
class ExtentLine:
    """One line of the extent description. Counts sectors."""

    access: str
    sectors: int
    kind: str
    filename: str
    offset: int
    """Where in the file it begins; only flat ones have one."""


@dataclass(frozen=True)
class Descriptor:
    cid: int
    parent_cid: int
    create_type: str
    parent_hint: str | None
    extents: tuple[ExtentLine, ...]
    text: bytes

    @property
    def has_parent(self) -> bool:
        return self.parent_cid != NO_PARENT


def is_descriptor(head: bytes) -> bool:
    """Whether a file that begins so is a descriptor: comments, and then its version."""
    return head.startswith(b"# Disk DescriptorFile") or _SIGNATURE.match(head) is not None


def parse(path: str, raw: bytes) -> Descriptor:
    """What a descriptor says. Raises CorruptImage, UnsupportedFeature, LimitExceeded."""
    text = raw.split(b"\0", 1)[0]
    lines = text.decode("utf-8", "surrogateescape")
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(lines):
        fields.setdefault(name.lower(), value.strip(" \t\r"))
    hint = _unquoted(fields["parentfilenamehint"]) if "parentfilenamehint" in fields else None
    found = Descriptor(
        _number(path, fields, "CID"), _number(path, fields, "parentCID"), _unquoted(fields.get("createtype", "")), hint,
        _extents(path, lines), text,
    )  # fmt: skip
    if hint and not found.has_parent:
        raise CorruptImage(path, "parentCID", "ffffffff", None, f"that means no parent, but there is one: '{hint}'")
    return found


def _number(path: str, fields: dict[str, str], name: str) -> int:
    value = fields.get(name.lower(), "")
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}", value):
        raise CorruptImage(path, name, repr(value[:40]), None, "it must be a hexadecimal number of 32 bits")
    return int(value, 16)


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value.strip('"')


def _extents(path: str, lines: str) -> tuple[ExtentLine, ...]:
    found: list[ExtentLine] = []
    total = 0
    for line in _EXTENT_LINE.finditer(lines):
        parts = _EXTENT.match(line[0])
        if parts is None:
            raise CorruptImage(path, "extent line", repr(line[0].strip()[:80]), None, "Invalid extent line")
        access, sectors, kind, name, offset = parts.groups()
        if len(found) == MAX_EXTENTS:
            raise LimitExceeded(f"{path}: has more than {MAX_EXTENTS} extents, the most accepted")
        if access == "NOACCESS":
            raise UnsupportedFeature(f"{path}: has an extent that must not be accessed (NOACCESS)")
        if (kind == "FLAT" and offset is None) or (offset or "").startswith("-") or (kind != "ZERO" and not name):
            raise CorruptImage(path, "extent line", repr(line[0].strip()[:80]), None, "Invalid extent line")
        total += int(sectors)
        if total > _MOST_SECTORS or int(offset or 0) > _MOST_SECTORS:
            raise CorruptImage(path, "extent line", repr(line[0].strip()[:80]), None, "larger than any disk can be")
        if int(sectors):
            found.append(ExtentLine(access, int(sectors), kind, name or "", int(offset or 0)))
    return tuple(found)


def with_cid(text: bytes, cid: int) -> bytes:
    """The descriptor with another CID, taken from the low digits of ``cid``: as long as before when the old one has at
    least six digits, so that nothing else has to move."""
    found = _CID.search(text)
    assert found is not None, "it has been parsed"
    digits = len(found[2])
    width = digits if digits >= _KEPT_DIGITS else 8
    number = cid & ((1 << 4 * width) - 1)
    if number in (int(found[2], 16), NO_PARENT):
        number ^= 1
    return text[: found.start(2)] + b"%0*x" % (width, number) + text[found.end(2) :]


def with_field(text: bytes, name: bytes, value: bytes | None) -> bytes:
    """The descriptor with another value of ``name`` in its first section, or, for None, without it."""
    line = re.compile(rb"^[ \t]*" + re.escape(name) + rb"[ \t]*=.*\n?", re.M | re.I)
    new = b"" if value is None else name + b"=" + value + b"\n"
    if line.search(text):
        return line.sub(lambda _: new, text, count=1)
    anchor = re.search(rb"^[ \t]*createType[ \t]*=.*\n?", text, re.M | re.I)
    at = anchor.end() if anchor else len(text)
    if at and text[at - 1 : at] != b"\n":
        new = b"\n" + new
    return text[:at] + new + text[at:]


def with_parent(text: bytes, parent: tuple[int, str] | None) -> bytes:
    """The descriptor with another parent, given by its CID and name, or none."""
    hint = None if parent is None else b'"' + parent[1].encode("utf-8", "surrogateescape") + b'"'
    text = with_field(text, b"parentFileNameHint", hint)
    return with_field(text, b"parentCID", b"%x" % (NO_PARENT if parent is None else parent[0]))


def with_sectors(text: bytes, sectors: int) -> bytes:
    """The descriptor whose last extent has ``sectors`` sectors."""
    lines = list(re.finditer(rb"^[ \t]*(?:RW|RDONLY)[ \t]+(\d+)[ \t]", text, re.M))
    last = lines[-1]
    return text[: last.start(1)] + b"%d" % sectors + text[last.end(1) :]


@dataclass
class Place:
    """Where a descriptor lies: in an image, ``room`` bytes at ``offset``, or all of a file of its own."""

    file: Node
    offset: int
    room: int | None

    def read(self) -> bytes:
        """Raises LimitExceeded for a file too long to be one."""
        length = self.room
        if length is None:
            length = self.file.size
            if length > MAX_DESCRIPTOR:
                raise LimitExceeded(
                    f"{self.file.filename}: has {length} bytes; a descriptor has at most {MAX_DESCRIPTOR}"
                )
        return self.file.pread(self.offset, length)

    def replace(self, old: bytes, new: bytes) -> None:
        """Writes what differs, durably. Raises LimitExceeded where there is no room for it."""
        if self.room is not None:
            if len(new) > self.room:
                raise LimitExceeded(f"{self.file.filename}: the descriptor has no room for {len(new)} bytes")
            old, new = old.ljust(self.room, b"\0"), new.ljust(self.room, b"\0")
        start, end = 0, len(new)
        while start < min(len(old), end) and old[start] == new[start]:
            start += 1
        while len(old) == len(new) and end > start and old[end - 1] == new[end - 1]:
            end -= 1
        if start < end:
            self.file.writev([(self.offset + start, memoryview(new)[start:end])])
        if len(new) < len(old):
            self.file.resize(len(new))
        self.file.flush()


def new(
    kind: str, extents: Sequence[str], sectors: int, *, cid: int, parent: tuple[int, str] | None, adapter: str,
    hwversion: str, tools: str,
) -> bytes:  # fmt: skip
    """The descriptor of a new disk of ``sectors``; ``extents`` are its lines, ``parent`` its CID and name."""
    heads = _HEADS.get(adapter, 255)
    parent_cid = NO_PARENT if parent is None else parent[0]
    hint = [] if parent is None else [f'parentFileNameHint="{parent[1]}"']
    return "\n".join([
        "# Disk DescriptorFile", "version=1", f"CID={cid:08x}", f"parentCID={parent_cid:x}",
        f'createType="{kind}"', *(hint or [""]), "# Extent description", *extents, "",
        "# The Disk Data Base", "#DDB", "", f'ddb.virtualHWVersion = "{hwversion}"',
        f'ddb.geometry.cylinders = "{sectors // (63 * heads)}"', f'ddb.geometry.heads = "{heads}"',
        'ddb.geometry.sectors = "63"', f'ddb.adapterType = "{adapter}"', f'ddb.toolsVersion = "{tools}"', "",
    ]).encode("utf-8", "surrogateescape")  # fmt: skip
