"""Extents: where the bytes of a guest range live.

An ``Extent`` is one run with the same answer; ``Extents`` holds many as columns of NumPy arrays, for
work in bulk. Both speak of the same six facts, so a driver may answer with either. NumPy is imported
only when columns are made: a command that looks at one extent must not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DATA: Final = 0
"""The bytes lie verbatim at ``file_offset`` of child ``child``."""
ZERO: Final = 1
"""The bytes read as zeros. ``file_offset`` is -1, or where space is kept ready for them."""
UNALLOCATED: Final = 2
"""This layer says nothing: the backing node answers, and without one the bytes read as zeros. ``file_offset`` is -1,
or where space is kept ready for them."""
SPECIAL: Final = 3
"""The driver must decode: ``stored`` bytes at ``file_offset`` hold the unit this range is part of."""

KIND_NAMES: Final = ("data", "zero", "unallocated", "special")

WINDOW: Final = 1 << 30
"""Guest bytes asked for at a time in bulk work: bounds the columns to a few MiB at 4 KiB clusters."""


class Extent(NamedTuple):
    """One run of guest bytes with one answer. All fields are plain ints, in bytes.

    ``offset``       guest offset of the run
    ``length``       its length, always above 0
    ``kind``         DATA, ZERO, UNALLOCATED or SPECIAL
    ``file_offset``  where the bytes are in the child; -1 when there is no such place
    ``child``        index of the child in the driver's ``children``; 0 is ``file``
    ``stored``       length of the stored unit of a SPECIAL extent, else 0
    """

    offset: int
    length: int
    kind: int
    file_offset: int = -1
    child: int = 0
    stored: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length


class Extents:
    """Runs as parallel columns, ordered by ``offset``, adjoining and not overlapping.

    Columns are int64 arrays of one shape ``(n,)`` except ``kind`` (uint8) and ``child`` (int16); the
    meaning of each is that of the ``Extent`` field of its name. Instances are not changed after they
    are made; every operation returns a new one.
    """

    __slots__ = ("child", "file_offset", "kind", "length", "offset", "stored")

    def __init__(
        self,
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
        kind: NDArray[np.uint8],
        file_offset: NDArray[np.int64],
        child: NDArray[np.int16],
        stored: NDArray[np.int64],
    ) -> None:
        self.offset, self.length, self.kind = offset, length, kind
        self.file_offset, self.child, self.stored = file_offset, child, stored

    @classmethod
    def of(cls, runs: Iterable[Extent]) -> Extents:
        """Columns from single extents, in their order."""
        import numpy as np

        rows = list(runs)
        if not rows:
            rows_by_column: list[tuple[int, ...]] = [()] * 6
        else:
            rows_by_column = list(zip(*rows, strict=True))
        return cls(*(np.array(column, dtype) for column, dtype in zip(rows_by_column, _dtypes(), strict=True)))

    @classmethod
    def join(cls, parts: Sequence[Extents]) -> Extents:
        """The runs of all parts, which adjoin in their order."""
        import numpy as np

        columns = zip(*((p.offset, p.length, p.kind, p.file_offset, p.child, p.stored) for p in parts), strict=True)
        return parts[0] if len(parts) == 1 else cls(*(np.concatenate(column) for column in columns))

    def __len__(self) -> int:
        return len(self.offset)

    def __iter__(self) -> Iterator[Extent]:
        columns = (self.offset, self.length, self.kind, self.file_offset, self.child, self.stored)
        return map(Extent._make, zip(*(column.tolist() for column in columns), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Extents({list(self)!r})"

    def slice(self, offset: int, length: int) -> Extents:
        """The part within ``[offset, offset + length)``; runs that cross its ends are cut."""
        import numpy as np

        first = int(np.searchsorted(self.offset + self.length, offset, "right"))
        last = int(np.searchsorted(self.offset, offset + length, "left"))
        start = np.maximum(self.offset[first:last], offset)
        end = np.minimum(self.offset[first:last] + self.length[first:last], offset + length)
        kind, place = self.kind[first:last], self.file_offset[first:last]
        # A SPECIAL run's place is that of its whole unit, so cutting the run does not move it.
        moved = np.where((place >= 0) & (kind != SPECIAL), place + (start - self.offset[first:last]), place)
        return Extents(start, end - start, kind, moved, self.child[first:last], self.stored[first:last])

    def shift(self, delta: int) -> Extents:
        """The same runs, ``delta`` bytes further on in the guest."""
        return Extents(self.offset + delta, self.length, self.kind, self.file_offset, self.child, self.stored)

    def merge(self) -> Extents:
        """Adjoining runs with one continued answer become one run. SPECIAL runs are never merged."""
        import numpy as np

        if len(self) < 2:
            return self
        step = self.length[:-1]
        placed = self.file_offset[:-1] >= 0
        place_goes_on = np.where(placed, self.file_offset[:-1] + step, -1) == self.file_offset[1:]
        same = (
            (self.kind[:-1] == self.kind[1:])
            & (self.kind[1:] != SPECIAL)
            & (self.child[:-1] == self.child[1:])
            & (self.offset[:-1] + step == self.offset[1:])
            & place_goes_on
        )
        heads = np.flatnonzero(np.concatenate(([True], ~same)))
        return Extents(
            self.offset[heads],
            np.add.reduceat(self.length, heads),
            self.kind[heads],
            self.file_offset[heads],
            self.child[heads],
            self.stored[heads],
        )

    def intersect(self, other: Extents) -> tuple[Extents, Extents]:
        """Both cut at the union of their boundaries, over the range they share: row by row they then speak of
        equal offsets and lengths."""
        import numpy as np

        if not len(self) or not len(other):
            empty = Extents.of(())
            return empty, empty
        low = max(int(self.offset[0]), int(other.offset[0]))
        high = min(int(self.offset[-1] + self.length[-1]), int(other.offset[-1] + other.length[-1]))
        if low >= high:
            empty = Extents.of(())
            return empty, empty
        cuts = np.unique(np.concatenate((self.offset, other.offset, np.array([low]))))
        cuts = cuts[(cuts >= low) & (cuts < high)]
        ends = np.append(cuts[1:], high)
        return self._cut(cuts, ends), other._cut(cuts, ends)

    def _cut(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Extents:
        """Rows ``[start, end)``, each within one run of this."""
        import numpy as np

        row = np.searchsorted(self.offset, start, "right") - 1
        kind, place = self.kind[row], self.file_offset[row]
        moved = np.where((place >= 0) & (kind != SPECIAL), place + (start - self.offset[row]), place)
        return Extents(start, end - start, kind, moved, self.child[row], self.stored[row])

    def total(self, kind: int) -> int:
        """How many bytes are of ``kind``."""
        return int(self.length[self.kind == kind].sum())


def windows(offset: int, length: int, step: int = WINDOW) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` pieces of a range, cut at multiples of ``step``, so that bulk work stays bounded."""
    end = offset + length
    while offset < end:
        stop = min(end, offset - offset % step + step)
        yield offset, stop - offset
        offset = stop


def _dtypes() -> tuple[Any, ...]:
    """Column types in the order of ``Extent``'s fields."""
    import numpy as np

    return (np.int64, np.int64, np.uint8, np.int64, np.int16, np.int64)
