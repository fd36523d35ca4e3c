"""LUKS2 headers made and changed: every prefix of the writes leaves one whole header and a passphrase that opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from diskwright.codecs.luks import Area, Luks2, kdf, luks2_write, read_header
from diskwright.codecs.luks.luks2_write import Luks2Slots, make, publish
from diskwright.codecs.luks.slots import SlotChange, change
from diskwright.errors import CorruptImage, DiskwrightError, ImageError
from tests.codecs.test_luks import Bytes, area_of, binary, crashes, luks2, opens, spoil

ADD = SlotChange("active", b"second", iter_time=1)


@pytest.fixture(scope="module")
def image() -> bytes:
    """PBKDF2, so that trying many states takes little time, and no more of the file than is written to."""
    area, medium = area_of(bytes(luks2_write.PAYLOAD))
    make("aes-xts-plain64", 64, "sha256", area, b"first", pbkdf="pbkdf2", iter_time=1, sector_size=512)
    return bytes(medium.data[: 1 << 20])


def header_of(data: bytes | bytearray) -> tuple[Luks2, Area, Bytes]:
    area, medium = area_of(bytes(data))
    header = read_header(area)
    assert isinstance(header, Luks2)
    return header, area, medium


def changed(data: bytes, wanted: SlotChange, with_: bytes = b"first", *, force: bool = False) -> Bytes:
    header, area, medium = header_of(data)
    change(Luks2Slots(header), area, wanted, lambda: header.unlock(area, with_), force=force)
    return medium


def slots_of(data: bytes | bytearray) -> list[int]:
    return Luks2Slots(header_of(data)[0]).slots_taken()


def test_passphrases_come_and_go(image: bytes) -> None:
    key = opens(image, b"first")
    both = bytes(changed(image, ADD).data)
    assert opens(both, b"first") == opens(both, b"second") == key and slots_of(both) == [0, 1]
    second = bytes(changed(both, SlotChange("inactive", old_secret=b"first")).data)
    assert opens(second, b"first") is None and opens(second, b"second") == key and slots_of(second) == [1]
    assert not any(second[at : at + 16] == both[at : at + 16] for at in range(32768, 32768 + 258048, 16))
    again = bytes(changed(second, SlotChange("active", b"third", keyslot=31, iter_time=1), b"second").data)
    assert opens(again, b"third") == key and slots_of(again) == [1, 31]
    assert header_of(again)[0].place_of("31") == (32768, 258048)  # the room that slot 0 had


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (SlotChange("active", b"x", keyslot=0), "Refusing to overwrite"),
        (SlotChange("active", b"x", keyslot=32), "must be between 0 and 31"),
        (SlotChange("inactive", old_secret=b"wrong"), "No keyslots match"),
        (SlotChange("inactive", old_secret=b"first"), "refusing operation"),
        (SlotChange("inactive", keyslot=0), "refusing operation"),
        (SlotChange("inactive", keyslot=3), "already erased"),
    ],
)
def test_refusals_change_nothing(image: bytes, wanted: SlotChange, what: str) -> None:
    header, area, medium = header_of(image)
    with pytest.raises(DiskwrightError, match=what):
        change(Luks2Slots(header), area, wanted, lambda: header.unlock(area, b"first"))
    assert not medium.writes and medium.data == image


def damaged(data: bytes, place: int) -> bytes:
    spoiled = bytearray(data)
    spoiled[place + 4096] ^= 0xFF
    return bytes(spoiled)


STARTS: list[Callable[[bytes], bytes]] = [
    lambda data: data,
    lambda data: damaged(data, 0),
    lambda data: damaged(data, 16384),
]


@pytest.mark.parametrize("start", STARTS, ids=["whole", "first copy damaged", "second copy damaged"])
def test_a_crash_while_a_passphrase_is_added(image: bytes, start: Callable[[bytes], bytes]) -> None:
    before, key = start(image), opens(image, b"first")
    medium = changed(before, ADD)
    for state in crashes(before, medium):
        assert opens(state, b"first") == key
    final = bytes(medium.data)
    assert opens(final, b"second") == key and not header_of(final)[0].lost
    for place in (0, 16384):  # each copy by itself says the same
        assert opens(damaged(final, place), b"second") == key


@pytest.mark.parametrize("start", STARTS, ids=["whole", "first copy damaged", "second copy damaged"])
def test_a_crash_while_one_is_erased(image: bytes, start: Callable[[bytes], bytes]) -> None:
    both = start(bytes(changed(image, ADD).data))
    medium = changed(both, SlotChange("inactive", old_secret=b"first"))
    for state in crashes(both, medium):
        assert opens(state, b"second") is not None
    assert opens(bytes(medium.data), b"first") is None


def test_a_crash_while_the_only_slot_is_overwritten_by_force(image: bytes) -> None:
    medium = changed(image, SlotChange("active", b"second", keyslot=0, iter_time=1), force=True)
    for state in crashes(image, medium):
        assert opens(state, b"first") is not None or opens(state, b"second") is not None
    final = bytes(medium.data)
    assert opens(final, b"first") is None and opens(final, b"second") is not None and slots_of(final) == [0]


def test_key_material_is_durable_first_and_the_copy_that_was_read_goes_last(image: bytes) -> None:
    def places(data: bytes) -> list[int | None]:
        return [None if write is None else write[0] for write in changed(data, ADD).writes]

    assert places(image) == [290816, None, 16384, None, 0, None]
    assert places(damaged(image, 0)) == [290816, None, 0, None, 16384, None]


def test_numbers_of_headers_go_up_and_what_is_unknown_stays(image: bytes) -> None:
    header, area, medium = header_of(image)
    odd = {**header.data, "tokens": {"0": {"type": "mine", "keyslots": ["0"], "more": {"x": [1, "2", None]}}}}
    publish(header, area, odd)
    assert header.copy.sequence == 2
    again = header_of(changed(bytes(medium.data), ADD).data)[0]
    assert again.copy.sequence == 3 and again.data["tokens"] == odd["tokens"] and again.uuid == header.uuid
    gone = header_of(changed(bytes(changed(bytes(medium.data), ADD).data), SlotChange("inactive", keyslot=0)).data)[0]
    assert gone.data["tokens"]["0"] == {"type": "mine", "keyslots": [], "more": {"x": [1, "2", None]}}


def test_slots_of_other_keys_and_of_no_priority_do_not_count_as_a_way_in(image: bytes) -> None:
    """An unbound slot holds some other key, and one of priority 0 opens only when it is asked for by number."""
    both = bytes(changed(image, ADD).data)
    for spoil_ in (
        lambda data: data["digests"]["0"]["keyslots"].remove("1"),
        lambda data: data["keyslots"]["1"].update(priority=0),
    ):
        header, area, medium = header_of(both)
        data = json.loads(json.dumps(header.data))
        spoil_(data)
        publish(header, area, data)
        with pytest.raises(ImageError, match="refusing operation"):
            changed(bytes(medium.data), SlotChange("inactive", keyslot=0))


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("keyslots.0.area.offset", "0", "area"),
        ("keyslots.0.area.offset", "16384", "area"),
        ("keyslots.0.area.offset", "65024", "area"),
        ("keyslots.0.area.size", str(1 << 40), "area"),
        ("keyslots.0.area", None, "area"),
        ("keyslots.x", {"type": "luks2"}, "no number"),
        ("keyslots.007", {"type": "luks2"}, "no number"),
        ("keyslots.99", {"type": "luks2"}, "no number"),
        ("config.keyslots_size", "x", "keyslots_size"),
    ],
)
def test_images_whose_slots_lie_where_they_must_not_are_never_written_to(path: str, value: object, what: str) -> None:
    header, area, medium = header_of(luks2(spoil(path, value)))
    for wanted in (ADD, SlotChange("inactive", keyslot=0)):
        with pytest.raises(DiskwrightError, match=what):
            change(Luks2Slots(header), area, wanted, lambda: b"k" * 64, force=True)
    assert not medium.writes


def test_two_slots_with_one_place(image: bytes) -> None:
    def overlap(data: dict[str, Any]) -> None:
        data["keyslots"]["1"] = data["keyslots"]["0"]

    header, area, medium = header_of(luks2(overlap))
    with pytest.raises(CorruptImage, match="another one's"):
        change(Luks2Slots(header), area, SlotChange("inactive", keyslot=0), lambda: b"", force=True)
    assert not medium.writes


def test_no_room_for_key_material_or_for_metadata() -> None:
    header, area, medium = header_of(luks2())  # its area for key material has 4096 bytes
    with pytest.raises(ImageError, match="no room"):
        change(Luks2Slots(header), area, ADD, lambda: b"k" * 64)
    data = {**header.data, "tokens": {"0": {"type": "mine", "keyslots": [], "text": "x" * 12288}}}
    with pytest.raises(ImageError, match="metadata area is full"):
        publish(header, area, data)
    assert not medium.writes


def test_a_sequence_number_that_cannot_go_up() -> None:
    data = bytearray(luks2())
    text = data[4096:16384].split(b"\0")[0]
    data[:16384] = binary(b"LUKS\xba\xbe", 0, bytes(text), sequence=(1 << 64) - 1)
    header, area, medium = header_of(data)
    with pytest.raises(CorruptImage, match="seqid"):
        publish(header, area, header.data)
    assert not medium.writes


def test_all_slots_can_be_used_and_opened_however_long_a_passphrase_is_to_take(
    image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdf, "MAX_ITERATIONS", 1 << 20)  # in proportion: trying all of the real one takes minutes
    data, key = image, opens(image, b"first")
    for number in range(31):
        data = bytes(changed(data, SlotChange("active", b"%d" % number, iter_time=10**6)).data)
        data += bytes(max(0, 32768 + (number + 3) * 258048 - len(data)))
    assert opens(data, b"30") == key and slots_of(data) == list(range(32))
    with pytest.raises(ImageError, match="all keyslots are in use"):
        changed(data, ADD)


def test_argon2_costs_stay_within_what_is_read_again() -> None:
    passes, memory, lanes = kdf.argon2_costs("argon2id", 64, 10**7)
    assert passes >= kdf.ARGON2_PASSES and 32 * passes * memory <= kdf.MAX_ARGON2_WORK
    assert kdf.ARGON2_MEMORY <= memory <= kdf.MAX_ARGON2_MEMORY and 1 <= lanes <= 4
    assert kdf.argon2_costs("argon2id", 64, 1)[:2] == (kdf.ARGON2_PASSES, kdf.ARGON2_MEMORY)
