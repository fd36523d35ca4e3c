"""Jobs of several kinds on one disk at once, and many one after the other."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.create import create_image
from diskwright.core.graph import Graph
from diskwright.errors import GraphError
from diskwright.jobs.backup import Backup
from diskwright.jobs.commit import ActiveCommit, Commit
from diskwright.jobs.job import Job
from diskwright.jobs.mirror import Mirror
from diskwright.jobs.stream import Stream
from diskwright.units import KiB, MiB
from tests.jobs.chains import Chain, chain_of, read_file
from tests.jobs.mirrors import GUEST, WAIT, Writers, read_all, until, until_ready

SIZE = 2 * MiB + 68 * KiB


def target(c: Chain, name: str) -> Any:
    path = str(c.folder / f"{name}.qcow2")
    create_image(path, "qcow2", {"size": SIZE})
    return c.graph.open({"driver": "qcow2", "filename": path, "node-name": name}, writable=True)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_four_jobs_of_one_disk(tmp_path: Path, mode: Any) -> None:
    with chain_of(tmp_path, [SIZE] * 4) as c:
        copy, old, new = target(c, "copy"), target(c, "old"), target(c, "new")
        alike: list[bool] = []
        with Writers(c.guest, 2) as writers:
            until(lambda: writers.writes > 10)
            with c.graph.drained():
                moment = read_all(c.top)
                jobs: list[Any] = [Backup("b", c.graph, c.top, old, speed=MiB)]
            jobs.append(Stream("s", c.graph, c.top, lowest=c.node(2), speed=2 * MiB))
            mirror = Mirror(
                "m", c.graph, c.top, new, copy_mode=mode, at_end=lambda: alike.append(read_all(c.top) == read_all(new))
            )
            jobs.append(mirror)
            second = Backup("b2", c.graph, c.top, copy, on_cbw_error="break-snapshot")
            jobs.append(second)
            for job in jobs:
                c.keep(job).start()
            for job in jobs:
                if job is not mirror:
                    job.set_speed(0) if not job.has_ended else None
                    job.result(WAIT)
            assert read_all(old) == moment
            until_ready(mirror)
            until(lambda before=writers.writes: writers.writes > before + 20)
            mirror.complete()
            mirror.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 20)
        writers.check()
        assert alike == [True]
        assert c.guest.node is new
        assert c.top.backing is c.node(1)
        assert read_all(old) == moment


def test_chains_that_jobs_need_are_kept(tmp_path: Path) -> None:
    """What would take an image away that another job counts on is refused."""
    with chain_of(tmp_path, [SIZE] * 5) as c:
        job = c.keep(Stream("s", c.graph, c.top, lowest=c.node(3), speed=1))
        job.start()
        for attempt in (
            lambda: Commit("c", c.graph, c.node(2), c.node(1)),  # takes the base away
            lambda: Commit("c", c.graph, c.node(3), c.node(2)),  # takes away what is copied from
            lambda: Commit("c", c.graph, c.node(3), c.node(0)),
            lambda: ActiveCommit("c", c.graph, c.top, c.node(3)),
            lambda: Stream("t", c.graph, c.node(3), lowest=c.node(2)),  # changes what is below it
        ):
            with pytest.raises(GraphError, match="Conflicting uses"):
                attempt()
        assert [node.writable for node in map(c.node, range(5))] == [False] * 4 + [True]
        below = c.keep(Stream("t", c.graph, c.node(2), lowest=c.node(1)))
        below.start()
        below.result(WAIT)
        job.set_speed(0)
        job.result(WAIT)
        assert c.top.backing is c.node(2)
        assert c.node(2).backing is c.node(0)
        assert read_all(c.top) == c.models[4]
        again = c.keep(Commit("c", c.graph, c.node(2), c.node(0)))
        again.start()
        again.result(WAIT)
        assert read_all(c.top) == c.models[4]
    assert read_file(c.names[4]) == c.models[4]


def test_one_job_after_the_other_leaves_nothing_behind(tmp_path: Path) -> None:
    """Threads, descriptors and nodes are as many after thirty jobs as after three."""
    graph = Graph()
    try:
        disk = graph.open({"driver": "memory", "size": SIZE, "node-name": "disk"}, writable=True)
        guest = graph.disk(disk, GUEST)
        chance = random.Random(2)
        counts: list[tuple[int, int, int]] = []
        for i in range(10):
            kinds: tuple[type[Any], ...] = (Backup, Mirror)
            for kind in kinds:
                name = str(tmp_path / f"{i}{kind.__name__}.qcow2")
                create_image(name, "qcow2", {"size": SIZE})
                node = graph.open({"driver": "qcow2", "filename": name}, writable=True)
                guest.pwrite(chance.randrange(SIZE - 5000), chance.randbytes(5000))
                job: Job = kind("j", graph, disk, node)
                job.start()
                if isinstance(job, Mirror):
                    until_ready(job)
                    job.cancel(force=False)
                job.result(WAIT)
                assert read_all(node) == read_all(disk)
                graph.release(node)
            with chain_of(_folder(tmp_path, i), [64 * KiB] * 3) as c:
                for make in (
                    lambda c=c: Commit("c", c.graph, c.node(1), c.node(0)),
                    lambda c=c: Stream("s", c.graph, c.top),
                ):
                    made = make()
                    made.start()
                    made.result(WAIT)
                assert read_all(c.top) == c.models[2]
            until(lambda: not any(thread.name.startswith("job-") for thread in threading.enumerate()))
            counts.append((threading.active_count(), len(os.listdir("/proc/self/fd")), len(graph.nodes())))
        assert len(set(counts[1:])) == 1, counts
        assert disk.bitmaps == ()
        assert graph._uses == [use for use in graph._uses if use[0] is guest]
        assert graph._followers == []
    finally:
        graph.close()


def _folder(tmp_path: Path, i: int) -> Path:
    folder = tmp_path / f"chain{i}"
    folder.mkdir()
    return folder
