"""Writes disk images of Apple's kind, for tests: all kinds of chunks, tables in a property list or a resource fork."""

from __future__ import annotations

import bz2
import lzma
import plistlib
import random
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SECTOR = 512
ZERO, RAW, IGNORE, ADC, ZLIB, BZIP2, LZFSE, XZ = 0, 1, 2, *range(0x80000004, 0x80000009)
COMMENT, END = 0x7FFFFFFE, 0xFFFFFFFF


class Chunk(NamedTuple):
    """``sectors`` is how many the table tells, which a test may make a lie."""

    kind: int
    sectors: int
    stored: bytes = b""


def adc(data: bytes) -> bytes:
    """A simple packer that uses all three forms, and copies that reach into themselves."""
    out, at, literal = bytearray(), 0, bytearray()

    def spill() -> None:
        for start in range(0, len(literal), 128):
            piece = literal[start : start + 128]
            out.append(0x80 | len(piece) - 1)
            out.extend(piece)
        literal.clear()

    while at < len(data):
        best, distance = 0, 0
        for candidate in (1, 2, 3, 64, 700, 1024, 1025, 3000):
            length = 0
            while candidate <= at and length < 67 and at + length < len(data):
                if data[at + length] != data[at + length - candidate]:
                    break
                length += 1
            if length > best:
                best, distance = length, candidate
        if best >= 4 and (distance > 1024 or best > 18):
            spill()
            out += bytes([0x40 | best - 4]) + (distance - 1).to_bytes(2, "big")
        elif 3 <= best <= 18 and distance <= 1024:
            spill()
            out += bytes([best - 3 << 2 | distance - 1 >> 8, distance - 1 & 0xFF])
        else:
            best = 1
            literal.append(data[at])
        at += best
    spill()
    return bytes(out)


def lzfse_stored(data: bytes) -> bytes:
    """A stream of blocks that are not packed."""
    return b"bvx-" + struct.pack("<I", len(data)) + data + b"bvx$"


PACKERS = {RAW: bytes, ADC: adc, ZLIB: zlib.compress, BZIP2: bz2.compress, LZFSE: lzfse_stored, XZ: lzma.compress}


def chunk(kind: int, data: bytes) -> Chunk:
    packer = PACKERS.get(kind)
    return Chunk(kind, len(data) // SECTOR, packer(data) if packer else b"")  # type: ignore[operator]


def disk_of(kinds: Sequence[int], seed: int = 1) -> list[tuple[int, bytes]]:
    """``(kind, bytes)`` of chunks of several lengths."""
    chance = random.Random(seed)
    found = []
    for number in range(6 * len(kinds)):
        kind = kinds[number % len(kinds)]
        length = SECTOR * chance.choice([1, 7, 128, 300])
        if kind in (ZERO, IGNORE):
            data = bytes(length)
        else:
            words = [chance.randbytes(3) for _ in range(20)]
            data = b"".join(chance.choices(words, k=length // 3 + 1))[:length]
        found.append((kind, data))
    return found


def image(
    parts: Iterable[Sequence[Chunk]], *, fork: bool = False, lead: bytes = b"", sectors: int | None = None
) -> bytes:
    """Each part gets a table of its own. ``lead`` comes before the data fork; ``sectors`` is what the trailer tells."""
    data, tables, first = bytearray(), [], 0
    for part in parts:
        rows, sector = [], 0
        for kind, count, stored in part:
            rows.append(struct.pack(">IIQQQQ", kind, 0, sector, count, len(data), len(stored)))
            data += stored
            sector += count
        rows.insert(len(rows) // 2, struct.pack(">IIQQQQ", COMMENT, 0, 0, 0, 0, 0))
        rows.append(struct.pack(">IIQQQQ", END, 0, sector, 0, len(data), 0))
        head = struct.pack(">4sIQQQII24x136x", b"mish", 1, first, sector, 0, 0, len(tables))
        tables.append(head + struct.pack(">I", len(rows)) + b"".join(rows))
        first += sector
    body = lead + bytes(data)
    listed = resources(tables) if fork else plist(tables)
    place = (len(body), len(listed))
    trailer = bytearray(struct.pack(">4sIIIQQQ", b"koly", 4, 512, 1, 0, len(lead), len(data)).ljust(512, b"\0"))
    struct.pack_into(">QQ", trailer, 40 if fork else 216, *place)
    struct.pack_into(">IQ", trailer, 488, 1, first if sectors is None else sectors)
    return body + listed + bytes(trailer)


def plist(tables: Sequence[bytes]) -> bytes:
    blocks = [{"Attributes": "0x0050", "ID": str(at), "Name": "", "Data": table} for at, table in enumerate(tables)]
    return plistlib.dumps({"resource-fork": {"blkx": blocks, "plst": [{"Data": b"\0" * 64}]}})


def resources(tables: Sequence[bytes]) -> bytes:
    data = b"".join(struct.pack(">I", len(piece)) + piece for piece in (*tables, b"something else"))
    return struct.pack(">4I", 256, 256 + len(data), len(data), 0).ljust(256, b"\0") + data
