"""Pictures of a disk's allocation: how many bytes of each class every cell of a picture stands for.

A disk of any size is looked at in windows, each as columns: what is in memory is one window of every layer of the
chain, and the picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.extents import WINDOW, windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.core.status import Spans

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
    from diskwright.core.status import spans

    picture = Picture(start, length, cells)
    for offset, span in windows(start, length, WINDOW):
        picture.add(offset, classes(spans(node, offset, span)))
    return picture


def classes(found: Spans) -> Runs:
    """The classes of runs. What lies beyond the end of a short backing image is said by nobody."""
    import numpy as np

    from diskwright.core.status import HAS_DATA, IS_BEYOND, IS_COMPRESSED, IS_PRESENT

    silent = found.flags & (IS_PRESENT | IS_BEYOND) != IS_PRESENT
    kind = np.where(silent, _UNALLOCATED, _ZERO)
    kind = np.where(found.flags & HAS_DATA, np.minimum(found.depth, _DEEPEST), kind)
    kind = np.where(found.flags & IS_COMPRESSED, _COMPRESSED, kind)
    return Runs(found.offset + found.length, kind.astype(np.uint8))
