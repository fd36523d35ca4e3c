"""Converting into compressed clusters: whole clusters of the target, compressed by all workers, placed in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from diskwright.core.driver import Segment
from diskwright.core.leases import Leases
from diskwright.core.lookup import ABSENT, Run, lookup
from diskwright.core.node import Node
from diskwright.core.status import status
from diskwright.engine.clock import Clock
from diskwright.engine.convert import Conversion, coding_workers, copy_failed, read_salvaging
from diskwright.engine.copy import CHUNK, Copier, Range, ReadFailed, WriteFailed, run_plan
from diskwright.engine.zeros import is_zero, zero_runs
from diskwright.errors import DiskwrightError
from diskwright.extents import DATA, WINDOW, ZERO, windows
from diskwright.units import SECTOR, MiB, align_down, align_up

MAX_UNIT: Final = 2 * MiB
"""The largest cluster of a target that is compressed to."""


class CompressingCopier(Copier):
    """A ``Copier`` whose ranges are whole clusters of the target. A cluster that holds data anywhere is compressed as a
    whole; one of zeros is left out or zeroed, or, without ``sparse``, compressed too."""

    def __init__(
        self, *arguments: Any, unreadable: Callable[[int, Exception], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.unit = self.target.cluster_size
        self._unreadable = unreadable

    def copy(
        self, ranges: Sequence[Range], buffer: memoryview, clock: Clock, turn: Callable[[], None] | None = None
    ) -> int:
        """See ``Copier.copy``."""
        room = align_down(len(buffer), self.unit)
        batch: list[Segment] = []
        zeros: list[Range] = []
        used = moved = 0
        for offset, length in ranges:
            if self.sparse and self._kinds(offset, length) == {ZERO}:
                zeros.append((offset, length))
                continue
            for at, step in _steps(offset, length, room):
                if used + step > room:
                    self._compress(batch, clock, turn)
                    batch, used = [], 0
                batch.append((at, buffer[used : used + step]))
                used += step
            moved += length
        if batch:
            self._compress(batch, clock, turn)
        if zeros and not self._target_zero:
            if turn is not None:
                turn()
            for offset, length in zeros:
                self._zero(offset, length)
            clock.lap("zero")
        return moved

    def _kinds(self, offset: int, length: int) -> set[int]:
        try:
            return {kind for _, _, kind in lookup(self.source, offset, length, self.base)}
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error

    def _compress(self, batch: list[Segment], clock: Clock, turn: Callable[[], None] | None) -> None:
        try:
            read_salvaging(self.source, batch, self._unreadable)
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        clock.lap("read")
        writes: list[Segment] = []
        zeros: list[Range] = []
        for offset, piece in batch:
            for start, length, zero in zero_runs(piece, self.unit) if self.sparse else [(0, len(piece), False)]:
                if not zero:
                    writes.append((offset + self.shift + start, piece[start : start + length]))
                elif not self._target_zero:
                    zeros.append((offset + start, length))
        clock.lap("look for zeros")
        try:
            self.target.write_compressed(writes, turn=turn)
        except (OSError, DiskwrightError) as error:
            raise WriteFailed from error
        clock.lap("compress and write")
        for offset, length in zeros:
            self._zero(offset, length)


def unit_plan(
    source: Node,
    leases: Leases,
    whole: Range,
    unit: int,
    *,
    zeros: bool,
    chunk: int,
    base: Node | None = None,
) -> Iterator[Range]:
    """Ranges of whole units of ``[whole[0], whole[1])``, itself some whole units of ``unit`` bytes, that have to be
    copied: those with data, by ``chunk``, and with ``zeros`` those that read as zeros too. Units of which only ``base``
    has anything are left out."""
    begin, end = whole
    shared = end if base is None else min(base.size, end)
    while begin < end:
        step = min(end - begin, align_down(WINDOW, unit))
        runs: list[Run] = []
        with leases.held():
            for row in status(source, begin, step, base=base):
                kind = ABSENT if base is not None and not row.present else ZERO if row.zero else DATA
                # Beyond the end of the source's backing file its zeros are its own, and have to be written.
                inside = min(row.length, max(0, shared - row.offset)) if kind == ABSENT else row.length
                if inside:
                    runs.append((row.offset, inside, kind))
                if inside < row.length:
                    runs.append((row.offset + inside, row.length - inside, ZERO))
        for offset, length, kind in whole_units(runs, unit):
            if kind == DATA:
                yield from _steps(offset, length, chunk)
            elif kind == ZERO and zeros:
                yield offset, length
        begin += step


def whole_units(runs: Sequence[Run], unit: int) -> list[Run]:
    """Adjoining runs, the first of which begins where a unit does, in whole units (the last may be shorter). A unit
    with runs of more than one kind in it is DATA: all of it has to be read to know what it holds."""
    found: list[Run] = []
    origin = runs[0][0] if runs else 0
    for offset, length, kind in runs:
        start = origin + align_down(offset - origin, unit)
        end = origin + align_up(offset + length - origin, unit)
        if found:
            at, size, last = found[-1]
            if start < at + size:  # the unit at ``start`` is the end of the last one too
                if last != kind:
                    found[-1] = (at, start - at, last)
                    _append(found, start, unit, DATA)
                start += unit
        if start < end:
            _append(found, start, end - start, kind)
    if found:
        offset, length, kind = found[-1]
        found[-1] = (offset, min(length, runs[-1][0] + runs[-1][1] - offset), kind)
    return found


def _append(runs: list[Run], offset: int, length: int, kind: int) -> None:
    if runs and not runs[-1][1]:
        runs.pop()
    if runs and runs[-1][2] == kind:
        runs[-1] = (runs[-1][0], runs[-1][1] + length, kind)
    else:
        runs.append((offset, length, kind))


def _steps(offset: int, length: int, step: int) -> Iterator[Range]:
    """A range in pieces of ``step`` bytes from its beginning on."""
    for at, size in windows(0, length, step):
        yield offset + at, size


class CompressedConversion(Conversion):
    """A ``Conversion`` into compressed clusters. Sources may begin and end anywhere within a cluster of the target:
    what is at the edges is collected until a cluster is complete.

    ``in_order``  the target is written in the order of the guest's offsets: the same image every time
    """

    def __init__(self, *arguments: Any, workers: int = 0, in_order: bool = True, **options: Any) -> None:
        super().__init__(*arguments, workers=workers or coding_workers(), **options)
        self.in_order = in_order
        self.unit = self.target.cluster_size
        if not 0 < self.unit <= MAX_UNIT:
            raise ValueError(f"Clusters of {self.unit} bytes cannot be compressed")
        self._edge: bytearray | None = None  # the cluster that is being collected,
        self._edge_end = 0  # and up to which offset of the target

    def copy(self, source: Node, start: int, *, base: Node | None = None) -> None:
        """See ``Conversion.copy``. Sources follow each other, each counted in whole sectors."""
        size, unit = source.size, self.unit
        head = min(-start % unit, size)
        body = head + align_down(size - head, unit)
        self._collect(source, start, 0, head, None)
        self._body(source, start, head, body, base)
        if self.stop():
            return
        self._collect(source, start, body, size, base)
        if align_up(start + size, SECTOR) >= self.total:
            self._finish_edge()
        self._reached(start + size)

    def _body(self, source: Node, start: int, begin: int, end: int, base: Node | None) -> None:
        chunk = max(self.unit, align_down(self.rate.limit(max(CHUNK, self.unit)), self.unit))
        copier = CompressingCopier(
            source,
            self.target,
            self.leases,
            sparse=self.sparse,
            target_zero=self.target_is_zero,
            base=base,
            offset_in_target=start,
            unreadable=self.unreadable,
        )
        zeros = not self.target_is_zero or not self.sparse
        run_plan(
            copier,
            unit_plan(source, self.leases, (begin, end), self.unit, zeros=zeros, chunk=chunk, base=base),
            workers=self.workers,
            rate=self.rate,
            stop=self.stop,
            done=lambda at, length: self._reached(start + at + length),
            failed=copy_failed,
            clocks=self.clocks,
            chunk=chunk,
            in_order=self.in_order,
        )

    # -- clusters of more than one source, and the last one ----------------------------------------

    def _collect(self, source: Node, start: int, begin: int, end: int, base: Node | None) -> None:
        """Adds a piece of a source, smaller than a cluster, to the cluster at the edge."""
        if begin == end:
            return
        at = start + begin
        if self._edge is None:
            self._edge = bytearray(self.unit)
        inside = at % self.unit
        try:
            with self.leases.held():
                runs = lookup(source, begin, end - begin, base)
                if base is not None and {kind for _, _, kind in runs} == {ABSENT} and end <= base.size:
                    self._edge = None  # only ``base`` has it
                    return
                piece = memoryview(self._edge)[inside : inside + end - begin]
                read_salvaging(source, [(begin, piece)], self.unreadable)
        except (OSError, DiskwrightError) as error:
            failure = ReadFailed()
            failure.__cause__ = error
            copy_failed(begin, end - begin, failure)
        self._edge_end = start + end
        if self._edge_end % self.unit == 0:
            self._finish_edge()

    def _finish_edge(self) -> None:
        """Writes the cluster at the edge. What is behind its end reads as zeros, unless an existing, larger target has
        something there: then it is not touched, and nothing is compressed."""
        edge, end = self._edge, self._edge_end
        if edge is None:
            return
        self._edge = None
        start = align_down(end - 1, self.unit)
        limit = min(start + self.unit, self.target.size)
        end = limit if self.target_is_zero else min(align_up(end, SECTOR), limit)
        piece = memoryview(edge)[: end - start]
        try:
            with self.leases.held():
                if self.sparse and is_zero(piece):
                    if not self.target_is_zero:
                        self.target.write_zeros(start, len(piece), unmap=True)
                elif end == limit:
                    self.target.write_compressed([(start, piece)])
                else:
                    self.target.writev([(start, piece)])
        except (OSError, DiskwrightError) as error:
            failure = WriteFailed()
            failure.__cause__ = error
            copy_failed(start, len(piece), failure)
