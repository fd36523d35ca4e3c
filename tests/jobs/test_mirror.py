"""Mirror: what it promises, in each of its phases, with a guest that goes on writing."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.create import create_image
from diskwright.core.graph import Graph
from diskwright.core.permissions import LIVE_READER
from diskwright.errors import GraphError, JobError, OptionError
from diskwright.jobs.job import Cancelled
from diskwright.jobs.mirror import Mirror
from diskwright.jobs.states import State
from diskwright.units import KiB, MiB
from tests.jobs.faulty import Fault, faulty_node
from tests.jobs.mirrors import GUEST, WAIT, Writers, fast_storage, read_all, rig, until, until_ready

SIZE = 3 * MiB + 70 * KiB  # not a multiple of a granule or a chunk


def finish(job: Mirror, *, pivot: bool) -> None:
    if pivot:
        job.complete()
    else:
        job.cancel(force=False)


# -- without load ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pivot", [False, True])
def test_an_idle_disk_step_by_step(pivot: bool) -> None:
    with rig(SIZE) as r:
        r.fill()
        job = r.mirror(target_is_zero=True)
        job.start()
        until_ready(job)
        assert r.names() == ["created", "running", "ready", "BLOCK_JOB_READY"]
        ready = r.data_of("BLOCK_JOB_READY")
        assert (ready["type"], ready["device"], ready["speed"]) == ("mirror", "m", 0)
        assert 0 < ready["offset"] == ready["len"] <= SIZE  # type: ignore[operator]
        assert r.target_bytes() == bytes(r.source_ram.data)
        r.guest.pwrite(5000, b"late")
        finish(job, pivot=pivot)
        job.result(WAIT)
        assert r.names()[4:] == ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
        done = r.data_of("BLOCK_JOB_COMPLETED")
        assert done["offset"] == done["len"] == ready["len"] + 64 * KiB  # type: ignore[operator]
        assert "error" not in done
        assert r.target_bytes() == r.frozen == bytes(r.source_ram.data)
        assert r.guest.node is (r.target if pivot else r.source)
        assert r.source.bitmaps == ()
        assert r.target_ram.calls[-1] == ("flush",)
        before = bytes(r.source_ram.data)
        r.guest.pwrite(0, b"after")
        assert r.target_bytes()[:5] == (b"after" if pivot else before[:5])
        assert (bytes(r.source_ram.data) == before) == pivot


@pytest.mark.parametrize("granularity", [512, 4 * KiB, 64 * KiB, MiB, 64 * MiB])
@pytest.mark.parametrize("buf_size", [0, 1, 200_000, 64 * MiB])
def test_any_granularity_and_buffer(granularity: int, buf_size: int) -> None:
    with rig(SIZE) as r:
        r.fill()
        job = r.mirror(granularity=granularity, buf_size=buf_size)
        job.start()
        until_ready(job)
        r.guest.pwrite(SIZE - 3, b"end")
        job.cancel(force=False)
        job.result(WAIT)
        assert r.target_bytes() == bytes(r.source_ram.data)


def test_a_disk_of_no_bytes() -> None:
    with rig(512) as r:
        r.source_ram.data.clear()
        r.target_ram.data.clear()
        job = r.mirror()
        job.start()
        until_ready(job)
        assert job.progress() == (0, 0)
        job.complete()
        job.result(WAIT)


def test_a_new_target_gets_no_zeros_and_an_old_one_gets_them() -> None:
    for new in (True, False):
        with rig(SIZE) as r:
            r.source_ram.data[MiB : MiB + 10] = b"0123456789"
            if not new:
                r.target_ram.data[:] = b"\xaa" * SIZE
            job = r.mirror(target_is_zero=new)
            job.start()
            until_ready(job)
            zeroed = [call for call in r.target_ram.calls if call[0] == "zero"]
            written = sum(n for call in r.target_ram.calls if call[0] == "writev" for _, n in call[1])
            assert bool(zeroed) != new
            assert written == 4 * KiB  # the block that holds something, as the storage's map has it
            assert r.target_bytes() == bytes(r.source_ram.data)


def test_an_old_target_that_cannot_zero_quickly_is_written_over() -> None:
    with rig(SIZE, zeroes=False) as r:
        r.fill(share=0.1)
        r.target_ram.data[:] = b"\xaa" * SIZE
        job = r.mirror()
        job.start()
        until_ready(job)
        assert job.progress() == (SIZE, SIZE)
        assert r.target_bytes() == bytes(r.source_ram.data)


def test_zeros_on_zeros_are_written_only_without_unmap() -> None:
    for unmap in (True, False):
        with rig(SIZE) as r:
            job = r.mirror(unmap=unmap)
            job.start()
            until_ready(job)
            for _ in range(2):  # the first is where nothing has been written yet
                r.guest.zero(0, 64 * KiB)
                until(lambda job=job: job.progress()[0] == job.progress()[1])
            assert (("zero", 0, 64 * KiB) in r.target_ram.calls) != unmap


def test_sync_none_copies_only_what_is_written_from_now_on() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        job = r.mirror(sync="none")
        job.start()
        until_ready(job)
        assert job.progress() == (0, 0)
        r.guest.pwrite(MiB + 1, b"new")
        job.cancel(force=False)
        job.result(WAIT)
        copied = r.target_bytes()
        assert copied[MiB : MiB + 64 * KiB] == r.source_ram.data[MiB : MiB + 64 * KiB]
        assert not any(copied[:MiB])
        assert not any(copied[MiB + 64 * KiB :])


def test_sync_top_copies_only_the_sources_own_layer(tmp_path: Path) -> None:
    base, top, target = (str(tmp_path / name) for name in ("base.qcow2", "top.qcow2", "target.qcow2"))
    create_image(base, "qcow2", {"size": MiB})
    graph = Graph()
    node = graph.open(base, writable=True)
    node.pwrite(0, b"b" * MiB)
    node.flush()
    graph.release(node)
    for name in (top, target):
        create_image(name, "qcow2", {"backing_file": base, "backing_fmt": "qcow2"})
    source, target_node = graph.open(top, writable=True), graph.open(target, writable=True)
    with graph.disk(source, GUEST) as guest:
        guest.pwrite(100_000, b"top")
        guest.zero(512 * KiB, 64 * KiB)
        job = Mirror("m", graph, source, target_node, sync="top", target_is_zero=True)
        job.start()
        until_ready(job)
        assert job.progress()[0] == 128 * KiB
        job.complete()
        job.result(WAIT)
        assert guest.node is target_node
        expected = bytearray(b"b" * MiB)
        expected[100_000:100_003] = b"top"
        expected[512 * KiB : 576 * KiB] = bytes(64 * KiB)
        assert guest.pread(0, MiB) == expected
        held = [run for run in target_node.extents(0, MiB) if run.kind != 2]
        assert sum(run.length for run in held) == 128 * KiB
    graph.close()


# -- under load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("granularity", [512, 64 * KiB])
def test_a_guest_that_goes_on_writing(copy_mode: Any, pivot: bool, granularity: int) -> None:
    with rig(SIZE) as r:
        r.fill()
        fast_storage(r.source_ram)
        job = r.mirror(target_is_zero=True, copy_mode=copy_mode, granularity=granularity)
        with Writers(r.guest, 3) as writers:
            until(lambda: writers.writes > 50)
            job.start()
            until_ready(job)
            seen = writers.writes
            until(lambda: writers.writes > seen + 300)
            finish(job, pivot=pivot)
            job.result(WAIT)
            assert r.frozen is not None
            if not pivot:
                assert r.target_bytes() == r.frozen
            seen = writers.writes
            until(lambda: writers.writes > seen + 100)
        writers.check()
        assert r.guest.node is (r.target if pivot else r.source)
        if not pivot:
            assert r.target_bytes() == r.frozen


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
def test_files(tmp_path: Path, source_format: str, format: str, copy_mode: Any) -> None:
    """With real drivers below, kernel copying included."""
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    create_image(source, source_format, {"size": 9 * MiB})
    create_image(target, format, {"size": 9 * MiB})
    graph = Graph()
    source_node = graph.open(source, driver=source_format, writable=True)
    target_node = graph.open(target, driver=format, writable=True)
    frozen = []
    guest = graph.disk(source_node, GUEST)
    guest.pwrite(MiB, b"\x55" * (3 * MiB))
    with Writers(guest, 3, unit=4096) as writers:
        job = Mirror(
            "m", graph, source_node, target_node, target_is_zero=True, copy_mode=copy_mode,
            at_end=lambda: frozen.append((read_all(source_node), read_all(target_node))),
        )  # fmt: skip
        job.start()
        until_ready(job)
        seen = writers.writes
        until(lambda: writers.writes > seen + 200)
        job.complete()
        job.result(WAIT)
        seen = writers.writes
        until(lambda: writers.writes > seen + 50)
    writers.check()
    ((before, after),) = frozen
    assert before == after
    guest.close()
    graph.close()
    if format == "qcow2":
        graph = Graph()
        report = graph.open(target, driver="qcow2", writable=True).format.check("off")  # type: ignore[attr-defined]
        assert (report.corruptions, report.leaks) == (0, 0)
        graph.close()


def test_a_write_to_both_sides_while_the_first_pass_is_being_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of its granule is copied all the same."""
    with rig(MiB) as r:
        r.source_ram.data[:] = b"\x55" * MiB
        marked = threading.Event()

        def hook(operation: str, offset: int, length: int) -> None:
            if operation == "write":
                assert marked.wait(WAIT)  # so that a write that goes to both sides is under way while marks are made

        r.target_ram.hook = hook
        job = r.mirror(target_is_zero=True, copy_mode="write-blocking")
        look, mark = job._status, job._mark_first_pass
        guest = threading.Thread(target=r.guest.pwrite, args=(128 * KiB, b"guest" * 100))

        def look_while_the_guest_writes(*range: Any) -> Any:
            if guest.ident is None:
                guest.start()
                guest.join(0.2)  # with the filter there it would wait for the target now
            return look(*range)

        def mark_and_tell(zeros: bool) -> None:
            try:
                mark(zeros)
            finally:
                marked.set()

        monkeypatch.setattr(job, "_status", look_while_the_guest_writes)
        monkeypatch.setattr(job, "_mark_first_pass", mark_and_tell)
        job.start()
        until_ready(job)
        guest.join(WAIT)
        job.cancel(force=False)
        job.result(WAIT)
        assert r.target_bytes() == r.frozen == bytes(r.source_ram.data)
        assert r.frozen is not None and r.frozen[128 * KiB :].startswith(b"guest")


def test_a_guest_faster_than_the_target_does_not_keep_the_job_from_ending() -> None:
    with rig(MiB) as r:
        fast_storage(r.source_ram)
        slow = threading.Event()

        def hook(operation: str, offset: int, length: int) -> None:
            if operation == "write" and not slow.is_set():
                time.sleep(0.005)

        r.target_ram.hook = hook
        job = r.mirror(target_is_zero=True, granularity=4 * KiB, buf_size=64 * KiB)
        with Writers(r.guest, 2) as writers:
            job.start()
            until_ready(job)
            assert job.bitmap.granules > 0
            job.complete()
            job.result(WAIT)
            slow.set()
            assert job.copy_mode == "background"  # the filter it needed is gone again
            assert r.guest.node is r.target
        writers.check()


# -- pausing, speed, cancelling ----------------------------------------------------------------------


def test_pause_and_resume_in_both_phases() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        job = r.mirror(speed=1)
        job.start()
        until(lambda: job.progress()[0])
        job.pause()
        until(lambda: job.state is State.PAUSED)
        calls = len(r.target_ram.calls)
        r.guest.pwrite(0, b"while paused")
        job.set_speed(0)
        time.sleep(0.1)
        assert len(r.target_ram.calls) == calls
        offset, length = job.progress()
        assert offset < length
        job.resume()
        until_ready(job)
        job.pause()
        until(lambda: job.state is State.STANDBY)
        calls = len(r.target_ram.calls)
        r.guest.pwrite(0, b"WHILE PAUSED")
        time.sleep(0.1)
        assert len(r.target_ram.calls) == calls
        assert job.progress()[1] - job.progress()[0] == 64 * KiB
        job.resume()
        until(lambda job=job: job.progress()[0] == job.progress()[1])
        assert r.target_bytes() == bytes(r.source_ram.data)
        states = ["created", "running", "paused", "running", "ready", "BLOCK_JOB_READY", "standby", "ready"]
        assert r.names() == states


def test_a_job_completed_on_standby_ends_after_the_resume() -> None:
    with rig(SIZE) as r:
        job = r.mirror()
        job.start()
        until_ready(job)
        job.pause()
        until(lambda: job.state is State.STANDBY)
        job.complete()
        r.guest.pwrite(0, b"x")  # the guest does not wait for it
        assert not job.wait(0.1)
        job.resume()
        job.result(WAIT)
        assert r.guest.node is r.target


def test_speed_limits_and_its_change_reaches_a_waiting_job() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        job = r.mirror(speed=1)
        job.start()
        until(lambda: job.progress()[0])
        time.sleep(0.2)
        offset, length = job.progress()
        assert 0 < offset < length
        assert job.info()["speed"] == 1
        job.set_speed(1 << 40)
        until_ready(job)
        assert r.target_bytes() == bytes(r.source_ram.data)


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("force", [False, True])
def test_cancel_in_the_first_phase(force: bool, copy_mode: Any) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        job = r.mirror(speed=1, copy_mode=copy_mode)
        job.start()
        until(lambda: job.progress()[0])
        job.cancel(force=force)
        with pytest.raises(Cancelled):
            job.result(WAIT)
        assert r.names()[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
        left_alone(r)


def test_cancel_by_force_in_the_second_phase() -> None:
    with rig(SIZE) as r:
        r.fill()
        job = r.mirror(copy_mode="write-blocking")
        job.start()
        until_ready(job)
        job.cancel(force=True)
        with pytest.raises(Cancelled):
            job.result(WAIT)
        left_alone(r)


def test_a_job_cancelled_before_its_start_lets_go() -> None:
    with rig(SIZE) as r:
        job = r.mirror()
        job.cancel()
        assert job.wait(0)
        left_alone(r)


def left_alone(r: Any) -> None:
    """Nothing of the job is left on the source, and both nodes can be used by others."""
    assert r.guest.node is r.source
    assert r.source.bitmaps == ()
    calls = len(r.target_ram.calls)
    r.guest.pwrite(0, b"mine")
    assert len(r.target_ram.calls) == calls
    assert r.guest.pread(0, 4) == b"mine"
    with r.graph.disk(r.target):
        pass


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_report_ends_the_job_and_nothing_else(side: str, copy_mode: Any) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        if side == "source":
            r.source_ram.hook = Fault("read", offset=MiB, times=None)
        else:
            r.target_ram.hook = Fault("write", offset=MiB, times=None)
        job = r.mirror(target_is_zero=True, auto_dismiss=False, copy_mode=copy_mode)
        job.start()
        with pytest.raises(JobError, match="Input/output error") as caught:
            job.result(WAIT)
        assert isinstance(caught.value.__cause__, OSError)
        operation = "read" if side == "source" else "write"
        assert r.data_of("BLOCK_JOB_ERROR") == {"device": "m", "operation": operation, "action": "report"}
        assert r.data_of("BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
        assert r.names()[-3:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded"]
        left_alone(r)


@pytest.mark.parametrize("side", ["source", "target"])
def test_ignore_tries_again_until_it_works(side: str) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        fault = Fault("read" if side == "source" else "write", offset=MiB, end=MiB + 4096, times=3)
        (r.source_ram if side == "source" else r.target_ram).hook = fault
        job = r.mirror(target_is_zero=True, on_source_error="ignore", on_target_error="ignore")
        job.start()
        until_ready(job)
        assert fault.times == 0
        assert job.progress() == (SIZE, SIZE)  # what failed is counted when it has been copied
        assert [data["action"] for name, data in r.events if name == "BLOCK_JOB_ERROR"] == ["ignore"] * len(
            [1 for name, _ in r.events if name == "BLOCK_JOB_ERROR"]
        )
        assert r.target_bytes() == bytes(r.source_ram.data)


@pytest.mark.parametrize(
    ("policy", "number", "status"), [("stop", errno.EIO, "failed"), ("enospc", errno.ENOSPC, "nospace")]
)
def test_stop_pauses_until_the_cause_is_mended(policy: str, number: int, status: str) -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        r.target_ram.hook = Fault("write", number, offset=MiB, times=None)
        job = r.mirror(target_is_zero=True, on_target_error=policy)
        job.start()
        until(lambda: job.state is State.PAUSED)
        assert job.info()["io-status"] == status
        assert job.info()["paused"] is True
        offset, length = job.progress()
        assert offset < length == SIZE
        r.guest.pwrite(2 * MiB, b"the guest goes on")
        job.resume()  # nothing is mended: it stops again
        until(lambda: job.io_status == status and job.state is State.PAUSED)  # "ok" since it was resumed
        r.target_ram.hook = None
        job.resume()
        until_ready(job)
        assert job.info()["io-status"] == "ok"
        assert r.target_bytes() == bytes(r.source_ram.data)


def test_enospc_reports_other_errors() -> None:
    with rig(SIZE) as r:
        r.fill(share=1)
        r.target_ram.hook = Fault("write", errno.EIO)
        job = r.mirror(on_target_error="enospc", target_is_zero=True)
        job.start()
        with pytest.raises(JobError, match="Input/output error"):
            job.result(WAIT)


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("operation", ["write", "flush"])
def test_stop_in_the_last_pass_lets_the_guest_go_on(operation: str, pivot: bool) -> None:
    with rig(SIZE) as r:
        r.fill()
        job = r.mirror(on_target_error="stop")
        job.start()
        until_ready(job)
        fault = Fault(operation, errno.ENOSPC, times=None)

        def only_drained(what: str, offset: int, length: int) -> None:
            if r.guest._drains:  # the one way to tell the last pass from those before
                fault(what, offset, length)
            elif what == "flush":  # just before it: leave it something to do
                r.guest.pwrite(SIZE - 4096, b"last")

        r.target_ram.hook = only_drained
        with Writers(r.guest, 1, pause=0.001) as writers:
            finish(job, pivot=pivot)
            until(lambda: job.state is State.STANDBY)
            assert fault.met.is_set()
            seen = writers.writes
            until(lambda: writers.writes > seen + 20)  # the guest is not kept waiting
            assert job.info()["io-status"] == "nospace"
            r.target_ram.hook = None
            job.resume()
            job.result(WAIT)
        writers.check()
        assert r.guest.node is (r.target if pivot else r.source)


@pytest.mark.parametrize("policy", ["report", "ignore"])
def test_a_failed_flush_of_the_target_is_never_success(policy: str) -> None:
    with rig(SIZE) as r:
        job = r.mirror(on_target_error=policy)
        job.start()
        until_ready(job)
        r.target_ram.hook = Fault("flush", times=None)
        job.complete()
        with pytest.raises(JobError, match="Input/output error"):
            job.result(WAIT)
        assert r.guest.node is r.source


@pytest.mark.parametrize("policy", ["stop", "ignore", "report"])
def test_a_failing_target_never_fails_a_guests_write(policy: str) -> None:
    """In write-blocking mode the guest's own write is what meets the error."""
    with rig(SIZE) as r:
        job = r.mirror(copy_mode="write-blocking", on_target_error=policy, auto_dismiss=False)
        job.start()
        until_ready(job)
        r.target_ram.hook = Fault("write", errno.EIO, times=None)
        with Writers(r.guest, 2, pause=0.001) as writers:
            until(lambda: writers.writes > 30)
            if policy == "report":
                assert job.wait(WAIT)
                assert r.guest.node is r.source
            else:
                until(lambda: "BLOCK_JOB_ERROR" in [name for name, _ in r.events])
                assert not job.has_ended
                r.target_ram.hook = None
                if policy == "stop":
                    until(lambda: job.state is State.STANDBY)
                    job.resume()
                job.cancel(force=False)
                job.result(WAIT)
                assert r.frozen == r.target_bytes()
        writers.check()


def test_a_guests_failed_write_is_copied_as_it_is() -> None:
    """Nobody knows what a failed write left. Whatever it is, the target gets it."""
    for copy_mode in ("background", "write-blocking"):
        with rig(SIZE) as r:
            job = r.mirror(copy_mode=copy_mode, target_is_zero=True)
            job.start()
            until_ready(job)

            def half(operation: str, offset: int, length: int, ram: Any = r.source_ram) -> None:
                if operation == "write":
                    ram.data[offset : offset + length // 2] = b"h" * (length // 2)
                    raise OSError(errno.EIO, "half of it")

            r.source_ram.hook = half
            with pytest.raises(OSError, match="half of it"):
                r.guest.pwrite(MiB, b"w" * 100)
            r.source_ram.hook = None
            job.cancel(force=False)
            job.result(WAIT)
            assert r.target_bytes()[MiB : MiB + 100] == b"h" * 50 + bytes(50)


# -- the moment of the end ---------------------------------------------------------------------------


@pytest.mark.parametrize("pivot", [False, True])
def test_a_pending_job_still_follows_its_source(pivot: bool) -> None:
    with rig(SIZE) as r:
        r.fill()
        job = r.mirror(auto_finalize=False)
        job.start()
        until_ready(job)
        finish(job, pivot=pivot)
        until(lambda: job.state is State.PENDING)
        r.guest.pwrite(MiB, b"written while pending")  # and the guest does not wait
        assert r.guest.node is r.source
        job.finalize()
        job.result(WAIT)
        assert r.target_bytes() == r.frozen
        assert r.target_bytes()[MiB : MiB + 21] == b"written while pending"
        assert r.guest.node is (r.target if pivot else r.source)


def test_a_pending_job_can_be_cancelled() -> None:
    with rig(SIZE) as r:
        job = r.mirror(auto_finalize=False, copy_mode="write-blocking")
        job.start()
        until_ready(job)
        job.complete()
        until(lambda: job.state is State.PENDING)
        job.cancel(force=False)
        with pytest.raises(Cancelled):
            job.result(WAIT)
        left_alone(r)


def test_an_error_too_late_to_pause_is_reported() -> None:
    with rig(SIZE) as r:
        job = r.mirror(auto_finalize=False, on_target_error="stop")
        job.start()
        until_ready(job)
        job.complete()
        until(lambda: job.state is State.PENDING)
        r.guest.pwrite(0, b"x")
        r.target_ram.hook = Fault("write", times=None)
        job.finalize()
        with pytest.raises(JobError, match="Input/output error"):
            job.result(WAIT)
        left_alone(r)


def test_every_disk_of_the_source_pivots() -> None:
    with rig(SIZE) as r:
        reader = r.graph.disk(r.source, LIVE_READER)
        job = r.mirror()
        job.start()
        until_ready(job)
        job.complete()
        job.result(WAIT)
        assert r.guest.node is reader.node is r.target


def test_an_event_receiver_may_use_the_disk() -> None:
    with rig(SIZE) as r:
        heard: list[str] = []

        def receive(name: str, data: dict[str, object]) -> None:
            heard.append(name)
            r.guest.pwrite(0, b"from the receiver")

        for copy_mode in ("background", "write-blocking"):
            job = Mirror("m", r.graph, r.source, r.target, on_event=receive, copy_mode=copy_mode)  # type: ignore[arg-type]
            job.start()
            until_ready(job)
            job.cancel(force=False)
            job.result(WAIT)
        assert heard.count("BLOCK_JOB_COMPLETED") == 2


def test_what_is_raised_at_the_end_fails_the_job() -> None:
    with rig(SIZE) as r:

        def refuse() -> None:
            raise JobError("they differ")

        job = Mirror("m", r.graph, r.source, r.target, at_end=refuse)
        job.start()
        until_ready(job)
        job.complete()
        with pytest.raises(JobError, match="they differ"):
            job.result(WAIT)
        left_alone(r)


# -- changing and refusing ---------------------------------------------------------------------------


def test_copy_mode_can_be_changed_one_way() -> None:
    with rig(SIZE) as r:
        r.fill()
        fast_storage(r.source_ram)
        job = r.mirror(speed=1)
        with Writers(r.guest, 2) as writers:
            job.start()
            until(lambda: job.progress()[0])
            job.change(copy_mode="background")
            job.change(copy_mode="write-blocking")
            until(lambda: r.guest.node.driver_name == "mirror_top")
            with pytest.raises(JobError, match="not implemented"):
                job.change(copy_mode="background")
            with pytest.raises(JobError, match="and nothing else"):
                job.change(speed=1)
            job.set_speed(0)
            until_ready(job)
            job.complete()
            job.result(WAIT)
            assert r.guest.node is r.target
        writers.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 100}, r"Parameter 'granularity' expects a value in range \[512B, 64MB\]"),
        ({"granularity": 128 * MiB}, "in range"),
        ({"granularity": 1000}, "power of 2"),
        ({"buf_size": -1}, "Invalid parameter 'buf-size'"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing_behind(options: dict[str, Any], message: str) -> None:
    with rig(SIZE) as r:
        with pytest.raises(OptionError, match=message):
            r.mirror(**options)
        left_alone(r)


def test_nodes_that_do_not_fit_are_refused() -> None:
    with rig(SIZE, target_size=SIZE - 512) as r:
        with pytest.raises(GraphError, match="fewer than the source's"):
            r.mirror()
        with pytest.raises(GraphError, match="Can't mirror node into itself"):
            Mirror("m", r.graph, r.source, r.source)
        left_alone(r)


def test_a_target_in_use_is_refused() -> None:
    with rig(SIZE) as r:
        with r.graph.disk(r.target), pytest.raises(GraphError, match="Conflicting uses"):
            r.mirror()
        left_alone(r)


def test_a_larger_target_gets_a_copy_but_no_pivot() -> None:
    with rig(SIZE, target_size=SIZE + MiB) as r:
        r.fill()
        job = r.mirror(target_is_zero=True)
        job.start()
        until_ready(job)
        with pytest.raises(JobError, match="larger than its source"):
            job.complete()
        job.cancel(force=False)
        job.result(WAIT)
        assert r.target_bytes() == bytes(r.source_ram.data)


def test_two_mirrors_of_one_source_at_once() -> None:
    from tests.jobs.faulty import faulty_node

    with rig(SIZE) as r:
        r.fill()
        fast_storage(r.source_ram)
        second_target, second_ram = faulty_node(r.graph, SIZE, "second")
        first = r.mirror(copy_mode="write-blocking")
        frozen: list[bytes] = []
        second = Mirror(
            "n", r.graph, r.source, second_target, copy_mode="write-blocking",
            at_end=lambda: frozen.append(read_all(r.source)),
        )  # fmt: skip
        with Writers(r.guest, 2) as writers:
            first.start()
            second.start()
            until_ready(first)
            until_ready(second)
            seen = writers.writes
            until(lambda: writers.writes > seen + 100)
            first.cancel(force=False)
            first.result(WAIT)
            second.cancel(force=False)
            second.result(WAIT)
        writers.check()
        assert r.target_bytes() == r.frozen
        assert [bytes(second_ram.data)] == frozen
        assert r.guest.node is r.source


# -- several of one disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [("background", "background"), ("write-blocking", "write-blocking")])
@pytest.mark.parametrize("first", [True, False])
def test_several_mirrors_of_one_disk(modes: tuple[Any, Any], first: bool) -> None:
    """One goes first, and may take the users with it: the other follows them."""
    with rig(SIZE) as r:
        fast_storage(r.source_ram)
        fast_storage(r.target_ram)
        r.fill()
        third, third_ram = faulty_node(r.graph, SIZE, "third")
        fast_storage(third_ram)
        alike: list[bool] = []

        def compare() -> None:
            alike.append(read_all(two.source) == read_all(third))

        with Writers(r.guest, 2) as writers:
            one = r.mirror(copy_mode=modes[0])
            two = Mirror("two", r.graph, r.source, third, copy_mode=modes[1], at_end=compare)
            r.jobs.append(two)
            for job in (one, two):
                job.start()
            for job in (one, two):
                until_ready(job)
            finish(one, pivot=first)
            one.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 30)
            assert two.source is (r.target if first else r.source)
            finish(two, pivot=True)
            two.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 30)
        writers.check()
        assert alike == [True]
        assert r.guest.node is third
        assert r.source.bitmaps == r.target.bitmaps == third.bitmaps == ()
        if not first:
            assert r.target_bytes() == r.frozen


def test_the_filter_has_the_name_it_is_given() -> None:
    with rig(SIZE) as r:
        job = r.mirror(copy_mode="write-blocking", filter_node_name="here")
        job.start()
        until_ready(job)
        assert r.guest.node is r.graph.node("here")
        job.cancel()
        assert job.wait(WAIT)


def test_another_node_than_the_source_can_be_replaced() -> None:
    """A disk that reads the source through a filter goes on upon the target without it."""
    with rig(SIZE) as r:
        r.fill()
        node = r.graph.open({"driver": "copy-on-read", "file": "source", "node-name": "over"}, writable=True)
        disk = r.graph.disk(node, LIVE_READER)
        job = r.mirror(replaces=node)
        job.start()
        until_ready(job)
        job.complete()
        job.result(WAIT)
        assert disk.node is r.target
        assert r.guest.node is r.source
        disk.close()
