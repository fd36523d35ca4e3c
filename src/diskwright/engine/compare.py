"""Comparing what two nodes read as."""

from __future__ import annotations

import threading
from collections.abc import Callable

from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.core.status import Status, status
from diskwright.engine.buffers import Buffers
from diskwright.engine.copy import WORKERS
from diskwright.engine.zeros import is_zero
from diskwright.extents import windows
from diskwright.units import GiB, KiB

CHUNK = 512 * KiB
"""Bytes compared at a time: two of them stay in the processor's cache."""


def first_difference(
    left: Node,
    right: Node,
    leases: Leases,
    *,
    length: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> int | None:
    """The offset of the first byte in which two nodes differ within ``length`` bytes (default: the shorter one's
    size), or None. ``progress`` is told the bytes that need no further look, from several threads. Raises OSError or
    ImageError.

    Where the maps of both say zero nothing is read.
    """
    whole = min(left.size, right.size) if length is None else length
    for start, step in windows(0, whole, GiB):
        with leases.held():
            pairs = _paired(status(left, start, step), status(right, start, step))
            found = _Window(left, right, pairs, progress, stop).search()
        if found is not None:
            return found
        if stop():
            return None
    return None


def beyond_is_zero(node: Node, leases: Leases, offset: int) -> int | None:
    """The offset of the first byte other than zero at or after ``offset``, or None."""
    buffer = memoryview(bytearray(CHUNK))
    for start, step in windows(offset, node.size - offset, GiB):
        with leases.held():
            for row in status(node, start, step):
                if row.zero:
                    continue
                for at, size in windows(row.offset, row.length, CHUNK):
                    piece = buffer[:size]
                    node.readv([(at, piece)])
                    if not is_zero(piece):
                        return at + next(i for i, byte in enumerate(piece) if byte)
    return None


class _Window:
    """The search of one window, by several workers; the first difference of all that they find counts."""

    def __init__(
        self,
        left: Node,
        right: Node,
        pairs: list[tuple[int, int, bool, bool]],
        progress: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> None:
        self.left, self.right, self.progress, self.stop = left, right, progress, stop
        self._steps = (
            (at, size, left_zero, right_zero)
            for offset, length, left_zero, right_zero in pairs
            for at, size in windows(offset, length, GiB if left_zero and right_zero else CHUNK)
        )
        self._lock = threading.Lock()
        self._found: int | None = None
        self._errors: list[BaseException] = []

    def search(self) -> int | None:
        threads = [threading.Thread(target=self._work, name="compare") for _ in range(WORKERS - 1)]
        for thread in threads:
            thread.start()
        self._work()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self._found

    def _work(self) -> None:
        buffers = Buffers(CHUNK, 2)
        try:
            with buffers.one() as a, buffers.one() as b:
                while not self._errors and not self.stop():
                    with self._lock:
                        step = next(self._steps, None)
                        # Steps come in order, so what follows a difference cannot hold the first one.
                        if step is None or (self._found is not None and step[0] > self._found):
                            return
                    self._compare(step, a, b)
                    self.progress(step[1])
        except BaseException as error:
            self._errors.append(error)

    def _compare(self, step: tuple[int, int, bool, bool], a: memoryview, b: memoryview) -> None:
        offset, length, left_zero, right_zero = step
        if left_zero and right_zero:
            return
        mine, theirs = a[:length], b[:length]
        if not left_zero:
            self.left.readv([(offset, mine)])
        if not right_zero:
            self.right.readv([(offset, theirs)])
        at = _first_set(theirs if left_zero else mine) if left_zero or right_zero else _first_unequal(mine, theirs)
        if at is not None:
            with self._lock:
                self._found = min(offset + at, self._found) if self._found is not None else offset + at


def _first_set(piece: memoryview) -> int | None:
    import numpy as np

    view = np.frombuffer(piece, np.uint8)
    return int((view != 0).argmax()) if view.any() else None


def _first_unequal(left: memoryview, right: memoryview) -> int | None:
    import numpy as np

    a, b = np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)
    if np.array_equal(a, b):
        return None
    return int((a != b).argmax())


def _paired(left: list[Status], right: list[Status]) -> list[tuple[int, int, bool, bool]]:
    """``(offset, length, left reads as zeros, right reads as zeros)`` over the range both cover."""
    pairs: list[tuple[int, int, bool, bool]] = []
    i = j = 0
    at = left[0].offset if left else 0
    while i < len(left) and j < len(right):
        end = min(left[i].end, right[j].end)
        zeros = left[i].zero, right[j].zero
        if pairs and pairs[-1][2:] == zeros:
            pairs[-1] = (pairs[-1][0], end - pairs[-1][0], *zeros)
        else:
            pairs.append((at, end - at, *zeros))
        at = end
        i += left[i].end == end
        j += right[j].end == end
    return pairs
