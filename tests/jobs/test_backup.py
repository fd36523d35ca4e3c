"""Backup: the target is the source as it was when the job was made, whatever is written meanwhile."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diskwright.core import bitmaps
from diskwright.core.create import create_image
from diskwright.core.graph import Graph
from diskwright.errors import GraphError, OptionError
from diskwright.jobs.backup import Backup
from diskwright.jobs.job import Cancelled
from diskwright.jobs.states import State
from diskwright.units import KiB, MiB
from tests.jobs.chains import chain_of, read_file
from tests.jobs.faulty import Fault, faulty_node
from tests.jobs.mirrors import GUEST, WAIT, Rig, Writers, fast_storage, read_all, rig, until

SIZE = 3 * MiB + 70 * KiB
GRANULE = 64 * KiB


def backup(r: Rig, **options: Any) -> Backup:
    job = Backup("b", r.graph, r.source, r.target, on_event=r.note, **options)
    r.jobs.append(job)
    return job


@contextmanager
def writing(r: Rig, threads: int = 3) -> Iterator[Writers]:
    """Writers that check afterwards that nothing of theirs was lost."""
    with Writers(r.guest, threads) as writers:
        yield writers
    writers.check()


# -- the moment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_an_idle_disk_step_by_step(old: bool) -> None:
    with rig(SIZE) as r:
        r.fill()
        if old:
            r.target_ram.data[:] = b"\xaa" * SIZE
        job = backup(r)
        assert r.guest.node is not r.source
        job.start()
        job.result(WAIT)
        assert r.names() == ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
        assert r.data_of("BLOCK_JOB_COMPLETED") == {
            "type": "backup", "device": "b", "len": SIZE, "offset": SIZE, "speed": 0,
        }  # fmt: skip
        assert r.target_bytes() == bytes(r.source_ram.data)
        assert r.guest.node is r.source
        assert r.target_ram.calls[-1] == ("flush",)


@pytest.mark.parametrize("speed", [0, 8 * MiB])
@pytest.mark.parametrize("workers", [1, 4])
def test_under_load_the_target_is_the_moment_it_was_made(speed: int, workers: int) -> None:
    with rig(SIZE) as r:
        fast_storage(r.source_ram)
        r.fill()
        with writing(r) as writers:
            until(lambda: writers.writes > 20)
            with r.graph.drained():
                moment = bytes(r.source_ram.data)
                job = backup(r, speed=speed, max_workers=workers)
            until(lambda before=writers.writes: writers.writes > before + 20)
            job.start()
            job.result(WAIT)
            copied = r.target_bytes()
            until(lambda before=writers.writes: writers.writes > before + 20)
        assert copied == moment == r.target_bytes()
        assert moment != bytes(r.source_ram.data)


def test_a_write_waits_for_the_copy_of_its_granule_only() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        job = backup(r, max_workers=1, max_chunk=GRANULE)
        held, go = threading.Event(), threading.Event()

        def hold(operation: str, offset: int, length: int) -> None:
            if operation == "write" and offset == 0:
                held.set()
                assert go.wait(WAIT)

        r.target_ram.hook = hold
        job.start()
        assert held.wait(WAIT)  # it has read the first granule, and not yet written it
        r.guest.pwrite(10 * GRANULE, b"elsewhere")  # does not wait, and copies first
        assert r.target_bytes()[10 * GRANULE : 11 * GRANULE] == moment[10 * GRANULE : 11 * GRANULE]
        writer = threading.Thread(target=r.guest.pwrite, args=(100, b"here"))
        writer.start()
        writer.join(0.05)
        assert writer.is_alive()
        go.set()
        writer.join(WAIT)
        job.result(WAIT)
        assert r.target_bytes() == moment
        assert r.source_ram.data[100:104] == b"here"


def test_several_disks_of_one_moment() -> None:
    with rig(SIZE) as r:
        other, other_ram = faulty_node(r.graph, SIZE, "other")
        to, _ = faulty_node(r.graph, SIZE, "to")
        guest = r.graph.disk(other, GUEST)
        with r.graph.drained():
            job = backup(r)
            second = Backup("c", r.graph, other, to)
            r.jobs.append(second)
        r.guest.pwrite(0, b"late")
        guest.pwrite(0, b"late")
        for each in (job, second):
            each.start()
            each.result(WAIT)
        assert not any(r.target_bytes())
        assert not any(read_all(to))
        assert other_ram.data[:4] == b"late"
        guest.close()


@pytest.mark.parametrize("kind", ["write", "zero", "trim", "detect"])
def test_every_kind_of_change_is_preceded_by_a_copy(kind: str) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        job = backup(r)
        at = 5 * GRANULE - 100
        if kind == "write":
            r.guest.pwrite(at, b"x" * 200)
        elif kind == "zero":
            r.guest.zero(at, 2 * GRANULE)
        elif kind == "trim":
            r.guest.trim(at, 2 * GRANULE)
        else:
            r.source.detect_zeroes = "on"
            r.guest.pwrite(at, bytes(200))
        assert bytes(r.source_ram.data) != moment
        start = 4 * GRANULE
        assert r.target_bytes()[start : start + 2 * GRANULE] == moment[start : start + 2 * GRANULE]
        job.start()
        job.result(WAIT)
        assert r.target_bytes() == moment


# -- what is copied --------------------------------------------------------------------------------


def test_none_keeps_what_is_written_over_until_it_is_cancelled() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        job = backup(r, sync="none")
        job.start()
        until(lambda: job.state is State.RUNNING)
        r.guest.pwrite(MiB + 5, b"new")
        assert r.target_bytes()[MiB : MiB + GRANULE] == moment[MiB : MiB + GRANULE]
        assert not any(r.target_bytes()[:MiB])
        job.cancel(force=False)
        assert job.wait(WAIT)
        assert isinstance(job.error, Cancelled)
        assert r.names()[-3:] == ["BLOCK_JOB_CANCELLED", "concluded", "null"]
        r.guest.pwrite(0, b"after")
        assert not any(r.target_bytes()[:MiB])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("sync", ["full", "top"])
def test_images_with_backing_files(tmp_path: Path, sync: str, compress: bool) -> None:
    with chain_of(tmp_path, [SIZE, SIZE], cluster_size=4096) as c:
        target = str(tmp_path / "target.qcow2")
        backing = {"backing_file": c.names[0], "backing_fmt": "qcow2"} if sync == "top" else {}
        create_image(target, "qcow2", {"size": SIZE, **backing})
        node = c.graph.open(target, writable=True)
        with Writers(c.guest, 2) as writers:
            until(lambda: writers.writes > 5)
            with c.graph.drained():
                moment = read_all(c.top)
                job = c.keep(Backup("b", c.graph, c.top, node, sync=sync, compress=compress, on_event=c.note))  # type: ignore[arg-type]
            job.start()
            job.result(WAIT)
        writers.check()
        offset, length = job.progress()
        assert offset == length
        assert (length < SIZE) == (sync == "top" and length != SIZE)
        c.graph.release(node)
        node = c.graph.open(target)
        assert read_all(node) == moment
        from diskwright.extents import SPECIAL

        assert (SPECIAL in node.extents(0, SIZE).kind) == compress
        c.graph.release(node)
    assert read_file(target) == moment


def test_top_leaves_out_what_is_below(tmp_path: Path) -> None:
    with chain_of(tmp_path, [SIZE]) as c:
        base = c.names[0]
    overlay, target = str(tmp_path / "overlay.qcow2"), str(tmp_path / "target.qcow2")
    for name in (overlay, target):
        create_image(name, "qcow2", {"backing_file": base, "backing_fmt": "qcow2"})
    graph = Graph()
    try:
        source, node = graph.open(overlay, writable=True), graph.open(target, writable=True)
        source.pwrite(MiB, b"own")
        moment = read_all(source)
        job = Backup("b", graph, source, node, sync="top")
        job.start()
        job.result(WAIT)
        assert job.progress() == (GRANULE, GRANULE)
        assert read_all(node) == moment
    finally:
        graph.close()
    assert read_file(target) == moment


@pytest.mark.parametrize("sync", ["none", "full"])
def test_a_target_that_stands_on_the_source(tmp_path: Path, sync: Any) -> None:
    """As fleecing was done before there was snapshot-access: where the target has nothing it reads the source, so what
    was zeros has to be copied before it is written to as well."""
    disk, over = str(tmp_path / "disk.qcow2"), str(tmp_path / "over.qcow2")
    create_image(disk, "qcow2", {"size": SIZE})
    create_image(over, "qcow2", {"size": SIZE})
    graph = Graph()
    try:
        source = graph.open({"driver": "qcow2", "filename": disk, "node-name": "disk"}, writable=True)
        node = graph.open({"driver": "qcow2", "filename": over, "backing": "disk"}, writable=True)
        guest = graph.disk(source, GUEST)
        guest.pwrite(MiB, b"old" * GRANULE)
        moment = read_all(source)
        job = Backup("b", graph, source, node, sync=sync)
        for at in (0, MiB, 2 * MiB):
            guest.pwrite(at, b"new")
        assert read_all(node) == moment
        job.start()
        if sync == "full":
            job.result(WAIT)
            guest.pwrite(0, b"x" * SIZE)
        else:
            guest.zero(0, SIZE)
        assert read_all(node) == moment
        if sync == "none":
            job.cancel()
            assert job.wait(WAIT)
        graph.release(node)
    finally:
        graph.close()


# -- dirty bitmaps ---------------------------------------------------------------------------------

ABC = (0, 7 * GRANULE, 20 * GRANULE)


def dirty(r: Rig, name: str = "d") -> list[int]:
    """The granules that are dirty."""
    bitmap = bitmaps.find(r.source, name)
    return [at // GRANULE for at in range(0, SIZE, GRANULE) if bitmap.get(at)]


def prepared(r: Rig) -> bytes:
    """A full copy in the target, then three writes that the bitmap ``d`` records."""
    r.fill(share=1)
    r.target_ram.data[:] = r.source_ram.data
    bitmaps.add(r.source, "d", GRANULE)
    for at in ABC:
        r.guest.pwrite(at + 3, b"abc")
    assert dirty(r) == [0, 7, 20]
    return bytes(r.source_ram.data)


@pytest.mark.parametrize(
    ("sync", "mode", "after"),
    [
        ("incremental", None, [7, 30]),
        ("bitmap", "on-success", [7, 30]),
        ("bitmap", "always", [7, 30]),
        ("bitmap", "never", [0, 7, 20, 30]),
        ("full", "on-success", [7, 30]),
        ("full", "always", [7, 30]),
        ("top", "always", [7, 30]),
    ],
)
def test_the_bitmap_after_a_success(sync: Any, mode: Any, after: list[int]) -> None:
    with rig(SIZE) as r:
        moment = prepared(r)
        job = backup(r, sync=sync, bitmap="d", bitmap_mode=mode)
        if sync in ("incremental", "bitmap"):
            assert job.progress() == (0, 3 * GRANULE)
        for at in (7, 30):
            r.guest.pwrite(at * GRANULE, b"later")
        with pytest.raises(GraphError, match="currently in use"):
            bitmaps.clear(r.source, "d")
        job.start()
        job.result(WAIT)
        assert r.target_bytes() == moment
        assert dirty(r) == after
        assert len(r.source.bitmaps) == 1
        bitmaps.clear(r.source, "d")
        r.guest.pwrite(9 * GRANULE, b"on")
        assert dirty(r) == [9]


@pytest.mark.parametrize("how", ["error", "cancel"])
@pytest.mark.parametrize(
    ("mode", "after"),
    [("on-success", [0, 7, 20, 30]), ("always", [7, 20, 30]), ("never", [0, 7, 20, 30])],
)
def test_the_bitmap_after_a_failure(mode: Any, after: list[int], how: str) -> None:
    with rig(SIZE) as r:
        prepared(r)
        policy = "report" if how == "error" else "ignore"
        job = backup(
            r, sync="bitmap", bitmap="d", bitmap_mode=mode, max_workers=1, max_chunk=GRANULE, on_target_error=policy
        )
        for at in (7, 30):
            r.guest.pwrite(at * GRANULE, b"later")  # 7 is copied first, and written to after that

        def at_the_last(operation: str, offset: int, length: int) -> None:
            if operation == "write" and offset == 20 * GRANULE:
                if how == "cancel":
                    job.cancel()
                raise OSError(errno.EIO, "Input/output error")

        r.target_ram.hook = at_the_last
        job.start()
        assert job.wait(WAIT)
        assert isinstance(job.error, Cancelled if how == "cancel" else OSError)
        r.target_ram.hook = None
        assert dirty(r) == after
        assert len(r.source.bitmaps) == 1
        # What it says is enough to make the target whole.
        moment = bytes(r.source_ram.data)
        second = backup(r, sync="incremental", bitmap="d")
        second.start()
        second.result(WAIT)
        if mode != "always":
            assert r.target_bytes() == moment
        assert dirty(r) == []


def test_a_week_of_incremental_backups(tmp_path: Path) -> None:
    """Each day's image over that of the day before reads as the disk did that day."""
    with rig(SIZE) as r:
        fast_storage(r.source_ram)
        r.fill()
        bitmaps.add(r.source, "week", 4 * KiB)
        days: list[tuple[str, bytes]] = []
        with writing(r, 2) as writers:
            for day in range(7):
                until(lambda before=writers.writes: writers.writes > before + 8)
                name = str(tmp_path / f"day{day}.qcow2")
                options = {"backing_file": days[-1][0], "backing_fmt": "qcow2"} if days else {"size": SIZE}
                create_image(name, "qcow2", options)
                node = r.graph.open(name, writable=True)
                with r.graph.drained():
                    moment = bytes(r.source_ram.data)
                    how: Any = {"sync": "incremental"} if day else {"sync": "full", "bitmap_mode": "always"}
                    job = Backup("b", r.graph, r.source, node, bitmap="week", **how)
                job.start()
                job.result(WAIT)
                r.graph.release(node)
                days.append((name, moment))
        for name, moment in days:
            assert read_file(name) == moment
        assert days[0][1] != days[6][1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
        ({"sync": "bitmap"}, "must provide a valid bitmap name for 'bitmap' sync mode"),
        (
            {"sync": "incremental", "bitmap": "d", "bitmap_mode": "never"},
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        ),
        ({"bitmap": "nix", "bitmap_mode": "always"}, "Bitmap 'nix' could not be found"),
        ({"bitmap": "d"}, "Bitmap sync mode must be given when providing a bitmap"),
        (
            {"sync": "none", "bitmap": "d", "bitmap_mode": "always"},
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ),
        (
            {"bitmap": "d", "bitmap_mode": "never"},
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
        ),
        ({"bitmap_mode": "never"}, "Cannot specify bitmap sync mode without a bitmap"),
        ({"max_workers": 0}, "max-workers must be between 1 and 2147483647"),
        ({"max_chunk": -1}, "max-chunk must be zero (which means no limit) or positive"),
        ({"compress": True}, None),
    ],
)
def test_what_is_refused(words: dict[str, Any], text: str | None) -> None:
    with rig(SIZE) as r:
        bitmaps.add(r.source, "d")
        with pytest.raises((OptionError, GraphError)) as caught:
            backup(r, **words)
        assert text is None or str(caught.value) == text
        assert r.guest.node is r.source
        assert not bitmaps.find(r.source, "d").busy
        bitmaps.find(r.source, "d").hold()
        with pytest.raises(GraphError, match="currently in use by another operation"):
            backup(r, sync="incremental", bitmap="d")
        assert r.guest.node is r.source


def test_sizes_must_be_equal() -> None:
    with rig(SIZE, target_size=SIZE + 512) as r, pytest.raises(GraphError, match="have different sizes"):
        backup(r)


# -- trouble ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["read", "write", "flush"])
@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
def test_errors_as_the_policy_says(where: str, policy: str) -> None:
    number = errno.ENOSPC if policy == "enospc" else errno.EIO
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        ours = {"on_source_error" if where == "read" else "on_target_error": policy}
        job = backup(r, auto_dismiss=False, **ours)
        fault = Fault(where, number)
        if where == "read":
            r.source_ram.hook = fault
        else:
            r.target_ram.hook = fault
        job.start()
        stops = policy in ("stop", "enospc")
        if stops:
            until(lambda: job.state is State.PAUSED or job.has_ended)
            assert job.state is State.PAUSED, job.error
            assert job.info()["io-status"] == ("nospace" if policy == "enospc" else "failed")
            r.guest.pwrite(SIZE - 4, b"mean")  # copied before, paused or not
            assert r.target_bytes()[-4:] == moment[-4:]
            job.resume()
        assert job.wait(WAIT)
        told = [data for name, data in r.events if name == "BLOCK_JOB_ERROR"]
        fails = policy == "report" or (policy == "ignore" and where == "flush")
        action = "report" if fails else "stop" if stops else "ignore"
        assert told == [{"device": "b", "operation": "read" if where == "read" else "write", "action": action}]
        assert (job.error is not None) == fails
        assert fails or r.target_bytes() == moment
        assert r.guest.node is r.source


def test_a_copy_before_a_write_that_fails_breaks_the_write() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        job = backup(r)
        r.target_ram.hook = Fault("write", errno.ENOSPC)
        with pytest.raises(OSError, match="No space left") as caught:
            r.guest.pwrite(0, b"x")
        assert caught.value.errno == errno.ENOSPC
        assert bytes(r.source_ram.data) == moment
        r.guest.pwrite(0, b"again")  # the fault is gone
        job.start()
        job.result(WAIT)
        assert r.target_bytes() == moment
        assert r.source_ram.data[:5] == b"again"


@pytest.mark.parametrize("when", ["before", "while", "pending"])
def test_or_else_it_breaks_the_snapshot(when: str) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        job = backup(r, on_cbw_error="break-snapshot", auto_finalize=False, auto_dismiss=False, speed=1, max_workers=1)
        if when != "before":
            job.start()
            until(lambda: job.progress()[0] > 0)
        fault = Fault("write", errno.EIO)
        if when != "pending":
            r.target_ram.hook = fault
        else:
            job.set_speed(0)
            until(lambda: job.state is State.PENDING)
            job.filter.todo.mark(SIZE - 100, 10)  # as if it had to be copied once more
            r.target_ram.hook = fault
        r.guest.pwrite(SIZE - 100, b"written")
        assert fault.met.is_set()
        if when == "before":
            job.start()
        if when == "pending":
            job.finalize()
        assert job.wait(WAIT)
        assert isinstance(job.error, OSError)
        assert "BLOCK_JOB_ERROR" not in r.names()
        assert r.source_ram.data[-100:-93] == b"written"
        assert r.guest.node is r.source


@pytest.mark.parametrize("mode", ["break-guest-write", "break-snapshot"])
def test_a_copy_that_takes_too_long(mode: str) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        job = backup(r, on_cbw_error=mode, cbw_timeout=1)
        go = threading.Event()
        r.target_ram.hook = lambda operation, offset, length: assert_true(operation != "write" or go.wait(WAIT))
        if mode == "break-snapshot":
            r.guest.pwrite(0, b"x")
            assert isinstance(job.filter.error, TimeoutError)
        else:
            with pytest.raises(TimeoutError):
                r.guest.pwrite(0, b"x")
            assert bytes(r.source_ram.data) == moment
        go.set()
        job.start()
        assert job.wait(WAIT)
        if mode == "break-snapshot":
            assert isinstance(job.error, TimeoutError)
        else:
            assert job.error is None
            assert r.target_bytes() == moment
            r.guest.pwrite(0, b"x")


def assert_true(value: object) -> None:
    assert value


def test_cancelled_at_any_moment_the_disk_is_as_it_was_left() -> None:
    for after in range(8):
        with rig(SIZE) as r:
            r.fill(share=1)
            job = backup(r, max_chunk=GRANULE)
            left = [after]

            def count(operation: str, offset: int, length: int, left: list[int] = left, job: Backup = job) -> None:
                left[0] -= 1
                if left[0] <= 0 and not job.cancelled:
                    job.cancel()

            r.target_ram.hook = count
            if after:
                job.start()
            else:
                job.cancel()
            assert job.wait(WAIT)
            assert isinstance(job.error, Cancelled)
            assert r.guest.node is r.source
            assert r.source.bitmaps == ()
            r.guest.pwrite(0, b"on")
            assert r.source_ram.data[:2] == b"on"


def test_pause_and_speed() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        moment = bytes(r.source_ram.data)
        job = backup(r, speed=1)
        job.start()
        until(lambda: job.progress()[0] > 0)
        job.pause()
        until(lambda: job.state is State.PAUSED)
        before = job.progress()[0]
        for at in range(0, SIZE - 10, 100_000):
            r.guest.pwrite(at, b"0123456789")
        assert job.progress()[0] > before  # copies before writes go on
        job.set_speed(0)
        job.resume()
        job.result(WAIT)
        assert r.target_bytes() == moment


@pytest.mark.parametrize("early", [False, True])
def test_a_backup_of_a_disk_that_is_mirrored_and_switched(early: bool) -> None:
    """The backup keeps to its moment while the disk's users go over to a mirror's target."""
    from diskwright.jobs.mirror import Mirror
    from tests.jobs.mirrors import until_ready

    with rig(SIZE) as r:
        fast_storage(r.source_ram)
        r.fill()
        new, new_ram = faulty_node(r.graph, SIZE, "new")
        fast_storage(new_ram)
        with writing(r, 2) as writers:
            until(lambda: writers.writes > 10)
            with r.graph.drained():
                moment = bytes(r.source_ram.data)
                job = backup(r, auto_dismiss=False)
            if early:
                job.hold_still()
                job.start()
                until(lambda: job.state is State.PAUSED)
            mirror = Mirror("m", r.graph, r.source, new)
            r.jobs.append(mirror)
            mirror.start()
            until_ready(mirror)
            mirror.complete()
            mirror.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 10)
            if early:
                job.go_on()
            else:
                job.start()
            job.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 10)
        assert r.target_bytes() == moment
        assert r.guest.node is new


class Gaps:
    """A hook after which a guest writes, in a thread of its own: it may have to wait for the request it follows."""

    def __init__(self, r: Rig, seed: int) -> None:
        self.r, self.chance = r, random.Random(seed)
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []

    def __call__(self, operation: str, offset: int, length: int) -> None:
        if not self.lock.acquire(blocking=False):
            return
        try:
            at = self.chance.randrange(SIZE - 900)
            self.threads.append(threading.Thread(target=self.r.guest.pwrite, args=(at, b"g" * 900)))
            self.threads[-1].start()
            self.threads[-1].join(0.002)
        finally:
            self.lock.release()


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_in_every_gap(seed: int) -> None:
    with rig(SIZE) as r:
        r.fill(seed)
        moment = bytes(r.source_ram.data)
        job = backup(r, max_workers=2, max_chunk=GRANULE)
        gaps = Gaps(r, seed)
        r.target_ram.hook = r.source_ram.after = gaps
        job.start()
        job.result(WAIT)
        r.target_ram.hook = r.source_ram.after = None
        for thread in gaps.threads:
            thread.join(WAIT)
        assert len(gaps.threads) > 5
        assert r.target_bytes() == moment


def test_a_graph_without_guest_is_backed_up_too() -> None:
    graph = Graph()
    try:
        source, ram = faulty_node(graph, SIZE, "source")
        target, _ = faulty_node(graph, SIZE, "target")
        ram.data[:5] = b"hello"
        job = Backup("b", graph, source, target)
        job.start()
        job.result(WAIT)
        assert read_all(target)[:5] == b"hello"
        with pytest.raises(GraphError, match="Source and target cannot be the same"):
            Backup("b", graph, source, source)
    finally:
        graph.close()
