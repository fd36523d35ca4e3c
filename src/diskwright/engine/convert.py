"""Convert: everything nodes hold, one after the other, into another node."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Final, NoReturn

from diskwright.core.driver import Segments
from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.engine.clock import Clocks
from diskwright.engine.copy import CHUNK, MAX_WORKERS, WORKERS, Copier, Range, ReadFailed, data_plan, run_plan
from diskwright.engine.rate import RateLimit
from diskwright.engine.zeros import SPARSE
from diskwright.errors import DiskwrightError, JobError
from diskwright.extents import SPECIAL
from diskwright.units import SECTOR, MiB, align_up

_PAGE: Final = 4096

_SAMPLES: Final = 8
_SAMPLE: Final = 4 * MiB


class CopyFailed(JobError):
    """A range could not be copied; the target is incomplete. ``operation`` is ``read`` or ``write``, ``offset`` the
    source's, in bytes; the error is chained."""

    def __init__(self, operation: str, offset: int, cause: BaseException) -> None:
        super().__init__(f"{operation} failed at byte {offset}: {cause}")
        self.operation, self.offset = operation, offset


class Conversion:
    """Copies whole nodes into ``target``, and knows how far it has got.

    ``total``           bytes there will be to copy, for ``progress``
    ``target_is_zero``  the target reads as zeros everywhere: it is new, or the user says so
    ``sparse``          see ``Copier``
    ``workers``         threads; 0: as many as suit the source
    ``stop``            asked between two ranges; when it is true the copying ends there
    ``unreadable``      called with the source's offset and the error for each sector that cannot be read, which then
                        becomes zeros in the target; None: such a sector ends the copy
    """

    def __init__(
        self,
        target: Node,
        leases: Leases,
        total: int,
        *,
        target_is_zero: bool,
        sparse: int = SPARSE,
        workers: int = 0,
        speed: int = 0,
        stop: Callable[[], bool] = lambda: False,
        unreadable: Callable[[int, Exception], None] | None = None,
    ) -> None:
        self.unreadable = unreadable
        self.target, self.leases, self.total = target, leases, total
        self.target_is_zero, self.sparse, self.workers, self.stop = target_is_zero, sparse, workers, stop
        self.rate, self.clocks = RateLimit(speed), Clocks()
        self._position = 0
        self._lock = threading.Lock()

    def progress(self) -> tuple[int, int]:
        """``(bytes of the target that are done, all)``."""
        return self._position, self.total

    def copy(self, source: Node, start: int, *, base: Node | None = None) -> None:
        """Copies ``source`` to ``start`` and further on in the target. What only ``base``, a backing node that the
        target has too, and those below it have is left out. Raises CopyFailed."""
        if base is None:
            self._part(source, start, 0, source.size, None)
        else:
            # Beyond the end of the source's backing file its zeros are its own, and have to be written.
            shared = min(base.size, source.size)
            self._part(source, start, 0, shared, base)
            self._part(source, start, shared, source.size, None)
        self._fill_sector(start + source.size)
        self._reached(start + source.size)

    def copy_part(self, source: Node, offset: int, length: int) -> None:
        """Copies only that range of ``source``, to the beginning of the target. Raises CopyFailed."""
        self._part(source, -offset, offset, offset + length, None)
        self._reached(length)

    def _fill_sector(self, end: int) -> None:
        """What a source lacks of its last sector reads as zeros, so that is what the target gets there."""
        stop = min(align_up(end, SECTOR), self.target.size)
        if stop > end and not self.target_is_zero and not self.stop():
            try:
                with self.leases.held():
                    self.target.write_zeros(end, stop - end)
            except (OSError, DiskwrightError) as error:
                raise CopyFailed("write", end, error) from error

    def _part(self, source: Node, start: int, offset: int, end: int, base: Node | None) -> None:
        copier = Copier(
            source,
            self.target,
            self.leases,
            sparse=self.sparse,
            target_zero=self.target_is_zero,
            base=base,
            offset_in_target=start,
        )
        # At a low rate smaller pieces keep the copy going evenly, and ``stop`` from being waited for.
        chunk = max(_PAGE, self.rate.limit(max(CHUNK, copier.unit)) // _PAGE * _PAGE)
        run_plan(
            copier,
            self._ranges(source, offset, end, base, chunk, copier.unit),
            workers=self.workers or self._suited(source),
            rate=self.rate,
            stop=self.stop,
            done=lambda at, length: self._reached(start + at + length),
            failed=lambda at, length, error: self._failed(source, start, at, length, error),
            clocks=self.clocks,
            chunk=chunk,
        )

    def _failed(self, source: Node, start: int, offset: int, length: int, error: Exception) -> None:
        """A range that could not be copied. Where sectors may be lost, the others of the range are not."""
        if self.unreadable is None or not isinstance(error, ReadFailed):
            copy_failed(offset, length, error)
        sector = memoryview(bytearray(SECTOR))
        for at in range(offset, offset + length, SECTOR):
            piece = sector[: min(SECTOR, offset + length - at)]
            with self.leases.held():
                read_salvaging(source, [(at, piece)], self.unreadable)
            try:
                with self.leases.held():
                    self.target.writev([(start + at, piece)])
            except (OSError, DiskwrightError) as full:
                raise CopyFailed("write", at, full) from full
        self._reached(start + offset + length)

    def _ranges(self, source: Node, offset: int, end: int, base: Node | None, chunk: int, unit: int) -> Iterator[Range]:
        whole = data_plan(source, self.leases, end, zeros=not self.target_is_zero, chunk=chunk, base=base, unit=unit)
        for at, length in whole:
            if at + length > offset:
                begin = max(at, offset)
                yield begin, at + length - begin

    def _suited(self, source: Node) -> int:
        """How many workers suit ``source``: decoding keeps processors busy, copying only the medium."""
        with self.leases.held():
            return coding_workers() if _has_stored_units(source) else WORKERS

    def _reached(self, position: int) -> None:
        with self._lock:
            self._position = max(self._position, position)


def read_salvaging(source: Node, segments: Segments, unreadable: Callable[[int, Exception], None] | None) -> None:
    """``source.readv``; but with ``unreadable``, which is told of each, sectors that cannot be read become zeros."""
    try:
        return source.readv(segments)
    except (OSError, DiskwrightError):
        if unreadable is None:
            raise
    for offset, buffer in segments:
        for at in range(0, len(buffer), SECTOR):
            piece = buffer[at : at + SECTOR]
            try:
                source.readv([(offset + at, piece)])
            except (OSError, DiskwrightError) as lost:
                unreadable(offset + at, lost)
                piece[:] = bytes(len(piece))
    return None


def coding_workers() -> int:
    """How many workers compress, or decode: enough that processors have work while some of them wait for the medium, or
    for their turn to write."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, 2 * processors + 2)


def _has_stored_units(source: Node) -> bool:
    """Whether reading ``source`` means decoding, judged by a few samples of its own map."""
    step = max(1, source.size // _SAMPLES)
    return any(
        bool((source.extents(at, min(_SAMPLE, source.size - at)).kind == SPECIAL).any())
        for at in range(0, source.size, step)
    )


def copy_failed(offset: int, length: int, error: Exception) -> NoReturn:
    """Raises CopyFailed for a range's ReadFailed or WriteFailed."""
    cause = error.__cause__ or error
    raise CopyFailed("read" if isinstance(error, ReadFailed) else "write", offset, cause) from cause
