"""LUKS1: the header ("phdr"), its eight key slots, and what is done with them."""

from __future__ import annotations

import hmac
import os
import struct
import uuid
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Final, Literal

from diskwright.codecs.block_ciphers import algorithm
from diskwright.codecs.ivs import hasher
from diskwright.codecs.luks import antiforensic
from diskwright.codecs.luks.area import Area
from diskwright.codecs.luks.kdf import Budget, iterations_for, pbkdf2
from diskwright.codecs.sector_ciphers import SectorCipher, sector_cipher
from diskwright.errors import CorruptImage, ImageError, LimitExceeded, UnsupportedFeature

MAGIC: Final = b"LUKS\xba\xbe"
SECTOR: Final = 512
SLOTS: Final = 8
STRIPES: Final = 4000
ACTIVE: Final = 0x00AC71F3
INACTIVE: Final = 0x0000DEAD
DIGEST: Final = 20
SALT: Final = 32

_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
LENGTH: Final = _HEADER.size + SLOTS * _SLOT.size  # 592
SLOTS_AT: Final = _HEADER.size

FIRST_SLOT: Final = 4096
"""Where the first slot's key material lies in headers made here; the others are aligned to as much."""

MAX_KEY: Final = 64
"""Longest volume key in bytes: two AES-256 keys, for XTS. No cipher known here has a longer one."""

MAX_STRIPES: Final = 65536
"""Most stripes of a key slot accepted: 4 MiB of key material for the longest key. Every known program writes 4000."""


@dataclass
class Slot:
    """One key slot; fields named as in the specification. ``key_material_offset`` is in sectors."""

    active: int = INACTIVE
    password_iterations: int = 0
    password_salt: bytes = bytes(SALT)
    key_material_offset: int = 0
    stripes: int = STRIPES

    @property
    def in_use(self) -> bool:
        return self.active == ACTIVE

    def encode(self) -> bytes:
        return _SLOT.pack(
            self.active, self.password_iterations, self.password_salt, self.key_material_offset, self.stripes
        )


@dataclass
class Luks1:
    """A LUKS1 header. ``payload_offset`` is in sectors, from where the encrypted device begins."""

    cipher_name: str
    cipher_mode: str
    hash_spec: str
    payload_offset: int
    key_bytes: int
    mk_digest: bytes = bytes(DIGEST)
    mk_digest_salt: bytes = bytes(SALT)
    mk_digest_iterations: int = 0
    uuid: str = ""
    slots: list[Slot] = field(default_factory=list)

    version: ClassVar[Literal[1]] = 1
    slot_count: ClassVar[int] = SLOTS

    # -- facts -----------------------------------------------------------------------------------

    @property
    def mode(self) -> tuple[str, str, str]:
        """``(mode, IV generator, its hash)`` of a mode as written on disk, like ``cbc-essiv:sha256``."""
        mode, _, ivgen = self.cipher_mode.partition("-")
        name, _, hash = ivgen.partition(":")
        return mode, name or "plain", hash

    @property
    def payload_start(self) -> int:
        return self.payload_offset * SECTOR

    def material_length(self, slot: Slot) -> int:
        """Bytes of a slot's key material, in whole sectors."""
        return -(-self.key_bytes * slot.stripes // SECTOR) * SECTOR

    def cipher(self, key: bytes) -> SectorCipher:
        """The cipher that ``key`` stands for; of the payload, or of a slot's key material."""
        mode, ivgen, hash = self.mode
        return sector_cipher(self.cipher_name, mode, ivgen, hash, key)

    def slots_taken(self) -> list[int]:
        """The slots that are not free."""
        return [index for index, slot in enumerate(self.slots) if slot.in_use]

    def slots_that_open(self) -> list[int]:
        """The slots by which the image can be opened."""
        return self.slots_taken()

    # -- on disk ---------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The 592 bytes of the header."""
        head = _HEADER.pack(
            MAGIC, 1, self.cipher_name.encode(), self.cipher_mode.encode(), self.hash_spec.encode(),
            self.payload_offset, self.key_bytes, self.mk_digest, self.mk_digest_salt, self.mk_digest_iterations,
            self.uuid.encode(),
        )  # fmt: skip
        return head + b"".join(slot.encode() for slot in self.slots)

    @classmethod
    def read(cls, area: Area) -> Luks1:
        """The checked header at the beginning of ``area``. Raises CorruptImage, LimitExceeded, UnsupportedFeature."""
        raw = area.read(0, LENGTH, "the LUKS header")
        magic, version, cipher, mode, hash, payload, key_bytes, digest, salt, iterations, name = _HEADER.unpack_from(
            raw
        )
        if magic != MAGIC:
            raise CorruptImage(area.path, "LUKS magic", magic.hex(), area.offset, "not a LUKS header")
        if version != 1:
            raise UnsupportedFeature(f"{area.path}: LUKS version {version} is not known; versions 1 and 2 are")
        header = cls(
            _text(area, cipher, "cipher-name", 8),
            _text(area, mode, "cipher-mode", 40),
            _text(area, hash, "hash-spec", 72),
            payload,
            key_bytes,
            digest,
            salt,
            iterations,
            _text(area, name, "uuid", 168),
            [Slot(*_SLOT.unpack_from(raw, SLOTS_AT + index * _SLOT.size)) for index in range(SLOTS)],
        )
        header._check(area)
        return header

    def _check(self, area: Area) -> None:
        if not 1 <= self.key_bytes <= MAX_KEY:
            raise LimitExceeded(
                f"{area.path}: key-bytes is {self.key_bytes} at offset {area.offset + 108:#x}; 1 to {MAX_KEY} are "
                "accepted"
            )
        places: list[tuple[int, int, int]] = []
        for index, slot in enumerate(self.slots):
            at = area.offset + SLOTS_AT + index * _SLOT.size
            if slot.active not in (ACTIVE, INACTIVE):
                raise CorruptImage(
                    area.path, f"state of key slot {index}", f"{slot.active:#x}", at, "neither active nor inactive"
                )
            if not 1 <= slot.stripes <= MAX_STRIPES:
                raise CorruptImage(
                    area.path, f"stripes of key slot {index}", slot.stripes, at + 44, f"must be 1 to {MAX_STRIPES}"
                )
            start = slot.key_material_offset * SECTOR
            end = start + self.material_length(slot)
            if start < LENGTH:
                raise CorruptImage(
                    area.path, f"key-material-offset of key slot {index}", slot.key_material_offset, at + 40,
                    "lies within the header",
                )  # fmt: skip
            if self.payload_offset and end > self.payload_start:
                raise CorruptImage(
                    area.path, f"key-material-offset of key slot {index}", slot.key_material_offset, at + 40,
                    f"its material ends beyond the payload's beginning at {self.payload_start}",
                )  # fmt: skip
            places.append((start, end, index))
        places.sort()
        for before, after in pairwise(places):
            if before[1] > after[0]:
                raise CorruptImage(
                    area.path, f"key-material-offset of key slot {after[2]}", after[0] // SECTOR,
                    area.offset + SLOTS_AT + after[2] * _SLOT.size + 40, f"overlaps with key slot {before[2]}",
                )  # fmt: skip

    # -- keys ------------------------------------------------------------------------------------

    def unlock(self, area: Area, passphrase: bytes) -> bytes:
        """The volume key. Raises ImageError when no slot opens with ``passphrase``."""
        budget = Budget(area.path)
        for index, slot in enumerate(self.slots):
            if slot.in_use:
                key = self.try_slot(area, index, passphrase, budget)
                if key is not None:
                    return key
        raise ImageError("Invalid password, cannot unlock any keyslot")

    def try_slot(self, area: Area, index: int, passphrase: bytes, budget: Budget) -> bytes | None:
        """The volume key in slot ``index``, or None when the passphrase is another's."""
        slot = self.slots[index]
        hasher(self.hash_spec)
        budget.pbkdf2(f"key slot {index}", self.hash_spec, slot.password_iterations, self.key_bytes)
        material = bytearray(
            area.read(slot.key_material_offset * SECTOR, self.material_length(slot), f"key slot {index}'s key material")
        )
        derived = pbkdf2(self.hash_spec, passphrase, slot.password_salt, slot.password_iterations, self.key_bytes)
        self.cipher(derived).decrypt(memoryview(material), 0)
        key = antiforensic.merge(bytes(material), self.key_bytes, slot.stripes, self.hash_spec)
        budget.pbkdf2("the volume key's digest", self.hash_spec, self.mk_digest_iterations, DIGEST)
        return key if hmac.compare_digest(self._digest(key), self.mk_digest) else None

    def _digest(self, key: bytes) -> bytes:
        return pbkdf2(self.hash_spec, key, self.mk_digest_salt, self.mk_digest_iterations, DIGEST)

    def store_key(self, area: Area, index: int, key: bytes, passphrase: bytes, iter_time: int) -> None:
        """Puts the volume key into slot ``index`` under ``passphrase``; ``iter_time`` in ms. Durable at the end.

        The key material is on the medium before the slot says that it is in use.
        """
        slot = self.slots[index]
        salt = os.urandom(SALT)
        iterations = iterations_for(self.hash_spec, self.key_bytes, iter_time)
        derived = pbkdf2(self.hash_spec, passphrase, salt, iterations, self.key_bytes)
        plain = antiforensic.split(key, STRIPES, self.hash_spec)
        plain = plain.ljust(-(-len(plain) // SECTOR) * SECTOR, b"\0")
        material = bytearray(len(plain))
        self.cipher(derived).encrypt(memoryview(plain), memoryview(material), 0)
        area.write(slot.key_material_offset * SECTOR, bytes(material))
        area.flush()
        self._publish(area, index, Slot(ACTIVE, iterations, salt, slot.key_material_offset, STRIPES))

    def erase_slot(self, area: Area, index: int) -> None:
        """Destroys what slot ``index`` holds, then says that it is free. Durable at the end."""
        slot = self.slots[index]
        length = self.material_length(slot)
        for _ in range(2):  # twice, for media that write changed bytes elsewhere at first
            area.write(slot.key_material_offset * SECTOR, os.urandom(length))
            area.flush()
        self._publish(area, index, Slot(INACTIVE, 0, bytes(SALT), slot.key_material_offset, slot.stripes))

    def _publish(self, area: Area, index: int, slot: Slot) -> None:
        # Only this slot's bytes are written: whatever becomes of the write, the others stay as they are.
        area.write(SLOTS_AT + index * _SLOT.size, slot.encode())
        area.flush()
        self.slots[index] = slot

    # -- making ----------------------------------------------------------------------------------

    @classmethod
    def plan(cls, cipher_alg: str, cipher_mode: str, ivgen: str, ivgen_hash: str | None, hash: str) -> Luks1:
        """A new header with empty slots. ``cipher_alg`` has the key's length in bits at its end, as QEMU writes
        it (``aes-256``). Raises UnsupportedFeature for what cannot be."""
        name, _, bits = cipher_alg.rpartition("-")
        algorithm(name)
        key_bytes = int(bits) // 8 * (2 if cipher_mode == "xts" else 1)
        hash_of_ivs = (ivgen_hash or "sha256") if ivgen == "essiv" else ""
        mode = f"{cipher_mode}-{ivgen}" + (f":{hash_of_ivs}" if hash_of_ivs else "")
        header = cls(name, mode, hash, 0, key_bytes, uuid=str(uuid.uuid4()))
        hasher(hash)
        header.cipher(os.urandom(key_bytes))  # raises what does not fit together
        step = -(-key_bytes * STRIPES // FIRST_SLOT) * FIRST_SLOT // SECTOR
        first = FIRST_SLOT // SECTOR
        header.slots = [Slot(key_material_offset=first + index * step) for index in range(SLOTS)]
        header.payload_offset = first + SLOTS * step
        return header

    def make(self, area: Area, passphrase: bytes, iter_time: int, *, detached: bool = False) -> bytes:
        """Writes a planned header with a new volume key, which it returns, in slot 0. A ``detached`` header is for a
        payload that begins where its own file begins."""
        key = os.urandom(self.key_bytes)
        self.mk_digest_salt = os.urandom(SALT)
        self.mk_digest_iterations = max(1000, iterations_for(self.hash_spec, DIGEST, iter_time) // 8)
        self.mk_digest = self._digest(key)
        if detached:
            self.payload_offset = 0
        area.write(0, self.encode())
        self.store_key(area, 0, key, passphrase, iter_time)
        return key


def _text(area: Area, raw: bytes, name: str, at: int) -> str:
    """A field of text, padded with zero bytes. Only what such names consist of is accepted."""
    text = raw.split(b"\0", 1)[0]
    if not text.isascii() or not text.decode("ascii", "replace").isprintable():
        raise CorruptImage(area.path, name, ascii(text.decode("latin-1")), area.offset + at, "is no name")
    return text.decode("ascii")
