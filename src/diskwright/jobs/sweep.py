"""Sweep: a job that deals once with every part of a disk that needs it, in any order, and then is done.

What is left to do is a bitmap. A worker takes a range out of it, works on it, and puts it back when that failed; then
the policy decides whether the job gives up, stops, or comes back to it later. So a job that is paused, throttled or in
trouble knows at any moment what is left, and that is all it needs to know.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Final, TypeVar, cast

from diskwright.core.bitmap import DEFAULT_GRANULARITY, DirtyBitmap
from diskwright.core.inflight import InFlight
from diskwright.engine.buffers import Buffers
from diskwright.engine.clock import Clocks
from diskwright.engine.copy import CHUNK, WORKERS, Copier, ReadFailed, run_plan
from diskwright.engine.policy import Action, OnError
from diskwright.errors import DiskwrightError, JobError
from diskwright.extents import WINDOW, windows
from diskwright.jobs.job import EventSink, Job
from diskwright.units import align_down, align_up

T = TypeVar("T")

IDLE: Final = 0.05
"""Seconds between looks at what is held by others."""
RETRY: Final = 0.2
"""Seconds before what failed is tried again, when the failure is to be ignored."""


class Sweep(Job):
    """``todo`` and ``in_flight`` say what is left. A subclass gives ``marks`` and a ``Copier``.

    ``size``        of the disk in bytes
    ``policies``    by operation, ``read`` and ``write``
    """

    told_as: ClassVar[str | None] = None
    """What ``BLOCK_JOB_ERROR`` calls the operation that failed, whichever it was."""
    skips_errors: ClassVar[bool] = False
    """Whether an error that is to be ignored is one more part that is not done, rather than tried again: then the job
    fails at its end, with the first such error, ``skipped``."""

    def __init__(
        self,
        id: str,
        size: int,
        policies: dict[str, OnError],
        *,
        granularity: int = DEFAULT_GRANULARITY,
        workers: int = WORKERS,
        chunk: int = CHUNK,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
    ) -> None:
        self.size = size
        self.todo = DirtyBitmap(size, granularity)
        self.in_flight = InFlight()
        self.clocks = Clocks()
        self._policies = policies
        self._unit, self._chunk, self._workers = granularity, max(chunk, granularity), workers
        self._buffers = Buffers(self._chunk, self._workers)
        self._mine: set[tuple[int, int]] = set()  # those copies in flight that are this job's; one a worker's range
        self._cursor = 0
        self._looked = 0  # bytes of the disk of which it is known whether they need anything
        self._failures = self._taken = 0
        self.skipped: Exception | None = None
        super().__init__(id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event)

    @abstractmethod
    def marks(self, offset: int, length: int) -> list[tuple[int, int]]:
        """``(offset, length)`` of what in a range, at most ``extents.WINDOW`` long, needs something done."""

    def progress(self) -> tuple[int, int]:
        """Bytes that are done, or need nothing; and the disk's size."""
        with self.in_flight.changed:
            return self._looked - self.todo.dirty_bytes - self.in_flight.bytes, self.size

    # -- the work ------------------------------------------------------------------------------------

    def sweep(self, copier: Copier) -> None:
        """Looks over the whole disk, and deals with everything there is to be done. Raises what made the job fail."""
        for start, step in windows(0, self.size, WINDOW):
            self.pause_point()
            found = self.retried("read", lambda: self.marks(start, step)) or []  # noqa: B023 - called at once
            with self.in_flight.changed:
                for offset, length in found:
                    self.todo.mark(offset, length)
                self._looked = start + step
            self.work_off(copier)

    def work_off(self, copier: Copier) -> None:
        """Deals with all that is marked."""
        while self.todo.granules:
            self.pause_point()
            self.check()
            failures, self._taken = self._failures, 0
            self._run(copier)
            if self._failures != failures:
                self._take_a_break()
            elif not self._taken:
                with self.in_flight.changed:  # all that is left is being written to
                    self.in_flight.changed.wait(IDLE)

    def check(self) -> None:
        """Called now and then; what it raises makes the job fail."""

    def interrupted(self) -> bool:
        """Whether workers should come back soon."""
        return self.should_pause

    def _take_a_break(self) -> None:
        with self._cond:
            self._cond.wait_for(lambda: self.should_pause, RETRY)

    def retried(self, operation: str, step: Callable[[], T]) -> T | None:
        """The result of ``step``, which is tried again for as long as the policy wants it; None when it is skipped."""
        while True:
            try:
                return step()
            except JobError:
                raise
            except (OSError, DiskwrightError) as error:
                chosen = self.handle_error(error, operation, self._policies[operation])
                if chosen is Action.REPORT:
                    raise
                if chosen is Action.IGNORE and self.skips_errors:
                    self.skipped = self.skipped or error
                    return None
                self._take_a_break()
                self.pause_point()

    def _run(self, copier: Copier) -> None:
        few = self.todo.count <= 2 * self._chunk
        try:
            run_plan(
                copier, self._plan(), workers=1 if few else self._workers, rate=self.rate,
                stop=self.interrupted, done=self._done, failed=self._failed, clocks=self.clocks,
                buffers=self._buffers,
            )  # fmt: skip
        finally:
            # An error ends the run in the middle of batches. What is left of them must keep nobody waiting.
            with self.in_flight.changed:
                for start, end in list(self._mine):
                    self._give_back(start, end - start)

    def _plan(self) -> Iterator[tuple[int, int]]:
        while True:
            with self.in_flight.changed:
                taken = self._take()
            if taken is None:
                return
            yield taken

    def _take(self) -> tuple[int, int] | None:
        """The next range that is marked and overlaps nothing in flight; in_flight's lock is held."""
        longest, unit = self._chunk, self._unit
        while True:
            run = None
            if self._cursor < self.size:
                run = self.todo.next_dirty(self._cursor, max(unit, self.rate.limit(longest)))
            if run is None:
                self._cursor = 0
                return None
            offset, length = run
            busy = self.in_flight.busy_end(offset, offset + unit)
            if busy:
                self._cursor = align_up(busy, unit)  # it stays marked, for the next time round
                continue
            end = min(offset + length, align_down(offset, longest) + longest)
            end = self.in_flight.free_until(offset, end)
            self.todo.clear(offset, end - offset)
            self.in_flight.add(offset, end)
            self._mine.add((offset, end))
            self._cursor = end
            self._taken += 1
            return offset, end - offset

    def _done(self, offset: int, length: int) -> None:
        with self.in_flight.changed:
            self._let_go(offset, length)

    def _let_go(self, offset: int, length: int) -> None:
        """A range that was taken is no longer in flight; in_flight's lock is held."""
        self._mine.discard((offset, offset + length))
        self.in_flight.remove(offset, offset + length)

    def _give_back(self, offset: int, length: int) -> None:
        """A range that was taken is to be done after all; in_flight's lock is held."""
        self.todo.mark(offset, length)
        self._let_go(offset, length)

    def _failed(self, offset: int, length: int, error: Exception) -> None:
        """What a worker could not do is to be done again; then the policy decides."""
        cause = cast(Exception, error.__cause__)
        operation = "read" if isinstance(error, ReadFailed) else "write"
        chosen = self.handle_error(cause, self.told_as or operation, self._policies[operation])
        with self.in_flight.changed:
            if chosen is Action.IGNORE and self.skips_errors:
                self.skipped = self.skipped or cause
                self._let_go(offset, length)
            else:
                self._failures += 1
                self._give_back(offset, length)
        if chosen is Action.REPORT:
            raise cause

    def flush(self, step: Callable[[], None]) -> None:
        """``step``, which makes something durable, as often as the policy says. A failed flush means lost data, so it
        is never just ignored."""
        policy = self._policies["write"]
        policy = OnError.REPORT if policy is OnError.IGNORE else policy
        while True:
            self.pause_point()
            try:
                return step()
            except (OSError, DiskwrightError) as error:
                if self.handle_error(error, "write", policy) is Action.REPORT:
                    raise
