"""LUKS2: key slots added and erased, and new headers (LUKS2 On-Disk Format Specification 1.1.0, sections 2 and 3).

The metadata is replaced as a whole, under the next sequence number, in one copy after the other with a flush between
them; the copy that was read goes last. So one copy with a right checksum is there at every moment, and nothing
that it speaks of is overwritten before it is: a new slot's key material goes where no slot has its own.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from diskwright.codecs.ivs import hasher
from diskwright.codecs.luks import antiforensic
from diskwright.codecs.luks.area import Area
from diskwright.codecs.luks.kdf import Budget, argon2, argon2_costs, iterations_for, pbkdf2
from diskwright.codecs.luks.luks1 import SALT, STRIPES, Luks1
from diskwright.codecs.luks.luks2 import BINARY_LENGTH, MAX_SLOTS, Copy, Luks2
from diskwright.codecs.sector_ciphers import sector_cipher
from diskwright.errors import CorruptImage, ImageError, UnsupportedFeature
from diskwright.units import MiB

_KDFS: Final = ("argon2id", "argon2i", "pbkdf2")
PAYLOAD: Final = 16 * MiB
"""Where the payload of a new image begins: as cryptsetup has it, with room for 32 slots of the longest key."""

_HEADER: Final = 16 * 1024
_SEQUENCES: Final = 1 << 64
_UNIT: Final = 4096
"""Key material begins at multiples of this."""
_WRAP: Final = ("aes-xts-plain64", 64)
"""What a new slot's key material is encrypted with: name and length of the key. Known to every reader."""
_SALT_OF_HEADER: Final = 64

Data = dict[str, Any]


class Luks2Slots:
    """The key slots of a LUKS2 header, for ``slots.change``."""

    slot_count: ClassVar[int] = MAX_SLOTS

    def __init__(self, header: Luks2) -> None:
        self._header, self._path = header, header.path

    def slots_taken(self) -> list[int]:
        """See ``Luks1.slots_taken``. Raises CorruptImage for slots with names that cannot be."""
        found = []
        for name in self._header.keyslots():
            if not name.isdecimal() or not name.isascii() or str(int(name[:4])) != name or int(name) >= MAX_SLOTS:
                raise CorruptImage(self._path, "LUKS2 keyslots", ascii(name)[:20], None, "is no number of a key slot")
            found.append(int(name))
        return sorted(found)

    def slots_that_open(self) -> list[int]:
        """Only those of the payload's key that are for everyday use."""
        return [index for index in self.slots_taken() if self._header.opens_with(str(index))]

    def try_slot(self, area: Area, index: int, passphrase: bytes, budget: Budget) -> bytes | None:
        """See ``Luks1.try_slot``."""
        return self._header.try_slot(area, index, passphrase, budget)

    def store_key(self, area: Area, index: int, key: bytes, passphrase: bytes, iter_time: int) -> None:
        """See ``Luks1.store_key``. A slot that is in use is overwritten where it is."""
        header, name = self._header, str(index)
        data: Data = copy.deepcopy(dict(header.data))
        places = self._places(area)
        length = _rounded(len(key) * STRIPES)
        start, size = places.pop(name, (0, 0))
        if size < length:
            start, size = self._free_place(area, [*places.values()], length), length
        slot, material = _wrapped(key, passphrase, self._kdf(), iter_time, start, size)
        if isinstance(before := data["keyslots"].get(name), dict) and "priority" in before:
            slot["priority"] = before["priority"]
        data["keyslots"][name] = slot
        digest = data["digests"][header.digest_name()]
        digest["keyslots"] = [*(other for other in digest["keyslots"] if other != name), name]
        _encode(header.copy, data)  # raises when there is no room, before anything is written
        area.write(start, material)
        area.flush()
        publish(header, area, data)

    def erase_slot(self, area: Area, index: int) -> None:
        """See ``Luks1.erase_slot``."""
        header, name = self._header, str(index)
        if name not in header.keyslots():
            return
        data: Data = copy.deepcopy(dict(header.data))
        del data["keyslots"][name]
        for kind in ("digests", "tokens"):
            for row in data.get(kind, {}).values():
                if isinstance(row, dict) and isinstance(row.get("keyslots"), list):
                    row["keyslots"] = [other for other in row["keyslots"] if other != name]
        _encode(header.copy, data)
        start, size = self._places(area)[name]
        for _ in range(2):  # twice, for media that write changed bytes elsewhere at first
            area.write(start, os.urandom(size))
            area.flush()
        publish(header, area, data)

    def _kdf(self) -> str:
        """How the next slot's key is derived: as those that are there."""
        kinds = [self._header.kdf(str(index)) for index in self.slots_that_open()]
        return kinds[0] if kinds and kinds[0] in _KDFS else _KDFS[0]

    def _bounds(self, area: Area) -> tuple[int, int]:
        """Where key material may lie: behind both copies of the header, before the payload."""
        begin, header = 2 * self._header.copy.length, self._header
        end = begin + header.keyslots_size()
        if header.payload_start:
            end = min(end, header.payload_start)
        return begin, min(end, area.size)

    def _places(self, area: Area) -> dict[str, tuple[int, int]]:
        """Where each slot has its key material: ``(offset, length)``. Raises CorruptImage for those that have it where
        it cannot be, or where another one's is: nothing is written to such an image."""
        begin, end = self._bounds(area)
        places = {str(index): self._header.place_of(str(index)) for index in self.slots_taken()}
        last = begin
        for name, (start, size) in sorted(places.items(), key=lambda row: row[1]):
            if start < last or start + size > end:
                raise CorruptImage(
                    self._path, f"LUKS2 keyslot {name} area", f"{size} bytes at {start}", None,
                    f"must lie in {begin} to {end}, and not where another one's is",
                )  # fmt: skip
            last = start + size
        return places

    def _free_place(self, area: Area, places: list[tuple[int, int]], length: int) -> int:
        begin, end = self._bounds(area)
        at = _rounded(begin)
        for start, size in sorted(places):
            if start - at >= length:
                break
            at = max(at, _rounded(start + size))
        if at + length > end:
            raise ImageError("Can't add a keyslot - there is no room for its key material")
        return at


def publish(header: Luks2, area: Area, data: Mapping[str, Any]) -> None:
    """Makes ``data`` the metadata of the image, durably, in both copies; see the module's text."""
    read = header.copy
    text = _encode(read, data)
    if 2 * read.length > area.size:
        raise CorruptImage(area.path, "hdr_size", read.length, None, f"two copies do not fit into {area.size} bytes")
    if read.sequence + 1 >= _SEQUENCES:
        raise CorruptImage(area.path, "LUKS2 seqid", read.sequence, None, "cannot be counted on")
    for place in (read.length if read.place == 0 else 0, read.place):
        new = dataclasses.replace(read, place=place, sequence=read.sequence + 1, text=text)
        area.write(place, new.encode(os.urandom(_SALT_OF_HEADER)))
        area.flush()
    header.copy, header.data, header.lost = new, data, []


def make(
    encryption: str,
    key_bytes: int,
    hash: str,
    area: Area,
    passphrase: bytes,
    *,
    pbkdf: str,
    iter_time: int,
    sector_size: int,
    detached: bool = False,
) -> bytes:
    """Writes the header of a new image with a new volume key, which it returns, in slot 0. A ``detached`` header is for
    a payload that begins where its own file begins. ``iter_time`` in ms."""
    key = os.urandom(key_bytes)
    salt = os.urandom(SALT)
    width = hasher(hash)().digest_size
    iterations = max(1000, iterations_for(hash, width, iter_time, MAX_SLOTS) // 8)
    slot, material = _wrapped(key, passphrase, pbkdf, iter_time, 2 * _HEADER, _rounded(key_bytes * STRIPES), hash=hash)
    segment = {
        "type": "crypt",
        "offset": "0" if detached else str(PAYLOAD),
        "size": "dynamic",
        "iv_tweak": "0",
        "encryption": encryption,
        "sector_size": sector_size,
    }
    digest = {
        "type": "pbkdf2",
        "keyslots": ["0"],
        "segments": ["0"],
        "hash": hash,
        "iterations": iterations,
        "salt": _text(salt),
        "digest": _text(pbkdf2(hash, key, salt, iterations, width)),
    }
    data: Data = {
        "keyslots": {"0": slot},
        "tokens": {},
        "segments": {"0": segment},
        "digests": {"0": digest},
        "config": {"json_size": str(_HEADER - BINARY_LENGTH), "keyslots_size": str(PAYLOAD - 2 * _HEADER)},
    }
    name = str(uuid.uuid4()).encode()
    first = Copy(0, _HEADER, 0, b"", b"sha256", name, b"", json.dumps(data).encode())
    area.write(2 * _HEADER, material)
    area.flush()
    publish(Luks2(area.path, first), area, data)
    return key


def encryption_of(header: Luks1, sector_size: int) -> str:
    """The cipher of a planned LUKS1 header, as LUKS2 writes it. Raises UnsupportedFeature for what it cannot have."""
    if sector_size > 512 and header.mode[1] == "plain" and header.mode[0] != "ecb":
        raise UnsupportedFeature("The IV generator 'plain' is for sectors of 512 bytes; 'plain64' is for larger ones")
    return f"{header.cipher_name}-{header.cipher_mode}"


def _wrapped(
    key: bytes, passphrase: bytes, kind: str, iter_time: int, start: int, size: int, *, hash: str = "sha256"
) -> tuple[Data, bytes]:
    """A slot's metadata, and its key material, which is to lie at ``start`` in ``size`` bytes."""
    cipher, width = _WRAP
    salt = os.urandom(SALT)
    if kind == "pbkdf2":
        iterations = iterations_for(hash, width, iter_time, MAX_SLOTS)
        kdf: Data = {"type": kind, "hash": hash, "iterations": iterations}
        derived = pbkdf2(hash, passphrase, salt, iterations, width)
    else:
        passes, memory, lanes = argon2_costs(kind, width, iter_time)
        kdf = {"type": kind, "time": passes, "memory": memory, "cpus": lanes}
        derived = argon2(kind, passphrase, salt, passes, memory, lanes, width)
    kdf["salt"] = _text(salt)
    plain = antiforensic.split(key, STRIPES, hash)
    plain = plain.ljust(-(-len(plain) // 512) * 512, b"\0")
    material = bytearray(len(plain))
    name, mode, ivgen = cipher.split("-")
    sector_cipher(name, mode, ivgen, "", derived).encrypt(memoryview(plain), memoryview(material), 0)
    slot = {
        "type": "luks2",
        "key_size": len(key),
        "af": {"type": "luks1", "stripes": STRIPES, "hash": hash},
        "area": {"type": "raw", "offset": str(start), "size": str(size), "encryption": cipher, "key_size": width},
        "kdf": kdf,
    }
    return slot, bytes(material)


def _encode(read: Copy, data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":")).encode()
    if len(text) >= read.length - BINARY_LENGTH:
        raise ImageError("Can't add a keyslot - the LUKS2 metadata area is full")
    return text


def _rounded(length: int) -> int:
    return -(-length // _UNIT) * _UNIT


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
