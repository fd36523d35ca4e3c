"""ova: the archive, after POSIX 1003.1 (ustar, pax) with GNU's large numbers. Members are found where they lie; nothing
is taken out, so it does not matter what their names would be as paths."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature

if TYPE_CHECKING:
    from diskwright.core.node import Node

BLOCK: Final = 512
MAX_MEMBERS: Final = 1000
_MAX_EXTENDED: Final = 1 << 16
"""Bytes of an extended header at most."""
_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_FILES: Final = (b"0", b"\0", b"7")
_MOST_OCTAL: Final = 8**11 - 1
_MODE: Final = 0o644


class Member(NamedTuple):
    """A file in the archive: ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


def is_archive(head: bytes) -> bool:
    """Whether it begins with a file whose name is an OVF descriptor's."""
    name = head[:100].split(b"\0", 1)[0]
    return head[257:262] == b"ustar" and name.lower().endswith(b".ovf")


def members(file: Node) -> list[Member]:
    """The files in the archive, in their order. Raises CorruptImage, LimitExceeded, UnsupportedFeature."""
    found: list[Member] = []
    at, headers = 0, 0
    extended: dict[str, str] = {}
    while at + BLOCK <= file.size:
        raw = file.pread(at, BLOCK)
        if not any(raw):
            break
        headers += 1
        if headers > 4 * MAX_MEMBERS or len(found) >= MAX_MEMBERS:
            raise LimitExceeded(f"{file.filename}: has more than {MAX_MEMBERS} files in it, the most accepted")
        name, size, kind = _header(file, at, raw)
        start, at = at + BLOCK, at + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _MAX_EXTENDED:
                raise LimitExceeded(f"{file.filename}: has an extended header of {size} bytes at offset {start:#x}")
            text = file.pread(start, size)
            if kind == b"x":
                extended.update(_records(file, start, text))
            elif kind == b"L":
                extended["path"] = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            size = _extended_size(file, extended, size, start)
            if kind in _FILES:
                found.append(Member(extended.get("path", name), start, size))
            extended = {}
        if start + size > file.size:
            raise CorruptImage(
                file.filename, f"size of '{name[:100]}'", size, start, "it goes on behind the end of the file"
            )
        at = start + -(-size // BLOCK) * BLOCK
    return found


def _header(file: Node, at: int, raw: bytes) -> tuple[str, int, bytes]:
    fields = _HEADER.unpack(raw)
    total = sum(raw) - sum(raw[148:156]) + 8 * ord(" ")
    if _number(fields[6]) != total or fields[9][:5] != b"ustar":
        raise CorruptImage(file.filename, "archive header", "damaged", at, "its checksum or magic is wrong")
    size = _number(fields[4])
    if size is None:
        raise CorruptImage(file.filename, "archive header", "damaged", at, "its size is no number")
    name, prefix = (field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") for field in (fields[0], fields[15]))
    return (f"{prefix}/{name}" if prefix and fields[9] == b"ustar\0" else name), size, fields[7]


def _number(raw: bytes) -> int | None:
    """Octal digits, or, as GNU writes what does not fit, a binary number."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    try:
        return int(raw.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _records(file: Node, at: int, text: bytes) -> dict[str, str]:
    """The records of a pax header: ``length key=value`` and a newline, each."""
    found: dict[str, str] = {}
    start = 0
    while start < len(text):
        space = text.find(b" ", start, start + 9)
        digits = text[start:space] if space > 0 else b""
        end = start + int(digits) if digits.isdigit() else 0
        if not space < end - 1 < len(text) or text[end - 1 : end] != b"\n":
            raise CorruptImage(file.filename, "extended header", "damaged", at)
        key, _, value = text[space + 1 : end - 1].decode("utf-8", "surrogateescape").partition("=")
        found[key] = value
        start = end
    return found


def _extended_size(file: Node, extended: dict[str, str], size: int, at: int) -> int:
    if any(key.startswith("GNU.sparse") for key in extended):
        raise UnsupportedFeature(f"{file.filename}: has a sparse file in it, which is not supported")
    text = extended.get("size")
    if text is None:
        return size
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise CorruptImage(file.filename, "extended header", "damaged", at, "its size is no number")
    return int(text)


def header(name: str, size: int) -> bytes:
    """The header of a member. Raises ValueError for a name that does not fit."""
    raw_name = name.encode("utf-8", "surrogateescape")
    if len(raw_name) > 100:
        raise ValueError(f"'{name}' is too long for the name of a file in an archive")
    number = b"%011o\0" % size if size <= _MOST_OCTAL else b"\x80" + size.to_bytes(11, "big")
    none, now = b"%07o\0" % 0, b"%011o\0" % 0
    fields = [
        raw_name, b"%07o\0" % _MODE, none, none, number, now, b" " * 8, b"0", b"", b"ustar\0", b"00", b"", b"", none,
        none, b"",
    ]  # fmt: skip
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)
