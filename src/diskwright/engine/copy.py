"""The copy engine: moves ranges of one node to another with several workers.

One ``Copier`` knows how one range is moved: what reads as zeros is zeroed (or left out, where the target
reads as zeros already), the rest is read, looked through for zeros and written. ``run_plan`` feeds it from
any number of threads. Convert, mirror and whatever copies in bulk differ only in their plans.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final

from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.core.status import Status, status
from diskwright.engine.buffers import Buffers
from diskwright.engine.clock import Clock, Clocks
from diskwright.engine.rate import RateLimit
from diskwright.errors import DiskwrightError
from diskwright.extents import windows
from diskwright.units import GiB, KiB, MiB

CHUNK: Final = MiB
"""Bytes moved by one read and one write: long enough that a call's cost does not show, short enough that what
was read is still in the processor's cache when it is written."""
WORKERS: Final = 3
"""Threads of one copy: reads, writes and memory comparison release the interpreter, so two keep two cores busy,
and the third fills the gaps."""
MAX_WORKERS: Final = 16
SPARSE: Final = 4 * KiB
"""Zeros of at least this length within data are not written as data."""

Range = tuple[int, int]

_ZEROS: Final = bytes(CHUNK)


class ReadFailed(Exception):
    """The source could not be read; the error is chained."""


class WriteFailed(Exception):
    """The target could not be written; the error is chained."""


class Copier:
    """How ranges of ``source`` get to ``target``. Thread-safe; each worker brings its own buffer and clock.

    ``sparse``       length in bytes from which zeros found in data are told as such; 0: data is not looked at
    ``target_zero``  the target reads as zeros wherever nothing has been copied to yet, so zeros can be left out
    ``unmap``        the target need not keep space for zeros
    ``base``         what only this backing node of the source (or one below it) has, the target has as well
    """

    def __init__(
        self,
        source: Node,
        target: Node,
        leases: Leases,
        *,
        sparse: int = SPARSE,
        target_zero: bool = False,
        unmap: bool = True,
        base: Node | None = None,
        offset_in_target: int = 0,
    ) -> None:
        self.source, self.target, self.leases = source, target, leases
        self.sparse, self.target_zero, self.unmap, self.base = sparse, target_zero, unmap, base
        self.shift = offset_in_target

    def copy(self, offset: int, length: int, buffer: memoryview, clock: Clock) -> None:
        """Copies one range, ``len(buffer)`` bytes of data at a time. Raises ReadFailed or WriteFailed; any part of the range
        may have been written then."""
        with self.leases.held():
            for run in self._status(offset, length):
                clock.lap("map")
                if run.zero:
                    self._zero(run.offset, run.length)
                    clock.lap("zero")
                else:
                    for start, step in windows(run.offset, run.length, len(buffer)):
                        self._data(start, step, buffer, clock)

    def _status(self, offset: int, length: int) -> list[Status]:
        try:
            rows = status(self.source, offset, length, base=self.base)
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        if self.base is not None:
            rows = [row for row in rows if row.present]
        return rows

    def _data(self, offset: int, length: int, buffer: memoryview, clock: Clock) -> None:
        piece = buffer[:length]
        try:
            self.source.readv([(offset, piece)])
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        clock.lap("read")
        runs = zero_runs(piece, self.sparse) if self.sparse else [(0, length, False)]
        clock.lap("look")
        for start, size, zero in runs:
            if zero:
                self._zero(offset + start, size)
                clock.lap("zero")
                continue
            try:
                self.target.writev([(offset + start + self.shift, piece[start : start + size])])
            except (OSError, DiskwrightError) as error:
                raise WriteFailed from error
            clock.lap("write")

    def _zero(self, offset: int, length: int) -> None:
        if self.target_zero:
            return
        try:
            self.target.write_zeros(offset + self.shift, length, unmap=self.unmap)
        except (OSError, DiskwrightError) as error:
            raise WriteFailed from error


def zero_runs(piece: memoryview, unit: int) -> list[tuple[int, int, bool]]:
    """``(start, length, reads as zeros)`` for a piece of data, in units of ``unit`` bytes.

    Whole pieces of zeros and pieces with a non-zero byte in every unit, the common ones, cost one pass.
    """
    import numpy as np

    length = len(piece)
    whole = length - length % unit
    if not whole or length < unit * 2:
        return [(0, length, not any_set(piece))]
    view = np.frombuffer(piece, np.uint8, whole)
    # One word from each unit first: real data nearly always shows itself there.
    if unit % 8 == 0 and bool(view.view(np.uint64)[:: unit // 8].all()):
        return [(0, length, False)] if whole == length or any_set(piece[whole:]) else [
            (0, whole, False),
            (whole, length - whole, True),
        ]
    flags = ~view.reshape(-1, unit).any(axis=1)
    tail_zero = whole == length or not any_set(piece[whole:])
    edges = np.flatnonzero(np.diff(flags)) + 1
    starts = [0, *(edges * unit).tolist()]
    kinds = [bool(flags[start // unit]) for start in starts]
    if whole < length and kinds[-1] != tail_zero:
        starts.append(whole)
        kinds.append(tail_zero)
    ends = [*starts[1:], length]
    return [(start, end - start, kind) for start, end, kind in zip(starts, ends, kinds, strict=True)]


def any_set(piece: memoryview) -> bool:
    """Whether a piece of memory has a byte other than zero."""
    import numpy as np

    return bool(np.frombuffer(piece, np.uint8).any())


def run_plan(
    copier: Copier,
    plan: Iterator[Range],
    *,
    workers: int = WORKERS,
    rate: RateLimit | None = None,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[int, int], None] = lambda offset, length: None,
    failed: Callable[[int, int, Exception], None],
    clocks: Clocks | None = None,
    chunk: int = CHUNK,
) -> None:
    """Copies every range of ``plan`` (each at most ``chunk`` bytes), which is asked for the next one by one worker at a
    time. Returns when the plan has ended, or ``stop()`` is true, and no range is in flight.

    ``done(offset, length)`` follows each copied range; ``failed(offset, length, error)`` each that was not, with the
    ReadFailed or WriteFailed: raise there to end the whole run. Both are called by workers.
    """
    rate = rate or RateLimit()
    clocks = clocks or Clocks()
    lock = threading.Lock()
    errors: list[BaseException] = []

    def quit_now() -> bool:
        return bool(errors) or stop()

    def work() -> None:
        try:
            clock = clocks.new()
            with Buffers(chunk, 1).one() as buffer:
                while rate.wait(quit_now):
                    with lock:
                        step = next(plan, None)
                    if step is None:
                        return
                    clock.lap("wait")
                    rate.charge(step[1])
                    try:
                        copier.copy(*step, buffer, clock)
                    except (ReadFailed, WriteFailed) as error:
                        failed(*step, error)
                    else:
                        done(*step)
        except BaseException as error:
            errors.append(error)
            rate.wake()

    count = max(1, min(workers, MAX_WORKERS))
    threads = [threading.Thread(target=work, name="copy") for _ in range(count - 1)]
    for thread in threads:
        thread.start()
    work()  # the caller is a worker too
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def chunks(offset: int, length: int, chunk: int = CHUNK) -> Iterator[Range]:
    """A range in pieces, cut at multiples of ``chunk``."""
    return windows(offset, length, chunk)


def data_plan(source: Node, leases: Leases, size: int, *, zeros: bool, chunk: int = CHUNK) -> Iterator[Range]:
    """Ranges of ``source`` that have to be copied: all that holds data and, with ``zeros``, what reads as zeros too.

    Zeros that follow each other for long come as ranges of up to 1 GiB: nothing has to be read for them.
    """
    for start, step in windows(0, size, GiB):
        with leases.held():
            rows = status(source, start, step)
        pending: Range | None = None  # data runs that adjoin are put together, whatever layer they come from
        for row in rows:
            if row.zero:
                if pending:
                    yield from chunks(*pending, chunk)
                    pending = None
                if zeros:
                    yield row.offset, row.length
            elif pending:
                pending = pending[0], row.end - pending[0]
            else:
                pending = row.offset, row.length
        if pending:
            yield from chunks(*pending, chunk)
