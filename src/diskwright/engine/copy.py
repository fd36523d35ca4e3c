"""The copy engine: moves ranges of one node to another with several workers.

One ``Copier`` knows how ranges are moved: what reads as zeros is zeroed (or left out, where the target reads
as zeros already), the rest is moved by the kernel, or read, looked through for zeros and written. ``run_plan``
feeds it from any number of threads. Convert, mirror and whatever copies in bulk differ only in their plans.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from diskwright.core.disk import Disk
from diskwright.core.driver import Segment
from diskwright.core.leases import Leases
from diskwright.core.lookup import ABSENT, Run, lookup, widen
from diskwright.core.node import Node
from diskwright.core.status import status
from diskwright.engine.buffers import Buffers
from diskwright.engine.clock import Clock, Clocks
from diskwright.engine.rate import RateLimit
from diskwright.engine.zeros import SPARSE, WORD, zero_runs
from diskwright.errors import DiskwrightError
from diskwright.extents import DATA, WINDOW, ZERO, windows
from diskwright.units import KiB, MiB, align_up, is_power_of_two

CHUNK: Final = 512 * KiB
"""Bytes moved by one read and one write: long enough that a call's cost does not show. Longer writes make the kernel
look for huge pages for its cache, which takes several times as long as the copying where memory is scarce."""
WORKERS: Final = 2
"""Threads of one copy: one reads and looks for zeros while the other writes. More only wait for each other, as a file
system lets one writer at a time into a file."""
MAX_WORKERS: Final = 16
BATCH: Final = 64
"""Ranges moved by one call at most, when they are short."""
MAX_UNIT: Final = MiB
"""Zeros are looked for in units of the target's clusters, up to this size."""

Range = tuple[int, int]
"""``(offset, length)`` in the source, in bytes."""


class ReadFailed(Exception):
    """The source could not be read; the error is chained."""


class WriteFailed(Exception):
    """The target could not be written; the error is chained."""


class Copier:
    """How ranges of ``source`` get to ``target``. Thread-safe; each worker brings its own buffer and clock.

    ``sparse``       length in bytes from which zeros found in data are told as such; 0: data is not looked at
    ``target_zero``  the target reads as zeros wherever nothing has been copied to yet, so zeros can be left out;
                     or a function that tells so of one range, asked once whenever it is about to be copied
    ``unmap``        the target need not keep space for zeros
    ``base``         what only this backing node of the source (or one below it) has, the target has as well
    ``gate``         the disk whose gate each batch passes, so that it is waited for when that is drained;
                     without, batches only hold a lease of ``leases``
    """

    def __init__(
        self,
        source: Node,
        target: Node,
        leases: Leases,
        *,
        sparse: int = SPARSE,
        target_zero: bool | Callable[[int, int], bool] = False,
        unmap: bool = True,
        base: Node | None = None,
        offset_in_target: int = 0,
        gate: Disk | None = None,
    ) -> None:
        self.source, self.target, self.base, self.gate = source, target, base, gate
        self.sparse, self.unmap, self.shift = sparse, unmap, offset_in_target
        self._leases = leases
        self._target_zero = target_zero
        self._in_kernel = not sparse
        cluster = min(target.cluster_size, MAX_UNIT)
        self.unit = max(sparse and align_up(sparse, WORD), cluster if cluster % WORD == 0 else 1)

    def enter(self) -> int:
        """Before a batch is chosen: from now on what is looked up stays valid, and drains wait. For ``leave``."""
        return self.gate.begin() if self.gate is not None else self._leases.take()

    def leave(self, token: int) -> None:
        if self.gate is not None:
            self.gate.end(token)
        else:
            self._leases.end(token)

    def copy(
        self, ranges: Sequence[Range], buffer: memoryview, clock: Clock, turn: Callable[[], None] | None = None
    ) -> int:
        """Copies ranges that do not overlap, of any length; returns how many bytes were moved as data. ``turn`` is
        called before anything is written. Raises ReadFailed or WriteFailed; any part may have been written then."""
        pieces: list[tuple[int, int, bool]] = []
        zeros: list[Range] = []
        for offset, length in ranges:
            blank = self._target_zero if isinstance(self._target_zero, bool) else self._target_zero(offset, length)
            for start, size, kind in self._lookup(offset, length):
                if kind == DATA:
                    pieces.append((start, size, blank))
                elif kind == ZERO and not blank:
                    zeros.append((start, size))
        clock.lap("look up")
        moved = sum(size for _, size, _ in pieces)
        if self._in_kernel:
            pieces = self._move_in_kernel(pieces, clock, turn)
        if pieces:
            self._move(pieces, buffer, clock, turn)
        if zeros:
            if turn is not None:
                turn()
            for start, size in zeros:
                self._zero(start, size)
            clock.lap("zero")
        return moved

    def _lookup(self, offset: int, length: int) -> list[Run]:
        try:
            runs = lookup(self.source, offset, length, self.base)
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        return runs if len(runs) == 1 else widen(runs, self.unit)

    # -- through memory --------------------------------------------------------------------------

    def _move(
        self,
        pieces: Sequence[tuple[int, int, bool]],
        buffer: memoryview,
        clock: Clock,
        turn: Callable[[], None] | None,
    ) -> None:
        """Moves data, one buffer full after the other."""
        room = len(buffer)
        batch: list[tuple[Segment, bool]] = []
        used = 0
        for offset, length, blank in pieces:
            done = 0
            while done < length:
                if used == room:
                    self._move_batch(batch, clock, turn)
                    batch, used = [], 0
                step = min(length - done, room - used)
                batch.append(((offset + done, buffer[used : used + step]), blank))
                used += step
                done += step
        self._move_batch(batch, clock, turn)

    def _move_batch(self, batch: list[tuple[Segment, bool]], clock: Clock, turn: Callable[[], None] | None) -> None:
        try:
            self.source.readv([segment for segment, _ in batch])
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        clock.lap("read")
        shift = self.shift
        writes: list[Segment] = []
        zeros: list[Range] = []
        if self.sparse:
            for (offset, piece), blank in batch:
                self._sort(offset, piece, writes, None if blank else zeros)
            clock.lap("look for zeros")
        else:
            writes = [(offset + shift, piece) for (offset, piece), _ in batch]
        if turn is not None:
            turn()
            clock.lap("wait for turn")
        if writes:
            try:
                self.target.writev(writes)
            except (OSError, DiskwrightError) as error:
                raise WriteFailed from error
            clock.lap("write")
        for offset, length in zeros:
            self._zero(offset, length)

    def _sort(self, offset: int, piece: memoryview, writes: list[Segment], zeros: list[Range] | None) -> None:
        """Tells the zeros in what was read from the rest; ``zeros`` None: they need not be written."""
        head = min(-(offset + self.shift) % self.unit, len(piece))
        for begin, end in ((0, head), (head, len(piece))):
            for start, length, zero in zero_runs(piece[begin:end], self.unit):
                at = begin + start
                if not zero:
                    writes.append((offset + self.shift + at, piece[at : at + length]))
                elif zeros is not None:
                    zeros.append((offset + at, length))

    def _zero(self, offset: int, length: int) -> None:
        offset += self.shift
        try:
            # Asking is much cheaper than zeroing what is zero, and among rewritten data most of it is.
            if not (self.unmap and lookup(self.target, offset, length) == [(offset, length, ZERO)]):
                self.target.write_zeros(offset, length, unmap=self.unmap)
        except (OSError, DiskwrightError) as error:
            raise WriteFailed from error

    # -- in the kernel ---------------------------------------------------------------------------

    def _move_in_kernel(
        self, pieces: list[tuple[int, int, bool]], clock: Clock, turn: Callable[[], None] | None
    ) -> list[tuple[int, int, bool]]:
        """Lets the kernel move what it can, and returns the rest. What fails is among the rest: read and written once
        more, it is known whose failure it was."""
        rest: list[tuple[int, int, bool]] = []
        if turn is not None:
            turn()
        for offset, length, blank in pieces:
            done = self._kernel_copied(offset, length) if self._in_kernel else 0
            if done < length:
                rest.append((offset + done, length - done, blank))
        clock.lap("copy in kernel")
        return rest

    def _kernel_copied(self, offset: int, length: int) -> int:
        """How many bytes from ``offset`` on the kernel has moved."""
        done = 0
        try:
            while done < length:
                place = self.source.place(offset + done, length - done)
                if place is None:
                    break
                self.target.copy_from(offset + self.shift + done, place)
                done += place.length
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                self._in_kernel = False  # what it will not do once it will not do the next time either
        except DiskwrightError:
            pass
        return done


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
    in_order: bool = False,
    buffers: Buffers | None = None,
) -> None:
    """Copies every range of ``plan``, which is asked for the next one by one worker at a time, always within
    ``copier.enter()``. Returns when the plan has ended, or ``stop()`` is true, and no range is in flight.

    ``done(offset, length)`` follows each copied range; ``failed(offset, length, error)`` each that was not, with the
    ReadFailed or WriteFailed: raise there to end the whole run. Both are called by workers. With ``in_order`` the
    target is written in the plan's order. ``buffers`` are reused when they are given; their length is the chunk then.
    """
    _Run(copier, plan, rate or RateLimit(), stop, done, failed, clocks or Clocks(), in_order).work_all(
        max(1, min(workers, MAX_WORKERS)), buffers or Buffers(chunk, MAX_WORKERS)
    )


class _Run:
    """One ``run_plan``."""

    def __init__(
        self,
        copier: Copier,
        plan: Iterator[Range],
        rate: RateLimit,
        stop: Callable[[], bool],
        done: Callable[[int, int], None],
        failed: Callable[[int, int, Exception], None],
        clocks: Clocks,
        in_order: bool,
    ) -> None:
        self.copier, self.plan, self.rate, self.stop = copier, plan, rate, stop
        self.done, self.failed, self.clocks = done, failed, clocks
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.turns = _Turns(self._over) if in_order else None
        self.tickets = 0

    def work_all(self, workers: int, buffers: Buffers) -> None:
        threads = [threading.Thread(target=self._work, args=(buffers,), name="copy") for _ in range(workers - 1)]
        for thread in threads:
            thread.start()
        self._work(buffers)  # the caller is a worker too
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _over(self) -> bool:
        return bool(self.errors) or self.stop()

    def _work(self, buffers: Buffers) -> None:
        try:
            clock = self.clocks.new()
            with buffers.one() as buffer:
                while self.rate.wait(self._over) and self._step(buffer, clock):
                    pass
        except BaseException as error:
            self.errors.append(error)
            self.rate.wake()
            if self.turns is not None:
                self.turns.wake()

    def _step(self, buffer: memoryview, clock: Clock) -> bool:
        """One batch; False when there are no more."""
        clock.lap("wait")
        token = self.copier.enter()
        try:
            with self.lock:
                ranges = self._grab(len(buffer))
                ticket = self.tickets
                self.tickets += 1
            if not ranges:
                return False
            clock.lap("plan")
            try:
                self.rate.charge(self._copy(ranges, buffer, clock, ticket))
            finally:
                if self.turns is not None:
                    self.turns.end(ticket)
            return True
        finally:
            self.copier.leave(token)

    def _grab(self, most: int) -> list[Range]:
        """The next ranges of the plan, as many as make a batch; the lock is held."""
        ranges: list[Range] = []
        total = 0
        while total < most and len(ranges) < BATCH:
            item = next(self.plan, None)
            if item is None:
                break
            ranges.append(item)
            total += item[1]
        return ranges

    def _copy(self, ranges: list[Range], buffer: memoryview, clock: Clock, ticket: int) -> int:
        turns = self.turns
        turn = None if turns is None else lambda: turns.wait(ticket)
        try:
            moved = self.copier.copy(ranges, buffer, clock, turn)
        except (ReadFailed, WriteFailed) as error:
            if len(ranges) == 1:
                self.failed(*ranges[0], error)
                return 0
            # One of many: each by itself, to learn which.
            return sum(self._copy([item], buffer, clock, ticket) for item in ranges)
        for item in ranges:
            self.done(*item)
        return moved


class _Turns:
    """Who may write next, when the order matters."""

    def __init__(self, over: Callable[[], bool]) -> None:
        self._cond = threading.Condition(threading.Lock())
        self._next = 0
        self._ended: set[int] = set()  # never more than there are workers
        self._over = over

    def wait(self, ticket: int) -> None:
        """Returns when all tickets before have ended, or the run is over."""
        with self._cond:
            self._cond.wait_for(lambda: self._next >= ticket or self._over())

    def end(self, ticket: int) -> None:
        with self._cond:
            self._ended.add(ticket)
            while self._next in self._ended:
                self._ended.remove(self._next)
                self._next += 1
            self._cond.notify_all()

    def wake(self) -> None:
        with self._cond:
            self._cond.notify_all()


def chunks(offset: int, length: int, chunk: int = CHUNK) -> Iterator[Range]:
    """A range in pieces, cut at multiples of ``chunk``."""
    return windows(offset, length, chunk)


def data_plan(
    source: Node,
    leases: Leases,
    size: int,
    *,
    zeros: bool,
    chunk: int = CHUNK,
    base: Node | None = None,
    unit: int = 1,
) -> Iterator[Range]:
    """Ranges of ``source`` that have to be copied: all that holds data and, with ``zeros``, what reads as zeros too.

    Zeros that follow each other for long come as ranges of up to 1 GiB: nothing has to be read for them. What only
    ``base`` or a node below it has is left out. Data is widened over zeros to whole multiples of ``unit``, a power
    of two: the target's cluster size.
    """
    unit = unit if is_power_of_two(unit) else 1
    for start, step in windows(0, size, WINDOW):
        with leases.held():
            rows = status(source, start, step, base=base)
        runs: list[Run] = []
        for row in rows:  # runs of a kind that adjoin are put together, whatever layer they come from
            kind = ABSENT if base is not None and not row.present else ZERO if row.zero else DATA
            if runs and runs[-1][2] == kind:
                runs[-1] = (runs[-1][0], runs[-1][1] + row.length, kind)
            else:
                runs.append((row.offset, row.length, kind))
        for offset, length, kind in widen(runs, unit):
            if kind == DATA:
                yield from chunks(offset, length, chunk)
            elif kind == ZERO and zeros:
                yield offset, length
