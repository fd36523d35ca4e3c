"""LUKS headers and key slots: what is written is read, hostile fields are refused, no crash locks anybody out."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from diskwright.codecs.luks import Area, Luks1, Luks2, antiforensic, kdf, read_header
from diskwright.codecs.luks.facts import facts
from diskwright.codecs.luks.slots import SlotChange, change
from diskwright.errors import CorruptImage, DiskwrightError, ImageError, LimitExceeded, UnsupportedFeature


class Bytes:
    """A medium in memory; ``writes`` has every write with its place, and None for a flush."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.writes: list[tuple[int, bytes] | None] = []

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def pwrite(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, bytes(data)))
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.writes.append(None)


def area_of(data: bytes) -> tuple[Area, Bytes]:
    medium = Bytes(data)
    return Area(medium, "image", len(data)), medium


def volume(passphrase: bytes = b"first", alg: str = "aes-128", mode: str = "cbc", ivgen: str = "plain64") -> bytes:
    header = Luks1.plan(alg, mode, ivgen, None, "sha256")
    area, medium = area_of(bytes(header.payload_start))
    header.make(area, passphrase, 1)
    return bytes(medium.data)


@pytest.fixture(scope="module")
def image() -> bytes:
    return volume()


def opens(data: bytes, passphrase: bytes) -> bytes | None:
    area, _ = area_of(data)
    try:
        return read_header(area).unlock(area, passphrase)
    except ImageError as error:
        if "Invalid password" not in str(error):
            raise
        return None


@pytest.mark.parametrize("length", [16, 20, 32, 48, 64])
@pytest.mark.parametrize("hash", ["sha1", "sha256", "sha512", "ripemd160"])
def test_split_keys_are_merged_and_need_every_stripe(length: int, hash: str) -> None:
    key = random.Random(length).randbytes(length)
    material = antiforensic.split(key, 50, hash)
    assert len(material) == 50 * length and key not in material
    assert antiforensic.merge(material, length, 50, hash) == key
    for place in (0, 25 * length, len(material) - 1):
        damaged = bytearray(material)
        damaged[place] ^= 1
        assert antiforensic.merge(bytes(damaged), length, 50, hash) != key


@pytest.mark.parametrize(
    ("alg", "mode", "ivgen"),
    [
        ("aes-256", "xts", "plain64"),
        ("aes-192", "cbc", "plain"),
        ("cast5-128", "cbc", "plain64"),
        ("aes-256", "ecb", "essiv"),
    ],
)
def test_what_is_made_opens_with_its_passphrase_only(alg: str, mode: str, ivgen: str) -> None:
    data = volume(b"first", alg, mode, ivgen)
    key = opens(data, b"first")
    assert key is not None and len(key) == int(alg[-3:]) // 8 * (2 if mode == "xts" else 1)
    assert opens(data, b"firs") is None and opens(data, b"") is None
    assert key not in data and b"first" not in data


def test_a_header_is_written_as_it_was_read(image: bytes) -> None:
    area, _ = area_of(image)
    header = Luks1.read(area)
    assert header.encode() == image[:592]


@pytest.mark.parametrize(
    ("at", "value", "kind", "what"),
    [
        (0, b"LUSK", CorruptImage, "magic"),
        (6, b"\0\3", UnsupportedFeature, "version 3"),
        (8, b"serpent\0", UnsupportedFeature, "serpent"),
        (8, b"\xff\xfe", CorruptImage, "cipher-name"),
        (8, b"ae\ns", CorruptImage, "cipher-name"),
        (40, b"xyz-plain64\0", UnsupportedFeature, "xyz"),
        (40, b"cbc-foo\0", UnsupportedFeature, "foo"),
        (40, b"cbc-essiv:md9\0", UnsupportedFeature, "md9"),
        (40, b"xts-plain64\0", UnsupportedFeature, "64"),
        (72, b"sha0\0", UnsupportedFeature, "sha0"),
        (72, b"shake_128\0", UnsupportedFeature, "shake_128"),
        (104, struct.pack(">I", 9), CorruptImage, "payload"),
        (108, struct.pack(">I", 0), LimitExceeded, "key-bytes"),
        (108, struct.pack(">I", 65), LimitExceeded, "key-bytes"),
        (108, struct.pack(">I", 0xFFFFFFFF), LimitExceeded, "key-bytes"),
        (164, struct.pack(">I", 0), LimitExceeded, "digest"),
        (164, struct.pack(">I", 0xFFFFFFFF), LimitExceeded, "digest"),
        (208, struct.pack(">I", 7), CorruptImage, "key slot 0"),
        (212, struct.pack(">I", 0), LimitExceeded, "key slot 0"),
        (212, struct.pack(">I", 0xFFFFFFFF), LimitExceeded, "key slot 0"),
        (248, struct.pack(">I", 0), CorruptImage, "key slot 0"),
        (248, struct.pack(">I", 0xFFFFFFFF), CorruptImage, "key slot 0"),
        (248, struct.pack(">I", 137), CorruptImage, "overlaps"),
        (252, struct.pack(">I", 0), CorruptImage, "stripes"),
        (252, struct.pack(">I", 0xFFFFFFFF), CorruptImage, "stripes"),
    ],
)
def test_hostile_fields(image: bytes, at: int, value: bytes, kind: type[Exception], what: str) -> None:
    data = bytearray(image)
    data[at : at + len(value)] = value
    area, _ = area_of(bytes(data))
    with pytest.raises(kind, match=what):
        read_header(area).unlock(area, b"first")


def test_damaged_stripes_do_not_open(image: bytes) -> None:
    data = bytearray(image)
    data[4096 + 1000] ^= 1
    assert opens(bytes(data), b"first") is None


def test_every_length_of_a_cut_off_header(image: bytes) -> None:
    for length in (0, 1, 5, 6, 8, 207, 591, 592, 4096, 10_000):
        area, _ = area_of(image[:length])
        with pytest.raises(DiskwrightError):
            read_header(area).unlock(area, b"first")


def test_noise_in_a_header_never_escapes_as_something_else(image: bytes) -> None:
    rng = random.Random(11)
    for _ in range(300):
        data = bytearray(image)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(592)] = rng.randrange(256)
        # Iterations as they were, or the test would take long for a good reason.
        data[164:168], data[212:216] = image[164:168], image[212:216]
        area, _ = area_of(bytes(data))
        try:
            read_header(area).unlock(area, b"first")
        except DiskwrightError:
            pass


# -- key slots -----------------------------------------------------------------------------------


def changed(data: bytes, wanted: SlotChange, with_: bytes = b"first", *, force: bool = False) -> Bytes:
    area, medium = area_of(data)
    header = Luks1.read(area)
    change(header, area, wanted, lambda: header.unlock(area, with_), force=force)
    return medium


def test_passphrases_come_and_go(image: bytes) -> None:
    key = opens(image, b"first")
    both = bytes(changed(image, SlotChange("active", new_secret=b"second", iter_time=1)).data)
    assert opens(both, b"first") == opens(both, b"second") == key
    second = bytes(changed(both, SlotChange("inactive", old_secret=b"first")).data)
    assert opens(second, b"first") is None and opens(second, b"second") == key
    at_five = bytes(changed(second, SlotChange("active", b"third", keyslot=5, iter_time=1), b"second").data)
    assert Luks1.read(area_of(at_five)[0]).slots[5].in_use and opens(at_five, b"third") == key
    # An erased slot holds nothing of what it held.
    start = Luks1.read(area_of(image)[0]).slots[0].key_material_offset * 512
    assert not any(a == b for a, b in zip(blocks(image, start), blocks(second, start), strict=True))


def blocks(data: bytes, start: int) -> list[bytes]:
    return [data[at : at + 16] for at in range(start, start + 64_000, 16)]


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (SlotChange("active"), "'new-secret' is required"),
        (SlotChange("active", b"x", b"y"), "'old-secret' must not"),
        (SlotChange("active", b"x", keyslot=0), "Refusing to overwrite"),
        (SlotChange("active", b"x", keyslot=8), "must be between 0 and 7"),
        (SlotChange("inactive", keyslot=-1), "must be between 0 and 7"),
        (SlotChange("inactive"), "To erase keyslot"),
        (SlotChange("inactive", b"x", b"y"), "'new-secret' must not"),
        (SlotChange("inactive", old_secret=b"first", iter_time=5), "'iter-time' must not"),
        (SlotChange("inactive", old_secret=b"wrong"), "No keyslots match"),
        (SlotChange("inactive", old_secret=b"first"), "refusing operation"),
        (SlotChange("inactive", keyslot=0), "refusing operation"),
        (SlotChange("inactive", keyslot=0, old_secret=b"wrong"), "doesn't contain"),
        (SlotChange("inactive", keyslot=3), "already erased"),
    ],
)
def test_refusals_change_nothing(image: bytes, wanted: SlotChange, what: str) -> None:
    area, medium = area_of(image)
    header = Luks1.read(area)
    with pytest.raises(DiskwrightError, match=what):
        change(header, area, wanted, lambda: header.unlock(area, b"first"))
    assert not medium.writes and medium.data == image


def test_all_slots_can_be_used_but_no_more(image: bytes) -> None:
    data = image
    for number in range(7):
        data = bytes(changed(data, SlotChange("active", b"pass%d" % number, iter_time=1)).data)
    with pytest.raises(ImageError, match="all keyslots are in use"):
        changed(data, SlotChange("active", b"one more", iter_time=1))


def test_the_last_slot_goes_only_by_force(image: bytes) -> None:
    data = bytes(changed(image, SlotChange("inactive", keyslot=0), force=True).data)
    assert opens(data, b"first") is None


def crashes(before: bytes, medium: Bytes) -> list[bytes]:
    """The medium after every prefix of the writes, the last of them also cut in two."""
    states, data = [before], bytearray(before)
    for write in medium.writes:
        if write is None:
            continue
        offset, new = write
        for cut in (len(new) // 2, len(new)):
            data[offset : offset + cut] = new[:cut]
            states.append(bytes(data))
    return states


def test_a_crash_while_a_passphrase_is_added(image: bytes) -> None:
    medium = changed(image, SlotChange("active", b"second", iter_time=1))
    key = opens(image, b"first")
    for state in crashes(image, medium):
        assert opens(state, b"first") == key
    assert opens(bytes(medium.data), b"second") == key


def test_a_crash_while_one_is_erased(image: bytes) -> None:
    both = bytes(changed(image, SlotChange("active", b"second", iter_time=1)).data)
    for state in crashes(both, changed(both, SlotChange("inactive", old_secret=b"first"))):
        assert opens(state, b"second") is not None


def test_a_crash_while_the_only_slot_is_overwritten_by_force(image: bytes) -> None:
    medium = changed(image, SlotChange("active", b"second", keyslot=0, iter_time=1), force=True)
    for state in crashes(image, medium):
        assert opens(state, b"first") is not None or opens(state, b"second") is not None
    final = bytes(medium.data)
    assert opens(final, b"first") is None and opens(final, b"second") is not None
    assert [slot.in_use for slot in Luks1.read(area_of(final)[0]).slots] == [True] + [False] * 7


def test_key_material_is_durable_before_the_slot_says_so(image: bytes) -> None:
    writes = changed(image, SlotChange("active", b"second", iter_time=1)).writes
    assert [None if write is None else len(write[1]) for write in writes] == [64000, None, 48, None]


# -- version 2 -----------------------------------------------------------------------------------


def luks2(change: Callable[[dict[str, Any]], None] = lambda data: None, **header: Any) -> bytes:
    """A small volume: PBKDF2, two stripes, one segment. ``change`` may spoil its metadata."""
    key, salt, slot_salt = b"\5" * 64, b"s" * 32, b"t" * 32
    digest = hashlib.pbkdf2_hmac("sha256", key, salt, 1000, 32)
    derived = hashlib.pbkdf2_hmac("sha256", b"first", slot_salt, 1000, 64)
    from diskwright.codecs.sector_ciphers import sector_cipher

    plain = antiforensic.split(key, 4, "sha256").ljust(512, b"\0")
    material = bytearray(512)
    sector_cipher("aes", "xts", "plain64", "", derived).encrypt(memoryview(plain), memoryview(material), 0)
    data: dict[str, Any] = {
        "keyslots": {
            "0": {
                "type": "luks2",
                "key_size": 64,
                "af": {"type": "luks1", "stripes": 4, "hash": "sha256"},
                "area": {"offset": "32768", "size": "4096", "encryption": "aes-xts-plain64", "key_size": 64},
                "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": _base64(slot_salt)},
            }
        },
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": "65536",
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": "aes-xts-plain64",
                "sector_size": 4096,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": ["0"],
                "segments": ["0"],
                "hash": "sha256",
                "iterations": 1000,
                "salt": _base64(salt),
                "digest": _base64(digest),
            }
        },
        "config": {"json_size": "12288", "keyslots_size": "4096"},
    }
    change(data)
    out = bytearray(65536 + 8192)
    out[32768 : 32768 + 512] = material
    for place, magic in ((0, b"LUKS\xba\xbe"), (16384, b"SKUL\xba\xbe")):
        out[place : place + 16384] = binary(magic, place, json.dumps(data).encode(), **header)
    return bytes(out)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def binary(magic: bytes, place: int, text: bytes, size: int = 16384, sequence: int = 1) -> bytes:
    head = struct.pack(">6sHQQ48s32s64s40s48sQ184s64s", magic, 2, size, sequence, b"", b"sha256", b"", b"u-u-i-d", b"",
                       place, b"", b"")  # fmt: skip
    whole = bytearray(head.ljust(4096, b"\0") + text.ljust(12288, b"\0"))
    whole[448:480] = hashlib.sha256(whole).digest()
    return bytes(whole)


def test_luks2_opens() -> None:
    assert opens(luks2(), b"first") == b"\5" * 64 and opens(luks2(), b"other") is None


@pytest.mark.parametrize("damaged", [0, 16384])
def test_luks2_opens_by_either_header(damaged: int) -> None:
    data = bytearray(luks2())
    data[damaged + 5000] ^= 0x20
    assert opens(bytes(data), b"first") is not None
    if damaged == 0:
        data[0 + 4096 : 4096 + 12288] = os.urandom(12288)
        assert opens(bytes(data), b"first") is not None
    data[16384 - damaged + 5000] ^= 0x20
    with pytest.raises(CorruptImage, match="csum"):
        opens(bytes(data), b"first")


@pytest.mark.parametrize("length", [1, 8, 512, 4096, 16384])
def test_luks2_opens_when_the_first_header_is_overwritten_from_its_beginning_on(length: int) -> None:
    data = bytearray(luks2())
    data[:length] = b"\xaa" * length
    assert opens(bytes(data), b"first") == b"\5" * 64
    data[16384] ^= 1
    with pytest.raises(CorruptImage, match="magic"):
        opens(bytes(data), b"first")


def test_the_newer_luks2_header_counts() -> None:
    newer = bytearray(luks2())
    newer[16384:32768] = luks2(lambda data: data["keyslots"].clear(), sequence=2)[16384:32768]
    assert opens(bytes(newer), b"first") is None


def spoil(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            data = data[name]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "kind", "what"),
    [
        ("keyslots", [], CorruptImage, "keyslots"),
        ("segments", {}, UnsupportedFeature, "segments"),
        ("segments.0.type", "linear", UnsupportedFeature, "crypt"),
        ("segments.0.integrity", {}, UnsupportedFeature, "integrity"),
        ("segments.0.offset", 65536, CorruptImage, "offset"),
        ("segments.0.offset", "-1", CorruptImage, "offset"),
        ("segments.0.offset", "9" * 30, CorruptImage, "offset"),
        ("segments.0.sector_size", 513, CorruptImage, "sector_size"),
        ("segments.0.sector_size", True, CorruptImage, "sector_size"),
        ("segments.0.size", "511", CorruptImage, "offset"),
        ("segments.0.iv_tweak", "x", CorruptImage, "iv_tweak"),
        ("segments.0.encryption", 7, CorruptImage, "encryption"),
        ("config.requirements", {"mandatory": ["online-reencrypt"]}, UnsupportedFeature, "online-reencrypt"),
        ("keyslots.0.key_size", 1 << 40, CorruptImage, "key_size"),
        ("keyslots.0.af", None, CorruptImage, "af"),
        ("keyslots.0.af.stripes", 1 << 30, CorruptImage, "stripes"),
        ("keyslots.0.af.hash", "md0", UnsupportedFeature, "md0"),
        ("keyslots.0.area.offset", "999999999999", CorruptImage, "key material"),
        ("keyslots.0.area.size", "1", CorruptImage, "size"),
        ("keyslots.0.area.encryption", "serpent-xts-plain64", UnsupportedFeature, "serpent"),
        ("keyslots.0.kdf.type", "scrypt", UnsupportedFeature, "scrypt"),
        ("keyslots.0.kdf.iterations", 1 << 31, LimitExceeded, "iterations"),
        ("keyslots.0.kdf.salt", "!!", CorruptImage, "salt"),
        ("keyslots.0.kdf", {"type": "argon2id", "time": 4, "memory": 1 << 30, "cpus": 4, "salt": "c2FsdHNhbHQ="},
         LimitExceeded, "Argon2"),
        ("keyslots.0.kdf", {"type": "argon2id", "time": 1 << 20, "memory": 1 << 20, "cpus": 4, "salt": "c2FsdHNhbHQ="},
         LimitExceeded, "passes"),
        ("keyslots.0.kdf", {"type": "argon2id", "time": 1, "memory": 4096, "cpus": 4000, "salt": "c2FsdHNhbHQ="},
         LimitExceeded, "lanes"),
        ("keyslots.0.kdf", {"type": "argon2id", "time": 1, "memory": 64, "cpus": 1, "salt": "c2E="},
         CorruptImage, "salt"),
        ("digests.0.iterations", 1 << 31, LimitExceeded, "digest"),
        ("digests.0.digest", "", CorruptImage, "digest"),
        ("digests.0.type", "x", UnsupportedFeature, "digest"),
        ("digests.0.keyslots", 7, ImageError, "Invalid password"),
        ("digests.0.segments", 7, ImageError, "Invalid password"),
        ("digests.0.segments", "0", ImageError, "Invalid password"),
    ],
)  # fmt: skip
def test_hostile_luks2_metadata(path: str, value: object, kind: type[Exception], what: str) -> None:
    area, _ = area_of(luks2(spoil(path, value)))
    with pytest.raises(kind, match=what):
        read_header(area).unlock(area, b"first")


def test_names_in_luks2_metadata_are_not_printed_as_they_are() -> None:
    def rename(data: dict[str, Any]) -> None:
        data["keyslots"]["\ud800\n\x1b[2J"] = {**data["keyslots"].pop("0"), "key_size": 0}

    area, _ = area_of(luks2(rename))
    header = read_header(area)
    with pytest.raises(CorruptImage, match="key_size") as caught:
        header.unlock(area, b"first")
    assert str(caught.value).isprintable() and str(facts(header)).isprintable()


def test_luks2_sizes_that_cannot_be() -> None:
    for size in (0, 4096, 16385, 1 << 40):
        data = bytearray(luks2())
        data[8:16] = struct.pack(">Q", size)
        data[16384 + 8 : 16384 + 16] = struct.pack(">Q", size)
        with pytest.raises(CorruptImage, match="hdr_size"):
            opens(bytes(data), b"first")


def test_luks2_that_is_no_json() -> None:
    out = bytearray(65536)
    for place, magic in ((0, b"LUKS\xba\xbe"), (16384, b"SKUL\xba\xbe")):
        out[place : place + 16384] = binary(magic, place, b"[" * 12000)
    with pytest.raises(CorruptImage, match="JSON"):
        opens(bytes(out), b"first")


def test_noise_in_luks2_metadata() -> None:
    rng = random.Random(12)
    good = luks2()
    text = good[4096 : 4096 + 12288].rstrip(b"\0")
    for _ in range(200):
        spoiled = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            spoiled[rng.randrange(len(spoiled))] = rng.choice(b'0123456789"{}[],:aex-')
        data = bytearray(good)
        data[:16384] = binary(b"LUKS\xba\xbe", 0, bytes(spoiled), sequence=9)
        area, _ = area_of(bytes(data))
        try:
            header = read_header(area)
            assert isinstance(header, Luks2)
            header.unlock(area, b"first")
        except DiskwrightError:
            pass


def test_work_is_limited_over_all_slots_together() -> None:
    budget = kdf.Budget("image")
    for _ in range(2):
        budget.pbkdf2("slot", "sha256", kdf.MAX_ITERATIONS // 2, 32)
    with pytest.raises(LimitExceeded, match="image: slot"):
        budget.pbkdf2("slot", "sha256", 1, 32)


def test_more_time_is_more_iterations() -> None:
    assert kdf.iterations_for("sha256", 32, 0) == kdf.MIN_ITERATIONS
    assert kdf.iterations_for("sha256", 32, 10**9) == kdf.MAX_ITERATIONS * 3 // 4 // 8


def test_all_slots_open_however_long_a_passphrase_is_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdf, "MAX_ITERATIONS", 1 << 19)  # in proportion: trying all of the real one takes minutes
    header = Luks1.plan("aes-256", "xts", "plain64", None, "sha256")
    area, medium = area_of(bytes(header.payload_start))
    header.make(area, b"0", 10**6)
    for number in range(1, 8):
        header.store_key(area, number, header.unlock(area, b"0"), b"%d" % number, 10**6)
    assert opens(bytes(medium.data), b"7") is not None
