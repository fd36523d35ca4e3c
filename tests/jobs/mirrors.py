"""What tests of the mirror share: a source with a guest's disk on it, a target, and the job between them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diskwright.core.disk import Disk
from diskwright.core.graph import Graph
from diskwright.core.node import Node
from diskwright.core.permissions import ALL, READ, WRITE, Access
from diskwright.jobs.job import Job
from diskwright.jobs.mirror import Mirror
from tests.jobs.faulty import Faulty, faulty_node

WAIT = 60
"""Seconds after which a test that waits for something gives up: only ever reached when it fails."""

GUEST = Access(READ | WRITE, ALL & ~WRITE)


class Rig:
    """A graph with a source in use by a guest and a target, both in memory unless the test brings its own."""

    def __init__(self, size: int, *, target_size: int | None = None, zeroes: bool = True) -> None:
        self.graph = Graph()
        self.size = size
        source, self.source_ram = faulty_node(self.graph, size, "source")
        target, self.target_ram = faulty_node(self.graph, target_size or size, "target", zeroes=zeroes)
        self.source: Node = source
        self.target: Node = target
        self.guest = self.graph.disk(self.source, GUEST)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.frozen: bytes | None = None
        self.jobs: list[Job] = []

    def fill(self, seed: int = 1, *, share: float = 0.5, block: int = 4096) -> None:
        """Random data in a share of the source's blocks."""
        chance = random.Random(seed)
        for at in range(0, self.size, block):
            if chance.random() < share:
                length = min(block, self.size - at)
                self.source_ram.data[at : at + length] = chance.randbytes(length)

    def mirror(self, **options: Any) -> Mirror:
        job = Mirror("m", self.graph, self.source, self.target, on_event=self.note, at_end=self.freeze, **options)
        self.jobs.append(job)
        return job

    def note(self, name: str, data: dict[str, object]) -> None:
        self.events.append((name, data))

    def freeze(self) -> None:
        """Keeps what the source is at the moment of which the target claims to be the copy."""
        self.frozen = bytes(read_all(self.source))

    def names(self) -> list[object]:
        return [data["status"] if name == "JOB_STATUS_CHANGE" else name for name, data in self.events]

    def data_of(self, name: str) -> dict[str, object]:
        return next(data for found, data in self.events if found == name)

    def target_bytes(self) -> bytes:
        return read_all(self.target)[: self.size]

    def close(self) -> None:
        for job in self.jobs:
            self.source_ram.hook = self.target_ram.hook = None
            if job._thread is None and job._committed:
                job.clean()  # taken through its steps by hand, it has no thread that would end it
                continue
            if not job.has_ended:
                job.cancel(force=True)
            assert job.wait(WAIT)
        self.graph.close()


@contextmanager
def rig(size: int, **options: Any) -> Iterator[Rig]:
    made = Rig(size, **options)
    try:
        yield made
    finally:
        made.close()


def read_all(node: Node) -> bytes:
    return node.pread(0, node.size)


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition that other threads bring about."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


def until_ready(job: Job) -> None:
    until(lambda: job.ready or job.has_ended)
    if job.has_ended:
        job.result(0)


class Writers:
    """Threads that go on writing to a disk, each in places of its own, and know what must be read there. The last
    4 KiB of the disk are left to the test."""

    def __init__(self, disk: Disk, threads: int, *, seed: int = 7, pause: float = 0.0, unit: int = 512) -> None:
        self.disk, self.unit, self.pause = disk, unit, pause
        self.size = (disk.size - 4096) // threads // unit * unit
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.writes = 0
        self.longest = 0.0  # seconds one request took
        self.model = [bytearray(disk.pread(i * self.size, self.size)) for i in range(threads)]
        self.unsure: list[set[int]] = [set() for _ in range(threads)]  # units that a discard left as anything
        self._threads = [threading.Thread(target=self._work, args=(i, seed)) for i in range(threads)]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive(), "a guest's request hangs"
        assert not self.errors, self.errors

    def _work(self, me: int, seed: int) -> None:
        chance = random.Random(seed * 1000 + me)
        try:
            while not self.stop.is_set():
                begin = time.monotonic()
                self._one(chance, me)
                self.longest = max(self.longest, time.monotonic() - begin)
                self.writes += 1
                if self.pause:
                    time.sleep(self.pause)
        except BaseException as error:
            self.errors.append(error)

    def _one(self, chance: random.Random, me: int) -> None:
        unit, units = self.unit, self.size // self.unit
        first = chance.randrange(units)
        count = min(units - first, chance.choice((1, 1, 2, 8, 9, 130)))
        offset, length = first * unit, count * unit
        base, model, unsure = me * self.size, self.model[me], self.unsure[me]
        covered = set(range(first, first + count))
        kind = chance.random()
        if kind < 0.75:
            data = chance.randbytes(length)
            self.disk.pwrite(base + offset, data)
            model[offset : offset + length] = data
            unsure -= covered
        elif kind < 0.88:
            self.disk.zero(base + offset, length, unmap=chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
            unsure -= covered
        elif kind < 0.96:
            self.disk.trim(base + offset, length)
            unsure |= covered
        else:
            self.disk.flush()

    def check(self) -> None:
        """What the disk reads as is what was written to it, wherever that is certain."""
        for me, model in enumerate(self.model):
            found = self.disk.pread(me * self.size, self.size)
            for i in range(self.size // self.unit):
                if i not in self.unsure[me]:
                    piece = slice(i * self.unit, (i + 1) * self.unit)
                    at = me * self.size + i * self.unit
                    assert found[piece] == model[piece], f"writer {me} lost its write at {at}"


def fast_storage(storage: Faulty) -> None:
    """Makes a Faulty's map coarse: looking at every byte for holes takes longer than all the rest of a test."""
    from diskwright.core.driver import Storage

    storage.extent_at = lambda offset, length: Storage.extent_at(storage, offset, length)  # type: ignore[method-assign]
