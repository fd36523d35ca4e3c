"""Mirror: copies a disk to another node while its users go on writing, and keeps the copy in sync until told to finish.

Why the copy is right. A dirty bitmap on the source has a bit set when a write has *ended*. A worker clears the bits
of a range *before* it reads it, and no two copies of overlapping ranges are in flight at once. So for every byte there
is, after the last write to it has ended, a copy that begins, and none that began earlier ends after it. The job
finishes inside a drained section: no write is in flight, what is dirty is copied, and the target is the source.

With ``copy_mode="write-blocking"`` a filter over the source sends each of the users' writes to the target as well
before it is answered, so that what is dirty can only become less.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final, Literal, cast

from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.driver import Filter, Segments
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode, Node, below_filters
from diskwright.core.status import Status, status
from diskwright.engine.clock import Clocks
from diskwright.engine.copy import CHUNK, WORKERS, Copier, ReadFailed, run_plan
from diskwright.engine.policy import Action, OnError
from diskwright.errors import DiskwrightError, JobError, OptionError
from diskwright.extents import windows
from diskwright.jobs.job import EventSink, Job
from diskwright.units import GiB, KiB, MiB, align_down, align_up

DEFAULT_BUFFER: Final = 16 * MiB
"""Bytes in flight unless the user says otherwise."""
SMALL_REST: Final = 8 * MiB
"""Dirty bytes that are few enough for the drained pass, a fraction of a second: with no more the job is ready."""
MOST_PASSES: Final = 20
"""Passes made to get there. A guest that writes faster than the target takes it would otherwise keep the job from ever
ending; after these it waits for the drained pass, however much there is to copy."""
IDLE: Final = 0.05
"""Seconds between looks at the bitmap when nothing is dirty."""
RETRY: Final = 0.2
"""Seconds before a range is tried again whose failure is to be ignored."""
DEFAULT_GRANULARITY: Final = 64 * KiB

Sync = Literal["full", "top", "none"]
CopyMode = Literal["background", "write-blocking"]


class InFlight:
    """Ranges being copied. Those of a new one must not overlap any of them. There are never more than threads."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self._ranges: list[tuple[int, int]] = []
        self.bytes = 0

    def overlapping_end(self, start: int, end: int) -> int:
        """The end of a range in flight that overlaps ``[start, end)``, or 0. The lock is held."""
        for low, high in self._ranges:
            if low < end and start < high:
                return high
        return 0

    def next_begin(self, start: int, end: int) -> int:
        """Where the first range in flight within ``[start, end)`` begins, or ``end``. The lock is held."""
        return min((low for low, _ in self._ranges if start <= low < end), default=end)

    def add(self, start: int, end: int, counted: int) -> None:
        self._ranges.append((start, end))
        self.bytes += counted

    def remove(self, start: int, end: int, counted: int) -> None:
        with self.changed:
            self._ranges.remove((start, end))
            self.bytes -= counted
            self.changed.notify_all()

    @contextmanager
    def alone(self, start: int, end: int) -> Iterator[None]:
        """Keeps ``[start, end)`` for the caller, once nobody else has any of it."""
        with self.changed:
            self.changed.wait_for(lambda: not self.overlapping_end(start, end))
            self.add(start, end, 0)
        try:
            yield
        finally:
            self.remove(start, end, 0)


class BothSides(Filter):
    """Sends the users' changes to the source and then to the target. A target that fails leaves the range dirty."""

    name = "mirror_top"

    def __init__(self, job: Mirror, child: Node) -> None:
        self.child = child
        self._job = job

    def writev(self, segments: Segments) -> None:
        target = self._job.target
        for segment in segments:
            one = [segment]
            self._both(segment[0], len(segment[1]), partial(self.child.writev, one), partial(target.writev, one))

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        target = self._job.target
        self._both(
            offset,
            length,
            lambda: self.child.write_zeros(offset, length, unmap=unmap, fast=fast),
            lambda: target.write_zeros(offset, length, unmap=unmap and self._job.unmap),
        )

    def discard(self, offset: int, length: int) -> None:
        # What the source reads as afterwards is its driver's affair, so the range is left for the copier.
        self.child.discard(offset, length)

    def _both(self, offset: int, length: int, ours: Callable[[], None], theirs: Callable[[], None]) -> None:
        job, unit = self._job, self._job.bitmap.granularity
        start, end = align_down(offset, unit), align_up(offset + length, unit)
        with job.in_flight.alone(start, end):
            clean = [at for at in range(start, end, unit) if at < job.bitmap.size and not job.bitmap.get(at)]
            ours()  # sets the bits
            if not clean:
                return  # to be copied anyway
            try:
                theirs()
            except (OSError, DiskwrightError):
                return  # never the guest's affair: the bits stay set, and the job meets the error itself
            for at in clean:
                job.bitmap.clear(at, 1)

    def transparent(self) -> bool:
        return True


class Mirror(Job):
    """One mirror of ``source`` to ``target``, open nodes of ``graph``; the target is writable and at least as large.

    ``sync``              full: everything; top: what the source's own layer has; none: only what is written from
                          now on
    ``granularity``       bytes a dirty bit stands for, a power of two from 512 to 64 MiB
    ``buf_size``          bytes in flight at most
    ``unmap``             zeros need not be allocated in the target
    ``target_is_zero``    the target reads as zeros everywhere, as a new image does
    ``on_source_error``, ``on_target_error``  report, ignore (try again later), enospc, stop
    ``pivot``             ``complete`` puts the source's users on the target

    Raises OptionError when target and source do not fit.
    """

    type = "mirror"

    def __init__(
        self,
        id: str,
        graph: Graph,
        source: Node,
        target: Node,
        *,
        sync: Sync = "full",
        granularity: int | None = None,
        buf_size: int = DEFAULT_BUFFER,
        speed: int = 0,
        unmap: bool = True,
        target_is_zero: bool = False,
        copy_mode: CopyMode = "background",
        on_source_error: str = "report",
        on_target_error: str = "report",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
    ) -> None:
        if target.size < source.size:
            raise OptionError(f"The target has {target.size} bytes, fewer than the source's {source.size}")
        if below_filters(source) is below_filters(target):
            raise OptionError("Can't mirror node into itself")
        self.graph, self.source, self.target = graph, source, target
        self.sync, self.unmap, self.copy_mode = sync, unmap, copy_mode
        self._new_target = target_is_zero
        self._policies = {"read": OnError(on_source_error), "write": OnError(on_target_error)}
        unit = granularity if granularity is not None else max(DEFAULT_GRANULARITY, min(target.cluster_size, MiB))
        self.bitmap = DirtyBitmap(source.size, unit)
        self.in_flight = InFlight()
        self.clocks = Clocks()
        self._copier = Copier(source, target, graph.leases, sparse=0, unmap=unmap)
        self._chunk = max(unit, min(CHUNK, align_down(max(buf_size, unit) // WORKERS, unit) or unit))
        self._workers = max(1, min(WORKERS, buf_size // self._chunk))
        self._copied = 0  # bytes
        self._try_later = False
        self._cursor = 0
        self._finishing: Literal["", "keep", "pivot"] = ""
        self._filter: FilterNode | None = None
        self._drain = ExitStack()
        super().__init__(
            id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event
        )
        graph.hold(source)
        graph.hold(target)

    # -- what the job answers ----------------------------------------------------------------------

    def progress(self) -> tuple[int, int]:
        """Bytes copied, and those plus all that is dirty or in flight: equal exactly when nothing is left."""
        with self.in_flight.changed:
            return self._copied, self._copied + self.bitmap.dirty_bytes + self.in_flight.bytes

    def soft_cancel(self) -> bool:
        self._finishing = self._finishing or "keep"
        return True

    def on_complete(self) -> None:
        if self._finishing:
            raise JobError(f"The active block job '{self.id}' cannot be completed")
        if self.target.size != self.source.size:
            raise JobError(f"The target of '{self.id}' is larger than its source: the disk cannot go on upon it")
        self._finishing = "pivot"

    def on_change(self, options: dict[str, object]) -> None:
        """``copy_mode="write-blocking"``, once: there is no way back, as the other way loses the sync it had."""
        if self._finishing:
            raise JobError(f"The mirror '{self.id}' is finishing: it cannot be changed any more")
        if set(options) != {"copy_mode"} or options["copy_mode"] not in ("background", "write-blocking"):
            raise JobError("A mirror can change its 'copy_mode' to 'write-blocking', and nothing else")
        if options["copy_mode"] == self.copy_mode:
            return
        if self.copy_mode == "write-blocking":
            raise JobError("Change to copy mode 'background' is not implemented")
        self.copy_mode = "write-blocking"
        self._insert_filter()

    # -- the work ----------------------------------------------------------------------------------

    def run(self) -> None:
        zeros = self.sync == "full" and (self._zeros_are_there() or self._zero_target())
        with self.graph.drained():
            # A write that began before must not end unseen after the bitmap is there.
            self.source.add_bitmap(self.bitmap)
        if self.copy_mode == "write-blocking":
            self._insert_filter()
        self._mark_first_pass(zeros)
        self._pass()
        while self.bitmap.dirty_bytes > SMALL_REST or self._try_later:
            self._pass()
        self.make_ready()
        while not self._finishing:
            self.pause_point()
            if self.bitmap.granules:
                self._pass()
            with self._cond:
                # Also after a pass: what is written often is then copied some times a second, not all the time.
                self._cond.wait_for(lambda: bool(self._finishing) or self.should_pause, IDLE)
        self._finish()

    def _finish(self) -> None:
        for _ in range(MOST_PASSES):
            if self.bitmap.dirty_bytes <= SMALL_REST:
                break
            self._pass()
        while True:
            self.pause_point()
            self._drain.enter_context(self.graph.drained())
            while self.bitmap.granules and not self._try_later and not self.should_pause:
                self._pass(may_pause=False)
            if not self.bitmap.granules and self._flush_target():
                return  # still drained, until ``clean``
            self._drain.close()  # the guest must not wait while the job is paused or tries again later
            self._pass()

    def _flush_target(self) -> bool:
        """Makes the target durable; False when that failed and is to be tried again."""
        try:
            self.target.flush()
        except OSError as error:
            if self.handle_error(error, "write", self._policies["write"]) is Action.REPORT:
                raise
            return False
        return True

    def prepare(self) -> None:
        if self._finishing == "pivot":
            self._remove_filter()
            self.graph.replace(self.source, self.target)

    def clean(self) -> None:
        self.source.remove_bitmap(self.bitmap)
        self._remove_filter()
        self._drain.close()
        self.graph.release(self.source)
        self.graph.release(self.target)

    # -- what has to be copied -----------------------------------------------------------------------

    def _zeros_are_there(self) -> bool:
        return self._new_target and self.target.zero_init

    def _zero_target(self) -> bool:
        """Makes an existing target read as zeros if that is quick; then only data has to be copied. This comes before
        everything else, as nothing of what is copied later may be lost to it."""
        try:
            for start, step in windows(0, self.source.size, GiB):
                self.pause_point()
                self.target.write_zeros(start, step, unmap=self.unmap, fast=True)
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                return False
            self.handle_error(error, "write", OnError.REPORT)
            raise
        return True

    def _mark_first_pass(self, zeros: bool) -> None:
        """Marks what the first pass has to copy; with ``zeros`` the target reads as zeros already. Writes that end
        meanwhile mark what they touch themselves."""
        if self.sync == "none":
            return
        base = below_filters(self.source).backing if self.sync == "top" else None
        if base is None and not zeros:
            self.bitmap.set_all()
            return
        for start, step in windows(0, self.source.size, GiB):
            self.pause_point()
            for row in self._status(start, step, base):
                if row.present if base is not None else not row.zero:
                    self.bitmap.set(row.offset, row.length)

    def _status(self, offset: int, length: int, base: Node | None) -> list[Status]:
        try:
            with self.graph.leases.held():
                return status(self.source, offset, length, base=base)
        except OSError as error:
            self.handle_error(error, "read", OnError.REPORT)
            raise

    def _plan(self) -> Iterator[tuple[int, int]]:
        """Dirty ranges up to the end of the disk, each taken (cleared, and in flight) as it is handed out. Called by
        one worker at a time."""
        while True:
            with self.in_flight.changed:
                taken = self._take()
            if taken is None:
                return
            yield taken

    def _take(self) -> tuple[int, int] | None:
        """The next dirty range that overlaps nothing in flight; in_flight's lock is held."""
        unit = self.bitmap.granularity
        while True:
            run = None
            if self._cursor < self.bitmap.size:
                run = self.bitmap.next_dirty(self._cursor, self.rate.limit(self._chunk))
            if run is None:
                self._cursor = 0
                return None
            offset, length = run
            busy = self.in_flight.overlapping_end(offset, offset + unit)
            if busy:
                self._cursor = align_up(busy, unit)
                continue
            end = self.in_flight.next_begin(offset, offset + length)
            # Cut at multiples of the chunk, so that later passes meet whole clusters of the target.
            end = min(end, align_down(offset, self._chunk) + self._chunk)
            self.bitmap.clear(offset, end - offset)
            self.in_flight.add(offset, end, end - offset)
            self._cursor = end
            return offset, end - offset

    def _pass(self, *, may_pause: bool = True) -> None:
        """Goes over the disk once, from where the last pass stopped, and copies what is dirty. With ``may_pause`` it
        rests at its end, for pauses and after failures."""
        self._try_later = False
        few = self.bitmap.count <= 2 * self._chunk
        run_plan(
            self._copier,
            self._plan(),
            workers=1 if few else self._workers,
            rate=self.rate,
            stop=lambda: self.should_pause or self._try_later,
            done=self._done,
            failed=self._failed,
            clocks=self.clocks,
            chunk=self._chunk,
        )
        if may_pause:
            if self._try_later:
                with self._cond:
                    self._cond.wait_for(lambda: self.should_pause, RETRY)
            self.pause_point()

    def _done(self, offset: int, length: int) -> None:
        with self.in_flight.changed:
            self._copied += length
        self.in_flight.remove(offset, offset + length, length)

    def _failed(self, offset: int, length: int, error: Exception) -> None:
        """What a worker could not copy is dirty again; then the policy decides."""
        self.bitmap.set(offset, length)
        self.in_flight.remove(offset, offset + length, length)
        cause = cast(Exception, error.__cause__)
        operation = "read" if isinstance(error, ReadFailed) else "write"
        self._try_later = True
        if self.handle_error(cause, operation, self._policies[operation]) is Action.REPORT:
            raise cause

    # -- the filter ----------------------------------------------------------------------------------

    def _insert_filter(self) -> None:
        self._filter = self.graph.insert_filter(BothSides(self, self.source))

    def _remove_filter(self) -> None:
        if self._filter is not None:
            node, self._filter = self._filter, None
            self.graph.remove_filter(node)
