"""Pictures of a disk's allocation: how many bytes of each class every cell of a picture stands for.

A disk of any size is looked at in windows, each as columns: what is in memory is one window of every layer of the
chain, and the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.extents import DATA, SPECIAL, WINDOW, ZERO, Extents, windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

CLASSES: Final = ("data", "backing-1", "backing-2", "backing-deeper", "compressed", "zero", "unallocated")
"""What a byte can be: stored as it is in the image, in its backing file, in that one's, or further down; compressed, in
any of them; known to read as zeros; said by none."""

_COMPRESSED: Final = CLASSES.index("compressed")
_ZERO: Final = CLASSES.index("zero")
_UNALLOCATED: Final = CLASSES.index("unallocated")
_DEEPEST: Final = CLASSES.index("backing-deeper")

MAX_CELLS: Final = 1 << 20
"""A megapixel: 56 MiB of counts."""


class Runs(NamedTuple):
    """Adjoining runs as columns: where each ends, in bytes, and its class. The first begins where it was asked for."""

    end: NDArray[np.int64]
    kind: NDArray[np.uint8]


class Picture:
    """``counts[cell, class]`` in bytes; cell ``i`` stands for the bytes from ``edges[i]`` to ``edges[i + 1]``."""

    def __init__(self, start: int, length: int, cells: int) -> None:
        import numpy as np

        self.start, self.length = start, length
        cells = max(1, min(cells, MAX_CELLS, length))
        # Python's integers: cells times the largest disk is more than 64 bits.
        self.edges = np.array([start + length * i // cells for i in range(cells + 1)], np.int64)
        self.counts = np.zeros((cells, len(CLASSES)), np.int64)

    def add(self, start: int, runs: Runs) -> None:
        """Counts the bytes of ``runs``, the first of which begins at ``start``."""
        import numpy as np

        end = int(runs.end[-1])
        first = int(np.searchsorted(self.edges, start, "right")) - 1
        last = int(np.searchsorted(self.edges, end, "left"))
        edges = np.clip(self.edges[first : last + 1], start, end)
        starts = np.concatenate((np.array([start], np.int64), runs.end[:-1]))
        row = np.minimum(np.searchsorted(runs.end, edges, "right"), len(runs.end) - 1)
        for kind in np.unique(runs.kind).tolist():
            mine = runs.kind == kind
            lengths = np.where(mine, runs.end - starts, 0)
            before = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
            # Bytes of this class before each edge: those of whole runs, and of the run the edge is in.
            upto = before[row] + np.where(mine[row], edges - starts[row], 0)
            self.counts[first:last, kind] += np.diff(upto)

    def totals(self) -> dict[str, int]:
        """Bytes by class."""
        return dict(zip(CLASSES, self.counts.sum(axis=0).tolist(), strict=True))


def draw(node: Node, start: int, length: int, cells: int) -> Picture:
    """The picture of a range of ``node``, seen through its backing chain. Raises what looking at extents raises."""
    picture = Picture(start, length, cells)
    for offset, span in windows(start, length, WINDOW):
        picture.add(offset, classes(node, offset, span))
    return picture


def classes(node: Node, offset: int, length: int) -> Runs:
    """The classes of a window's bytes: layer after layer, each only where those above say nothing."""
    import numpy as np

    found = Runs(np.array([offset + length], np.int64), np.array([_UNALLOCATED], np.uint8))
    for depth, (layer, until) in enumerate(_layers(node)):
        end = min(offset + length, until)
        if end <= offset or not (found.kind == _UNALLOCATED).any():
            break
        mine = _of_layer(layer, offset, end - offset, depth)
        if end < offset + length:  # what lies beyond a short image is zeros that nobody stored
            mine = Runs(np.append(mine.end, np.int64(offset + length)), np.append(mine.kind, np.uint8(_UNALLOCATED)))
        ends = np.union1d(found.end, mine.end)
        above, below = found.kind[np.searchsorted(found.end, ends)], mine.kind[np.searchsorted(mine.end, ends)]
        found = Runs(ends, np.where(above == _UNALLOCATED, below, above).astype(np.uint8))
    return found


def _layers(node: Node) -> Iterator[tuple[Node, int]]:
    """Each image of a chain, and how far what it says counts: not beyond the shortest of those above it."""
    from diskwright.core.node import below_filters

    layer: Node | None = below_filters(node)
    until = 1 << 63
    while layer is not None:
        yield layer, until
        backing = layer.backing
        if backing is not None:
            layer = below_filters(backing)
            until = min(until, layer.size)
        else:
            layer = None


def _of_layer(node: Node, offset: int, length: int, depth: int) -> Runs:
    """What one image says of a range; where it says nothing, UNALLOCATED."""
    import numpy as np

    from diskwright.core.node import FormatNode, StorageNode, below_filters

    linear = node.format.linear if isinstance(node, FormatNode) else None
    if isinstance(node, FormatNode) and linear is not None:
        file = below_filters(node.format.children[0])
        if not isinstance(file, StorageNode):  # an image within an image: what that one says, at this depth
            inner = classes(file, offset + linear, length)
            kinds = np.where(inner.kind <= _DEEPEST, min(depth, _DEEPEST), inner.kind).astype(np.uint8)
            return Runs(inner.end - linear, kinds)
        columns = file.extents(offset + linear, length).shift(-linear)
        return Runs(*_classified(columns, depth, unallocated=_ZERO))
    unallocated = _ZERO if isinstance(node, StorageNode) else _UNALLOCATED
    return Runs(*_classified(node.extents(offset, length), depth, unallocated=unallocated))


def _classified(columns: Extents, depth: int, *, unallocated: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    import numpy as np

    table = np.full(4, unallocated, np.uint8)
    table[DATA], table[SPECIAL], table[ZERO] = min(depth, _DEEPEST), _COMPRESSED, _ZERO
    return columns.offset + columns.length, table[columns.kind]
