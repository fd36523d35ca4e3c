"""Filters are put over a disk in use and taken out again, while threads write, zero, discard and read it."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from diskwright.core.disk import Disk
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.core.throttle import ThrottleGroup, limits_of
from diskwright.units import KiB, MiB
from tests.filters.opening import memory
from tests.peers.qemu_img import qemu_img

SIZE = 4 * MiB
PART = 512 * KiB

FILTERS: dict[str, Mapping[str, object]] = {
    "throttle": {"driver": "throttle", "throttle-group": "group"},
    "blkdebug": {"driver": "blkdebug", "align": 4096, "max-transfer": 65536},
    "blkverify": {"driver": "blkverify"},
    "blklogwrites": {"driver": "blklogwrites", "log": memory(0)},
    "copy-on-read": {"driver": "copy-on-read"},
    "compress": {"driver": "compress"},
}
ROLES = {"blkdebug": "image", "blkverify": "raw"}


class Worker(threading.Thread):
    """Has a part of the disk to itself."""

    def __init__(self, disk: Disk, number: int) -> None:
        super().__init__()
        self.disk, self.start_at, self.rng = disk, number * PART, random.Random(number)
        self.stopping = threading.Event()
        self.requests, self.problem = 0, ""

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _work(self) -> None:
        content = bytearray(self.disk.pread(self.start_at, PART))
        while not self.stopping.is_set():
            offset = self.rng.randrange(PART - 1)
            length = min(self.rng.choice([512, 4096, 30_000]), PART - offset)
            kind = self.rng.randrange(4)
            if kind == 0:
                content[offset : offset + length] = data = self.rng.randbytes(length)
                self.disk.pwrite(self.start_at + offset, data)
            elif kind == 1:
                content[offset : offset + length] = bytes(length)
                self.disk.zero(self.start_at + offset, length)
            elif kind == 2:
                found = self.disk.pread(self.start_at + offset, length)
                assert found == content[offset : offset + length], "read something else than was written"
            else:
                self.disk.flush()
            self.requests += 1
        assert self.disk.pread(self.start_at, PART) == content, "the disk holds something else than was written"


def _wait_for_requests(workers: list[Worker], count: int) -> None:
    for worker in workers:
        target = worker.requests + count
        while worker.requests < target and worker.is_alive():
            threading.Event().wait(0.001)


@pytest.mark.parametrize("name", FILTERS)
def test_in_and_out_under_load(tmp_path: Path, name: str) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", str(base), str(SIZE))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", str(top), str(SIZE))
    group = ThrottleGroup("group", limits_of({"iops-total": 2000, "bps-write": 200 * MiB}))
    graph = Graph(objects={"group": group})
    below = graph.open({"driver": "qcow2", "file.filename": str(top), "node-name": "below"}, writable=True)
    disk = graph.disk(below)
    graph.release(below)
    workers = [Worker(disk, number) for number in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(3):
        _wait_for_requests(workers, 10)
        options = {**FILTERS[name], ROLES.get(name, "file"): "below"}
        if name == "blkverify":
            with graph.drained():  # the other side begins as a copy
                options["test"] = {"driver": "memory", "size": SIZE, "node-name": "copy"}
                node = graph.open(options, writable=True)
                graph.node("copy").pwrite(0, below.pread(0, SIZE))
                graph.replace(below, node)
        else:
            node = graph.open(options, writable=True)
            graph.replace(below, node)
        graph.release(node)
        assert disk.node is node and isinstance(node, FilterNode)
        _wait_for_requests(workers, 10)
        graph.remove_filter(node)
        assert disk.node is below
        assert [each.driver_name for each in graph.nodes()].count(name) == 0
    for worker in workers:
        worker.stopping.set()
    for worker in workers:
        worker.join()
    assert [worker.problem for worker in workers] == [""] * len(workers)
    disk.close()
    graph.close()
    qemu_img("check", "-q", str(top))
