"""LUKS2: two copies of a binary header with JSON metadata, and the key slots these describe.

Opened: one ``crypt`` segment, with PBKDF2 and Argon2 key slots. Refused by name: authenticated encryption
(integrity), a reencryption under way, and whatever else the metadata calls a requirement.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from diskwright.codecs.ivs import hasher
from diskwright.codecs.luks import antiforensic
from diskwright.codecs.luks.area import Area
from diskwright.codecs.luks.kdf import Budget, argon2, pbkdf2
from diskwright.codecs.luks.luks1 import MAGIC, MAX_KEY, MAX_STRIPES
from diskwright.codecs.sector_ciphers import SectorCipher, sector_cipher
from diskwright.errors import CorruptImage, ImageError, LimitExceeded, UnsupportedFeature

MAGIC_SECOND: Final = b"SKUL\xba\xbe"

_BINARY: Final = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
BINARY_LENGTH: Final = 4096
_CSUM_AT: Final = 448
_CSUM_LENGTH: Final = 64

SIZES: Final = tuple(1 << bits for bits in range(14, 23))
"""What a header and its JSON area may take together: 16 KiB to 4 MiB (specification, section 2.2)."""

MAX_SLOTS: Final = 32
MAX_SALT: Final = 1024


@dataclass(frozen=True)
class Copy:
    """One of the two copies of the header: where it is, and the fields of its binary part that stay as they are.
    ``length`` is that of the copy in bytes, its JSON area included."""

    place: int
    length: int
    sequence: int
    label: bytes
    algorithm: bytes
    uuid: bytes
    subsystem: bytes
    text: bytes

    def encode(self, salt: bytes) -> bytes:
        """The whole copy with its checksum. ``salt``: 64 random bytes, so that no two copies are ever equal."""
        magic = MAGIC_SECOND if self.place else MAGIC
        head = _BINARY.pack(magic, 2, self.length, self.sequence, self.label, self.algorithm, salt, self.uuid,
                            self.subsystem, self.place, b"", b"")  # fmt: skip
        whole = bytearray((head.ljust(BINARY_LENGTH, b"\0") + self.text).ljust(self.length, b"\0"))
        digest = hasher(_name(self.algorithm))(bytes(whole)).digest()
        whole[_CSUM_AT : _CSUM_AT + len(digest)] = digest
        return bytes(whole)


class Luks2:
    """The metadata of one LUKS2 image, and the one segment it describes. Changed by ``luks2_write``."""

    version: ClassVar[Literal[2]] = 2

    def __init__(self, path: str, copy: Copy) -> None:
        self.copy, self.data = copy, _parse(path, copy.text)
        self.uuid, self.label = _plain(copy.uuid), _plain(copy.label)
        self.lost: list[str] = []
        """What is wrong with the other copy of the header, when something is."""
        self.path = path
        self._refuse_requirements()
        segment = self._segment()
        self.payload_start = self._number(segment, "segments offset")
        size = segment.get("size")
        self.payload_size = None if size == "dynamic" else self._number(segment, "segments size")
        self.encryption = self._text(segment, "segments encryption")
        self.sector_size = self._int(segment, "segments sector_size", 512, 4096)
        if self.sector_size not in (512, 1024, 2048, 4096):
            raise self._wrong("segments sector_size", self.sector_size, "must be 512, 1024, 2048 or 4096")
        if self.payload_start % 512 or (self.payload_size or 0) % self.sector_size:
            raise self._wrong("segments offset", self.payload_start, "is not in whole sectors")
        self._iv_tweak = self._number(segment, "segments iv_tweak")
        if self._iv_tweak >= 1 << 55:
            raise self._wrong("segments iv_tweak", self._iv_tweak, "is beyond the largest disk")

    # -- reading ---------------------------------------------------------------------------------

    @staticmethod
    def has_second(area: Area) -> bool:
        """Whether something like a second copy of the header is at one of the places it may have."""
        return any(
            area.read(place, len(MAGIC_SECOND), "the second LUKS2 header") == MAGIC_SECOND
            for place in SIZES
            if place + BINARY_LENGTH <= area.size
        )

    @classmethod
    def read(cls, area: Area) -> Luks2:
        """The newer of the two headers that is whole. Raises CorruptImage when neither is."""
        found: list[Copy] = []
        errors: list[ImageError] = []
        for place in (0, *SIZES):
            if place and (place + BINARY_LENGTH > area.size or (found and place != found[0].length)):
                continue  # the first header tells where the second one is; without it all places are looked at
            try:
                copy = _read_one(area, place)
            except ImageError as error:
                errors.append(error)
                continue
            if copy is not None:
                found.append(copy)
        if not found:
            raise errors[0] if errors else CorruptImage(area.path, "LUKS2 header", "missing", area.offset)
        header = cls(area.path, max(found, key=lambda copy: copy.sequence))
        if len(found) < 2:
            other = "first" if header.copy.place else "second"
            header.lost = [f"The {other} copy of the LUKS2 header is damaged"]
        elif found[0].sequence != found[1].sequence or found[0].text != found[1].text:
            older = "first" if header.copy.place else "second"
            header.lost = [f"The {older} copy of the LUKS2 header is not that of the other"]
        return header

    # -- keys ------------------------------------------------------------------------------------

    def unlock(self, area: Area, passphrase: bytes) -> bytes:
        """The volume key. Raises ImageError when no slot opens with ``passphrase``."""
        budget = Budget(area.path)
        slots = self._mapping("keyslots")
        if len(slots) > MAX_SLOTS:
            raise LimitExceeded(f"{area.path}: it has {len(slots)} key slots; at most {MAX_SLOTS} are accepted")
        # Slots of priority 0 are not for everyday use; those of 2 come first (section 3.3).
        order = sorted(slots, key=lambda name: -self._priority(slots[name]))
        for name in order:
            slot = slots[name]
            if isinstance(slot, Mapping) and slot.get("type") == "luks2" and self._priority(slot) > 0:
                key = self._try_slot(area, name, slot, passphrase, budget)
                if key is not None:
                    return key
        raise ImageError("Invalid password, cannot unlock any keyslot")

    def try_slot(self, area: Area, index: int, passphrase: bytes, budget: Budget) -> bytes | None:
        """The volume key in slot ``index``, or None when the passphrase is another's."""
        slot = self.keyslots().get(str(index))
        if not isinstance(slot, Mapping) or slot.get("type") != "luks2":
            return None
        return self._try_slot(area, str(index), slot, passphrase, budget)

    def keyslots(self) -> Mapping[str, Any]:
        """The key slots, by their numbers as text. Raises CorruptImage."""
        return self._mapping("keyslots")

    def opens_with(self, name: str) -> bool:
        """Whether slot ``name`` is one of the payload's key, and for everyday use."""
        slot = self.keyslots().get(name)
        if not isinstance(slot, Mapping) or slot.get("type") != "luks2" or self._priority(slot) <= 0:
            return False
        return name in self._mapping("digests")[self.digest_name()]["keyslots"]

    def kdf(self, name: str) -> str:
        """How the key of slot ``name`` is derived."""
        return self._text(self._sub(self.keyslots()[name], f"keyslot {name} kdf"), f"keyslot {name} kdf type")

    def place_of(self, name: str) -> tuple[int, int]:
        """Where slot ``name`` has its key material, and how much room for it. Raises CorruptImage."""
        what = f"keyslot {name}"
        place = self._sub(self._sub(self.keyslots(), what), f"{what} area")
        return self._number(place, f"{what} area offset"), self._number(place, f"{what} area size")

    def keyslots_size(self) -> int:
        """Bytes behind both copies of the header that are for key material."""
        return self._number(self._mapping("config"), "config keyslots_size")

    def digest_name(self) -> str:
        """The name of the digest that the payload's key is known by. Raises CorruptImage."""
        for name, digest in self._mapping("digests").items():
            if not isinstance(digest, Mapping):
                continue
            segments, slots = digest.get("segments"), digest.get("keyslots")
            if isinstance(segments, list) and isinstance(slots, list) and self._segment_name in segments:
                return str(name)
        raise self._wrong("digests", len(self._mapping("digests")), "have none of the segment's key")

    @staticmethod
    def _priority(slot: object) -> int:
        found = slot.get("priority", 1) if isinstance(slot, Mapping) else 0
        return found if isinstance(found, int) else 1

    def _try_slot(
        self, area: Area, name: str, slot: Mapping[str, Any], passphrase: bytes, budget: Budget
    ) -> bytes | None:
        what = f"keyslot {ascii(name)[1:-1][:20]}"
        length = self._int(slot, f"{what} key_size", 1, MAX_KEY)
        af, place = self._sub(slot, f"{what} af"), self._sub(slot, f"{what} area")
        stripes, hash = self._int(af, f"{what} af stripes", 1, MAX_STRIPES), self._text(af, f"{what} af hash")
        hasher(hash)
        start, size = self._number(place, f"{what} area offset"), self._number(place, f"{what} area size")
        used = -(-length * stripes // 512) * 512
        if used > size:
            raise self._wrong(f"{what} area size", size, f"is less than the {used} bytes of its key material")
        wrap_length = self._int(place, f"{what} area key_size", 1, MAX_KEY)
        encryption = self._text(place, f"{what} area encryption")
        material = bytearray(area.read(start, used, f"{what}'s key material"))
        derived = self._derive(self._sub(slot, f"{what} kdf"), what, passphrase, wrap_length, budget)
        _cipher(encryption, derived, 512).decrypt(memoryview(material), 0)
        key = antiforensic.merge(bytes(material), length, stripes, hash)
        return key if self._proves(name, key, budget) else None

    def _derive(self, kdf: Mapping[str, Any], what: str, passphrase: bytes, length: int, budget: Budget) -> bytes:
        kind, salt = self._text(kdf, f"{what} kdf type"), self._bytes(kdf, f"{what} kdf salt", MAX_SALT)
        if kind == "pbkdf2":
            hash = self._text(kdf, f"{what} kdf hash")
            hasher(hash)
            iterations = self._int(kdf, f"{what} kdf iterations", 1, 1 << 32)
            budget.pbkdf2(what, hash, iterations, length)
            return pbkdf2(hash, passphrase, salt, iterations, length)
        if kind not in ("argon2i", "argon2id"):
            raise UnsupportedFeature(f"{self.path}: {what} uses the key derivation '{kind}', which is not known")
        passes = self._int(kdf, f"{what} kdf time", 1, 1 << 32)
        memory = self._int(kdf, f"{what} kdf memory", 1, 1 << 32)
        lanes = self._int(kdf, f"{what} kdf cpus", 1, 1 << 32)
        if len(salt) < 8:
            raise self._wrong(f"{what} kdf salt", len(salt), "bytes are fewer than the 8 that Argon2 needs")
        budget.argon2(what, passes, memory, lanes)
        return argon2(kind, passphrase, salt, passes, memory, lanes, length)

    def _proves(self, slot: str, key: bytes, budget: Budget) -> bool:
        """Whether the segment's digest is that of ``key``."""
        for name, digest in self._mapping("digests").items():
            if not isinstance(digest, Mapping) or self._segment_name not in _list(digest, "segments"):
                continue
            what = f"digest {ascii(name)[1:-1][:20]}"
            if digest.get("type") != "pbkdf2":
                raise UnsupportedFeature(f"{self.path}: {what} is of a type that is not known: {digest.get('type')!r}")
            if slot not in _list(digest, "keyslots"):
                continue
            hash, salt = self._text(digest, f"{what} hash"), self._bytes(digest, f"{what} salt", MAX_SALT)
            wanted = self._bytes(digest, f"{what} digest", 512)
            hasher(hash)
            iterations = self._int(digest, f"{what} iterations", 1, 1 << 32)
            if not wanted:
                raise self._wrong(f"{what} digest", 0, "bytes prove nothing")
            budget.pbkdf2(what, hash, iterations, len(wanted))
            return hmac.compare_digest(pbkdf2(hash, key, salt, iterations, len(wanted)), wanted)
        return False

    def cipher(self, key: bytes) -> SectorCipher:
        """The cipher of the payload, by position in it."""
        return _cipher(self.encryption, key, self.sector_size, self._iv_tweak)

    # -- looking at the metadata -----------------------------------------------------------------

    def _refuse_requirements(self) -> None:
        requirements = self._mapping("config").get("requirements", {})
        mandatory = requirements.get("mandatory", ()) if isinstance(requirements, Mapping) else ("?",)
        if mandatory:
            named = ", ".join(str(name)[:40] for name in list(mandatory)[:8])
            raise UnsupportedFeature(f"{self.path}: LUKS2 requirements that are not supported here: {named!a}")

    def _segment(self) -> Mapping[str, Any]:
        segments = self._mapping("segments")
        if len(segments) != 1:
            raise UnsupportedFeature(f"{self.path}: has {len(segments)} LUKS2 segments; only one is supported")
        self._segment_name, segment = next(iter(segments.items()))
        if not isinstance(segment, Mapping) or segment.get("type") != "crypt":
            raise UnsupportedFeature(f"{self.path}: its LUKS2 segment is not of type 'crypt'")
        if "integrity" in segment:
            raise UnsupportedFeature(f"{self.path}: LUKS2 with data integrity is not supported")
        return segment

    def _mapping(self, name: str) -> Mapping[str, Any]:
        found = self.data.get(name)
        if not isinstance(found, Mapping):
            raise self._wrong(name, type(found).__name__, "must be an object")
        return found

    # The field's name ends with the key under which it is found.

    def _sub(self, of: Mapping[str, Any], field: str) -> Mapping[str, Any]:
        found = of.get(field.rpartition(" ")[2])
        if not isinstance(found, Mapping):
            raise self._wrong(field, type(found).__name__, "must be an object")
        return found

    def _text(self, of: Mapping[str, Any], field: str) -> str:
        found = of.get(field.rpartition(" ")[2])
        if not isinstance(found, str) or not found.isascii() or not found.isprintable() or len(found) > 128:
            raise self._wrong(field, ascii(found)[:40], "is no name")
        return found

    def _int(self, of: Mapping[str, Any], field: str, least: int, most: int) -> int:
        found = of.get(field.rpartition(" ")[2])
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise self._wrong(field, ascii(found)[:40], f"must be a number from {least} to {most}")
        return found

    def _number(self, of: Mapping[str, Any], field: str) -> int:
        """A 64-bit number: in LUKS2's JSON these are written as text."""
        found = of.get(field.rpartition(" ")[2])
        if not isinstance(found, str) or not found.isdecimal() or not found.isascii() or len(found) > 19:
            raise self._wrong(field, ascii(found)[:40], "must be a decimal number as text")
        return int(found)

    def _bytes(self, of: Mapping[str, Any], field: str, most: int) -> bytes:
        found = of.get(field.rpartition(" ")[2])
        try:
            decoded = base64.b64decode(found, validate=True) if isinstance(found, str) else None
        except (ValueError, binascii.Error):
            decoded = None
        if decoded is None or len(decoded) > most:
            raise self._wrong(field, type(found).__name__, f"must be base64 of at most {most} bytes")
        return decoded

    def _wrong(self, field: str, value: object, why: str) -> CorruptImage:
        return CorruptImage(self.path, f"LUKS2 {field}", value, None, why)


def _read_one(area: Area, place: int) -> Copy | None:
    """The header at ``place``; None when there is none at all."""
    if place + BINARY_LENGTH > area.size:
        raise CorruptImage(area.path, "size", area.size, None, "is less than a LUKS2 header takes")
    raw = area.read(place, BINARY_LENGTH, "the LUKS2 header")
    magic, version, size, sequence, label, algorithm, _, uuid, subsystem, offset, _, checksum = _BINARY.unpack_from(raw)
    at = area.offset + place
    if magic != (MAGIC_SECOND if place else MAGIC):
        if place:
            return None
        raise CorruptImage(area.path, "LUKS magic", magic.hex(), at, "not a LUKS header")
    if version != 2:
        raise UnsupportedFeature(f"{area.path}: LUKS version {version} is not known; versions 1 and 2 are")
    if size not in SIZES:
        raise CorruptImage(area.path, "hdr_size", size, at + 8, f"no power of two from {SIZES[0]} to {SIZES[-1]}")
    if offset != place or (place and size != place):
        raise CorruptImage(area.path, "hdr_offset", offset, at + 256, "is not where the header is")
    digest = hasher(_name(algorithm))(b"")
    text = area.read(place + BINARY_LENGTH, size - BINARY_LENGTH, "the LUKS2 metadata")
    digest.update(raw[:_CSUM_AT] + bytes(_CSUM_LENGTH) + raw[_CSUM_AT + _CSUM_LENGTH :])
    digest.update(text)
    if not hmac.compare_digest(digest.digest(), checksum[: digest.digest_size]):
        raise CorruptImage(area.path, "csum", checksum[:8].hex() + "...", at + _CSUM_AT, "the LUKS2 header is damaged")
    return Copy(place, size, sequence, label, algorithm, uuid, subsystem, text.split(b"\0", 1)[0])


def _list(of: Mapping[str, Any], field: str) -> list[Any]:
    found = of.get(field)
    return found if isinstance(found, list) else []


def _name(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("latin-1")


def _plain(raw: bytes) -> str:
    return "".join(c for c in raw.split(b"\0", 1)[0].decode("utf-8", "replace") if c.isprintable())


def _parse(path: str, text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise CorruptImage(path, "LUKS2 metadata", f"{len(text)} bytes", BINARY_LENGTH, "is not JSON") from None
    if not isinstance(found, Mapping):
        raise CorruptImage(path, "LUKS2 metadata", type(found).__name__, BINARY_LENGTH, "must be an object")
    return found


def _cipher(encryption: str, key: bytes, sector: int, tweak: int = 0) -> SectorCipher:
    """The cipher that the metadata writes as ``aes-xts-plain64``; ``tweak`` is added to sectors' numbers."""
    name, _, rest = encryption.partition("-")
    mode, _, ivgen = rest.partition("-")
    ivname, _, hash = ivgen.partition(":")
    return sector_cipher(name, mode, ivname or "plain", hash, key, sector=sector, first=tweak)
