"""Persistent bitmaps: what is stored is what was recorded, and whatever goes wrong, none is ever wrong."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

from diskwright.core import bitmaps
from diskwright.core.bitmap import DirtyBitmap, InconsistentBitmap
from diskwright.errors import CorruptImage, DiskwrightError, GraphError, ImageError, LimitExceeded
from diskwright.formats.qcow2 import bitmap_store
from diskwright.formats.qcow2.bitmap_header import EXT_VACANT
from diskwright.formats.qcow2.bitmaps import AUTO, EXTRA_DATA_COMPATIBLE, IN_USE, Entry, encode_directory, read_entries
from diskwright.formats.qcow2.header import BITMAPS, EXT_BITMAPS
from tests.formats.qcow2.support import (
    LONG,
    Change,
    Image,
    Tape,
    checked,
    contents,
    created,
    header_of,
    poked,
    qemu_check,
)
from tests.formats.qcow2.test_crash import after_crash
from tests.formats.qcow2.test_threads import together

SECTOR = 512


def dirty(bitmap: DirtyBitmap) -> set[int]:
    """Numbers of the granules that are dirty."""
    return {at for at in range(-(-bitmap.size // bitmap.granularity)) if bitmap.get(at * bitmap.granularity)}


def stored(data: bytes) -> dict[str, tuple[bool, set[int] | None]]:
    """Of each bitmap in an image whether it records and what is dirty in it; None for an inconsistent one."""
    with Image(Tape(data), writable=False) as image:
        return {
            str(each.name): (each.enabled, None if each.inconsistent else dirty(each))
            for each in bitmaps.named(image.node)
        }


def entries_of(data: bytes) -> list[Entry]:
    with Image(Tape(data), writable=False) as image:
        return read_entries(image.format.children[0], image.format.header)


def sound(data: bytes) -> None:
    report = checked(data)
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages


def with_bitmaps(*names: str, **options: object) -> bytes:
    """A new image with bitmaps of which each has a granule dirty."""
    tape = Tape(created(**{"size": 1 << 20, **options}))
    with Image(tape) as image:
        for number, name in enumerate(names):
            bitmaps.add(image.node, name, persistent=True).mark(number << 16, 1)
    return bytes(tape.data)


# -- what is stored is what was recorded ----------------------------------------------------------------


class Model:
    """Bitmaps as sets of granules, beside those of an image."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.all: dict[str, tuple[int, bool, set[int]]] = {}  # granularity, whether it records, granules

    def wrote(self, offset: int, length: int) -> None:
        for granularity, enabled, granules in self.all.values():
            if enabled:
                granules.update(range(offset // granularity, (offset + length - 1) // granularity + 1))

    def resized(self, size: int) -> None:
        self.size = size
        for name, (granularity, enabled, granules) in self.all.items():
            kept = {granule for granule in granules if granule * granularity < size}
            self.all[name] = granularity, enabled, kept

    def step(self, image: Image, chance: random.Random, *, resize: bool = True) -> None:
        """One thing that can be done with bitmaps, or with the disk."""
        node, disk = image.node, image.disk
        name = f"bitmap {chance.randrange(4)}"
        action = chance.random()
        if name not in self.all:
            granularity, enabled = 512 << chance.randrange(4), chance.random() < 0.7
            bitmaps.add(node, name, granularity, persistent=True, enabled=enabled)
            self.all[name] = granularity, enabled, set()
        elif action < 0.05:
            bitmaps.remove(node, name)
            del self.all[name]
        elif action < 0.1:
            bitmaps.clear(node, name)
            self.all[name][2].clear()
        elif action < 0.2:
            granularity, enabled, granules = self.all[name]
            (bitmaps.disable if enabled else bitmaps.enable)(node, name)
            self.all[name] = granularity, not enabled, granules
        elif action < 0.3:
            other = chance.choice(list(self.all))
            bitmaps.merge(node, name, [(node, other)])
            granularity, theirs = self.all[name][0], self.all[other][0]
            for granule in list(self.all[other][2]):
                end = min((granule + 1) * theirs, self.size)
                self.all[name][2].update(range(granule * theirs // granularity, (end - 1) // granularity + 1))
        elif action < 0.35 and resize:
            size = chance.randrange(1, 400) * SECTOR
            node.resize(size)
            self.resized(size)
        else:
            offset = chance.randrange(self.size)
            length = min(self.size - offset, chance.choice((1, 512, 700, 5000, 70000)))
            kind = chance.random()
            if kind < 0.7:
                disk.pwrite(offset, chance.randbytes(length))
            elif kind < 0.85:
                disk.zero(offset, length)
            else:
                disk.trim(offset, length)
            self.wrote(offset, length)

    def check(self, found: dict[str, tuple[bool, set[int] | None]]) -> None:
        assert found == {name: (enabled, granules) for name, (_, enabled, granules) in self.all.items()}


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("seed", range(30 if LONG else 3))
def test_bitmaps_are_as_recorded_after_each_closing(cluster_size: int, seed: int) -> None:
    chance = random.Random(f"{cluster_size} {seed}")
    tape = Tape(created(size=100 << 10, cluster_size=cluster_size))
    model = Model(100 << 10)
    for _ in range(12):
        with Image(tape) as image:
            for _ in range(chance.randrange(15)):
                model.step(image, chance)
            model.check({str(each.name): (each.enabled, dirty(each)) for each in bitmaps.named(image.node)})
        model.check(stored(bytes(tape.data)))
        sound(bytes(tape.data))


def test_a_bitmap_that_is_all_dirty_takes_no_space() -> None:
    tape = Tape(created(size=64 << 20, cluster_size=512))
    with Image(tape) as image:
        bitmaps.add(image.node, "all", 512, persistent=True).set_all()
    assert len(tape.data) < 24 << 10
    sound(bytes(tape.data))
    assert stored(bytes(tape.data)) == {"all": (True, set(range(64 << 11)))}


def test_many_clusters_of_bits() -> None:
    chance = random.Random(1)
    tape = Tape(created(size=64 << 20, cluster_size=512))
    with Image(tape) as image:
        bitmap = bitmaps.add(image.node, "noise", 512, persistent=True)
        bitmap.load_bits(0, chance.randbytes(len(bitmap.buffer)))
        expected = bytes(bitmap.buffer)
    sound(bytes(tape.data))
    with Image(tape) as image:
        found = bitmaps.find(image.node, "noise")
        assert bytes(found.buffer) == expected and found.granules == sum(map(int.bit_count, expected))
    with Image(tape) as image:
        bitmaps.remove(image.node, "noise")
    sound(bytes(tape.data))


def test_reading_changes_nothing_and_loads_nothing() -> None:
    tape = Tape(with_bitmaps("one"))
    with Image(tape, writable=False) as image:
        assert image.node.bitmaps == ()
        assert dirty(bitmaps.find(image.node, "one")) == {0}
        with pytest.raises(GraphError, match="Bitmap 'one' is readonly and cannot be modified"):
            bitmaps.clear(image.node, "one")
    assert not tape.changes


def test_what_is_only_opened_stays_as_it_is() -> None:
    tape = Tape(with_bitmaps("one", "two"))
    with Image(tape) as image:
        bitmaps.disable(image.node, "two")
    before = stored(bytes(tape.data))
    for _ in range(3):
        with Image(tape):
            pass
        assert stored(bytes(tape.data)) == before == {"one": (True, {0}), "two": (False, {1})}
    sound(bytes(tape.data))


def test_a_disabled_bitmap_is_not_touched_by_writes() -> None:
    """Not even marked in use: a crash must not cost it."""
    tape = Tape(with_bitmaps("frozen"))
    with Image(tape) as image:
        bitmaps.disable(image.node, "frozen")
    with Image(tape) as image:
        image.disk.pwrite(0, b"x" * (1 << 20))
        image.disk.flush()
        assert stored(bytes(tape.data)) == {"frozen": (False, {0})}
        bitmaps.enable(image.node, "frozen")
        assert stored(bytes(tape.data)) == {"frozen": (False, None)}
    assert stored(bytes(tape.data)) == {"frozen": (True, {0})}


@pytest.mark.parametrize("change", ["mark", "clear", "merge", "take", "resize"])
def test_whatever_changes_a_bitmap_first_marks_it_in_use(change: str) -> None:
    tape = Tape(with_bitmaps("frozen", "other"))
    with Image(tape) as image:
        bitmaps.disable(image.node, "frozen")
    with Image(tape) as image:
        bitmap = bitmaps.find(image.node, "frozen")
        if change == "mark":
            bitmap.mark(1 << 19, 1)
        elif change == "clear":
            bitmap.clear_all()
        elif change == "merge":
            bitmap.merge(bitmaps.find(image.node, "other"))
        elif change == "take":
            bitmap.take(0)
        else:
            image.node.resize(2 << 20)
        assert stored(bytes(tape.data))["frozen"] == (False, None)
        expected = dirty(bitmap)
    assert stored(bytes(tape.data))["frozen"] == (False, expected)


def test_new_space_is_clean_and_lost_space_forgotten() -> None:
    tape = Tape(created(size=1 << 20))
    with Image(tape) as image:
        bitmaps.add(image.node, "b", 65536, persistent=True).set_all()
        image.node.resize(2 << 20)
    assert stored(bytes(tape.data)) == {"b": (True, set(range(16)))}
    with Image(tape) as image:
        image.node.resize(100 << 10)
    assert stored(bytes(tape.data)) == {"b": (True, {0, 1})}
    sound(bytes(tape.data))


def test_merging_is_all_or_nothing() -> None:
    with Image(Tape(with_bitmaps("one", "two"))) as image:
        with pytest.raises(GraphError, match="Dirty bitmap 'gone' not found"):
            bitmaps.merge(image.node, "one", [(image.node, "two"), (image.node, "gone")])
        assert dirty(bitmaps.find(image.node, "one")) == {0}


def test_refusals() -> None:
    with Image(Tape(with_bitmaps("one"))) as image:
        for name, words in (("one", "Bitmap already exists: one"), ("", "Bitmap name cannot be empty")):
            with pytest.raises(GraphError, match=words):
                bitmaps.add(image.node, name, persistent=True)
        for name in ("x" * 1024, "é" * 512):
            with pytest.raises(ImageError, match="Name length exceeds maximum"):
                bitmaps.add(image.node, name, persistent=True)
        with pytest.raises(ImageError, match="cannot contain NUL"):
            bitmaps.add(image.node, "a\0b", persistent=True)
        bitmaps.add(image.node, "é" * 511 + "x", persistent=True)
    with Image(Tape(created(size=1 << 20, compat="0.10"))) as image:
        with pytest.raises(ImageError, match="Cannot store dirty bitmaps in qcow2 v2 files"):
            bitmaps.add(image.node, "one", persistent=True)
        bitmaps.add(image.node, "in memory")
        assert [each.name for each in bitmaps.named(image.node)] == ["in memory"]
    with (
        Image(Tape(created(size=1 << 45, cluster_size=2 << 20))) as image,
        pytest.raises(ImageError, match="Too much space will be occupied"),
    ):
        bitmaps.add(image.node, "fine", 4096, persistent=True)


def test_bitmaps_in_memory_are_not_stored() -> None:
    tape = Tape(created(size=1 << 20))
    with Image(tape) as image:
        bitmaps.add(image.node, "fleeting")
    assert bytes(tape.data) == created(size=1 << 20)


@pytest.mark.parametrize(("cluster_size", "granularity"), [(512, 4096), (4096, 4096), (65536, 65536), (2 << 20, 65536)])
def test_default_granularity(cluster_size: int, granularity: int) -> None:
    with Image(Tape(created(size=1 << 20, cluster_size=cluster_size))) as image:
        assert bitmaps.add(image.node, "b", persistent=True).granularity == granularity


def test_threads_write_while_a_bitmap_records() -> None:
    step, rows = 700, 200
    tape = Tape(created(size=-(-step * 6 * rows // SECTOR) * SECTOR, cluster_size=512))
    written: set[int] = set()
    with Image(tape) as image:
        bitmaps.add(image.node, "b", 512, persistent=True)

        def work(number: int) -> None:
            chance = random.Random(number)
            mine = set()
            for _ in range(rows):
                offset = (chance.randrange(rows) * 6 + number) * step
                image.disk.pwrite(offset, b"x" * step)
                mine.update(range(offset // 512, (offset + step - 1) // 512 + 1))
            written.update(mine)

        together(work)
    sound(bytes(tape.data))
    assert stored(bytes(tape.data)) == {"b": (True, written)}


# -- the header -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("length", [0, 1, 9, 100, 200, 301])
def test_the_backing_file_name_makes_room(cluster_size: int, length: int) -> None:
    """Wherever a crash comes, the name is there, and other extensions are as they were."""
    names = {"backing_file": "b" * length, "backing_fmt": "raw"} if length else {}
    start = created(size=1 << 20, cluster_size=cluster_size, **names)
    tape = Tape(start)
    with Image(tape) as image:
        bitmaps.add(image.node, "one", persistent=True)
    before = header_of(start)
    for seed in range(3):
        chance = random.Random(seed)
        for position in range(len(tape.changes) + 1):
            header = header_of(after_crash(start, tape.changes, position, chance))
            assert header.backing_file == before.backing_file
            assert [pair for pair in header.extensions if pair[0] != EXT_BITMAPS] == before.extensions
    assert header_of(bytes(tape.data)).autoclear_features == BITMAPS
    with Image(tape) as image:
        bitmaps.remove(image.node, "one")
    header = header_of(bytes(tape.data))
    assert (header.extensions, header.backing_file) == (before.extensions, before.backing_file)
    assert header.autoclear_features == 0
    sound(bytes(tape.data))


def test_no_room_in_the_header() -> None:
    start = created(size=1 << 20, cluster_size=512, backing_file="b" * 380)
    tape = Tape(start)
    image = Image(tape)
    bitmaps.add(image.node, "one", persistent=True)
    with pytest.raises(ImageError, match="no room for bitmaps in the header"):
        image.close()
    assert header_of(bytes(tape.data)).backing_file == b"b" * 380
    assert stored(bytes(tape.data)) == {}


def followed(data: bytes) -> bytes:
    """Another extension behind the bitmaps extension."""
    place = data.index(struct.pack(">II", EXT_BITMAPS, 24)) + 32
    changed = bytearray(data)
    changed[place : place + 16] = struct.pack(">II8s", 0x1234_5678, 8, b"follower")
    return bytes(changed)


def test_the_last_bitmap_leaves_an_extension_that_others_follow() -> None:
    tape = Tape(followed(with_bitmaps("one")))
    with Image(tape) as image:
        bitmaps.remove(image.node, "one")
    header = header_of(bytes(tape.data))
    assert header.extension(EXT_BITMAPS) is None and header.extension(0x1234_5678) == b"follower"
    assert header.extension(EXT_VACANT) is not None
    with Image(tape) as image:
        bitmaps.add(image.node, "two", persistent=True).mark(0, 1)
    header = header_of(bytes(tape.data))
    assert header.extension(EXT_VACANT) is None and header.extension(0x1234_5678) == b"follower"
    assert stored(bytes(tape.data)) == {"two": (True, {0})}
    sound(bytes(tape.data))


def test_an_extension_across_sectors_is_exchanged_in_steps() -> None:
    start = bytearray(with_bitmaps("one"))
    place = start.index(struct.pack(">II", EXT_BITMAPS, 24))
    extension = bytes(start[place : place + 32])
    shift = (488 - place) % 512
    start[place : place + 8] = struct.pack(">II", 0x1111_1111, shift - 8)
    start[place + shift : place + shift + 32] = extension
    assert (place + shift + 8) // 512 != (place + shift + 31) // 512
    data = bytes(start)
    tape = Tape(data)
    with Image(tape) as image:
        image.disk.pwrite(5 << 16, b"x")
    for position in range(len(tape.changes) + 1):
        found = stored(after_crash(data, tape.changes, position, random.Random(position)))
        assert found in ({}, {"one": (True, {0})}, {"one": (False, None)}, {"one": (True, {0, 5})})
    assert stored(bytes(tape.data)) == {"one": (True, {0, 5})}


def test_bitmaps_of_a_program_that_did_not_know_them_are_void() -> None:
    tape = Tape(poked(with_bitmaps("one"), 88, 0))
    assert stored(bytes(tape.data)) == {}
    with Image(tape) as image:
        assert bitmaps.named(image.node) == []
        image.disk.pwrite(0, b"x")
        bitmaps.add(image.node, "two", persistent=True)
    assert stored(bytes(tape.data)) == {"two": (True, set())}


# -- crashes and failures -------------------------------------------------------------------------------


def session(tape: Tape, chance: random.Random, steps: int) -> None:
    """Bitmaps are made, changed and written under, until the image is closed."""
    with Image(tape) as image:
        model = Model(image.disk.size)
        for each in bitmaps.named(image.node):
            model.all[str(each.name)] = each.granularity, each.enabled, dirty(each)
        for _ in range(steps):
            model.step(image, chance, resize=False)
            if chance.random() < 0.2:
                image.disk.flush()


def never_wrong(
    data: bytes, disk: bytes, before: dict[str, tuple[bool, set[int] | None]],
    after: dict[str, tuple[bool, set[int] | None]],
) -> None:  # fmt: skip
    """What is stored after a crash is what was before the session (of a bitmap that records only as long as nothing
    has been written), what is after it, or says of itself that it is no good."""
    report = checked(data)
    assert not report.corruptions and not report.check_errors, report.messages
    now = None
    for name, (enabled, granules) in stored(data).items():
        if granules is None or (enabled, granules) == after.get(name):
            continue
        assert (enabled, granules) == before.get(name)
        if enabled:
            now = now if now is not None else contents(data)
            assert now == disk, f"{name} does not know of writes"


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("seed", range(40 if LONG else 4))
def test_crash_anywhere(cluster_size: int, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{cluster_size} {seed}")
    tape = Tape(created(size=64 << 10, cluster_size=cluster_size))
    session(tape, chance, 20)
    for _ in range(2):
        start = bytes(tape.data)
        before, disk = stored(start), contents(start)
        tape.changes.clear()
        session(tape, chance, 25)
        after = stored(bytes(tape.data))
        for position in range(len(tape.changes) + 1):
            data = after_crash(start, tape.changes, position, chance)
            never_wrong(data, disk, before, after)
            if position % 10 == 0:
                recovered(data)
            if position % 40 == 7:
                (tmp_path / "crashed").write_bytes(data)
                assert not qemu_check(tmp_path / "crashed")["corruptions"]


def recovered(data: bytes) -> None:
    """An image after a crash is used again: the broken bitmaps are removed, and all is well."""
    tape = Tape(data)
    with Image(tape) as image:
        for each in bitmaps.named(image.node):
            if each.inconsistent:
                with pytest.raises(InconsistentBitmap):
                    bitmaps.clear(image.node, str(each.name))
                bitmaps.remove(image.node, str(each.name))
        image.disk.pwrite(0, b"y" * 5000)
        bitmaps.add(image.node, "new", 512, persistent=True).mark(0, 512)
    assert stored(bytes(tape.data))["new"] == (True, {0})
    assert not checked(bytes(tape.data)).corruptions
    with Image(tape, repair=True) as image:
        image.format.check("leaks")
    sound(bytes(tape.data))
    assert stored(bytes(tape.data))["new"] == (True, {0})


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_every_write_may_fail(seed: int) -> None:
    chance = random.Random(seed)
    tape = Tape(created(size=64 << 10, cluster_size=512))
    session(tape, chance, 20)
    start = bytes(tape.data)
    before, disk = stored(start), contents(start)
    script = chance.random()
    whole = Tape(start)
    session(whole, random.Random(script), 15)
    after = stored(bytes(whole.data))
    for fail in range(len(whole.changes)):
        for recovers in (False, True):
            tape = Tape(start)
            tape.fail = fail
            with pytest.raises((OSError, DiskwrightError)):
                session_that_fails(tape, random.Random(script), 15, recovers=recovers)
            tape.fail = -1
            never_wrong(bytes(tape.data), disk, before, after)
            recovered(bytes(tape.data))


def session_that_fails(tape: Tape, chance: random.Random, steps: int, *, recovers: bool) -> None:
    """As ``session``. When something fails and ``recovers``, the medium works again for closing the image."""
    image = Image(tape)
    try:
        model = Model(image.disk.size)
        for each in bitmaps.named(image.node):
            model.all[str(each.name)] = each.granularity, each.enabled, dirty(each)
        for _ in range(steps):
            model.step(image, chance, resize=False)
            if chance.random() < 0.2:
                image.disk.flush()
    except (OSError, DiskwrightError):
        # Bitmaps have gone on recording, but what is stored need not be what the script would have left.
        if recovers:
            tape.fail = -1
        for each in list(image.node.bitmaps):
            with_failure(lambda name=str(each.name): bitmaps.remove(image.node, name))
        with_failure(image.close)
        raise
    image.close()


def with_failure(action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except (OSError, DiskwrightError):
        pass


def test_a_bitmap_that_cannot_be_stored_is_told_of_and_in_use() -> None:
    class Once(Tape):
        def _record(self, change: Change) -> None:
            try:
                super()._record(change)
            except OSError:
                self.fail = -1
                raise

    tape = Once(with_bitmaps("one"))
    image = Image(tape)
    image.disk.pwrite(0, b"x")
    image.disk.flush()
    tape.fail = 1
    with pytest.raises(ImageError, match=r"could not store bitmap 'one', which is lost: .*the tape is torn"):
        image.close()
    assert stored(bytes(tape.data)) == {"one": (False, None)}
    sound(bytes(tape.data))


def test_a_resize_that_is_interrupted_leaves_no_bitmap_of_the_wrong_size() -> None:
    start = with_bitmaps("one", "two", cluster_size=512)
    tape = Tape(start)
    with Image(tape) as image:
        bitmaps.disable(image.node, "two")
    start = bytes(tape.data)
    for size in (100 << 10, 3 << 20):
        tape = Tape(start)
        with Image(tape) as image:
            image.node.resize(size)
        for position in range(len(tape.changes) + 1):
            data = after_crash(start, tape.changes, position, random.Random(position))
            with Image(Tape(data), writable=False) as image:
                for each in bitmaps.named(image.node):
                    assert each.inconsistent or (each.size == image.disk.size and dirty(each) < {0, 1, 16})
                for entry in image.format.bitmap_store.entries() if image.format.bitmap_store else ():
                    wanted = -(-image.disk.size // (1 << entry.granularity_bits) // 4096)
                    assert entry.flags & IN_USE or entry.bitmap_table_size == max(1, wanted)


@pytest.mark.parametrize(("fail", "size"), [(fail, size) for fail in range(14) for size in (100 << 10, 3 << 20)])
def test_a_resize_that_fails_leaves_bitmaps_of_the_right_size(fail: int, size: int) -> None:
    tape = Tape(with_bitmaps("one", cluster_size=512))
    image = Image(tape)
    tape.fail = fail
    with_failure(lambda: image.node.resize(size))
    tape.fail = -1
    image.close()
    found = stored(bytes(tape.data))
    assert found == {"one": (True, {0})}
    with Image(tape) as image:
        assert bitmaps.find(image.node, "one").size == image.disk.size


# -- images that are not as they should be ---------------------------------------------------------------


def rewritten(data: bytes, entries: Iterable[Entry]) -> bytes:
    """The image with another directory in the old one's place."""
    place = data.index(struct.pack(">II", EXT_BITMAPS, 24)) + 8
    _, _, _, offset = struct.unpack_from(">IIQQ", data, place)
    listed = list(entries)
    directory = encode_directory(listed)
    changed = bytearray(data)
    changed[place : place + 24] = struct.pack(">IIQQ", len(listed), 0, len(directory), offset)
    changed[offset : offset + len(directory)] = directory
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", b"", "name of bitmap 0"),
        ("name", b"x" * 1024, "name of bitmap 0"),
        ("name", b"a\0b", "name of bitmap 0"),
        ("granularity_bits", 8, "granularity_bits of bitmap 0 is 8"),
        ("granularity_bits", 32, "granularity_bits of bitmap 0 is 32"),
        ("type", 0, "type of bitmap 0 is 0"),
        ("type", 2, "type of bitmap 0 is 2"),
        ("name", b"two", "another has it too"),
    ],
)
def test_impossible_entries_are_refused(field: str, value: object, words: str) -> None:
    data = with_bitmaps("one", "two")
    entries = entries_of(data)
    setattr(entries[0], field, value)
    damaged = rewritten(data, entries)
    with pytest.raises(CorruptImage, match=words):
        stored(damaged)
    with pytest.raises(CorruptImage, match=words):
        Image(Tape(damaged))
    assert contents(damaged) == bytes(1 << 20), "the disk can still be read"


@pytest.mark.parametrize(
    ("at", "layout", "value", "words"),
    [
        (0, "I", 0, "nb_bitmaps"),
        (0, "I", 65536, "nb_bitmaps"),
        (0, "I", 3, "bitmap directory|sizes in the entry|bitmap_directory_size"),
        (0, "I", 1, "bitmap_directory_size"),
        (8, "Q", 0, "bitmap_directory_size"),
        (8, "Q", 1 << 60, "bitmap_directory_size"),
        (8, "Q", 60, "sizes in the entry|too short|bitmap_directory_size"),
        (16, "Q", 0, "bitmap_directory_offset"),
        (16, "Q", 512, "bitmap_directory_offset"),
        (16, "Q", 1 << 62, "bitmap_directory_offset"),
    ],
)
def test_impossible_directories_are_refused(at: int, layout: str, value: int, words: str) -> None:
    data = bytearray(with_bitmaps("one", "two"))
    struct.pack_into(f">{layout}", data, data.index(struct.pack(">II", EXT_BITMAPS, 24)) + 8 + at, value)
    with pytest.raises(CorruptImage, match=words):
        stored(bytes(data))
    with pytest.raises(CorruptImage, match=words):
        Image(Tape(bytes(data)))


@pytest.mark.parametrize("value", ["reserved", "unaligned", "beyond", "header", "itself", "refcounts", "size", "place"])
def test_a_bitmap_with_an_impossible_table_is_inconsistent_and_no_more(value: str) -> None:
    data = with_bitmaps("one", "two")
    entries = entries_of(data)
    table = entries[0].bitmap_table_offset
    header = header_of(data)
    damaged = {
        "reserved": lambda: poked(data, table, 1 << 60),
        "unaligned": lambda: poked(data, table, 0x50200),
        "beyond": lambda: poked(data, table, 1 << 40),
        "header": lambda: poked(data, table, header.refcount_table_offset),
        "itself": lambda: poked(data, table, table),
        "refcounts": lambda: poked(data, table, header.l1_table_offset),
        "size": lambda: rewritten(data, [_with(entries[0], "bitmap_table_size", 2), entries[1]]),
        "place": lambda: rewritten(data, [_with(entries[0], "bitmap_table_offset", 77), entries[1]]),
    }[value]()
    tape = Tape(damaged)
    with Image(tape) as image:
        one, two = bitmaps.named(image.node)
        assert (one.inconsistent, two.inconsistent) == (True, False)
        image.disk.pwrite(9 << 16, b"x")
    found = stored(bytes(tape.data))
    assert found == {"one": (False, None), "two": (True, {1, 9})}
    assert entries_of(bytes(tape.data))[0].flags == IN_USE | AUTO, "what was not recorded must not be believed"
    with Image(tape) as image:
        bitmaps.remove(image.node, "one")
        image.disk.pwrite(0, bytes(range(256)) * 4096)
    assert stored(bytes(tape.data)) == {"two": (True, set(range(16)))}
    assert contents(bytes(tape.data)) == bytes(range(256)) * 4096
    assert not checked(bytes(tape.data)).corruptions


def _with(entry: Entry, field: str, value: int) -> Entry:
    setattr(entry, field, value)
    return entry


def test_two_bitmaps_cannot_share_a_cluster() -> None:
    data = with_bitmaps("one", "two")
    first, second = (entry.bitmap_table_offset for entry in entries_of(data))
    shared = bytearray(data)
    shared[second : second + 8] = shared[first : first + 8]
    tape = Tape(bytes(shared))
    with Image(tape) as image:
        assert [each.inconsistent for each in bitmaps.named(image.node)] == [False, True]
        bitmaps.remove(image.node, "two")
    assert stored(bytes(tape.data)) == {"one": (True, {0})}


def test_extra_data_that_does_no_harm_is_kept() -> None:
    data = with_bitmaps("one")
    (entry,) = entries_of(data)
    entry.extra_data, entry.flags = b"more than we know", AUTO | EXTRA_DATA_COMPATIBLE
    tape = Tape(rewritten(data, [entry]))
    with Image(tape) as image:
        image.disk.pwrite(5 << 16, b"x")
    (entry,) = entries_of(bytes(tape.data))
    assert (entry.extra_data, entry.flags) == (b"more than we know", AUTO | EXTRA_DATA_COMPATIBLE)
    assert stored(bytes(tape.data)) == {"one": (True, {0, 5})}
    sound(bytes(tape.data))


@pytest.mark.parametrize(("flags", "extra"), [(0, b"what is this?"), (8, b"")])
def test_what_is_not_understood_is_kept_or_refused(flags: int, extra: bytes) -> None:
    data = with_bitmaps("one", "two")
    one, two = entries_of(data)
    one.extra_data, one.flags = extra, flags
    tape = Tape(rewritten(data, [one, two]))
    with Image(tape) as image:
        assert bitmaps.find(image.node, "one").inconsistent
        image.disk.pwrite(5 << 16, b"x")
        with pytest.raises(InconsistentBitmap):
            image.node.resize(2 << 20)
    kept = entries_of(bytes(tape.data))[0]
    assert (kept.extra_data, kept.flags, kept.bitmap_table_offset) == (extra, flags, one.bitmap_table_offset)
    sound(bytes(tape.data))
    one.flags |= AUTO
    with pytest.raises(ImageError, match="bitmap 'one' would have to record writes"):
        Image(Tape(rewritten(data, [one, two])))


def test_memory_is_bounded_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_bitmaps("one", "two")
    entries = entries_of(data)
    entries[0].bitmap_table_size = 0xFFFF_FFFF
    with pytest.raises(LimitExceeded, match="the tables of its bitmaps take"):
        Image(Tape(rewritten(data, entries)))
    monkeypatch.setattr(bitmap_store, "MAX_BITS_BYTES", 5)
    with pytest.raises(LimitExceeded, match="bitmaps take 6 bytes"):
        stored(data)


def test_hostile_bytes_do_no_more_than_raise() -> None:
    data = with_bitmaps("one", "two", cluster_size=512)
    place = data.index(struct.pack(">II", EXT_BITMAPS, 24))
    _, _, size, offset = struct.unpack_from(">IIQQ", data, place + 8)
    spots = [*range(place + 8, place + 32), *range(offset, offset + size)]
    spots += [entry.bitmap_table_offset + i for entry in entries_of(data) for i in range(8)]
    chance = random.Random(7)
    for spot in spots:
        changed = bytearray(data)
        changed[spot] ^= 1 << chance.randrange(8)
        tape = Tape(bytes(changed))
        try:
            with Image(tape) as image:
                image.disk.pwrite(0, bytes(range(256)) * 4096)
                assert image.disk.pread(0, 1 << 20) == bytes(range(256)) * 4096
        except DiskwrightError:
            continue
        assert contents(bytes(tape.data)) == bytes(range(256)) * 4096


def test_a_bitmap_in_clusters_counted_as_free_is_not_believed() -> None:
    data = with_bitmaps("one", cluster_size=512)
    (entry,) = entries_of(data)
    (block,) = struct.unpack_from(">Q", data, header_of(data).refcount_table_offset)
    tape = Tape(poked(data, block + entry.bitmap_table_offset // 512 * 2, 0, 2))
    with Image(tape) as image:
        assert bitmaps.find(image.node, "one").inconsistent
        image.disk.pwrite(0, b"z" * (1 << 20))
    assert contents(bytes(tape.data)) == b"z" * (1 << 20)
    assert stored(bytes(tape.data)) == {"one": (False, None)}


def test_a_repair_leaves_bitmaps_alone() -> None:
    tape = Tape(with_bitmaps("one"))
    with Image(tape, repair=True) as image:
        image.format.check("all")
    assert stored(bytes(tape.data)) == {"one": (True, {0})}
    sound(bytes(tape.data))
