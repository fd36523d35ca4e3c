"""Inspection of LUKS headers, field by field, right or wrong (LUKS On-Disk Format Specification 1.2.3, section
"phdr"; LUKS2 On-Disk Format Specification 1.1.0, section 2.1)."""

from __future__ import annotations

import struct
from typing import Final

from diskwright.core.inspection import Fact, Field, Inspection, between, pread_up_to, read_fields, text_of
from diskwright.core.node import Node

_HEADER_1: Final = 592
_SLOTS_1: Final = (208, 48, 8)  # where, how long, how many
_STATES: Final = {0x00AC71F3: "in use", 0x0000DEAD: "free"}
_HEADER_2: Final = 4096
_JSON_AREAS: Final = tuple(1 << bits for bits in range(14, 23))


def inspect(file: Node) -> Inspection:
    """See ``Format.inspect``. Reads 4 KiB at most: the metadata of version 2 is looked at when the image is opened."""
    head = pread_up_to(file, 0, _HEADER_2)
    version = int.from_bytes(head[6:8], "big")
    found = Inspection(version=version, encrypted=True)
    if version == 2:
        _version_2(head, found)
    else:
        _version_1(head, found, file.size)
    return found


def _version_1(head: bytes, found: Inspection, size: int) -> None:
    if len(head) < _HEADER_1:
        found.problems.append(f"the file ends within the header, which has {_HEADER_1} bytes")
    for name, at, length in (("cipher-name", 8, 32), ("cipher-mode", 40, 32), ("hash-spec", 72, 32), ("uuid", 168, 40)):
        found.facts.append(_text(head, name, at, length))

    def payload(sectors: int) -> str | None:
        return None if sectors * 512 <= size else f"is in sectors of 512 bytes; beyond the file's end, {size}"

    found.facts += read_fields(
        head,
        (
            Field("version", 6, ">H", between(1, 2)),
            Field("payload-offset", 104, ">I", payload),
            Field("key-bytes", 108, ">I", between(1, 64)),
            Field("mk-digest-iter", 164, ">I", between(1, (1 << 32) - 1)),
        ),
    )
    start, length, count = _SLOTS_1
    for slot in range(count):
        at = start + slot * length
        if at + 4 <= len(head):
            (state,) = struct.unpack_from(">I", head, at)
            problem = None if state in _STATES else f"{state:#010x} is neither in use nor free"
            found.facts.append(Fact(f"key slot {slot}", _STATES.get(state, "damaged"), at, problem))


def _version_2(head: bytes, found: Inspection) -> None:
    def size(value: int) -> str | None:
        return None if value in _JSON_AREAS else "must be a power of two from 16 KiB to 4 MiB"

    fields = (Field("hdr_size", 8, ">Q", size), Field("seqid", 16, ">Q"), Field("hdr_offset", 256, ">Q"))
    found.facts += read_fields(head, fields)
    for name, at, length in (("label", 24, 48), ("csum_alg", 72, 32), ("uuid", 168, 40), ("subsystem", 208, 48)):
        found.facts.append(_text(head, name, at, length))


def _text(head: bytes, name: str, at: int, length: int) -> Fact:
    raw = head[at : at + length]
    problem = None if b"\0" in raw else "is not terminated"
    return Fact(name, text_of(raw), at, problem)
