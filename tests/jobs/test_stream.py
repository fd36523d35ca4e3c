"""Stream: the image has it all afterwards, whatever its users write meanwhile; and what happens at errors."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from diskwright.core import bitmaps
from diskwright.core.permissions import READER
from diskwright.errors import GraphError, OptionError
from diskwright.jobs.commit import Commit
from diskwright.jobs.job import Cancelled
from diskwright.jobs.states import State
from diskwright.jobs.stream import Stream, stream_job
from diskwright.units import KiB, MiB
from tests.jobs.chains import Chain, backing_of, chain_of, inject, read_file
from tests.jobs.faulty import Fault
from tests.jobs.mirrors import WAIT, Writers, read_all, until

SIZE = 2 * MiB + 68 * KiB
SAME = [SIZE] * 4
STAIRS = [SIZE // 2, SIZE // 2 + 4 * KiB, SIZE - 64 * KiB, SIZE]
DIP = [SIZE, SIZE // 3, SIZE, SIZE]


def stream(chain: Chain, lowest: int = 0, *, top: int = 3, **options: Any) -> Any:
    made = Stream("s", chain.graph, chain.node(top), lowest=chain.node(lowest), on_event=chain.note, **options)
    return chain.keep(made)


@pytest.mark.parametrize("sizes", [SAME, STAIRS, STAIRS[::-1], DIP])
@pytest.mark.parametrize(("top", "lowest"), [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1), (3, 3)])
@pytest.mark.parametrize("raw_base", [False, True])
def test_the_image_needs_those_below_no_more(
    tmp_path: Path, sizes: list[int], top: int, lowest: int, raw_base: bool
) -> None:
    with chain_of(tmp_path, sizes, raw_base=raw_base) as c:
        image = c.node(top)
        job = stream(c, lowest, top=top)
        job.start()
        job.result(WAIT)
        assert c.names_of_events() == [
            "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
        ]  # fmt: skip
        assert job.progress() == (sizes[top], sizes[top])
        assert read_all(image) == c.models[top]
        assert read_all(c.top) == c.models[3]
        assert image.writable == (top == 3)
        base = image.backing
        assert (base is None) if lowest == 0 else (base is c.node(lowest - 1))
    kind = "raw" if raw_base and lowest == 1 else "qcow2"
    assert backing_of(c.names[top]) == (None if lowest == 0 else (c.names[lowest - 1], kind))
    for i in range(lowest, top):
        os.unlink(c.names[i])
    assert read_file(c.names[3]) == c.models[3]


@pytest.mark.parametrize("cluster_size", [512, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("lowest", [0, 1])
def test_under_a_guest_that_goes_on_writing(tmp_path: Path, cluster_size: int, lowest: int) -> None:
    with chain_of(tmp_path, SAME, cluster_size=cluster_size) as c:
        with Writers(c.guest, 3) as writers:
            until(lambda: writers.writes > 20)
            job = stream(c, lowest, speed=8 * MiB)
            job.start()
            job.result(WAIT)
            until(lambda before=writers.writes: writers.writes > before + 20)
        writers.check()
        found = read_all(c.top)
        assert c.guest.node is c.top
    for i in range(lowest, 3):
        os.unlink(c.names[i])
    assert read_file(c.names[3]) == found


def test_a_write_between_the_read_and_the_write_of_a_copy_is_kept(tmp_path: Path) -> None:
    """It has to wait for the copy, and comes after it."""
    with chain_of(tmp_path, SAME, cluster_size=512) as c:
        model = bytearray(c.models[3])
        threads: list[threading.Thread] = []
        seen: set[int] = set()
        chance = random.Random(3)

        def write(at: int, data: bytes) -> None:
            c.guest.pwrite(at, data)

        def between(operation: str, offset: int, length: int) -> None:
            """At the first write of each copy: it has read what it is about to write."""
            if operation != "write" or threading.current_thread().name == "guest":
                return
            for start, end in job.in_flight.copies():
                if start in seen:
                    continue
                seen.add(start)
                for at in range(start, min(end, SIZE) - 2000, 7000):
                    data = chance.randbytes(1500)
                    model[at : at + 1500] = data
                    threads.append(threading.Thread(target=write, args=(at, data), name="guest"))
                    threads[-1].start()
                threads[-1].join(0.02)
                assert threads[-1].is_alive(), "a write did not wait for the copy of its granule"

        job = stream(c)
        job._workers, job._chunk = 1, 64 * KiB
        inject(c.top, between)
        job.start()
        job.result(WAIT)
        for thread in threads:
            thread.join(WAIT)
        assert len(seen) > 10
        assert read_all(c.top) == bytes(model)
    assert read_file(c.names[3]) == bytes(model)


def test_dirty_bitmaps_do_not_see_what_is_copied(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        bitmap = bitmaps.add(c.top, "b")
        job = stream(c)
        job.start()
        job.result(WAIT)
        assert bitmap.granules == 0
        c.guest.pwrite(0, b"x")
        assert bitmap.granules == 1


@pytest.mark.parametrize("where", ["read", "write", "flush"])
@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
def test_errors_as_the_policy_says(tmp_path: Path, where: str, policy: str) -> None:
    number = errno.ENOSPC if policy == "enospc" else errno.EIO
    with chain_of(tmp_path, SAME) as c:
        job = stream(c, on_error=policy, auto_dismiss=False)
        # Behind the first tables and before the last: data.
        fault = Fault(where, number, **({"offset": 100 * KiB, "end": 200 * KiB} if where == "read" else {}))
        undo = inject(c.node(1) if where == "read" else c.top, fault)
        job.start()
        stops = policy in ("stop", "enospc")
        if stops:
            until(lambda: job.state is State.PAUSED or job.has_ended)
            assert job.state is State.PAUSED, job.error
            assert job.info()["io-status"] == ("nospace" if policy == "enospc" else "failed")
            c.guest.pwrite(SIZE - 4, b"meanwhile"[:4])
            job.resume()
        assert job.wait(WAIT)
        assert fault.met.is_set()
        undo()
        told = [data for name, data in c.events if name == "BLOCK_JOB_ERROR"]
        fails = policy in ("report", "ignore")
        action = "stop" if stops else "ignore" if policy == "ignore" and where != "flush" else "report"
        assert told == [{"device": "s", "operation": "write" if where == "flush" else "read", "action": action}]
        assert (job.error is not None) == fails
        assert (c.top.backing is None) == (not fails)
        expected = c.models[3][:-4] + b"mean" if stops else c.models[3]
        assert read_all(c.top) == expected
        if policy == "ignore" and where != "flush":
            assert job.progress()[0] > SIZE // 2  # it went on after the error
    assert read_file(c.names[3]) == expected


def test_cancelled_anywhere_nothing_has_changed(tmp_path: Path) -> None:
    for after in range(6):
        folder = tmp_path / str(after)
        folder.mkdir()
        with chain_of(folder, SAME) as c:
            job = stream(c)
            left = [after]

            def count(operation: str, offset: int, length: int, left: list[int] = left, job: Stream = job) -> None:
                left[0] -= operation == "write"
                if left[0] <= 0 and not job.cancelled:
                    job.cancel()

            undo = inject(c.top, count)
            if after:
                job.start()
            else:
                job.cancel()
            assert job.wait(WAIT)
            undo()
            assert isinstance(job.error, Cancelled)
            assert c.top.backing is c.node(2)
            assert c.guest.node is c.top
            c.guest.pwrite(0, b"on")
            expected = b"on" + c.models[3][2:]
            assert read_all(c.top) == expected
        assert read_file(c.names[3]) == expected


def test_paused_nothing_is_kept_from_writing(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = stream(c, speed=1, auto_finalize=False)
        job.start()
        until(lambda: job.progress()[0] > 0)
        job.pause()
        until(lambda: job.state is State.PAUSED)
        expected = bytearray(c.models[3])
        for at in range(0, SIZE - 10, 61_000):
            c.guest.pwrite(at, b"0123456789")
            expected[at : at + 10] = b"0123456789"
        job.set_speed(0)
        job.resume()
        until(lambda: job.state is State.PENDING)
        c.guest.pwrite(5, b"late")
        expected[5:9] = b"late"
        job.finalize()
        job.result(WAIT)
        assert read_all(c.top) == expected
    assert read_file(c.names[3]) == expected


def test_two_jobs_of_one_chain_keep_out_of_each_others_way(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        job = stream(c, 1)
        with pytest.raises(GraphError, match="Conflicting uses"):
            Commit("c", c.graph, c.node(2), c.node(0))
        with c.graph.disk(c.node(1), READER):
            pass  # readers are welcome
        job.start()
        job.result(WAIT)
        assert read_all(c.top) == c.models[3]


def test_which_images_are_meant(tmp_path: Path) -> None:
    with chain_of(tmp_path, SAME) as c:
        nodes = {i: c.node(i).name for i in range(4)}
        for words, lowest in (
            ({}, 0),
            ({"base": c.names[1]}, 2),
            ({"base_node": nodes[2]}, 3),
            ({"bottom": nodes[1]}, 1),
            ({"base": c.names[0], "backing_file": "./0.qcow2"}, 1),
        ):
            job = c.keep(stream_job("s", c.graph, c.top, **words))
            assert job._lowest is c.node(lowest)
            job.cancel()
            assert job.wait(WAIT)
        for words, text in (
            ({"base": "x", "base_node": "y"}, "'base' and 'base-node' cannot be specified at the same time"),
            ({"base": "x", "bottom": "y"}, "'base' and 'bottom' cannot be specified at the same time"),
            ({"base_node": "x", "bottom": "y"}, "'bottom' and 'base-node' cannot be specified at the same time"),
            ({"base": "nowhere"}, "Can't find 'nowhere' in the backing chain"),
            ({"base_node": nodes[3]}, f"Node '{nodes[3]}' is not a backing image of '{nodes[3]}'"),
            ({"backing_file": "x"}, "backing file specified, but streaming the entire chain"),
        ):
            with pytest.raises((GraphError, OptionError)) as caught:
                stream_job("s", c.graph, c.top, **words)
            assert str(caught.value) == text
