"""Logs written by hand, after MS-VHDX 2.3, without the code under test."""

from __future__ import annotations

import struct

from diskwright.codecs.crc32c import crc32c

MiB = 1 << 20
LOG, HEADERS = MiB, (64 << 10, 128 << 10)
GUID = bytes(range(1, 17))


def entry(
    number: int,
    changes: list[tuple[int, bytes | int]],
    *,
    tail: int,
    guid: bytes = GUID,
    flushed: int = 4 * MiB,
    last: int = 4 * MiB,
    pages: int = 0,
) -> bytes:
    """A log entry. A change is a page's bytes, or how many zeros there are."""
    descriptors = sectors = b""
    for offset, what in changes:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, offset, number)
            continue
        assert len(what) == 4096
        trailing, leading = struct.unpack("<I", what[-4:])[0], struct.unpack("<Q", what[:8])[0]
        descriptors += struct.pack("<4sIQQQ", b"desc", trailing, leading, offset, number)
        sectors += struct.pack("<4sI", b"data", number >> 32) + what[8:-4] + struct.pack("<I", number & 0xFFFFFFFF)
    room = (64 + len(descriptors) + 4095) // 4096 * 4096
    length = max(pages * 4096, room + len(sectors))
    head = struct.pack("<4sIIIQII16sQQ", b"loge", 0, length, tail, number, len(changes), 0, guid, flushed, last)
    whole = bytearray(((head + descriptors).ljust(room, b"\0") + sectors).ljust(length, b"\0"))
    return seal(whole)


def seal(whole: bytearray) -> bytes:
    whole[4:8] = bytes(4)
    struct.pack_into("<I", whole, 4, crc32c(whole))
    return bytes(whole)


def put(image: bytearray, position: int, data: bytes, length: int = MiB) -> int:
    """Puts an entry into the ring; returns where the next one goes."""
    for at in range(0, len(data), 4096):
        place = LOG + (position + at) % length
        image[place : place + 4096] = data[at : at + 4096]
    return (position + len(data)) % length


def use_log(image: bytearray, guid: bytes = GUID) -> None:
    """Both headers say that the log is in use."""
    for at in HEADERS:
        image[at + 48 : at + 64] = guid
        image[at : at + 4096] = seal(bytearray(image[at : at + 4096]))
