"""Transactions and groups of jobs: all or none."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from diskwright.core import bitmaps
from diskwright.errors import GraphError, JobError, LimitExceeded
from diskwright.jobs.backup import Backup
from diskwright.jobs.group import MAX_GROUP, JobGroup
from diskwright.jobs.job import Cancelled
from diskwright.jobs.states import State
from diskwright.jobs.transaction import (
    AddBitmap,
    ClearBitmap,
    MergeBitmaps,
    RemoveBitmap,
    StartJob,
    SwitchBitmap,
    run,
)
from diskwright.units import KiB, MiB
from tests.jobs.faulty import Fault, faulty_node
from tests.jobs.mirrors import GUEST, WAIT, Rig, rig, until
from tests.jobs.test_job import Toy

SIZE = MiB
G = 64 * KiB


def toys(count: int, **options: Any) -> tuple[JobGroup, list[Toy]]:
    group = JobGroup()
    jobs = [Toy(f"j{i}", auto_dismiss=False, **options) for i in range(count)]
    for job in jobs:
        group.add(job)
    for job in jobs:
        job.start()
    return group, jobs


# -- groups ----------------------------------------------------------------------------------------


def test_they_end_together() -> None:
    _, jobs = toys(3)
    for job in jobs[:2]:
        job.allow(3)
        job.until("waiting")
    assert not jobs[0].wait(0.05)
    assert jobs[0].log == []
    jobs[2].allow(3)
    for job in jobs:
        job.result(WAIT)
        assert job.names() == ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded"]
        assert job.log == ["prepare", "clean"]


@pytest.mark.parametrize("how", ["run", "prepare", "cancel", "cancel waiting", "cancel pending"])
def test_one_that_fails_takes_the_others_with_it(how: str) -> None:
    manual = how in ("prepare", "cancel pending")
    _, jobs = toys(3, auto_finalize=not manual)
    last = jobs[2]
    if how in ("run", "prepare"):
        last.fail_in = {how: OSError(errno.EIO, "it failed")}
    for job in jobs[:2]:
        job.allow(3)
        job.until("waiting")
    if how == "cancel":
        last.cancel()
    elif how == "cancel waiting":
        jobs[0].cancel()
        last.allow(3)
    else:
        last.allow(3)
    if manual:
        for job in jobs:
            with job.seen:
                assert job.seen.wait_for(lambda job=job: "BLOCK_JOB_PENDING" in job.names(), WAIT)
        assert all(job.log == [] for job in jobs)
        if how == "prepare":
            for job in jobs:
                job.finalize()
        else:
            jobs[1].cancel()
    for job in jobs:
        assert job.wait(WAIT)
        assert job.state is State.CONCLUDED
        assert job.log[-2:] == ["abort", "clean"]
    failed = [job for job in jobs if not isinstance(job.error, Cancelled)]
    assert failed == ([last] if how in ("run", "prepare") else [])
    assert all(job.error is not None for job in jobs)


def test_one_finalize_is_for_all() -> None:
    _, jobs = toys(2, auto_finalize=False)
    for job in jobs:
        job.allow(3)
    for job in jobs:
        job.until("pending")
    jobs[1].finalize()
    for job in jobs:
        job.result(WAIT)


def test_who_is_to_be_finalized_by_hand_holds_the_others_up() -> None:
    group = JobGroup()
    jobs = [Toy(f"j{i}", auto_dismiss=False, auto_finalize=bool(i)) for i in range(2)]
    for job in jobs:
        group.add(job)
        job.start()
        job.allow(3)
    for job in jobs:
        job.until("pending")
    assert not jobs[1].wait(0.05)
    assert jobs[1].log == []
    jobs[0].finalize()
    for job in jobs:
        job.result(WAIT)


def test_a_group_has_a_limit_and_a_job_one_group() -> None:
    group = JobGroup()
    jobs = [Toy(f"j{i}") for i in range(MAX_GROUP + 1)]
    for job in jobs[:-1]:
        group.add(job)
    with pytest.raises(LimitExceeded):
        group.add(jobs[-1])
    with pytest.raises(JobError, match="in a group already"):
        JobGroup().add(jobs[0])


# -- bitmaps ---------------------------------------------------------------------------------------


def dirty(r: Rig, name: str) -> list[int]:
    bitmap = bitmaps.find(r.source, name)
    return [at // G for at in range(0, SIZE, G) if bitmap.get(at)]


def with_bitmaps(r: Rig) -> None:
    for name in ("a", "b"):
        bitmaps.add(r.source, name, G)
    r.guest.pwrite(0, b"x")
    bitmaps.disable(r.source, "a")
    r.guest.pwrite(3 * G, b"x")
    bitmaps.enable(r.source, "a")
    bitmaps.disable(r.source, "b")
    assert (dirty(r, "a"), dirty(r, "b")) == ([0], [0, 3])


def every_action(r: Rig) -> list[Any]:
    return [
        AddBitmap(r.source, "new", G),
        MergeBitmaps(r.source, "new", [(r.source, "a")]),
        ClearBitmap(r.source, "a"),
        MergeBitmaps(r.source, "a", [(r.source, "b")]),
        SwitchBitmap(r.source, "a", enabled=False),
        SwitchBitmap(r.source, "b", enabled=True),
    ]


def test_all_of_them() -> None:
    with rig(SIZE) as r:
        with_bitmaps(r)
        run(r.graph, [*every_action(r), RemoveBitmap(r.source, "b")])
        assert {bitmap.name for bitmap in bitmaps.named(r.source)} == {"a", "new"}
        assert (dirty(r, "new"), dirty(r, "a")) == ([0], [0, 3])
        assert not bitmaps.find(r.source, "a").enabled


def test_or_none_of_them() -> None:
    with rig(SIZE) as r:
        with_bitmaps(r)
        bitmaps.add(r.source, "c", G)
        r.guest.pwrite(5 * G, b"x")
        last = RemoveBitmap(r.source, "nowhere")
        for i in range(len(every_action(r)) + 1):
            with pytest.raises(GraphError, match="Dirty bitmap 'nowhere' not found"):
                run(r.graph, [RemoveBitmap(r.source, "c"), *every_action(r)[:i], last])
            assert {bitmap.name for bitmap in bitmaps.named(r.source)} == {"a", "b", "c"}
            assert (dirty(r, "a"), dirty(r, "b"), dirty(r, "c")) == ([0, 5], [0, 3], [5])
            assert bitmaps.find(r.source, "a").enabled
            assert not bitmaps.find(r.source, "b").enabled
            bitmaps.find(r.source, "c").check()


def test_nobody_sees_half_of_it() -> None:
    """Guests' writes come before all of it or after."""
    with rig(SIZE) as r:
        bitmaps.add(r.source, "a", G)
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                r.guest.pwrite(0, b"x")

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for i in range(30):
                run(r.graph, [AddBitmap(r.source, f"n{i}", G), ClearBitmap(r.source, "a")])
                until(lambda: bitmaps.find(r.source, "a").granules)
                assert bitmaps.find(r.source, f"n{i}").granules  # whatever "a" has seen since, it has too
        finally:
            stop.set()
            thread.join(WAIT)


# -- jobs ------------------------------------------------------------------------------------------


class TwoDisks:
    def __init__(self, r: Rig) -> None:
        self.r = r
        self.other, self.other_ram = faulty_node(r.graph, SIZE, "other")
        self.to, self.to_ram = faulty_node(r.graph, SIZE, "to")
        self.guest = r.graph.disk(self.other, GUEST)
        for node, guest in ((r.source, r.guest), (self.other, self.guest)):
            bitmaps.add(node, "d", G)
            guest.pwrite(2 * G, b"one")

    def actions(self, group: JobGroup | None) -> list[StartJob]:
        def make(id: str, source: Any, target: Any) -> Backup:
            job = Backup(id, self.r.graph, source, target, sync="incremental", bitmap="d", auto_dismiss=False)
            self.r.jobs.append(job)
            return job

        return [
            StartJob(lambda: make("b0", self.r.source, self.r.target), group),
            StartJob(lambda: make("b1", self.other, self.to), group),
        ]


@pytest.mark.parametrize("grouped", [False, True])
def test_incremental_backups_of_two_disks_one_of_which_fails(grouped: bool) -> None:
    with rig(SIZE) as r:
        two = TwoDisks(r)
        actions = two.actions(JobGroup() if grouped else None)
        two.to_ram.hook = Fault("write")
        run(r.graph, actions)
        jobs = [action.job for action in actions]
        for job in jobs:
            assert job is not None
            assert job.wait(WAIT)
        assert [type(job.error) for job in jobs if job] == [Cancelled if grouped else type(None), OSError]
        assert bitmaps.find(two.other, "d").granules == 1
        assert bitmaps.find(r.source, "d").granules == (1 if grouped else 0)
        for job in jobs:
            assert job is not None
            job.dismiss()
        actions = two.actions(JobGroup())
        run(r.graph, actions)
        for action in actions:
            assert action.job is not None
            action.job.result(WAIT)
        assert bitmaps.find(two.other, "d").granules == bitmaps.find(r.source, "d").granules == 0
        assert r.target_bytes() == bytes(r.source_ram.data)
        assert two.to_ram.data == two.other_ram.data
        two.guest.close()


def test_a_job_that_cannot_be_made_undoes_the_rest() -> None:
    with rig(SIZE) as r:
        two = TwoDisks(r)
        bitmaps.find(two.other, "d").hold()
        with pytest.raises(GraphError, match="currently in use"):
            run(r.graph, [AddBitmap(r.source, "new"), *two.actions(JobGroup())])
        assert [bitmap.name for bitmap in bitmaps.named(r.source)] == ["d"]
        assert not bitmaps.find(r.source, "d").busy
        assert bitmaps.find(r.source, "d").granules == 1
        assert r.guest.node is r.source
        r.guest.pwrite(0, b"on")
        two.guest.close()
