"""Status: what is seen through backing chains, short backing nodes, raw windows and holes."""

from __future__ import annotations

from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode
from diskwright.core.status import Status, status
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent
from diskwright.formats.raw import Raw
from tests.core.ram import ram_node, raw_node
from tests.core.tablemap import TableMap


def layer(graph: Graph, name: str, size: int, runs: list[Extent]) -> FormatNode:
    node = FormatNode(name, TableMap(ram_node(graph, 1 << 20, name + ".file"), size, runs), True)
    graph.adopt(node)
    return node


def brief(rows: list[Status]) -> list[tuple[int, int, str, int]]:
    """Offset, length, letters for zero/data/present/compressed, depth."""
    return [
        (
            r.offset,
            r.length,
            "".join(c for c, on in zip("zdpc", (r.zero, r.data, r.present, r.compressed), strict=True) if on),
            r.depth,
        )
        for r in rows
    ]


def test_a_chain_is_followed_and_a_short_backing_ends_in_zeros() -> None:
    graph = Graph()
    top = layer(graph, "top", 40960, [Extent(0, 4096, DATA, 8192), Extent(4096, 36864, UNALLOCATED)])
    mid = layer(
        graph,
        "mid",
        20480,
        [Extent(0, 8192, ZERO), Extent(8192, 4096, SPECIAL, 0, 0, 512), Extent(12288, 8192, UNALLOCATED)],
    )
    base = layer(graph, "base", 16384, [Extent(0, 16384, DATA, 0)])
    top.backing, mid.backing = mid, base
    assert brief(status(top, 0, 40960)) == [
        (0, 4096, "dp", 0),
        (4096, 4096, "zp", 1),
        (8192, 4096, "dpc", 1),
        (12288, 4096, "dp", 2),
        (16384, 4096, "zp", 2),
        (20480, 20480, "zp", 1),
    ]
    assert status(top, 0, 4096)[0].file_offset == 8192
    assert brief(status(top, 8192, 12288, base=base)) == [(8192, 4096, "dpc", 1), (12288, 8192, "z", 1)]
    assert brief(status(base, 100, 200)) == [(100, 200, "dp", 0)]


def test_no_backing_means_not_present() -> None:
    graph = Graph()
    top = layer(graph, "top", 8192, [Extent(0, 8192, UNALLOCATED)])
    assert brief(status(top, 0, 8192)) == [(0, 8192, "z", 0)]


def test_holes_in_a_raw_file_are_zeros_and_a_window_shifts_them() -> None:
    graph = Graph()
    file = ram_node(graph, 65536, "f")
    file.pwrite(8192, b"x" * 4096)
    window = FormatNode("w", Raw(file, 4096, 32768), True)
    assert brief(status(window, 0, 32768)) == [(0, 4096, "zp", 0), (4096, 4096, "dp", 0), (8192, 24576, "zp", 0)]
    assert status(window, 4096, 100)[0].file_offset == 8192


def test_raw_on_raw() -> None:
    graph = Graph()
    inner = raw_node(graph, 16384, "inner")
    inner.pwrite(4096, b"x")
    outer = FormatNode("outer", Raw(inner, 4096, None), True)
    assert brief(status(outer, 0, 12288)) == [(0, 4096, "dp", 0), (4096, 8192, "zp", 0)]
