"""lookup against core.status, which answers the same question in bulk; widen against a set of units."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from diskwright.core.graph import Graph
from diskwright.core.lookup import ABSENT, Run, lookup, widen
from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.core.status import status
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent
from diskwright.formats.raw import Raw
from tests.core.ram import Ram
from tests.core.tablemap import TableMap

B = 4096


def table(draw: st.DataObject, name: str, blocks: int) -> FormatNode:
    """A format with runs of any kind, over a file of its own."""
    runs, at = [], 0
    while at < blocks:
        length = draw.draw(st.integers(1, blocks - at))
        kind = draw.draw(st.sampled_from([DATA, ZERO, UNALLOCATED, UNALLOCATED, SPECIAL]))
        place = at * B if kind in (DATA, SPECIAL) else -1
        runs.append(Extent(at * B, length * B, kind, place, 0, 512 if kind == SPECIAL else 0))
        at += length
    file = StorageNode(name + ".file", Ram(blocks * B, name), True)
    return FormatNode(name, TableMap(file, blocks * B, runs), True)


@given(draw=st.data())
def test_agrees_with_status(draw: st.DataObject) -> None:
    chain: list[Node] = []
    for level in range(draw.draw(st.integers(1, 4))):
        if level == 0 and draw.draw(st.booleans()):
            ram = Ram(draw.draw(st.integers(1, 12)) * B)
            for block in draw.draw(st.sets(st.integers(0, 11))):
                if block * B < ram.size:
                    ram.data[block * B] = 1
            node: Node = StorageNode("ram", ram, True)
            if draw.draw(st.booleans()):
                node = FormatNode("raw", Raw(node, draw.draw(st.sampled_from([0, B])) % ram.size, None), True)
        else:
            node = table(draw, f"level{level}", draw.draw(st.integers(1, 12)))
            node.backing = chain[-1] if chain else None
        chain.append(node)
    top = chain[-1]
    base = draw.draw(st.none() | st.sampled_from(chain))
    if base is top:
        base = None
    offset = draw.draw(st.integers(0, top.size - 1))
    length = draw.draw(st.integers(1, top.size - offset))
    expected: list[Run] = []
    for row in status(top, offset, length, base=base):
        kind = ABSENT if base is not None and not row.present else ZERO if row.zero else DATA
        if expected and expected[-1][2] == kind:
            expected[-1] = (expected[-1][0], expected[-1][1] + row.length, kind)
        else:
            expected.append((row.offset, row.length, kind))
    assert lookup(top, offset, length, base) == expected


def test_looks_below_filters() -> None:
    from diskwright.core.driver import Filter

    class Plain(Filter):
        name = "plain"

    graph = Graph()
    ram = Ram(2 * B)
    ram.data[B] = 1
    node = StorageNode("ram", ram, True)
    graph.adopt(node)
    filter = Plain()
    filter.child = node
    assert lookup(graph.insert_filter(filter), 0, 2 * B) == [(0, B, ZERO), (B, B, DATA)]
    graph.close()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([DATA, ZERO, ABSENT])), min_size=1, max_size=10),
    start=st.integers(0, 20),
    unit=st.sampled_from([1, 4, 8, 16]),
)
def test_widen(lengths: list[tuple[int, int]], start: int, unit: int) -> None:
    runs: list[Run] = []
    at = start
    for length, kind in lengths:
        if runs and runs[-1][2] == kind:
            continue
        runs.append((at, length, kind))
        at += length
    wide = widen(runs, unit)
    # The same bytes, in order, without overlap.
    assert wide[0][0] == start
    assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(wide))
    assert wide[-1][0] + wide[-1][1] == at
    assert all(a[2] != b[2] for a, b in itertools.pairwise(wide))
    before = {b: kind for offset, length, kind in runs for b in range(offset, offset + length)}
    after = {b: kind for offset, length, kind in wide for b in range(offset, offset + length)}
    for b, kind in before.items():
        if kind == ABSENT:
            assert after[b] == ABSENT
        elif kind == DATA:
            assert after[b] == DATA
        else:
            # Zeros become data just where data reaches their unit with nothing but zeros between.
            reached = False
            for step in (-1, 1):
                i = b
                while i // unit == b // unit and before.get(i) == ZERO:
                    i += step
                reached |= i // unit == b // unit and before.get(i) == DATA
            assert (after[b] == DATA) == reached, (runs, wide, b)
