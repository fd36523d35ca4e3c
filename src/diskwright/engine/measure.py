"""Measure: how large an image would be, and how much of a disk holds anything.

A disk is looked at in windows, and in each as sorted arrays of ranges: what one layer holds, and of what it does not
say anything, what the layers below hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from diskwright.core.driver import Format, MeasuredSource, Measurement
from diskwright.core.leases import Leases
from diskwright.core.node import FormatNode, Node, StorageNode, below_filters
from diskwright.core.status import may_have_holes
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, Extents, windows
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_SPREAD: Final = 16
"""How much more of a file than is wanted may be gone through for its holes, rather than asking range by range."""


class _Ranges(NamedTuple):
    """Ranges of guest bytes, sorted, not overlapping, as arrays of their starts and ends."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]


def can_measure(driver: type[Any]) -> bool:
    """Whether a driver is a format that knows how large its images become."""
    return issubclass(driver, Format) and any("measure" in vars(cls) for cls in driver.__mro__ if cls is not Format)


def measure(driver: type[Format], options: Any, source: Node | None, leases: Leases) -> Measurement:
    """How large a new image of format ``driver`` will be; a copy of ``source``, if there is one, whose size (in whole
    sectors) ``options.size`` must be. Raises OptionError or LimitExceeded where creating it would."""
    return driver.measure(options, None if source is None else _described(source, leases))


def _described(source: Node, leases: Leases) -> MeasuredSource:
    node = below_filters(source)
    return MeasuredSource(
        align_up(source.size, SECTOR),
        lambda unit: allocated(source, leases, unit),
        node.format.stored_bitmaps() if isinstance(node, FormatNode) else None,
    )


def allocated(node: Node, leases: Leases, unit: int) -> int:
    """How many bytes those units of ``unit`` bytes have in which ``node``, with its backing chain, holds anything.
    Zeros that the map knows of are nothing."""
    count, last = 0, -1
    known: dict[int, bool] = {}
    for offset, length in windows(0, node.size):
        with leases.held():
            start, end = _held(node, offset, length, known)
        if not len(start):
            continue
        first, final = start // unit, (end - 1) // unit
        # Ranges are sorted, so one can share a unit only with its neighbour.
        count += int((final - first).sum()) + len(first) - int((first[1:] == final[:-1]).sum())
        count -= int(first[0]) == last
        last = int(final[-1])
    return count * unit


def _held(node: Node, offset: int, length: int, known: dict[int, bool]) -> _Ranges:
    """The ranges of a window in which something is stored. ``known`` remembers whose files may have holes."""
    import numpy as np

    node = below_filters(node)
    if isinstance(node, FormatNode) and node.format.linear is not None:
        shift = node.format.linear
        found = _held(node.format.children[0], offset + shift, length, known)
        return _Ranges(found.start - shift, found.end - shift) if shift else found
    runs = node.extents(offset, length)
    if isinstance(node, StorageNode):
        return _data(runs)
    if id(node) not in known:
        known[id(node)] = may_have_holes(node)
    own = _ranges(runs, (runs.kind == DATA) | (runs.kind == SPECIAL))
    if known[id(node)] and len(own.start):
        own = _without_holes(node, runs)
    backing = node.backing
    if backing is None or offset >= backing.size:
        return own
    open_ = _ranges(runs, runs.kind == UNALLOCATED)
    if not len(open_.start):
        return own
    low, high = int(open_.start[0]), min(int(open_.end[-1]), backing.size)
    if low >= high:
        return own
    _, below = _common(open_, _held(backing, low, high - low, known))
    if not len(own.start):
        return below
    start, end = np.concatenate((own.start, below.start)), np.concatenate((own.end, below.end))
    order = np.argsort(start, kind="stable")
    return _Ranges(start[order], end[order])


def _ranges(runs: Extents, chosen: NDArray[np.bool_]) -> _Ranges:
    start = runs.offset[chosen]
    return _Ranges(start, start + runs.length[chosen])


def _without_holes(node: Node, runs: Extents) -> _Ranges:
    """The DATA and SPECIAL ranges of a format, less what its file has no space for: clusters that were taken in
    advance and never written."""
    import numpy as np

    assert isinstance(node, FormatNode)
    special = _ranges(runs, runs.kind == SPECIAL)
    starts, ends = [special.start], [special.end]
    for child in np.unique(runs.child[runs.kind == DATA]).tolist():
        chosen = (runs.kind == DATA) & (runs.child == child)
        guest, host, length = runs.offset[chosen], runs.file_offset[chosen], runs.length[chosen]
        order = np.argsort(host, kind="stable")
        guest, host, length = guest[order], host[order], length[order]
        there = _stored(below_filters(node.format.children[child]), _Ranges(host, host + length))
        row, found = _common(_Ranges(host, host + length), there)
        shift = guest[row] - host[row]
        starts.append(found.start + shift)
        ends.append(found.end + shift)
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    return _Ranges(start[order], end[order])


def _stored(file: Node, wanted: _Ranges) -> _Ranges:
    """What ``file`` has space for, in ranges that cover at least ``wanted``."""
    import numpy as np

    low, high = int(wanted.start[0]), int(wanted.end.max())
    if high - low <= _SPREAD * int((wanted.end - wanted.start).sum()):
        pieces = list(windows(low, high - low))
    else:  # so far apart that asking for each costs less than going through all that is between them
        pieces = list(zip(wanted.start.tolist(), (wanted.end - wanted.start).tolist(), strict=True))
    parts = [_data(file.extents(offset, length)) for offset, length in pieces]
    return _Ranges(np.concatenate([p.start for p in parts]), np.concatenate([p.end for p in parts]))


def _data(runs: Extents) -> _Ranges:
    return _ranges(runs, runs.kind == DATA)


def _common(a: _Ranges, b: _Ranges) -> tuple[NDArray[np.int64], _Ranges]:
    """What both have, and to which rows of ``a`` it belongs."""
    import numpy as np

    first = np.searchsorted(b.end, a.start, "right")
    counts = np.maximum(np.searchsorted(b.start, a.end, "left") - first, 0)
    row = np.repeat(np.arange(len(a.start)), counts)
    other = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + first[row]
    return row, _Ranges(np.maximum(a.start[row], b.start[other]), np.minimum(a.end[row], b.end[other]))
