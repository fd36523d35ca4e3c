"""Many threads on one image: no write is lost, nothing reads another's bytes, and the image stays sound."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from tests.formats.qcow2.support import Image, Tape, checked, contents, created, sound

THREADS = 6


def together(work: Callable[[int], None], count: int = THREADS) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a deadlock"
    if failures:
        raise failures[0]


EXTENDED: dict[str, object] = {"extended_l2": True, "cluster_size": 16384}
APART: dict[str, object] = {"data_file": "d", "cluster_size": 4096}


def beside(options: dict[str, object]) -> Tape | None:
    """The data file an image with these options needs."""
    return Tape(filename="data") if "data_file" in options else None


def nothing_wrong(tape: Tape, data: Tape | None, options: dict[str, object]) -> None:
    if "extended_l2" in options or data is not None:
        return sound(bytes(tape.data), None if data is None else bytes(data.data))
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    return None


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096},
        {"compat": "0.10", "cluster_size": 512},
        EXTENDED,
        APART,
        {**EXTENDED, **APART, "cluster_size": 65536},
        {**APART, "data_file_raw": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cache_size", [1, 32 << 20])
def test_threads_with_sectors_of_their_own_in_shared_clusters(options: dict[str, object], cache_size: int) -> None:
    """Each thread owns every sixth 128 bytes, so that almost every cluster is everyone's."""
    step, rows = 128, 500
    size = -(-step * THREADS * rows // 512) * 512
    data = beside(options)
    tape = Tape(created(size=size, data=data, **options))
    final: dict[int, bytes] = {}
    with Image(tape, data=data, cache_size=cache_size) as image:
        disk = image.disk

        def work(number: int) -> None:
            chance = random.Random(number)
            mine: dict[int, bytes] = {}
            for _ in range(rows):
                offset = (chance.randrange(rows) * THREADS + number) * step
                action = chance.random()
                if action < 0.6:
                    mine[offset] = chance.randbytes(step)
                    disk.pwrite(offset, mine[offset])
                elif action < 0.75:
                    mine[offset] = bytes(step)
                    disk.zero(offset, step)
                elif action < 0.8:
                    disk.flush()
                else:
                    assert disk.pread(offset, step) == mine.get(offset, bytes(step))
            final.update(mine)

        together(work)
    model = bytearray(size)
    for offset, piece in final.items():
        model[offset : offset + step] = piece
    assert contents(bytes(tape.data), beside=None if data is None else bytes(data.data)) == model
    nothing_wrong(tape, data, options)


@pytest.mark.parametrize("options", [{"cluster_size": 512}, EXTENDED, {**APART, "cluster_size": 512}], ids=str)
def test_threads_that_allocate_zero_and_discard_whole_units(options: dict[str, object]) -> None:
    """Clusters are given up and taken again all the time; a byte of another thread's would be noticed. A subcluster
    is 512 bytes too, and its cluster may be another thread's in part."""
    cluster, each = 512, 60
    size = THREADS * each * cluster
    data = beside(options)
    tape = Tape(created(size=size, data=data, **options))
    with Image(tape, data=data) as image:
        disk = image.disk

        def work(number: int) -> None:
            chance = random.Random(number)
            base = number * each * cluster
            for turn in range(400):
                offset = base + chance.randrange(each) * cluster
                length = min(chance.randrange(1, 4) * cluster, base + each * cluster - offset)
                action = chance.random()
                if action < 0.5:
                    disk.pwrite(offset, bytes([number + 1]) * length)
                elif action < 0.7:
                    disk.trim(offset, length)
                elif action < 0.85:
                    disk.zero(offset, length, unmap=chance.random() < 0.5)
                elif turn % 5 == 0:
                    disk.flush()
                seen = set(disk.pread(base, each * cluster))
                assert seen <= {0, number + 1}, f"thread {number} reads {seen}"

        together(work)
    nothing_wrong(tape, data, options)


def test_readers_never_see_anything_but_old_or_new() -> None:
    """One thread moves a cluster about by discarding and rewriting it, others read: whole versions or zeros."""
    cluster = 4096
    tape = Tape(created(size=64 * cluster, cluster_size=cluster))
    stop = threading.Event()
    with Image(tape) as image:
        disk = image.disk

        def work(number: int) -> None:
            if number:
                while not stop.is_set():
                    found = set(disk.pread(5 * cluster, cluster))
                    assert len(found) == 1, f"a mixture of {found}"
                return
            try:
                for turn in range(300):
                    disk.pwrite(5 * cluster, bytes([turn % 250 + 1]) * cluster)
                    disk.trim(5 * cluster, cluster)
                    disk.flush()
                    disk.pwrite((6 + turn % 50) * cluster, b"\xff\xfe" * (cluster // 2))
            finally:
                stop.set()

        together(work, 3)
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
