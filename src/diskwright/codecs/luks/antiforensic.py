"""The anti-forensic splitter (LUKS1 specification, section 2.4): a key blown up to many stripes, every one of which is
needed to get it back, so that destroying any part of them destroys the key."""

from __future__ import annotations

import os
import struct

from diskwright.codecs.ivs import hasher


def split(key: bytes, stripes: int, hash: str) -> bytes:
    """``stripes`` times the key's length; all but the last stripe are random."""
    noise = os.urandom(len(key) * (stripes - 1))
    return noise + _xor(_diffused(noise, len(key), stripes - 1, hash), key)


def merge(material: bytes, length: int, stripes: int, hash: str) -> bytes:
    """The key of ``length`` bytes that was split into ``material``."""
    mixed = _diffused(material, length, stripes - 1, hash)
    return _xor(mixed, material[length * (stripes - 1) : length * stripes])


def _diffused(material: bytes, length: int, stripes: int, hash: str) -> bytes:
    make = hasher(hash)
    width = make().digest_size
    # The number of a hash's block is hashed before the block itself, and that beginning is always the same.
    starts = [(at, make(struct.pack(">I", at // width))) for at in range(0, length, width)]
    mixed = bytes(length)
    for stripe in range(stripes):
        data = _xor(mixed, material[stripe * length : (stripe + 1) * length])
        parts = []
        for at, start in starts:
            block = start.copy()
            block.update(data[at : at + width])
            parts.append(block.digest())
        mixed = b"".join(parts)[:length] if length % width == 0 else _cut(parts, width, length)
    return mixed


def _cut(parts: list[bytes], width: int, length: int) -> bytes:
    """The last block is shorter than the hash: of its hash so much is taken."""
    return b"".join(parts[:-1]) + parts[-1][: length - width * (len(parts) - 1)]


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
