"""Status: what is seen through backing chains, short backing nodes, raw windows and holes."""

from __future__ import annotations

import random

import pytest

from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node
from diskwright.core.status import Status, layers, status
from diskwright.errors import CorruptImage
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


UNIT = 4096


def layers_of(chance: random.Random, graph: Graph) -> FormatNode:
    """A chain of random layers of random lengths, in units of 4 KiB; each unit's place tells where it comes from."""
    top: FormatNode | None = None
    for depth in range(chance.randrange(1, 5)):
        units = chance.randrange(1, 60)
        runs, place = [], 0
        for unit in range(units):
            kind = chance.choice((DATA, ZERO, UNALLOCATED, UNALLOCATED, UNALLOCATED, SPECIAL))
            place = chance.choice((place + 1, chance.randrange(200)))
            where = place * UNIT if kind in (DATA, SPECIAL) or chance.random() < 0.2 else -1
            runs.append(Extent(unit * UNIT, UNIT, kind, where, 0, 512 if kind == SPECIAL else 0))
        new = layer(graph, f"layer{depth}", units * UNIT, runs)
        new.backing, top = top, new
    assert top is not None
    return top


def unit_by_unit(top: FormatNode, unit: int, base: Node | None) -> tuple[object, ...]:
    """What ``status`` should say of one unit, found by hand."""
    node, depth, ready = top, 0, -1
    while True:
        if unit * UNIT >= node.size:
            return True, False, True, depth, node, ready, False
        run = node.format.extent_at(unit * UNIT, UNIT)
        if run.kind == DATA:
            return False, True, True, depth, node, run.file_offset, False
        if run.kind == SPECIAL:
            return False, True, True, depth, node, -1, True
        if run.kind == ZERO:
            return True, False, True, depth, node, run.file_offset, False
        if node.backing is None or node.backing is base:
            return True, False, False, depth, node, run.file_offset, False
        ready = run.file_offset
        assert isinstance(node.backing, FormatNode)
        node, depth = node.backing, depth + 1


@pytest.mark.parametrize("seed", range(60))
def test_any_chain_says_what_its_units_say(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    top = layers_of(chance, Graph())
    monkeypatch.setattr("diskwright.core.status._ALONG", chance.choice((0, 3 * UNIT, 1 << 20)))
    base = chance.choice(layers(top)) if chance.random() < 0.3 else None
    if base is top:
        base = None
    units = top.size // UNIT
    first = chance.randrange(units)
    count = chance.randrange(1, units - first + 1)
    rows = status(top, first * UNIT, count * UNIT, base=base)
    expected: list[Status] = []
    for unit in range(first, first + count):
        row = Status(unit * UNIT, UNIT, *unit_by_unit(top, unit, base))  # type: ignore[arg-type]
        last = expected[-1] if expected else None
        place = last and (last.file_offset + last.length if last.file_offset >= 0 else -1)
        if last and (last[2:7], last.compressed, place) == (row[2:7], row.compressed, row.file_offset):
            expected[-1] = last._replace(length=last.length + UNIT)
        else:
            expected.append(row)
    assert rows == expected


class Damaged(TableMap):
    """Its second unit cannot be looked up."""

    def extent_at(self, offset: int, length: int) -> Extent:
        if offset <= UNIT < offset + length:
            raise CorruptImage("image", "entry", 1, None, "it is wrong")
        return super().extent_at(offset, length)


def test_damage_below_matters_where_it_shows() -> None:
    graph = Graph()
    base = FormatNode("base", Damaged(ram_node(graph, 1 << 20, "f"), 3 * UNIT, [Extent(0, 3 * UNIT, DATA, 0)]), True)
    top = layer(
        graph,
        "top",
        3 * UNIT,
        [Extent(i * UNIT, UNIT, kind) for i, kind in enumerate((UNALLOCATED, ZERO, UNALLOCATED))],
    )
    top.backing = base
    assert brief(status(top, 0, 3 * UNIT)) == [(0, UNIT, "dp", 1), (UNIT, UNIT, "zp", 0), (2 * UNIT, UNIT, "dp", 1)]
    bare = layer(graph, "bare", 3 * UNIT, [Extent(0, 3 * UNIT, UNALLOCATED)])
    bare.backing = base
    with pytest.raises(CorruptImage):
        status(bare, 0, 3 * UNIT)
