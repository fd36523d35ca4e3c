"""probe_guard: a guest cannot make a raw disk look like something else."""

from __future__ import annotations

import errno

import pytest

from diskwright.core.graph import Graph
from diskwright.filters.probe_guard import ProbeGuard
from tests.core.ram import raw_node

MAGIC = b"QFI\xfb\0\0\0\3"


def test_a_header_is_refused_and_everything_else_passes() -> None:
    graph = Graph()
    node = raw_node(graph, 65536, "n")
    disk = graph.disk(node)
    graph.insert_filter(ProbeGuard(node))
    disk.pwrite(0, b"\xeb\x63" + bytes(510))  # a boot sector
    with pytest.raises(OSError) as caught:
        disk.pwrite(0, MAGIC + bytes(504))
    assert caught.value.errno == errno.EPERM and "qcow2" in str(caught.value)
    assert disk.pread(0, 2) == b"\xeb\x63"
    disk.pwrite(4096, MAGIC)
    graph.close()


def test_a_header_in_two_halves_is_refused_too() -> None:
    graph = Graph()
    node = raw_node(graph, 65536, "n")
    disk = graph.disk(node)
    graph.insert_filter(ProbeGuard(node))
    disk.pwrite(4, MAGIC[4:])
    with pytest.raises(OSError, match="guessed"):
        disk.pwrite(0, MAGIC[:4])
    graph.close()
