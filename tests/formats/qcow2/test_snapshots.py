"""Internal snapshots: made, shown, applied, deleted; what has no room; what fails on the way."""

from __future__ import annotations

import errno
import io
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from diskwright.core import snapshots
from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.snapshots import SnapshotInfo, VmState
from diskwright.errors import (
    CorruptImage,
    DiskwrightError,
    ImageError,
    LimitExceeded,
    OptionError,
    SnapshotNotFound,
)
from diskwright.formats.qcow2 import changes
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED
from diskwright.formats.qcow2.snapshots import entry, read_snapshots
from tests.formats.qcow2.snapshotting import shown, sound, states
from tests.formats.qcow2.support import (
    LONG,
    Change,
    Image,
    Tape,
    checked,
    contents,
    created,
    header_of,
    l2_entry,
    l2_entry_place,
    poked,
)

CASES: dict[str, dict[str, Any]] = {
    "512": {"size": 100 << 10, "cluster_size": 512},
    "4k": {"size": 3 << 20, "cluster_size": 4096},
    "4k version 2": {"size": 3 << 20, "cluster_size": 4096, "compat": "0.10"},
    "4k, 2 bits": {"size": 1 << 20, "cluster_size": 4096, "refcount_bits": 2},
    "512, 64 bits": {"size": 100 << 10, "cluster_size": 512, "refcount_bits": 64},
    "64k, 8 bits": {"size": 9 << 20, "cluster_size": 65536, "refcount_bits": 8},
    "2M": {"size": 20 << 20, "cluster_size": 2 << 20, "refcount_bits": 32},
}


class Small(Tape):
    """A medium with little room: whatever takes an image's word for where to write soon has none left."""

    limit: int | None = 64 << 20

    def _record(self, change: Change) -> None:
        if self.limit is not None and change[1] + len(change[2]) > self.limit:
            raise OSError(errno.ENOSPC, "the tape is at its end")
        super()._record(change)


def scribble(image: Image, chance: random.Random, times: int) -> None:
    disk = image.disk
    for _ in range(times):
        offset = chance.randrange(disk.size >> 9) << 9
        length = min(disk.size - offset, chance.randrange(1, 300) << 9)
        kind = chance.random()
        if kind < 0.7:
            disk.pwrite(offset, chance.randbytes(length))
        elif kind < 0.85:
            disk.zero(offset, length, unmap=chance.random() < 0.5)
        else:
            disk.trim(offset, length)


def whole(image: Image) -> bytes:
    return image.disk.pread(0, image.disk.size)


def created_with(**options: Any) -> tuple[bytes, dict[str, bytes]]:
    """An image with two snapshots, and what these hold."""
    chance = random.Random(1)
    tape = Tape(created(**options))
    kept = {}
    with Image(tape) as image:
        for name in ("one", "two"):
            scribble(image, chance, 4)
            kept[snapshots.create(image.node, name).id] = whole(image)
        scribble(image, chance, 4)
    return bytes(tape.data), kept


@pytest.mark.parametrize("case", CASES)
def test_random_life(case: str) -> None:
    """Writes and snapshot operations, with everything checked after each of the latter."""
    chance = random.Random(case)
    tape = Tape(created(**CASES[case]))
    most = 2 if "2 bits" in case else 5
    kept: dict[str, bytes] = {}
    image = Image(tape)
    for _ in range(80 if LONG else 14):
        scribble(image, chance, chance.randrange(6))
        now = whole(image)
        action = chance.random()
        if action < 0.5 and len(kept) < most:
            kept[snapshots.create(image.node, "name").id] = now
        elif action < 0.75 and kept:
            id = chance.choice(list(kept))
            snapshots.apply(image.node, id)
            now = kept[id]
        elif kept:
            id = chance.choice(list(kept))
            snapshots.delete(image.node, id)
            del kept[id]
        assert whole(image) == now
        if chance.random() < 0.5:
            image.close()
            image = Image(tape)
        assert image.format.check("off").leaks == 0
        data = bytes(tape.data)
        sound(data)
        assert contents(data) == now
        assert states(data) == kept
    image.close()


def test_sizes_differ() -> None:
    tape = Tape(created(size=200_192, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 200_192)
        small = snapshots.create(image.node, "small").id
        image.node.resize(900_096)
        image.disk.pwrite(700_000, b"b" * 100)
        large, held = snapshots.create(image.node, "large").id, whole(image)
        image.node.resize(512)
        assert states(bytes(tape.data)) == {small: b"a" * 200_192, large: held}
        bitmap = DirtyBitmap(image.node.size, 4096)
        image.node.add_bitmap(bitmap)
        snapshots.apply(image.node, large)
        assert whole(image) == held
        assert bitmap.dirty_bytes == 900_096, "whoever follows the disk has to know that all of it has changed"
        snapshots.apply(image.node, small)
        assert whole(image) == b"a" * 200_192
    sound(bytes(tape.data))


def test_writes_after_a_snapshot_go_elsewhere() -> None:
    """Places that were proven to be writable are not any more, and again when nobody shares them."""
    tape = Tape(created(size=1 << 20, cluster_size=4096))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 8192)
        place = image.format.in_place(0, 4096)
        assert place > 0
        id = snapshots.create(image.node, "s").id
        assert image.format.in_place(0, 4096) == -1
        snapshots.delete(image.node, id)
        assert image.format.in_place(0, 4096) == place
        assert l2_entry(bytes(tape.data), 0) & COPIED
    sound(bytes(tape.data))


def test_opened_by_id_or_name() -> None:
    data, kept = created_with(size=300 << 10, cluster_size=4096)
    assert shown(data, snapshot="one") == shown(data, snapshot="1") == shown(data, snapshot_id="1") == kept["1"]
    assert shown(data, snapshot_id="2", snapshot_name="two") == kept["2"]
    for option in ({"snapshot": "three"}, {"snapshot_id": "one"}, {"snapshot_id": "1", "snapshot_name": "two"}):
        with pytest.raises(SnapshotNotFound):
            shown(data, **option)
    with pytest.raises(ImageError, match="read-only"):
        Image(Tape(data), snapshot="one")


def test_an_id_goes_before_a_name() -> None:
    infos = [SnapshotInfo(id, name, 0, 0, 0, 0, None, 0) for id, name in (("1", "2"), ("2", "x"), ("9", "x"))]
    assert snapshots.find_any(infos, "2").id == "2"
    assert snapshots.find_any(infos, "x").id == "2"
    assert snapshots.find(infos, name="2").id == "1"


def test_ids_are_new() -> None:
    tape = Tape(created(size=1 << 20))
    with Image(tape) as image:
        ids = [snapshots.create(image.node, "s").id for _ in range(3)]
        snapshots.delete(image.node, "2")
        ids.append(snapshots.create(image.node, "s").id)
        assert ids == ["1", "2", "3", "4"]
        snapshots.delete(image.node, "4")
        assert snapshots.create(image.node, "s").id == "4"
        with pytest.raises(SnapshotNotFound):
            snapshots.apply(image.node, "2")
        with pytest.raises(SnapshotNotFound):
            snapshots.delete(image.node, "2")
        with pytest.raises(OptionError, match="255 bytes"):
            snapshots.create(image.node, "é" * 128)
        assert snapshots.create(image.node, "x" * 255).name == "x" * 255
    sound(bytes(tape.data))


def test_unknown_extra_data_is_kept() -> None:
    tape = Tape(created(size=1 << 20))
    with Image(tape) as image:
        snapshots.create(image.node, "first")
    header = header_of(bytes(tape.data))
    at = header.snapshots_offset
    raw = bytes(tape.data[at : at + 40]) + bytes(tape.data[at + 40 : at + 64]) + b"to come!" + b"1first"
    tape.data[at : at + 80] = raw.ljust(80, b"\0")
    struct.pack_into(">I", tape.data, at + 36, 32)
    raw = bytes(tape.data[at : at + len(raw)])
    with Image(tape) as image:
        snapshots.create(image.node, "second")
        snapshots.delete(image.node, "2")
        snapshots.apply(image.node, "1")
        assert [info.name for info in snapshots.list_of(image.node)] == ["first"]
        found, _ = read_snapshots(image.format.children[0], header_of(bytes(tape.data)))
        assert found[0].raw.startswith(raw)


def test_old_entries_without_extra_data() -> None:
    data, kept = created_with(size=300 << 10, cluster_size=4096, compat="0.10")
    changed = bytearray(data)
    at = header_of(data).snapshots_offset
    names = b"1one", b"2two"
    for name in names:
        fixed = bytearray(data[at : at + 40])
        fixed[36:40] = bytes(4)
        at += 72
        names = (*names, bytes(fixed) + name + bytes(4))
    start = header_of(data).snapshots_offset
    changed[start : start + 96] = b"".join(names[2:])
    assert states(bytes(changed)) == kept
    with Image(Tape(bytes(changed))) as image:
        assert [info.icount for info in snapshots.list_of(image.node)] == [None, None]
        snapshots.apply(image.node, "1")
        assert whole(image) == kept["1"]


# -- the machine's state -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 4096, 3_000_000])
@pytest.mark.parametrize("size", [0, 300 << 10])
def test_state_of_a_machine(length: int, size: int) -> None:
    state = random.Random(length).randbytes(length)
    tape = Tape(created(size=size, cluster_size=512))
    with Image(tape) as image:
        if size:
            image.disk.pwrite(1000, b"a" * 2000)
        before = whole(image)
        vm = VmState(io.BytesIO(state), length, 12_345_678_901, 99)
        info = snapshots.create(image.node, "vm", vm_state=vm)
        assert (info.vm_state_size, info.vm_clock_nsec, info.icount) == (length, 12_345_678_901, 99)
        assert snapshots.list_of(image.node) == [info]
        sound(bytes(tape.data))
        image.node.resize(size + 90_112)
        image.disk.pwrite(0, b"b" * 5000)
        snapshots.apply(image.node, info.id)
        assert whole(image) == before
        into = io.BytesIO()
        assert image.format.load_vm_state(info.id, into) == length
        assert into.getvalue() == state
        sound(bytes(tape.data))
        snapshots.delete(image.node, info.id)
    sound(bytes(tape.data))


def test_state_that_ends_too_early() -> None:
    tape = Tape(created(size=1 << 20))
    before = bytes(tape.data)
    with Image(tape) as image, pytest.raises(ImageError, match="ends before"):
        snapshots.create(image.node, "vm", vm_state=VmState(io.BytesIO(b"abc"), 4))
    assert bytes(tape.data) == before


# -- no room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "fit"), [(1, 0), (2, 2), (4, 14)])
def test_refcounts_too_narrow(bits: int, fit: int) -> None:
    tape = Tape(created(size=1 << 20, cluster_size=4096, refcount_bits=bits))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 20000)
        for number in range(fit):
            snapshots.create(image.node, str(number))
        image.disk.flush()
        before = bytes(tape.data)
        with pytest.raises(LimitExceeded, match=f"refcounts of {bits} bits"):
            snapshots.create(image.node, "one too many")
        assert bytes(tape.data) == before, "nothing may have been changed"
        image.disk.pwrite(0, b"b" * 20000)
    assert contents(bytes(tape.data))[:20000] == b"b" * 20000
    sound(bytes(tape.data))


def test_too_many_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape(created(size=1 << 20))
    monkeypatch.setattr(changes, "MAX_SNAPSHOTS", 3)
    with Image(tape) as image:
        for _ in range(3):
            snapshots.create(image.node, "s")
        before = bytes(tape.data)
        with pytest.raises(LimitExceeded, match="3 snapshots already"):
            snapshots.create(image.node, "s")
        assert bytes(tape.data) == before


def test_the_refcount_table_grows() -> None:
    """One refcount block counts 64 clusters here, and a table of one cluster 4096."""
    tape = Tape(created(size=1 << 20, cluster_size=512, refcount_bits=64))
    chance = random.Random(3)
    with Image(tape) as image:
        for _ in range(4):
            image.disk.pwrite(0, chance.randbytes(1 << 19))
            before = header_of(bytes(tape.data)).refcount_table_clusters
            snapshots.create(image.node, "s")
            sound(bytes(tape.data))
        assert header_of(bytes(tape.data)).refcount_table_clusters > before or before > 1


# -- failures ----------------------------------------------------------------------------------------


def _create(image: Image) -> None:
    snapshots.create(image.node, "three")


def _create_with_state(image: Image) -> None:
    snapshots.create(image.node, "three", vm_state=VmState(io.BytesIO(b"s" * 9999), 9999))


def _apply(image: Image) -> None:
    snapshots.apply(image.node, "1")


def _delete(image: Image) -> None:
    snapshots.delete(image.node, "1")


ACTIONS = {"create": _create, "create with state": _create_with_state, "apply": _apply, "delete": _delete}


@pytest.mark.parametrize("then", ["flush", "write"])
@pytest.mark.parametrize("action", ACTIONS)
def test_each_write_and_flush_fails_once(action: str, then: str) -> None:
    """The old state is there, or the new one; the image is sound; and the disk and the action work afterwards."""
    start, kept = created_with(size=200 << 10, cluster_size=512)
    number = 0
    while True:
        tape = Tape(start)
        with Image(tape) as image:
            image.disk.pwrite(30 << 10, b"z" * 3000)
            assert image.format.in_place(30 << 10, 512) > 0, "what is overwritten below must be a write in place"
            old = whole(image)
            new = kept["1"] if action == "apply" else old
            tape.fail = number
            number += 1
            try:
                ACTIONS[action](image)
                left, tape.fail = tape.fail, -1
                if left:
                    break
                # It was done already, and only space could not be given back.
                assert whole(image) == new
                sound(bytes(tape.data))
                continue
            except OSError:
                tape.fail = -1
            assert whole(image) == old
            _check_whole(tape, kept, old)
            expected = bytearray(old)
            if then == "write":
                image.disk.pwrite(30 << 10, b"y" * 500)
                expected[30 << 10 : (30 << 10) + 500] = b"y" * 500
                _check_whole(tape, kept, old)
            image.disk.flush()
            _check_whole(tape, kept, old)
            assert contents(bytes(tape.data)) == expected
            assert states(bytes(tape.data)) == kept
            ACTIONS[action](image)
            assert whole(image) == (new if action == "apply" else expected)
        sound(bytes(tape.data))
    assert number > 5


def _check_whole(tape: Tape, kept: dict[str, bytes], old: bytes) -> None:
    """Whatever snapshots the file has now, they hold what they should; and there is no damage."""
    report = checked(bytes(tape.data))
    assert not report.corruptions and not report.check_errors, report.messages
    for id, held in states(bytes(tape.data)).items():
        assert held == kept.get(id, old), id


def sound_or_leaks(data: bytes) -> None:
    with Image(Tape(data), writable=False) as image:
        report = image.format.check("off")
        assert not report.corruptions and not report.check_errors, report.messages


@pytest.mark.parametrize("stuck", [False, True])
def test_failure_gives_back_what_the_file_had_grown(stuck: bool) -> None:
    """And where that fails too, what has been written there does not show in new clusters."""
    tape = Small(created(size=1 << 20, cluster_size=4096))
    with Image(tape) as image:
        image.disk.pwrite(0, b"z" * (300 << 10))
        image.disk.flush()
        before, changes_before = len(tape.data), len(tape.changes)
        tape.fail = 3
        if not stuck:
            tape.fail = -1
            tape.limit = before + 8192
        with pytest.raises(OSError):
            snapshots.create(image.node, "s")
        tape.fail, tape.limit = -1, None
        grown = any(at + len(piece) > before for _, at, piece in tape.changes[changes_before:])
        assert grown, "the attempt must have written something behind the end"
        assert len(tape.data) > before if stuck else len(tape.data) == before
        for offset in range(500_000, 900_000, 40_000):
            image.disk.pwrite(offset, b"a")
        expected = bytearray(b"z" * (300 << 10) + bytes((1 << 20) - (300 << 10)))
        for offset in range(500_000, 900_000, 40_000):
            expected[offset] = ord("a")
        assert whole(image) == expected
    sound_or_leaks(bytes(tape.data))


# -- hostile images ----------------------------------------------------------------------------------


def _attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except (DiskwrightError, OSError, ValueError) as error:
        assert not isinstance(error, ValueError) or "beyond the end" in str(error), repr(error)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(400 if LONG else 60))
def test_damaged_tables(seed: int) -> None:
    """Damage anywhere in header, snapshot table, L1 and L2 tables and refcounts gives our errors, and nothing worse."""
    chance = random.Random(seed)
    start, _ = created_with(**CASES[chance.choice(["512", "4k version 2", "64k, 8 bits"])])
    data = bytearray(start)
    header = header_of(start)
    with Image(Tape(start), writable=False) as image:
        found, length = read_snapshots(image.format.children[0], header)
    areas = [
        (header.snapshots_offset, length),
        (60, 12),
        (header.refcount_table_offset, 64),
        (header.l1_table_offset, 64),
    ]
    areas += [(each.l1_table_offset, 64) for each in found] + [(header.snapshots_offset, 40)] * 3
    for _ in range(chance.randrange(1, 4)):
        at, size = chance.choice(areas)
        width = chance.choice((1, 2, 4, 8))
        at += chance.randrange(size)
        value = chance.choice(
            (0, 1, 0x80, 0xFF, 0xFFFF, 1 << 30, (1 << 63) + 512, 1 << 62, 4096, chance.getrandbits(64))
        )
        data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
    for action in range(5):
        tape = Small(bytes(data))

        def attempt(action: int = action, tape: Tape = tape) -> None:
            with Image(tape, writable=action > 0, **({"snapshot_id": "1"} if not action else {})) as image:
                if not action:
                    _attempt(lambda: image.disk.pread(0, min(image.disk.size, 1 << 20)))
                    return
                _attempt(lambda: snapshots.list_of(image.node))
                _attempt(lambda: image.format.load_vm_state("1", io.BytesIO()))
                wanted = (_create, _apply, _delete, _create_with_state)[action - 1]
                _attempt(lambda: wanted(image))
                _attempt(lambda: image.disk.pwrite(0, b"a" * 5000))

        _attempt(attempt)


@pytest.mark.parametrize(
    ("field", "width", "value", "error"),
    [
        (0, 8, 4096 + 512, CorruptImage),  # L1 table not aligned
        (0, 8, 1 << 40, CorruptImage),  # beyond the end
        (0, 8, 0, CorruptImage),  # the header
        (8, 4, 1 << 23, LimitExceeded),  # L1 table too long
        (8, 4, 1 << 22, CorruptImage),
        (36, 4, 5000, LimitExceeded),  # extra data
        (48, 8, 1 << 63, CorruptImage),  # disk size
        (48, 8, 1 << 60, LimitExceeded),
    ],
)
def test_fields_out_of_bounds(field: int, width: int, value: int, error: type[Exception]) -> None:
    start, kept = created_with(size=300 << 10, cluster_size=4096)
    data = poked(start, header_of(start).snapshots_offset + field, value, width)
    with pytest.raises(error):
        shown(data, snapshot_id="1")
    tape = Tape(data)
    with Image(tape) as image:
        now = whole(image)
        for action in (_apply, _delete):
            with pytest.raises(error):
                action(image)
        assert whole(image) == now
    assert bytes(tape.data) == data
    if field != 36:
        assert shown(data, snapshot_id="2") == kept["2"]


@pytest.mark.parametrize("value", [COPIED | 0x200, 7 << 40, COMPRESSED | (1 << 50), 0x10001 << 9 | COPIED])
def test_impossible_places_stop_it(value: int) -> None:
    start, kept = created_with(size=300 << 10, cluster_size=4096)
    tape = Tape(start)
    with Image(tape) as image:
        image.disk.pwrite(0, b"the active state has an L2 table of its own")
    data = poked(bytes(tape.data), l2_entry_place(bytes(tape.data), 8192), value)
    tape = Tape(data)
    with Image(tape) as image:
        with pytest.raises(CorruptImage):
            _create(image)
        with pytest.raises(CorruptImage):
            _apply(image)
    assert bytes(tape.data) == data
    assert states(data) == kept


def test_space_that_is_wrongly_counted_as_free_is_not_taken() -> None:
    """The L1 table's cluster has a refcount of 0: it must not become anything else."""
    start, kept = created_with(size=300 << 10, cluster_size=4096)
    header = header_of(start)
    block = int.from_bytes(start[header.refcount_table_offset :][:8], "big")
    for offset in (header.l1_table_offset, header.snapshots_offset):
        data = poked(start, block + (offset >> 12) * 2, 0, 2)
        tape = Tape(data)
        with Image(tape) as image, pytest.raises(CorruptImage, match="repair"):
            _create(image)
        assert bytes(tape.data) == data
        assert states(data) == kept


def test_entry_is_what_the_specification_says() -> None:
    info = SnapshotInfo("7", "näme", 0x5566_7788, 999, 12, 5 << 32, None, 1 << 20)
    raw = entry(info, 0x30000, 3).raw
    assert struct.unpack_from(">QIHHIIQII", raw) == (0x30000, 3, 1, 5, 0x5566_7788, 999, 12, 0, 24)
    assert struct.unpack_from(">QQQ", raw, 40) == (5 << 32, 1 << 20, (1 << 64) - 1)
    assert raw[64:70] == b"7n\xc3\xa4me" and len(raw) % 8 == 0


def test_space_of_a_deleted_snapshot_is_given_back() -> None:
    """What only it had reads as zeros in the file afterwards, for the tape writes zeros where it is told to discard."""
    tape = Tape(created(size=2 << 20, cluster_size=4096))
    with Image(tape) as image:
        image.disk.pwrite(0, b"K" * (1 << 20))
        snapshots.create(image.node, "s")
        image.disk.pwrite(0, b"L" * (1 << 20))
        image.disk.flush()
        assert tape.data.count(b"K" * 4096) == 256
        _delete(image)
        assert tape.data.count(b"K") < 4096
        snapshots.create(image.node, "t")
        image.disk.pwrite(0, b"M" * (1 << 20))
        _apply(image)
        assert tape.data.count(b"M") < 4096 and tape.data.count(b"L" * 4096) == 256
    sound(bytes(tape.data))
