"""Persistent bitmaps: what is stored is what was recorded."""

from __future__ import annotations

import random

import pytest

from diskwright.core import bitmaps
from diskwright.errors import GraphError, ImageError
from tests.formats.qcow2.bitmap_support import Model, dirty, sound, stored, with_bitmaps
from tests.formats.qcow2.support import (
    LONG,
    Image,
    Tape,
    created,
)
from tests.formats.qcow2.test_threads import together

SECTOR = 512


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
