"""Commit: where the bytes go, what the chain is afterwards, and what happens when something fails or is cancelled."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.permissions import READER
from diskwright.errors import GraphError, JobError, OptionError
from diskwright.jobs.commit import ActiveCommit, Commit, commit_job
from diskwright.jobs.job import Cancelled
from diskwright.jobs.states import State
from diskwright.units import KiB, MiB
from tests.jobs.chains import Chain, backing_of, chain_of, inject, read_file
from tests.jobs.faulty import Fault
from tests.jobs.mirrors import WAIT, Writers, read_all, until, until_ready

SIZE = 2 * MiB + 68 * KiB
SAME = [SIZE] * 4
STAIRS = [SIZE // 2, SIZE // 2 + 4 * KiB, SIZE - 64 * KiB, SIZE]


def commit(chain: Chain, top: int, base: int, **options: Any) -> Any:
    return chain.keep(Commit("c", chain.graph, chain.node(top), chain.node(base), on_event=chain.note, **options))


# -- intermediate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [SAME, STAIRS, STAIRS[::-1]])
@pytest.mark.parametrize(("top", "base"), [(2, 0), (2, 1), (1, 0)])
@pytest.mark.parametrize("raw_base", [False, True])
def test_the_base_has_it_all_and_the_overlay_reads_the_same(
    tmp_path: Path, sizes: list[int], top: int, base: int, raw_base: bool
) -> None:
    with chain_of(tmp_path, sizes, raw_base=raw_base) as c:
        lower, overlay = c.node(base), c.node(top + 1)
        job = commit(c, top, base)
        job.start()
        job.result(WAIT)
        assert c.names_of_events() == [
            "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
        ]  # fmt: skip
        assert job.progress() == (sizes[top], sizes[top])
        assert read_all(c.top) == c.models[3]
        assert overlay.backing is lower
        assert not lower.writable
        assert read_all(lower)[: sizes[top]] == c.models[top]
        assert len([node for node in c.graph.nodes() if node.driver_name == "qcow2"]) == 4 - (top - base) - raw_base
    assert read_file(c.names[3]) == c.models[3]
    assert backing_of(c.names[top + 1]) == (c.names[base], "raw" if raw_base and base == 0 else "qcow2")
    assert os.path.getsize(c.names[base]) > 0


def test_under_a_guest_that_goes_on_writing(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        with Writers(c.guest, 2) as writers:
            until(lambda: writers.writes > 20)
            job = commit(c, 2, 0, speed=4 * MiB)
            job.start()
            job.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 20)
        writers.check()
        found = read_all(c.top)
    assert read_file(c.names[3]) == found
    assert read_file(c.names[0]) == c.models[2]


def test_the_name_in_the_header_can_be_chosen(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = commit(c, 2, 0, backing_file="./0.qcow2")
        job.start()
        job.result(WAIT)
    assert backing_of(c.names[3]) == ("./0.qcow2", "qcow2")
    assert read_file(c.names[3]) == c.models[3]


def test_an_image_of_whom_nobody_is_left_can_be_away(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = commit(c, 2, 0)
        job.start()
        job.result(WAIT)
        for i in (1, 2):
            os.unlink(c.names[i])
        assert read_all(c.top) == c.models[3]
    assert read_file(c.names[3]) == c.models[3]


@pytest.mark.parametrize("where", ["read", "write", "flush"])
@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
def test_errors_as_the_policy_says(tmp_path: Path, where: str, policy: str) -> None:
    number = errno.ENOSPC if policy == "enospc" else errno.EIO
    with chain_of(tmp_path, SAME) as c:
        job = commit(c, 2, 0, on_error=policy, auto_dismiss=False)
        # Behind the first tables and before the last: data.
        fault = Fault(where, number, **({"offset": 100 * KiB, "end": 200 * KiB} if where == "read" else {}))
        inject(c.node(0), fault if where != "read" else lambda *request: None)
        undo = inject(c.node(2), fault) if where == "read" else lambda: None
        job.start()
        stops = policy in ("stop", "enospc")
        if stops:
            until(lambda: job.state is State.PAUSED or job.has_ended)
            assert job.state is State.PAUSED, job.error
            assert job.info()["io-status"] == ("nospace" if policy == "enospc" else "failed")
            assert read_all(c.top) == c.models[3]
            job.resume()
        assert job.wait(WAIT)
        assert fault.met.is_set()
        told = [data for name, data in c.events if name == "BLOCK_JOB_ERROR"]
        fails = policy == "report" or (policy == "ignore" and where == "flush")
        action = "report" if fails else "stop" if stops else "ignore"
        assert told == [{"device": "c", "operation": "read" if where == "read" else "write", "action": action}]
        undo()
        assert (job.error is not None) == fails
        assert c.node(3).backing is (c.node(2) if fails else c.node(0))
        assert read_all(c.top) == c.models[3]
    assert read_file(c.names[3]) == c.models[3]


def test_cancelled_anywhere_nothing_has_changed(tmp_path: Path) -> None:
    for after in (0, 1, 2, 4, 6):
        folder = tmp_path / str(after)
        folder.mkdir()
        with chain_of(folder, SAME) as c:
            job = commit(c, 2, 0)
            left = [after]

            def count(operation: str, offset: int, length: int, left: list[int] = left, job: Commit = job) -> None:
                left[0] -= operation == "write"
                if left[0] <= 0 and not job.cancelled:
                    job.cancel()

            undo = inject(c.node(0), count)
            if after:
                job.start()
            else:
                job.cancel()
            assert job.wait(WAIT)
            undo()
            assert isinstance(job.error, Cancelled)
            assert c.names_of_events()[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
            assert c.node(3).backing is c.node(2)
            assert not c.node(0).writable
            assert read_all(c.top) == c.models[3]
        assert read_file(c.names[3]) == c.models[3]


def test_a_crash_at_any_write_to_the_base_costs_nothing(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        pictures: list[Path] = []
        lock = threading.Lock()

        def photograph(operation: str, offset: int, length: int) -> None:
            with lock:
                if operation == "write" and len(pictures) < 12:
                    picture = tmp_path / f"picture{len(pictures)}"
                    picture.mkdir()
                    for name in c.names:
                        shutil.copy(name, picture)
                    pictures.append(picture)

        job = commit(c, 2, 0)
        inject(c.node(0), photograph)
        job.start()
        job.result(WAIT)
    assert len(pictures) > 3
    for picture in pictures:
        for name in c.names:  # the chain's names are absolute: the copies take the places of the images
            shutil.copy(picture / os.path.basename(name), name)
        assert read_file(c.names[3]) == c.models[3]


def test_pause_resume_and_speed(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = commit(c, 2, 0, speed=1, auto_finalize=False, auto_dismiss=False)
        job.start()
        until(lambda: job.progress()[0] > 0)
        job.pause()
        until(lambda: job.state is State.PAUSED)
        before = job.progress()
        assert before[0] < before[1] == SIZE
        c.guest.pwrite(0, b"meanwhile")
        job.set_speed(0)
        assert job.progress() == before
        job.resume()
        until(lambda: job.state is State.PENDING)
        assert c.node(3).backing is c.node(2)
        job.finalize()
        job.result(WAIT)
        job.dismiss()
        expected = b"meanwhile" + c.models[3][9:]
        assert read_all(c.top) == expected
    assert read_file(c.names[3]) == expected


def test_pending_and_cancelled_the_chain_is_as_before(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = commit(c, 2, 0, auto_finalize=False)
        job.start()
        until(lambda: job.state is State.PENDING)
        job.cancel()
        assert job.wait(WAIT)
        assert isinstance(job.error, Cancelled)
        assert c.node(3).backing is c.node(2)
    assert backing_of(c.names[3]) == (c.names[2], "qcow2")
    assert read_file(c.names[3]) == c.models[3]


def test_who_reads_an_image_that_goes_stands_in_the_way(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        with c.graph.disk(c.node(1), READER), pytest.raises(GraphError, match="Conflicting uses"):
            commit(c, 2, 0)
        assert not c.node(0).writable
        fork = str(tmp_path / "fork.qcow2")
        from diskwright.core.create import create_image

        create_image(fork, "qcow2", {"backing_file": c.names[0], "backing_fmt": "qcow2"})
        other = c.graph.open({"driver": "qcow2", "file": {"filename": fork}, "backing": c.node(0).name})
        with pytest.raises(GraphError, match="as its backing file too"):
            commit(c, 2, 0)
        c.graph.release(other)
        job = commit(c, 2, 0)
        with pytest.raises(GraphError, match="Conflicting uses"):
            c.graph.disk(c.node(2), READER)
        job.start()
        job.result(WAIT)


def test_a_base_that_cannot_be_written_to(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        from diskwright.core.graph import Graph

        other = Graph()
        node = other.open(c.names[0])  # a reader in the way of every writer
        try:
            with pytest.raises(Exception, match="lock"):
                commit(c, 2, 0)
        finally:
            other.release(node)
            other.close()
        assert read_all(c.top) == c.models[3]
        job = commit(c, 2, 0)
        job.start()
        job.result(WAIT)


# -- active ----------------------------------------------------------------------------------------


def active(chain: Chain, base: int, **options: Any) -> Any:
    return chain.keep(ActiveCommit("c", chain.graph, chain.top, chain.node(base), on_event=chain.note, **options))


@pytest.mark.parametrize("sizes", [SAME, STAIRS])
@pytest.mark.parametrize("base", [0, 2])
@pytest.mark.parametrize("raw_base", [False, True])
@pytest.mark.parametrize("pivot", [False, True])
def test_active_under_load(tmp_path: Path, sizes: list[int], base: int, raw_base: bool, pivot: bool) -> None:
    with chain_of(tmp_path, sizes, raw_base=raw_base) as c:
        lower, frozen = c.node(base), []
        job = active(c, base, at_end=lambda: frozen.append(read_all(c.top)))
        with Writers(c.guest, 2) as writers:
            until(lambda: writers.writes > 20)
            job.start()
            until_ready(job)
            until(lambda before=writers.writes: writers.writes > before + 20)
            if pivot:
                job.complete()
            else:
                job.cancel(force=False)
            job.result(WAIT)
            found = read_all(lower)
            until(lambda before=writers.writes: writers.writes > before + 20)
        writers.check()
        assert c.guest.node is (lower if pivot else c.top)
        assert lower.writable == pivot
        if not pivot:
            assert found == frozen[0]
        last = read_all(c.guest.node)
        assert job.info()["type"] == "commit"
    assert read_file(c.names[base] if pivot else c.names[3]) == last
    if not pivot:
        assert read_file(c.names[base]) == frozen[0]


def test_active_copies_only_what_the_base_has_not(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME, cluster_size=4096) as c:
        written: list[tuple[int, int]] = []
        job = active(c, 2)
        undo = inject(c.node(2), lambda what, at, length: written.append((at, length)) if what == "write" else None)
        job.start()
        until_ready(job)
        moved = sum(length for _, length in written)
        undo()
        job.complete()
        job.result(WAIT)
        assert 0 < moved < SIZE * 3 // 4
        assert read_all(c.guest.node) == c.models[3]


def test_active_cancelled_by_force_leaves_the_disk_where_it_is(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = active(c, 0)
        job.start()
        until_ready(job)
        job.cancel(force=True)
        assert job.wait(WAIT)
        assert isinstance(job.error, Cancelled)
        assert c.guest.node is c.top
        assert not c.node(0).writable
        assert read_all(c.top) == c.models[3]
    assert read_file(c.names[3]) == c.models[3]


def test_active_into_a_larger_base_is_refused(tmp_path: Path) -> None:
    with chain_of(tmp_path, STAIRS[::-1]) as c:
        with pytest.raises(GraphError, match="more than the"):
            active(c, 0)
        assert not c.node(0).writable


# -- by QMP's words --------------------------------------------------------------------------------


def test_which_images_are_meant(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        make = commit_job
        for words, kind, top, base in (
            ({}, ActiveCommit, 3, 0),
            ({"base": c.names[1]}, ActiveCommit, 3, 1),
            ({"base_node": c.node(1).name, "top_node": c.node(2).name}, Commit, 2, 1),
            ({"top": c.names[1]}, Commit, 1, 0),
            ({"top": c.names[3]}, ActiveCommit, 3, 0),
        ):
            job = c.keep(make("c", c.graph, c.top, **words))
            assert type(job) is kind
            found = (job.source, job.target) if isinstance(job, ActiveCommit) else (job.top, job.base)  # type: ignore[attr-defined]
            assert found == (c.node(top), c.node(base))
            job.cancel()
            assert job.wait(WAIT)
        nodes = {i: c.node(i).name for i in range(4)}
        for words, text in (
            ({"top": "x", "top_node": nodes[2]}, "'top-node' and 'top' are mutually exclusive"),
            ({"base": "x", "base_node": nodes[2]}, "'base-node' and 'base' are mutually exclusive"),
            ({"top": "nowhere"}, "Top image file nowhere not found"),
            ({"base": "nowhere"}, "Can't find 'nowhere' in the backing chain"),
            ({"top_node": nodes[0]}, "cannot commit an image into itself"),
            ({"top_node": nodes[1], "base_node": nodes[2]}, f"'{nodes[2]}' is not in this backing file chain"),
            ({"top_node": nodes[1], "base_node": nodes[1]}, "cannot commit an image into itself"),
            ({"backing_file": "x"}, "'backing-file' specified, but 'top' is the active layer"),
            ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ):
            with pytest.raises((GraphError, OptionError, JobError)) as caught:
                make("c", c.graph, c.top, **words)  # type: ignore[arg-type]
            assert str(caught.value) == text
        assert not any(node.writable for node in c.graph.nodes() if c.names[3] != node.filename)


def test_a_job_that_ends_while_others_open_and_close(tmp_path: Path) -> None:
    """Nodes come and go in the graph while a chain loses its images."""
    with chain_of(tmp_path, SAME) as c:
        stop = threading.Event()
        errors: list[BaseException] = []

        def come_and_go() -> None:
            try:
                while not stop.is_set():
                    node = c.graph.open({"driver": "memory", "size": 1 * MiB}, writable=True)
                    with c.graph.disk(node) as disk:
                        disk.pwrite(0, b"x")
                    c.graph.release(node)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for top in (2, 1):
                job = commit(c, top, top - 1)
                job.start()
                job.result(WAIT)
        finally:
            stop.set()
            thread.join(WAIT)
        assert not errors, errors
        assert read_all(c.top) == c.models[3]
    assert read_file(c.names[3]) == c.models[3]
