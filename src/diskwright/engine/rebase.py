"""Rebase: an image gets another backing file, and goes on reading as it did.

What the image itself does not have it reads from its backing file. Where the new one has something else there, the
image has to take over what the old one has. That changes nothing of what it reads as long as its header still names
the old one; so a crash at any moment before the name is changed costs nothing, and afterwards all is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from diskwright.core.chain import common_base
from diskwright.core.lookup import ABSENT, Run, lookup
from diskwright.core.node import fill_zeros
from diskwright.engine.copy import CHUNK
from diskwright.engine.zeros import is_zero
from diskwright.errors import JobError
from diskwright.extents import UNALLOCATED, WINDOW, ZERO, windows
from diskwright.units import GiB, align_down, align_up

if TYPE_CHECKING:
    from diskwright.core.leases import Leases
    from diskwright.core.node import Node

_AT_ONCE: Final = GiB
"""Bytes of the guest's disk looked up together."""


class RebaseFailed(JobError):
    """A range could not be taken over. ``what`` is ``read`` or ``write``; ``offset`` in bytes; the error is chained."""

    def __init__(self, what: str, offset: int, cause: BaseException) -> None:
        super().__init__(f"{what} failed at byte {offset}: {cause}")
        self.what, self.offset = what, offset


class Rebase:
    """Takes over from ``old`` into ``image``, whose backing node in memory is ``new`` already, what ``new`` reads
    otherwise. Either may be None, which reads as zeros, and of any size.

    ``image`` reads as over ``old`` again, whatever happens, once its header's backing file is opened.
    """

    def __init__(
        self,
        image: Node,
        old: Node | None,
        new: Node | None,
        leases: Leases,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        assert image.backing is new, "what is written must be seen over the new backing node"
        self.image, self.old, self.new, self.leases, self.stop = image, old, new, leases, stop
        shared = common_base(old, new) if old is not None and new is not None else None
        # What both get from one and the same image below need not be read.
        self._old_base: Node | None
        self._new_base: Node | None
        self._old_base, self._new_base = shared or (None, None)
        # Whole clusters, so that nothing has to be filled in from a backing file; both are powers of two.
        self._unit = max(image.cluster_size, 512)
        self._mine, self._theirs = (memoryview(bytearray(max(CHUNK, self._unit))) for _ in range(2))
        self.position = 0

    def progress(self) -> tuple[int, int]:
        """``(bytes of the image that are done, all)``."""
        return self.position, self.image.size

    def run(self) -> None:
        """Takes over everything there is to be, and makes it durable. Raises RebaseFailed; what has been taken over
        until then is right, and can stay."""
        for offset, length in windows(0, self.image.size, WINDOW):
            for at, size in self._missing(offset, length):
                for start, step in windows(at, size, _AT_ONCE):
                    self._compare(start, step)
                    if self.stop():
                        return
            self.position = offset + length
        self.image.flush()

    def _missing(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Ranges for which the image has nothing itself."""
        with self.leases.held():
            found = [run for run in self.image.extents(offset, length) if run.kind == UNALLOCATED]
        for run in found:
            yield run.offset, run.length

    def _compare(self, offset: int, length: int) -> None:
        """Compares old and new in a range, and takes over what differs."""
        with self.leases.held():
            try:
                left = _runs(self.old, offset, length, self._old_base)
                right = _runs(self.new, offset, length, self._new_base)
            except Exception as error:
                raise RebaseFailed("read", offset, error) from error
            unit = self._unit
            for start, end, alike in _joined(left, right, unit):
                # Zeros may go on for long, and there is nothing to read in them.
                for at, size in () if alike else windows(start, end - start, len(self._mine)):
                    if self.stop():
                        return
                    self._take_over(at, size)
                    self.position = at
                self.position = end

    def _take_over(self, offset: int, length: int) -> None:
        mine, theirs = self._mine[:length], self._theirs[:length]
        try:
            _read(self.old, offset, mine)
            _read(self.new, offset, theirs)
        except Exception as error:
            raise RebaseFailed("read", offset, error) from error
        for start, end in _differing(offset, mine, theirs, self._unit):
            piece = mine[start:end]
            try:
                if is_zero(piece):
                    self.image.write_zeros(offset + start, end - start, unmap=True)
                else:
                    self.image.writev([(offset + start, piece)])
            except Exception as error:
                raise RebaseFailed("write", offset + start, error) from error


def _runs(node: Node | None, offset: int, length: int, base: Node | None) -> list[Run]:
    """What a backing node has in a range; ABSENT is what only ``base`` may have, ZERO what is beyond the end."""
    if node is None:
        return [(offset, length, ZERO)]
    inside = max(0, min(length, node.size - offset))
    runs = lookup(node, offset, inside, base) if inside and node is not base else []
    if inside and node is base:
        runs = [(offset, inside, ABSENT)]
    if inside < length:
        runs.append((offset + inside, length - inside, ZERO))
    return runs


def _joined(left: list[Run], right: list[Run], unit: int) -> Iterator[tuple[int, int, bool]]:
    """``(start, end, alike)`` over the range of both; what has to be compared begins and ends with whole units."""
    begin, stop = left[0][0], left[-1][0] + left[-1][1]
    pending: tuple[int, int] | None = None
    done = begin
    i = j = 0
    at = begin
    while at < stop:
        end = min(left[i][0] + left[i][1], right[j][0] + right[j][1])
        if not (left[i][2] == right[j][2] and left[i][2] in (ZERO, ABSENT)):
            low, high = max(begin, align_down(at, unit)), min(stop, align_up(end, unit))
            if pending is not None and low <= pending[1]:
                pending = pending[0], max(high, pending[1])
            else:
                if pending is not None:
                    yield *pending, False
                    done = pending[1]
                if low > done:
                    yield done, low, True
                pending = max(low, done), high
        i += left[i][0] + left[i][1] == end
        j += right[j][0] + right[j][1] == end
        at = end
    if pending is not None:
        yield *pending, False
        done = pending[1]
    if done < stop:
        yield done, stop, True


def _read(node: Node | None, offset: int, into: memoryview) -> None:
    inside = 0 if node is None else max(0, min(len(into), node.size - offset))
    if node is not None and inside:
        node.readv([(offset, into[:inside])])
    if inside < len(into):
        fill_zeros(into[inside:])


def _differing(offset: int, mine: memoryview, theirs: memoryview, unit: int) -> Iterator[tuple[int, int]]:
    """``(start, end)`` within the buffers of runs of whole units in which they differ; all of a run is zeros in
    ``mine``, or none of its units is."""
    import numpy as np

    a, b = np.frombuffer(mine, np.uint8), np.frombuffer(theirs, np.uint8)
    if np.array_equal(a, b):
        return
    run: tuple[int, int, bool] | None = None
    head = -offset % unit or unit
    starts = [0, *range(head, len(mine), unit)]
    for start, end in zip(starts, [*starts[1:], len(mine)], strict=True):
        if np.array_equal(a[start:end], b[start:end]):
            continue
        zero = not a[start:end].any()
        if run is not None and run[1:] == (start, zero):
            run = run[0], end, zero
            continue
        if run is not None:
            yield run[:2]
        run = start, end, zero
    if run is not None:
        yield run[:2]
