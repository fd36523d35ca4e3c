"""Images of several files for the tests of vmdk."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
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


def strict(raw: bytes) -> dict[int, bytes]:
    """Reads a stream as the most exacting of its readers do: once, from its beginning to its end. The grains, by their
    sector; everything that is told twice has to be the same."""
    fields = struct.unpack_from("<4sIIQQQQIQQQB4sH", raw)
    magic, version, flags, capacity, grain, at, length, entries, rgd, gd, over, dirty, newlines, method = fields
    assert (magic, version, flags, grain, entries, rgd, gd) == (b"KDMV", 3, 0x30001, 128, 512, 0, (1 << 64) - 1)
    assert (dirty, newlines, method, over) == (0, b"\n \r\n", 1, 128) and not any(raw[79:512])
    text = raw[at * 512 : (at + length) * 512].rstrip(b"\0").decode()
    assert 'createType="streamOptimized"' in text and f"RW {capacity} SPARSE" in text
    place, grains, where = over * 512, {}, {}
    tables: dict[int, int] = {}
    while True:
        sector, size, kind = struct.unpack_from("<QII", raw, place)
        if size:
            assert sector % grain == 0 and sector not in grains and sector > max(grains, default=-1)
            stream = zlib.decompressobj()
            grains[sector] = stream.decompress(raw[place + 12 : place + 12 + size])
            assert stream.eof and not stream.unused_data and len(grains[sector]) == grain * 512
            where[sector] = place // 512
            end = place + 12 + size
            place = -(-end // 512) * 512
            assert not any(raw[end:place])
            continue
        data, place = place + 512, place + 512 + sector * 512
        if kind == 1:
            assert sector == 4
            index = max(grains) // (grain * 512)
            found = struct.unpack_from("<512I", raw, data)
            assert found == tuple(where.get((index * 512 + i) * grain, 0) for i in range(512))
            tables[index] = data // 512
        elif kind == 2:
            count = -(-capacity // (grain * 512))
            directory = data // 512
            assert sector == -(-count * 4 // 512)
            assert list(struct.unpack_from(f"<{count}I", raw, data)) == [tables.get(i, 0) for i in range(count)]
        elif kind == 3:
            footer = struct.unpack_from("<4sIIQQQQIQQQB4sH", raw, data)
            assert footer == (*fields[:9], directory, *fields[10:]) and sector == 1
        else:
            assert kind == 0 and sector == 0 and place == len(raw) and not any(raw[data - 512 :])
            return grains


def cowd(sectors: int, grain: int, grains: Mapping[int, bytes]) -> bytes:
    """An ESX sparse extent with these grains."""
    count = -(-sectors // (4096 * grain))
    free = 4 + -(-count * 4 // 512)
    raw, tables = bytearray(free * 512), dict[int, int]()
    for number, data in sorted(grains.items()):
        index, at = divmod(number, 4096)
        if index not in tables:
            struct.pack_into("<I", raw, 4 * 512 + 4 * index, free)
            tables[index] = free
            raw += bytes(16384)
            free += 32
        struct.pack_into("<I", raw, tables[index] * 512 + 4 * at, free)
        raw += data
        free += grain
    struct.pack_into("<4s7I", raw, 0, b"COWD", 1, 3, sectors, grain, 4, count, free)
    return bytes(raw)


def sesparse(sectors: int, grains: Mapping[int, bytes | str], *, replay: int = 0) -> bytes:
    """An seSparse extent. A grain that is ``zero`` or ``unmapped`` is called so."""
    count = -(-sectors // (8 * 4096))
    directory, tables = 256, 512
    start = -(-(tables + 64 * count) // 8) * 8
    raw = bytearray((start + 8 * len(grains)) * 512)
    struct.pack_into(
        "<26Q", raw, 0, 0xCAFEBABE, 0x200000001, sectors, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 2, 4, 16, directory,
        -(-count * 8 // 512), tables, 64 * count, 128, 8, 136, 8, start, 8 * len(grains),
    )  # fmt: skip
    struct.pack_into("<4Q", raw, 512, 0xCAFECAFE, 0, 0, replay)
    used: dict[int, int] = {}
    stored = 0
    for number, data in sorted(grains.items()):
        index, at = divmod(number, 4096)
        used.setdefault(index, len(used))
        struct.pack_into("<Q", raw, directory * 512 + 8 * index, 1 << 60 | used[index])
        if isinstance(data, str):
            entry = {"unmapped": 1, "zero": 2}[data] << 60
        else:
            entry = 3 << 60 | (stored & 0xFFF) << 48 | stored >> 12
            raw[start * 512 + stored * 4096 : start * 512 + (stored + 1) * 4096] = data
            stored += 1
        struct.pack_into("<Q", raw, tables * 512 + used[index] * 32768 + 8 * at, entry)
    return bytes(raw)
