"""Mirror: copies a disk to another node while its users go on writing, and keeps the copy in sync until told to finish.

Why the copy is right. A dirty bitmap on the source has a bit set when a write has *ended*. A worker clears the bits
of a range *before* it reads it, and no two copies of overlapping ranges are in flight at once. So for every byte there
is, after the last write to it has ended, a copy that begins, and none that began earlier ends after it. The job
finishes inside a drained section: no write is in flight, what is dirty is copied, and the target is the source.

With ``copy_mode="write-blocking"`` a filter over the source (see ``both_sides``) sends each of the users' writes to the
target as well before it is answered, so that what is dirty can only become less. A job that is to finish while its
guest writes faster than is copied goes over to that by itself: so it ends, and the drained section stays short.

The copying goes in passes over the disk. What a guest writes again and again is copied once a pass, not once a write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import Final, Literal, TypeVar, cast

from diskwright.core.bitmap import DEFAULT_GRANULARITY, MIN_GRANULARITY, DirtyBitmap
from diskwright.core.disk import Disk
from diskwright.core.driver import not_supported
from diskwright.core.graph import Graph
from diskwright.core.inflight import InFlight
from diskwright.core.node import FilterNode, FormatNode, Node, below_filters
from diskwright.core.permissions import ALL, READ, RESIZE, WRITER, Access
from diskwright.core.status import Status, status
from diskwright.engine.buffers import Buffers
from diskwright.engine.clock import Clocks
from diskwright.engine.copy import CHUNK, WORKERS, Copier, ReadFailed, run_plan
from diskwright.engine.policy import Action, OnError
from diskwright.errors import DiskwrightError, GraphError, JobError, OptionError, errno_of
from diskwright.extents import WINDOW, windows
from diskwright.jobs.both_sides import BothSides
from diskwright.jobs.job import EventSink, Job
from diskwright.units import KiB, MiB, align_down, align_up, is_power_of_two

T = TypeVar("T")

DEFAULT_BUFFER: Final = 16 * MiB
"""Bytes in flight at most, unless the user says otherwise."""
LAST_PASS: Final = 0.1
"""Seconds the drained pass should take at most: what is dirty before is copied outside, as far as the guest allows."""
SMALL_REST: Final = MiB
"""Dirty bytes that are few at any speed."""
SHRINKS: Final = 0.9
"""When a pass leaves more than this part of what was dirty before it, more passes of the kind will not end."""
PATIENCE: Final = 3
"""Passes in a row that do not shrink before something else is tried: one alone may have been a guest's sudden burst."""
IDLE: Final = 0.05
"""Seconds between looks at the bitmap. Also the time a granule rests that is written all the time."""
RETRY: Final = 0.2
"""Seconds before what failed is tried again, when the failure is to be ignored."""

MAX_GRANULARITY: Final = 64 * MiB
"""What QMP accepts for a mirror; a coarser bitmap would copy far more than was written."""

SOURCE_ACCESS: Final = Access(READ, ALL & ~RESIZE)
"""Reads a disk whose writes it follows by itself; only its size has to stay."""

Sync = Literal["full", "top", "none"]
CopyMode = Literal["background", "write-blocking"]


class Mirror(Job):
    """One mirror of ``source`` to ``target``, open nodes of ``graph``; the target is writable and at least as large.

    ``sync``              full: everything; top: what the source's own layer has; none: only what is written from
                          now on
    ``base``              the target has what only this image of the source's chain, or one below it, has
    ``granularity``       bytes a dirty bit stands for, a power of two from 512 to 64 MiB
    ``buf_size``          bytes in flight at most; 0 for the default
    ``unmap``             zeros need not be allocated in the target
    ``target_is_zero``    the target is new: nobody has written to it
    ``copy_mode``         see the module's text
    ``replaces``          the node whose users go on upon the target; default: the source
    ``filter_node_name``  the name of the filter of a write-blocking mirror
    ``on_source_error``, ``on_target_error``  report, ignore (try again later), enospc, stop
    ``at_end``            called at the moment of which the target is the source: the disk is drained, the target
                          durable, nothing switched yet; what it raises makes the job fail

    ``complete`` puts the source's users on the target; a cancel without force, when the job is ready, leaves them
    where they are. Raises OptionError when an option is out of range, GraphError when source and target do not fit
    or are used by somebody in a way that does not go together with this.
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
        base: Node | None = None,
        granularity: int | None = None,
        buf_size: int = DEFAULT_BUFFER,
        speed: int = 0,
        unmap: bool = True,
        target_is_zero: bool = False,
        copy_mode: CopyMode = "background",
        replaces: Node | None = None,
        filter_node_name: str | None = None,
        on_source_error: str = "report",
        on_target_error: str = "report",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        _check(source, target, granularity, buf_size)
        self._policies = {"read": OnError(on_source_error), "write": OnError(on_target_error)}
        self.graph, self.source, self.target = graph, source, target
        self.sync, self.unmap, self.copy_mode = sync, unmap, copy_mode
        self._new_target, self._base = target_is_zero, base
        self._unit = granularity or DEFAULT_GRANULARITY
        self.bitmap = DirtyBitmap(source.size, self._unit)
        self._untouched: DirtyBitmap | None = None  # granules that still read as zeros in the target
        self.in_flight = InFlight()
        self.clocks = Clocks()
        self._copied = 0  # bytes; in_flight's lock guards it
        self._cursor = 0
        self._try_later = False
        self._speed_seen = 0.0  # bytes per second of the latest passes
        self._marked = False  # the bitmap has all that the first pass has to copy
        self._finishing: Literal["", "keep", "pivot"] = ""
        self._finished = False
        self._replaces, self._filter_name = replaces, filter_node_name
        self._at_end = at_end
        self._filter: FilterNode | None = None
        self._chunk, self._workers = _in_flight(buf_size or DEFAULT_BUFFER)
        self._buffers = Buffers(self._chunk, self._workers)
        super().__init__(id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event)
        with ExitStack() as stack:
            self._gate = graph.disk(source, SOURCE_ACCESS)
            stack.callback(_let_go, self._gate)
            self._target_use = graph.disk(target, WRITER)
            stack.pop_all()
        self._copier = self._make_copier(self._gate)

    def _make_copier(self, gate: Disk | None) -> Copier:
        return Copier(
            self.source, self.target, self.graph.leases, sparse=0, unmap=self.unmap, gate=gate,
            target_zero=self._claim_untouched, base=self._base,
        )  # fmt: skip

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
        self._check_pivot()
        self._finishing = "pivot"

    def _check_pivot(self) -> None:
        if self.target.size != self.source.size:
            raise JobError(f"The target of '{self.id}' is larger than its source: the disk cannot go on upon it")
        if self._replaces is not None and self._replaces.size != self.target.size:
            raise JobError("cannot replace image with a mirror image of different size")
        replaced = self._replaces or self.source
        for node in self.graph.nodes():
            if isinstance(node, FormatNode) and replaced in node.format.children:
                raise JobError(f"'{node.name}' has the source of '{self.id}' as its file: it cannot go on upon another")

    def on_change(self, options: dict[str, object]) -> None:
        """``copy_mode="write-blocking"``, once: there is no way back, as the other way loses the sync it had. The work
        goes over to it as soon as what is in flight has ended."""
        if set(options) != {"copy_mode"} or options["copy_mode"] not in ("background", "write-blocking"):
            raise JobError("A mirror can change its 'copy_mode' to 'write-blocking', and nothing else")
        with self._cond:
            if options["copy_mode"] == "background" and self.copy_mode == "write-blocking":
                raise JobError("Change to copy mode 'background' is not implemented")
            self.copy_mode = options["copy_mode"]
            self.wake()

    # -- the work ----------------------------------------------------------------------------------

    def run(self) -> None:
        self._begin()
        self._catch_up()
        self.make_ready()
        while not self._finishing:
            if self.bitmap.granules:
                self._pass()
            with self._cond:
                self._cond.wait_for(lambda: bool(self._finishing) or self._interrupted(), IDLE)
            self._rest()
        self._catch_up()
        if self.auto_finalize:
            self._finish()

    def _begin(self) -> None:
        """From here on the bitmap has everything that has to be copied."""
        zeros = (
            self.sync == "full"
            and self._base is None
            and (self._zeros_are_there() or self._retried("write", self._zero_target))
        )
        if zeros:
            self._untouched = DirtyBitmap(self.source.size, self._unit)
            self._untouched.set_all()
        with self.quiet(), self.graph.drained():
            # A write that began before must not end unseen after the bitmap is there.
            self.source.add_bitmap(self.bitmap)
            self.graph.follow(self.source, self._moved)
        self._mark_first_pass(zeros)
        self._marked = True

    def prepare(self) -> None:
        if not self._finished:
            self._catch_up()  # with all that has been written while the job was pending
            self._finish()

    def _moved(self, node: Node) -> None:
        """Another job has put the source's users on ``node``, which reads as the source does."""
        self.source.remove_bitmap(self.bitmap)
        node.add_bitmap(self.bitmap)
        self.source = self._copier.source = node

    def clean(self) -> None:
        self.graph.unfollow(self._moved)
        self.source.remove_bitmap(self.bitmap)
        try:
            self._remove_filter()
        finally:
            _let_go(self._gate)
            _let_go(self._target_use)

    def _interrupted(self) -> bool:
        return self.should_pause or self._wants_filter()

    def _wants_filter(self) -> bool:
        # Not before all is marked: a write that both sides have takes the mark off its granules, and of one that was
        # marked only while the write was under way the rest would never be copied.
        return self.copy_mode == "write-blocking" and self._filter is None and self._marked

    def _rest(self) -> None:
        """Nothing is in flight here: what has to be done then is done."""
        if self._try_later:
            self._try_later = False
            with self._cond:
                self._cond.wait_for(lambda: self.should_pause, RETRY)
        self.pause_point()
        if self._wants_filter():
            self._insert_filter()

    # -- what has to be copied -----------------------------------------------------------------------

    def _zeros_are_there(self) -> bool:
        """Whether the target reads as zeros without anything being done."""
        return self._new_target and self.target.zero_init and below_filters(self.target).backing is None

    def _zero_target(self) -> bool:
        """Makes an existing target read as zeros if that is quick; then only data has to be copied. This comes before
        everything else, as nothing of what is copied later may be lost to it."""
        try:
            for start, step in windows(0, self.source.size, WINDOW):
                self.pause_point()
                self.target.write_zeros(start, step, unmap=self.unmap, fast=True)
        except OSError as error:
            if error.errno == not_supported("").errno:
                return False
            raise
        return True

    def _mark_first_pass(self, zeros: bool) -> None:
        """Marks what the first pass has to copy; with ``zeros`` the target reads as zeros already. Writes that end
        meanwhile mark what they touch themselves."""
        if self.sync == "none":
            return
        base = self._base or (below_filters(self.source).backing if self.sync == "top" else None)
        if base is None and not zeros:
            self.bitmap.set_all()
            return
        for start, step in windows(0, self.source.size, WINDOW):
            self._rest()
            for row in self._retried("read", partial(self._status, start, step, base)):
                if row.present if base is not None else not row.zero:
                    self.bitmap.mark(row.offset, row.length)

    def _status(self, offset: int, length: int, base: Node | None) -> list[Status]:
        with self._gate.request():  # within, the source stays the same
            return status(self.source, offset, length, base=base)

    def _retried(self, operation: str, step: Callable[[], T]) -> T:
        """The result of ``step``, which is tried again for as long as the policy wants it."""
        while True:
            try:
                return step()
            except JobError:
                raise
            except (OSError, DiskwrightError) as error:
                if self.handle_error(error, operation, self._policies[operation]) is Action.REPORT:
                    raise
                self._try_later = True
                self._rest()

    def _claim_untouched(self, offset: int, length: int) -> bool:
        """Whether the target still reads as zeros in a range that is in flight. Asked once: it is written to now."""
        untouched = self._untouched
        if untouched is None:
            return False
        granules = -(-length // self._unit)
        blank = untouched.count_in(offset, length) == granules
        untouched.clear(offset, length)
        return blank

    # -- passes --------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Passes until nothing is dirty, or so little that the drained pass takes no time, and more passes do not make
        it less. A guest that writes faster than is copied is made to wait for the target once the job is to finish."""
        stuck = 0
        while dirty := self.bitmap.dirty_bytes:
            self._rest()
            if not self._pass():
                continue
            after = self.bitmap.dirty_bytes
            stuck = stuck + 1 if after > dirty * SHRINKS else 0
            if stuck and (after <= self._small() or stuck >= PATIENCE):
                if after <= self._small() or not self._finishing:
                    break
                self.copy_mode = "write-blocking"
        self._rest()

    def _small(self) -> int:
        """Bytes that are copied in ``LAST_PASS`` seconds."""
        return max(SMALL_REST, int(self._speed_seen * LAST_PASS))

    def _pass(self) -> bool:
        """Goes over the disk once, from where the last pass stopped, and copies what is dirty; returns early when there
        is something else to do. True when it went over the whole disk without a failure."""
        whole = self._cursor == 0
        begin, before = monotonic(), self._copied
        self._run(self._copier, limited=True)
        took, moved = monotonic() - begin, self._copied - before
        if moved >= SMALL_REST and took > 0:
            self._speed_seen = moved / took
        return whole and self._cursor == 0 and not self._try_later

    def _run(self, copier: Copier, *, limited: bool) -> None:
        few = self.bitmap.count <= 2 * self._chunk
        try:
            run_plan(
                copier,
                self._plan(),
                workers=1 if few else self._workers,
                rate=self.rate if limited else None,
                stop=self._interrupted if limited else lambda: self.should_pause,
                done=self._done,
                failed=self._failed,
                clocks=self.clocks,
                buffers=self._buffers,
            )
        finally:
            # An error ends the run in the middle of batches. What is left of them must not keep guests' writes waiting.
            with self.in_flight.changed:
                for start, end in self.in_flight.copies():
                    self.bitmap.mark(start, end - start)
                    self.in_flight.remove(start, end)

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
        unit, bitmap = self._unit, self.bitmap
        longest = max(unit, self._chunk)
        while True:
            run = None
            if self._cursor < bitmap.size:
                run = bitmap.next_dirty(self._cursor, self.rate.limit(longest))
            if run is None:
                self._cursor = 0
                return None
            offset, length = run
            busy = self.in_flight.busy_end(offset, offset + unit)
            if busy:
                self._cursor = align_up(busy, unit)  # it stays dirty, for the next pass
                continue
            # Cut at multiples of the longest, so that later passes meet whole clusters of the target.
            end = min(offset + length, align_down(offset, longest) + longest)
            end = self.in_flight.free_until(offset, end)
            bitmap.clear(offset, end - offset)
            self.in_flight.add(offset, end)
            self._cursor = end
            return offset, end - offset

    def _done(self, offset: int, length: int) -> None:
        with self.in_flight.changed:
            self._copied += length
            self.in_flight.remove(offset, offset + length)

    def _failed(self, offset: int, length: int, error: Exception) -> None:
        """What a worker could not copy is dirty again; then the policy decides."""
        with self.in_flight.changed:
            self.bitmap.mark(offset, length)
            self.in_flight.remove(offset, offset + length)
        cause = cast(Exception, error.__cause__)
        operation = "read" if isinstance(error, ReadFailed) else "write"
        self._try_later = True
        if self.handle_error(cause, operation, self._policies[operation]) is Action.REPORT:
            raise cause

    # -- the end ---------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Drained passes until one succeeds. The guest never waits while the job is paused or tries again later."""
        while True:
            self._flush_target()  # so that the flush within the drained section has little to do
            if self._finish_drained():
                return
            self._rest()
            self._catch_up()

    def _finish_drained(self) -> bool:
        """The last pass and, when it succeeds, the end of the mirror: all with no user's request in flight."""
        with self.quiet(), self.graph.drained():
            copier = self._make_copier(None)  # the gate is shut, for this job too
            while self.bitmap.granules:
                self._run(copier, limited=False)
                if self._try_later or self.should_pause:
                    return False
            self._flush_target()
            if self._try_later or self.should_pause or self.bitmap.granules:
                return False
            if self._at_end is not None:
                self._at_end()
            if not self.commit():
                return False
            self._finished = True
            self.graph.unfollow(self._moved)
            self.source.remove_bitmap(self.bitmap)  # what is written from here on is not this job's to count
            self._remove_filter()
            if self._finishing == "pivot":
                self._pivot()
            return True

    def _pivot(self) -> None:
        with self.graph.drained():  # a disk made since the first one began is not held by it
            self._check_pivot()
            self.graph.replace(self._replaces or self.source, self.target)

    def _flush_target(self) -> None:
        """Makes the target durable. A failed flush means lost data, so it is never just ignored."""
        try:
            self.target.flush()
        except (OSError, DiskwrightError) as error:
            policy = self._policies["write"]
            policy = OnError.REPORT if policy is OnError.IGNORE else policy
            if self.handle_error(error, "write", policy) is Action.REPORT:
                raise
            self._try_later = True

    # -- the filter ----------------------------------------------------------------------------------

    def _insert_filter(self) -> None:
        filter = BothSides(
            self.source, self.target, self.bitmap, self.in_flight, unmap=self.unmap,
            wrote=self._both_wrote, synced=self._both_synced,
        )  # fmt: skip
        with self.quiet():
            node = self.graph.insert_filter(filter, name=self._filter_name)
        self.graph.hold(node)  # it may have no other user
        self._filter = node

    def _both_wrote(self, start: int, end: int) -> None:
        if self._untouched is not None:
            self._untouched.clear(start, end - start)

    def _both_synced(self, length: int) -> None:
        self._copied += length  # in_flight's lock is held

    def _remove_filter(self) -> None:
        if self._filter is not None:
            node, self._filter = self._filter, None
            self.copy_mode = "background"
            self.graph.remove_filter(node)
            self.graph.release(node)


def _check(source: Node, target: Node, granularity: int | None, buf_size: int) -> None:
    if granularity is not None:
        if not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
            raise OptionError("Parameter 'granularity' expects a value in range [512B, 64MB]")
        if not is_power_of_two(granularity):
            raise OptionError("Parameter 'granularity' expects a power of 2")
    if buf_size < 0:
        raise OptionError("Invalid parameter 'buf-size'")
    if below_filters(source) is below_filters(target):
        raise GraphError("Can't mirror node into itself")
    if target.size < source.size:
        raise GraphError(f"The target has {target.size} bytes, fewer than the source's {source.size}")
    if not target.writable:
        raise GraphError(f"The target '{target.name}' is open read-only")


def _in_flight(buf_size: int) -> tuple[int, int]:
    """Chunk and number of workers that keep to ``buf_size`` bytes, or to 64 KiB where that is less."""
    chunk = max(64 * KiB, min(CHUNK, align_down(buf_size // WORKERS, 64 * KiB)))
    return chunk, max(1, min(WORKERS, buf_size // chunk))


def _let_go(disk: Disk) -> None:
    """Gives up a handle. Whether the flush that goes with it works is not this job's affair: what had to be durable
    has been flushed, and told."""
    try:
        disk.close()
    except (OSError, DiskwrightError) as error:
        errno_of(error)
