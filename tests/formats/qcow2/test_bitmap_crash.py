"""Crashes and failures: whenever they come, no bitmap is ever wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.core import bitmaps
from diskwright.core.bitmap import InconsistentBitmap
from diskwright.errors import DiskwrightError, ImageError
from diskwright.formats.qcow2.bitmaps import IN_USE
from tests.formats.qcow2.bitmap_support import Model, dirty, sound, stored, with_bitmaps
from tests.formats.qcow2.support import (
    LONG,
    Change,
    Image,
    Tape,
    checked,
    contents,
    created,
    qemu_check,
)
from tests.formats.qcow2.test_crash import after_crash


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
