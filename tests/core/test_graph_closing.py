"""What a graph has opened is closed again: also when closing fails half way, or an open after its driver was made."""

from __future__ import annotations

import errno
import itertools
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from diskwright.core.driver import Filter
from diskwright.core.graph import Graph
from diskwright.core.node import Node, StorageNode
from diskwright.errors import DiskwrightError
from tests.core.ram import Ram, ram_node, raw_node
from tests.peers import qemu_img


class Stubborn(Ram):
    """Cannot be closed without an error."""

    def close(self) -> None:
        super().close()
        raise OSError(errno.EIO, f"{self.filename}: made to fail")


class Passing(Filter):
    name = "passing"
    closed = False

    def __init__(self, child: Node) -> None:
        self.child = child

    def close(self) -> None:
        self.closed = True


def ram_of(node: Node) -> Ram:
    return cast(Ram, cast(StorageNode, node.file or node).storage)


def test_one_error_does_not_keep_the_rest_open() -> None:
    graph = Graph()
    for i in range(3):
        graph.adopt(StorageNode(f"stubborn{i}", Stubborn(0, f"stubborn{i}"), True))
    nodes = [*graph.nodes(), ram_node(graph, 4096, "last")]
    with pytest.raises(OSError, match="stubborn0"):
        graph.close()
    assert not graph.nodes() and all(ram_of(node).closed for node in nodes)


def test_a_disk_whose_last_flush_fails_does_not_keep_others_open() -> None:
    graph = Graph()
    first, second = raw_node(graph, 4096, "first"), raw_node(graph, 4096, "second")
    disks = [graph.disk(first), graph.disk(second)]
    rams = [ram_of(first), ram_of(second)]

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "made to fail")

    rams[0].flush = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="made to fail"):
        graph.close()
    assert not graph.nodes() and all(disk.closed for disk in disks) and all(ram.closed for ram in rams)


def test_a_filter_is_closed_with_what_is_below() -> None:
    for users in (0, 1, 2):
        graph = Graph()
        node = raw_node(graph, 4096, "node")
        disks = [graph.disk(node) for _ in range(min(users, 1))]
        inner, outer = Passing(node), None
        wrapped = graph.insert_filter(inner)
        if users == 2:
            outer = Passing(wrapped)
            graph.insert_filter(outer)
        ram = ram_of(node)
        graph.close()
        assert ram.closed and inner.closed and (outer is None or outer.closed) and not graph.nodes()
        assert all(disk.closed for disk in disks)


def test_a_filter_that_nobody_uses_any_more_goes_by_itself() -> None:
    graph = Graph()
    node = raw_node(graph, 4096, "node")
    filter = Passing(node)
    wrapped = graph.insert_filter(filter)
    disk = graph.disk(wrapped)
    graph.release(node)  # its opener's hold
    assert not ram_of(node).closed
    disk.close()
    assert filter.closed and not graph.nodes()


def test_a_driver_that_gets_no_node_is_closed(tmp_path: Path) -> None:
    """Its threads with it."""
    path = qemu_img.create(str(tmp_path / "image"), 1 << 20)
    graph = Graph()
    options = {"driver": "qcow2", "node-name": "mine", "cache-clean-interval": 600, "file.filename": path}
    graph.open(options)
    threads = threading.active_count()
    with pytest.raises(DiskwrightError, match="Duplicate nodes"):
        graph.open(options)
    assert threading.active_count() == threads and len(graph.nodes()) == 2
    graph.close()


def test_a_chain_whose_last_image_is_missing_leaves_nothing_open(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.qcow2") for i in range(3)]
    qemu_img.create(paths[0], 1 << 20)
    for below, path in itertools.pairwise(paths):
        qemu_img.create(path, None, backing=below)
    Path(paths[0]).unlink()
    graph = Graph()
    for writable in (False, True):
        with pytest.raises(OSError, match="Could not open backing file"):
            graph.open(paths[2], writable=writable)
        assert not graph.nodes()
    graph.close()
