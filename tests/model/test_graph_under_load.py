"""The graph changes while threads read and write, and no byte goes astray."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.create import create_image
from diskwright.core.disk import Disk
from diskwright.core.driver import Filter, Segments
from diskwright.core.gate import DirectoryGate
from diskwright.core.graph import Graph
from diskwright.core.node import Node, format_of

SIZE = 4 << 20
LANES = 4


class Watcher(Filter):
    """Passes everything on, and remembers which bytes were written while it was there."""

    name = "watcher"

    def __init__(self, child: Node) -> None:
        self.child = child
        self.seen = DirtyBitmap(SIZE, 512)

    def writev(self, segments: Segments) -> None:
        self.child.writev(segments)
        self.seen.set_segments(segments)


class Lane(threading.Thread):
    """One user of the disk with a stripe of its own, which it compares with its model at every read."""

    def __init__(self, disk: Disk, number: int, stop: threading.Event) -> None:
        super().__init__()
        self.disk, self.number, self.stop = disk, number, stop
        self.base, self.size = number * SIZE // LANES, SIZE // LANES
        self.model = bytearray(disk.pread(self.base, self.size))
        self.error: BaseException | None = None
        self.steps = 0

    def run(self) -> None:
        try:
            rng = random.Random(self.number)
            while not self.stop.is_set():
                self.step(rng)
                self.steps += 1
        except BaseException as error:
            self.error = error

    def step(self, rng: random.Random) -> None:
        length = rng.choice((512, 3000, 4096, 65536, 150_000))
        offset = rng.randrange(self.size - length)
        action = rng.randrange(10)
        if action < 5:
            data = rng.randbytes(length)
            self.disk.pwrite(self.base + offset, data)
            self.model[offset : offset + length] = data
        elif action == 5:
            self.disk.zero(self.base + offset, length)
            self.model[offset : offset + length] = bytes(length)
        elif action == 6:
            self.disk.trim(self.base + offset, length)
            self.model[offset : offset + length] = self.disk.pread(self.base + offset, length)
        elif action == 7:
            self.disk.flush()
        assert self.disk.pread(self.base + offset, length) == self.model[offset : offset + length]


@pytest.mark.parametrize("format_name", ["raw", "qcow2"])
def test_filters_bitmaps_and_switches_under_load(tmp_path: Path, format_name: str) -> None:
    graph = Graph(DirectoryGate())
    nodes = []
    for name in ("a", "b"):
        path = str(tmp_path / name)
        create_image(path, format_name, {"size": str(SIZE)})
        nodes.append(graph.open(path, driver=format_name, writable=True))
    disk = graph.disk(nodes[0])
    stop = threading.Event()
    lanes = [Lane(disk, number, stop) for number in range(LANES)]
    for lane in lanes:
        lane.start()
    current, other = nodes
    rng = random.Random(11)
    for _ in range(25):
        action = rng.randrange(3)
        if action == 0:
            node = graph.insert_filter(Watcher(disk.node))
            wait_for_steps(lanes)
            graph.remove_filter(node)
        elif action == 1:
            bitmap = DirtyBitmap(SIZE, 65536)
            with disk.drained():
                before = current.pread(0, SIZE)
                current.add_bitmap(bitmap)
            wait_for_steps(lanes)
            with disk.drained():
                current.remove_bitmap(bitmap)
                assert_only_dirty_changed(before, current.pread(0, SIZE), bitmap)
        else:
            with disk.drained():
                other.writev([(0, memoryview(current.pread(0, SIZE)))])
                disk.switch(other)
            current, other = other, current
        wait_for_steps(lanes)
    stop.set()
    for lane in lanes:
        lane.join()
    for lane in lanes:
        assert lane.error is None, lane.error
        assert disk.pread(lane.base, lane.size) == lane.model
    disk.close()
    for node in nodes:
        if format_name == "qcow2":
            node.flush()
            report = format_of(node).check("none")
            assert (report.corruptions, report.leaks) == (0, 0), report.messages
    graph.close()


def wait_for_steps(lanes: list[Lane], count: int = 5) -> None:
    """Until every lane has done something, or has failed."""
    marks = [lane.steps + count for lane in lanes]
    while any(lane.steps < mark and lane.is_alive() for lane, mark in zip(lanes, marks, strict=True)):
        threading.Event().wait(0.001)


def assert_only_dirty_changed(before: bytes, after: bytes, bitmap: DirtyBitmap) -> None:
    for start in range(0, SIZE, bitmap.granularity):
        if not bitmap.get(start):
            stop = start + bitmap.granularity
            assert before[start:stop] == after[start:stop], f"a change at {start} was not marked"
