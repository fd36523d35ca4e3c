"""Graph and Disk: bounds, the gate, draining under load, switching, filters, ownership, uses."""

from __future__ import annotations

import io
import threading
import time
from typing import cast

import pytest

from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.driver import Filter, Segments
from diskwright.core.graph import Graph
from diskwright.core.node import Node, StorageNode
from diskwright.core.permissions import LIVE_READER, READER, WRITER
from diskwright.errors import GraphError
from tests.core.ram import Ram, ram_node, raw_node


class Tap(Filter):
    """Counts the writes that pass."""

    name = "tap"

    def __init__(self, child: Node) -> None:
        self.child = child
        self.writes = 0

    def writev(self, segments: Segments) -> None:
        self.writes += len(segments)
        self.child.writev(segments)


def ram_of(node: Node) -> Ram:
    file = node.file or node
    return cast(Ram, cast(StorageNode, file).storage)


def test_disk_keeps_to_its_bounds() -> None:
    graph = Graph()
    disk = graph.disk(raw_node(graph, 8192, "n"))
    disk.pwrite(8000, bytes(192))
    for offset, length in ((8000, 193), (-1, 4), (8193, 1)):
        with pytest.raises(ValueError, match="beyond the end"):
            disk.pwrite(offset, bytes(length))
        with pytest.raises(ValueError, match="beyond the end"), disk.request():
            disk.readv([(offset, memoryview(bytearray(length)))])
        with pytest.raises(ValueError, match="beyond the end"):
            disk.zero(offset, length)
    assert disk.pread(8190, 100) == bytes(2)
    graph.close()


def test_disk_is_a_file() -> None:
    graph = Graph()
    disk = graph.disk(raw_node(graph, 4096, "n"))
    assert disk.write(b"hello") == 5
    assert disk.seek(0) == 0 and disk.read(5) == b"hello" and disk.tell() == 5
    disk.seek(-2, io.SEEK_END)
    assert disk.write(b"abc") == 2
    with pytest.raises(OSError, match="No space"):
        disk.write(b"c")
    assert disk.read() == b""
    assert io.BufferedReader(disk).readable()
    disk.close()
    with pytest.raises((GraphError, ValueError)):
        disk.pread(0, 1)
    graph.close()


def test_closing_a_disk_flushes_and_releases() -> None:
    graph = Graph()
    node = raw_node(graph, 4096, "n")
    ram = ram_of(node)
    disk = graph.disk(node)
    graph.release(node)  # the disk is now its only holder
    assert not ram.closed
    disk.close()
    assert ram.calls[-1] == ("flush",) and ram.closed
    assert graph.nodes() == []


def test_draining_holds_new_requests_and_waits_for_old_ones() -> None:
    graph = Graph()
    disk = graph.disk(raw_node(graph, 4096, "n"))
    token = disk.begin()
    order: list[str] = []

    def drain() -> None:
        with disk.drained():
            order.append("drained")
            time.sleep(0.05)
            order.append("leaving")

    def write() -> None:
        disk.pwrite(0, b"x")
        order.append("written")

    drainer = threading.Thread(target=drain)
    drainer.start()
    while not disk._drains:
        time.sleep(0.001)
    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)
    assert order == []  # one inside: no drain; a drain asked for: no newcomer
    disk.end(token)
    drainer.join()
    writer.join()
    assert order == ["drained", "leaving", "written"]
    graph.close()


def test_switching_under_load_loses_no_write() -> None:
    """Writers hammer while the root is switched back and forth; in each drained section what the old
    root holds is copied to the new one, so a write that went astray would be missing at the end."""
    graph = Graph()
    roots = [raw_node(graph, 64 * 512, name) for name in "ab"]
    disk = graph.disk(roots[0])
    last: dict[int, bytes] = {}
    counts = [0] * 4
    stop = threading.Event()

    def hammer(lane: int) -> None:
        serial = 0
        while not stop.is_set():
            serial += 1
            slot = lane * 16 + serial % 16
            data = serial.to_bytes(8, "little") * 64
            disk.pwrite(slot * 512, data)
            last[slot] = data
            counts[lane] = serial

    threads = [threading.Thread(target=hammer, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        seen = sum(counts)
        while sum(counts) < seen + 20:  # between two switches the writers get a turn
            time.sleep(0.0005)
        old, new = roots[turn % 2], roots[(turn + 1) % 2]
        with disk.drained():
            ram_of(new).data[:] = ram_of(old).data
            disk.switch(new)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(last) > 16
    for slot, data in last.items():
        assert disk.pread(slot * 512, 512) == data
    graph.close()


def test_switch_needs_a_drained_disk_and_an_equal_size() -> None:
    graph = Graph()
    disk, other, small = graph.disk(raw_node(graph, 4096, "a")), raw_node(graph, 4096, "b"), raw_node(graph, 512, "c")
    with pytest.raises(GraphError, match="drained"):
        disk.switch(other)
    with disk.drained(), pytest.raises(GraphError, match="512 bytes"):
        disk.switch(small)
    graph.close()


def test_filters_come_and_go_between_users_and_node() -> None:
    graph = Graph()
    node = raw_node(graph, 4096, "n")
    disk = graph.disk(node)
    tap = Tap(node)
    inserted = graph.insert_filter(tap)
    assert disk.node is inserted
    disk.pwrite(0, b"x")
    assert tap.writes == 1
    graph.remove_filter(inserted)
    disk.pwrite(0, b"y")
    assert tap.writes == 1 and disk.node is node and disk.pread(0, 1) == b"y"
    disk.close()
    graph.release(node)
    assert graph.nodes() == []


def test_conflicting_uses_are_refused() -> None:
    graph = Graph()
    node = raw_node(graph, 4096, "n")
    graph.disk(node, WRITER)
    with pytest.raises(GraphError, match="write"):
        graph.disk(node, WRITER)
    with pytest.raises(GraphError, match="write"):
        graph.disk(node, READER)
    graph.disk(node, LIVE_READER)
    graph.close()


def test_bitmaps_see_writes_zeros_and_discards_also_failed_ones() -> None:
    graph = Graph()
    node = raw_node(graph, 1 << 20, "n")
    disk = graph.disk(node)
    bitmap = DirtyBitmap(1 << 20, 65536)
    node.add_bitmap(bitmap)
    disk.pwrite(65536, b"x")
    disk.zero(2 * 65536, 512)
    disk.trim(3 * 65536, 65536)
    ram_of(node).fail_writes = 5
    with pytest.raises(OSError, match="made to fail"):
        disk.pwrite(5 * 65536, b"x")
    ram_of(node).fail_writes = 0
    assert [n for n in range(16) if bitmap.get(n * 65536)] == [1, 2, 3, 5]
    node.remove_bitmap(bitmap)
    disk.pwrite(9 * 65536, b"x")
    assert not bitmap.get(9 * 65536)
    graph.close()


def test_a_storage_without_zeroing_gets_zeros_written() -> None:
    graph = Graph()
    node = ram_node(graph, 3 << 20, "s")
    ram_of(node).data[:] = b"\xff" * (3 << 20)
    disk = graph.disk(node)
    disk.zero(100, (2 << 20) + 7)
    data = ram_of(node).data
    assert data[:100] == b"\xff" * 100 and not any(data[100 : 107 + (2 << 20)]) and data[107 + (2 << 20)] == 0xFF
    with pytest.raises(OSError, match="not supported"), disk.request():
        disk.write_zeros(0, 4096, fast=True)
    graph.close()
