"""Backup: a copy of a disk as it is when the job is made, while its users go on writing.

A copy-before-write filter over the source sees to it that nothing is overwritten that has not been copied. The job
copies the rest, from the same bitmap of what is left: whoever takes a range out of it copies it, once.

With a named dirty bitmap only what is dirty in it is copied. What is written from the job's beginning on is recorded
apart; at the end the bitmap has, as its mode says, just that, or that and what was not copied, or all it had and that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final, Literal

from diskwright.core import bitmaps
from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.disk import Disk
from diskwright.core.driver import COMPRESSION
from diskwright.core.graph import Graph
from diskwright.core.lookup import lookup
from diskwright.core.node import FilterNode, Node, below_filters
from diskwright.core.permissions import ALL, READ, RESIZE, WRITER, Access
from diskwright.core.status import status
from diskwright.engine.clock import Clock
from diskwright.engine.copy import CHUNK, MAX_WORKERS, WORKERS, Copier, Range, ReadFailed, WriteFailed
from diskwright.engine.policy import OnError
from diskwright.errors import DiskwrightError, GraphError, OptionError
from diskwright.extents import WINDOW, ZERO, windows
from diskwright.filters.copy_before_write import BREAK_GUEST, CopyBeforeWrite, granule_for
from diskwright.jobs.commit import closed
from diskwright.jobs.job import EventSink
from diskwright.jobs.sweep import IDLE, Sweep
from diskwright.units import align_down, align_up

Sync = Literal["full", "top", "none", "incremental", "bitmap"]
BitmapMode = Literal["on-success", "always", "never"]

SOURCE_ACCESS: Final = Access(READ, ALL & ~RESIZE)


class Backup(Sweep):
    """One backup of ``source`` to ``target``, open nodes of ``graph`` of one size; the target is writable.

    It begins when it is made: of several jobs that are made within one ``graph.drained()`` the backups are of one
    moment.

    ``sync``          full: everything; top: what the source's own layer has; none: only what is written over, until
                      the job is cancelled; bitmap: what is dirty in ``bitmap``; incremental: the same, and the mode is
                      on-success
    ``bitmap``        the name of a dirty bitmap of the source
    ``bitmap_mode``   what the bitmap has at the end. on-success: what has been written since the job began, when it
                      succeeds, else what it had too. always: likewise, but what a failed job has copied is not in it
                      any more. never: what it had, and what has been written
    ``compress``      write compressed clusters
    ``on_source_error``, ``on_target_error``  of the job's own copies: report, ignore (try again later), enospc, stop
    ``on_cbw_error``  of copies before writes: break-guest-write (the write fails), break-snapshot (the job fails)
    ``cbw_timeout``   seconds after which such a copy counts as failed; 0: never
    ``max_workers``   copies in flight at most
    ``max_chunk``     bytes of one copy at most, at least a cluster; 0: the default

    Raises OptionError and GraphError, with QEMU's texts where it has any.
    """

    type = "backup"

    def __init__(
        self,
        id: str,
        graph: Graph,
        source: Node,
        target: Node,
        *,
        sync: Sync = "full",
        bitmap: str | None = None,
        bitmap_mode: BitmapMode | None = None,
        compress: bool = False,
        speed: int = 0,
        on_source_error: str = "report",
        on_target_error: str = "report",
        on_cbw_error: str = BREAK_GUEST,
        cbw_timeout: int = 0,
        max_workers: int = WORKERS,
        max_chunk: int = 0,
        filter_node_name: str | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
    ) -> None:
        self.bitmap_mode = _check_bitmap(sync, bitmap, bitmap_mode)
        _check(source, target, compress, max_workers, max_chunk)
        self.graph, self.source, self.target, self.sync = graph, source, target, sync
        self.compress = compress
        self._cleaned: Callable[[], None] | None = None
        self.named: DirtyBitmap | None = None
        if bitmap is not None:
            self.named = _bitmap(source, bitmap)
            self.named.check(allow_readonly=self.bitmap_mode == "never")
        super().__init__(
            id, source.size, {"read": OnError(on_source_error), "write": OnError(on_target_error)},
            granularity=granule_for(target), workers=min(max_workers, MAX_WORKERS), chunk=max_chunk or CHUNK,
            speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event,
        )  # fmt: skip
        with ExitStack() as undo:
            self._gate = graph.disk(source, SOURCE_ACCESS)
            undo.callback(closed, self._gate.close)
            self._target_use = graph.disk(target, WRITER)
            undo.callback(closed, self._target_use.close)
            with self.quiet(), graph.drained():
                self._begin(on_cbw_error, cbw_timeout, filter_node_name)
            undo.pop_all()

    def _begin(self, on_cbw_error: str, cbw_timeout: int, name: str | None) -> None:
        """The moment of which the target will be the copy; no request is in flight."""
        copied = self.named if self.sync in ("bitmap", "incremental") else None
        filter = CopyBeforeWrite(
            self.source, self.target, bitmap=copied, on_cbw_error=on_cbw_error, cbw_timeout=cbw_timeout,
            compress=self.compress, leases=self.graph.leases,
        )  # fmt: skip
        self._node: FilterNode | None = self.graph.insert_filter(filter, name=name)
        self.graph.hold(self._node)
        self.filter, self.todo, self.in_flight = filter, filter.todo, filter.in_flight
        filter.broken = self.wake
        self._length = self.todo.dirty_bytes
        self._since: DirtyBitmap | None = None
        if self.named is not None:
            named = self.named
            self._since = DirtyBitmap(named.size, named.granularity, enabled=named.enabled)
            named.hold(allow_readonly=self.bitmap_mode == "never")
            self.source.add_bitmap(self._since)

    # -- what the job answers ------------------------------------------------------------------------

    def progress(self) -> tuple[int, int]:
        """Bytes copied, by whom ever; and those plus what is left."""
        with self.in_flight.changed:
            return self._length - self.todo.dirty_bytes - self.in_flight.bytes, self._length

    def marks(self, offset: int, length: int) -> list[tuple[int, int]]:
        raise AssertionError("what is to be copied was marked at the beginning")

    # -- the work ------------------------------------------------------------------------------------

    def run(self) -> None:
        copier = _Copier(self.source, self.target, self.graph, self._gate, self.compress)
        copier.unmap = not self.filter.stands_on_source  # else zeros are left out where the target has them already
        if self.sync == "none":
            while True:  # until it is cancelled
                self.pause_point()
                self.check()
                with self._cond:
                    self._cond.wait_for(lambda: self.should_pause, 0.5)
        if self.sync == "top":
            self._leave_out_what_is_below()
        self.work_off(copier)
        self.check()
        self.flush(self._flush_target)
        self.check()

    def interrupted(self) -> bool:
        return self.should_pause or self.filter.error is not None

    def work_off(self, copier: Copier) -> None:
        """The copies that writes wait for are part of the work; one that fails leaves something to do again."""
        while True:
            super().work_off(copier)
            with self.in_flight.changed:
                while self.in_flight.copies() and not self.interrupted():
                    self.in_flight.changed.wait(IDLE)
                if not self.todo.granules and not self.in_flight.copies():
                    return
            self.pause_point()
            self.check()

    def check(self) -> None:
        if self.filter.error is not None:
            raise self.filter.error

    def _flush_target(self) -> None:
        with self._target_use.request():
            self.target.flush()

    def _leave_out_what_is_below(self) -> None:
        """Granules of which the source's own layer has nothing are not copied."""
        base = below_filters(self.source).backing
        if base is None:
            return
        unit = self.todo.granularity
        for start, step in windows(0, self.size, WINDOW):
            self.pause_point()
            for row in self.retried("read", partial(self._layer, start, step, base)) or []:
                low = align_up(row[0], unit)
                end = row[0] + row[1]
                high = end if end == self.size else align_down(end, unit)
                if low < high:
                    with self.in_flight.changed:
                        before = self.todo.dirty_bytes
                        self.todo.clear(low, high - low)
                        self._length -= before - self.todo.dirty_bytes

    def _layer(self, offset: int, length: int, base: Node) -> list[tuple[int, int]]:
        """Runs that the source's own layer says nothing of."""
        with self._gate.request():
            # What is written meanwhile is on the layer too: then it was copied before.
            rows = status(self.source, offset, length, base=base)
        runs: list[tuple[int, int]] = []
        for row in rows:
            if not row.present:
                if runs and sum(runs[-1]) == row.offset:
                    runs[-1] = (runs[-1][0], runs[-1][1] + row.length)
                else:
                    runs.append((row.offset, row.length))
        return runs

    def _let_go(self, offset: int, length: int) -> None:
        if not self.todo.count_in(offset, length):
            self.filter.done.mark(offset, length)
        super()._let_go(offset, length)

    # -- the end -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        self.check()  # it may have broken while the job was pending

    def clean(self) -> None:
        with self.quiet():
            with self.graph.drained():
                self._settle_bitmap()
                if self._node is not None:
                    node, self._node = self._node, None
                    self.graph.remove_filter(node)
                    self.graph.release(node)
            closed(self._gate.close)
            closed(self._target_use.close)
            if self._cleaned is not None:
                self._cleaned()

    def when_cleaned(self, action: Callable[[], None]) -> None:
        """``action`` is called when the job has let go of source and target; what it raises makes the job fail."""
        self._cleaned = action

    def _settle_bitmap(self) -> None:
        named, since = self.named, self._since
        if named is None or since is None:
            return
        self._since = None
        self.source.remove_bitmap(since)
        named.release()
        if self.bitmap_mode == "never" or (self.bitmap_mode == "on-success" and self.error is not None):
            return  # it has recorded what was written all the time
        if self.error is not None:
            since.merge(self.todo)
        named.depart()
        named.load_bits(0, since.read_bits(0, since.size))


class _Copier(Copier):
    """Copies ranges that are in flight; compressed ones through memory, each whole clusters of the target."""

    def __init__(self, source: Node, target: Node, graph: Graph, gate: Disk, compress: bool) -> None:
        super().__init__(source, target, graph.leases, sparse=0, gate=gate)
        self._compress = compress

    def copy(
        self, ranges: Sequence[Range], buffer: memoryview, clock: Clock, turn: Callable[[], None] | None = None
    ) -> int:
        if not self._compress:
            return super().copy(ranges, buffer, clock, turn)
        moved = 0
        for offset, length in ranges:
            for start, step in windows(offset, length, len(buffer)):
                moved += self._compressed(start, buffer[:step])
        return moved

    def _compressed(self, offset: int, piece: memoryview) -> int:
        length = len(piece)
        try:
            blank = lookup(self.source, offset, length) == [(offset, length, ZERO)]
            if not blank:
                self.source.readv([(offset, piece)])
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        try:
            if blank:
                self._zero(offset, length)
                return 0
            self.target.write_compressed([(offset, piece)])
        except (OSError, DiskwrightError) as error:
            raise WriteFailed from error
        return length


def _check(source: Node, target: Node, compress: bool, max_workers: int, max_chunk: int) -> None:
    if below_filters(source) is below_filters(target):
        raise GraphError("Source and target cannot be the same")
    if source.size != target.size:
        raise GraphError("Source and target image have different sizes")
    if compress and not target.compresses:
        raise GraphError(f"{COMPRESSION}: '{target.name}' ({target.driver_name})")
    if max_workers < 1:
        raise OptionError("max-workers must be between 1 and 2147483647")
    if max_chunk < 0:
        raise OptionError("max-chunk must be zero (which means no limit) or positive")
    if 0 < max_chunk < granule_for(target):
        raise OptionError(f"Required max-chunk ({max_chunk}) is less than backup cluster size ({granule_for(target)})")


def _check_bitmap(sync: Sync, bitmap: str | None, mode: BitmapMode | None) -> BitmapMode:
    """The mode that holds. Raises OptionError for what does not go together."""
    if sync in ("bitmap", "incremental"):
        if bitmap is None:
            raise OptionError(f"must provide a valid bitmap name for '{sync}' sync mode")
        if sync == "incremental":
            if mode not in (None, "on-success"):
                raise OptionError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
            return "on-success"
    if bitmap is None:
        if mode is not None:
            raise OptionError("Cannot specify bitmap sync mode without a bitmap")
        return "never"
    if mode is None:
        raise OptionError("Bitmap sync mode must be given when providing a bitmap")
    if sync == "none":
        raise OptionError("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode == "never" and sync in ("full", "top"):
        raise OptionError(f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'")
    return mode


def _bitmap(source: Node, name: str) -> DirtyBitmap:
    try:
        return bitmaps.find(source, name)
    except GraphError:
        raise GraphError(f"Bitmap '{name}' could not be found") from None
