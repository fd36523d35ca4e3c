"""copy-before-write: before the source is changed, what is there is copied to a target.

So the target, together with what has not been changed of the source, is the source as it was when the filter was put
over it. A backup job copies the rest; a ``snapshot-access`` node shows both as one disk.

Three bitmaps say how things stand: ``todo`` has what still has to be copied before it is changed, ``done`` what the
target has, and ``access`` of what the snapshot may be asked. A copy takes its range out of ``todo`` and is in flight
until the target has it; a write waits for copies in flight of its granules, and for readers of the snapshot that are
reading them in the source, and then makes the copies that are missing.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import ClassVar, Final

from diskwright.core import bitmaps
from diskwright.core.bitmap import DEFAULT_GRANULARITY, DirtyBitmap
from diskwright.core.chain import chain
from diskwright.core.driver import Filter, OpenContext, Role, Segments, not_supported
from diskwright.core.inflight import InFlight
from diskwright.core.leases import Leases
from diskwright.core.lookup import lookup
from diskwright.core.node import Node, below_filters
from diskwright.core.options import INT, STR, OneOf, option
from diskwright.core.permissions import READ, WRITE, WRITE_UNCHANGED, Access
from diskwright.errors import DiskwrightError, GraphError, ImageError, OptionError, errno_of
from diskwright.extents import DATA, ZERO, Extent, Extents
from diskwright.units import MiB, align_down, align_up, is_power_of_two

_AT_ONCE: Final = MiB
"""Bytes copied with one read and one write, which is the memory one request needs."""
_LOOKED_UP: Final = 16 * MiB
"""Bytes of the snapshot whose map is looked up while writes to them wait."""
MAX_GRANULE: Final = 32 * MiB

BREAK_GUEST: Final = "break-guest-write"
BREAK_SNAPSHOT: Final = "break-snapshot"


@dataclass(frozen=True, kw_only=True)
class CopyBeforeWriteOptions:
    bitmap_node: str | None = option(STR, "the node that has the bitmap", default=None, name="bitmap.node")
    bitmap_name: str | None = option(STR, "copy only what is dirty in this bitmap", default=None, name="bitmap.name")
    on_cbw_error: str = option(
        OneOf(BREAK_GUEST, BREAK_SNAPSHOT),
        "what fails when a copy fails: the write, or the snapshot from then on",
        default=BREAK_GUEST,
    )
    cbw_timeout: int = option(INT, "seconds after which a copy counts as failed; 0: never", default=0)


class CopyBeforeWrite(Filter):
    """``child`` is the source, ``target`` at least as large and written to by nobody else.

    ``granularity``  what is copied at once, in bytes: a power of two, at least the target's cluster size
    ``bitmap``       only what is dirty in it has to be copied, and can be read of the snapshot
    ``compress``     the target's clusters are written compressed
    ``error``        what broke the snapshot, if anything did
    """

    name = "copy-before-write"
    options: ClassVar[type] = CopyBeforeWriteOptions
    roles = (Role("file", image=True), Role("target", image=True))
    needs = {"target": Access(READ | WRITE, READ | WRITE_UNCHANGED)}

    def __init__(
        self,
        child: Node,
        target: Node,
        *,
        bitmap: DirtyBitmap | None = None,
        on_cbw_error: str = BREAK_GUEST,
        cbw_timeout: int = 0,
        compress: bool = False,
        granularity: int | None = None,
        leases: Leases | None = None,
    ) -> None:
        """Raises OptionError for a bad option, GraphError when source and target do not fit."""
        if cbw_timeout < 0:
            raise OptionError("Parameter 'cbw-timeout' expects a non-negative value")
        if target.size < child.size:
            raise GraphError(f"The target has {target.size} bytes, fewer than the source's {child.size}")
        if not target.writable:
            raise ImageError("Block node is read-only")
        self.child, self.target = child, target
        self.on_cbw_error, self.timeout, self.compress = on_cbw_error, cbw_timeout, compress
        self.unit = granularity or granule_for(target)
        if not is_power_of_two(self.unit):
            raise OptionError(f"{self.unit} is not a power of two")
        self.todo, self.done, self.access_map = (DirtyBitmap(child.size, self.unit) for _ in range(3))
        if bitmap is None:
            self.access_map.set_all()
        else:
            self.access_map.merge(bitmap)
        self.todo.merge(self.access_map)
        self.stands_on_source = below_filters(child) in list(chain(target))
        """Whether the target reads the source where it has nothing: then what is zeros there now may be so no longer in
        a moment, and has to be copied like everything else."""
        self.in_flight = InFlight()
        self.error: BaseException | None = None
        self.broken: Callable[[], None] | None = None
        """Called when the snapshot has broken."""
        self._leases = leases if leases is not None else Leases()
        self._helpers: list[threading.Thread] = []

    @classmethod
    def open(cls, context: OpenContext, options: CopyBeforeWriteOptions) -> CopyBeforeWrite:
        bitmap = None
        if (options.bitmap_node is None) != (options.bitmap_name is None):
            raise OptionError("'bitmap' needs both 'node' and 'name'")
        if options.bitmap_node is not None and options.bitmap_name is not None:
            assert context.find_node is not None
            bitmap = bitmaps.find(below_filters(context.find_node(options.bitmap_node)), options.bitmap_name)
            bitmap.check(allow_readonly=True)
        return cls(
            context.file,
            context.children["target"],
            bitmap=bitmap,
            on_cbw_error=options.on_cbw_error,
            cbw_timeout=options.cbw_timeout,
            leases=context.leases,
        )

    # -- requests ------------------------------------------------------------------------------------

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            self._before(segment[0], len(segment[1]))
        self.child.writev(segments)

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        for segment in segments:
            self._before(segment[0], len(segment[1]))
        self.child.write_compressed(segments, turn=turn)

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._before(offset, length)
        self.child.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        self._before(offset, length)
        self.child.discard(offset, length)

    def resize(self, size: int, *, preallocation: str) -> None:
        raise not_supported("Filter 'copy-before-write' cannot resize")

    def settle(self) -> None:
        for helper in self._helpers:
            helper.join()

    def close(self) -> None:
        self.settle()

    # -- copying -------------------------------------------------------------------------------------

    def _before(self, offset: int, length: int) -> None:
        """Returns when the range may be changed: of what it touches nothing is left to be copied. Raises OSError, the
        copy's or ETIMEDOUT, when that is to make the change fail."""
        start, end = self._granules(offset, length)
        deadline = monotonic() + self.timeout if self.timeout else None
        try:
            while claimed := self._claim(start, end, deadline):
                if deadline is None:
                    self._copy_claimed(claimed)
                else:
                    self._copy_in_time(claimed, deadline)
        except (OSError, DiskwrightError) as error:
            if self.on_cbw_error == BREAK_SNAPSHOT:
                self._break(error)
            elif isinstance(error, OSError):
                raise
            else:
                raise OSError(errno_of(error), str(error)) from error

    def _granules(self, offset: int, length: int) -> tuple[int, int]:
        unit = self.unit
        return align_down(offset, unit), align_up(offset + length, unit)

    def _claim(self, start: int, end: int, deadline: float | None) -> list[tuple[int, int]]:
        """Waits until nobody is at the range, and takes what is to be copied; nothing when it may be changed."""
        in_flight = self.in_flight
        with in_flight.changed:
            while self.error is None and in_flight.busy_end(start, end):
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                in_flight.changed.wait(left)
            if self.error is not None or not self.todo.count_in(start, end - start):
                return []
            claimed = []
            while run := self.todo.next_dirty(start, end - start):
                low, high = run[0], min(run[0] + run[1], end)
                if low >= end:
                    break
                self.todo.clear(low, high - low)
                in_flight.add(low, high)
                claimed.append((low, high))
            return claimed

    def _copy_claimed(self, claimed: list[tuple[int, int]]) -> None:
        """Copies ranges that are in flight, and lets go of all of them."""
        waiting = list(claimed)
        try:
            while waiting:
                start, end = waiting[0]
                self.copy_range(start, min(end, self.child.size) - start)
                waiting.pop(0)
                self.copied(start, end)
        finally:
            with self.in_flight.changed:
                for start, end in waiting:
                    self.todo.mark(start, end - start)
                    self.in_flight.remove(start, end)

    def copied(self, start: int, end: int) -> None:
        """A copy in flight has ended: the target has the range."""
        with self.in_flight.changed:
            self.done.mark(start, end - start)
            self.in_flight.remove(start, end)

    def _copy_in_time(self, claimed: list[tuple[int, int]], deadline: float) -> None:
        """``_copy_claimed`` by another thread. One that comes too late goes on: the range stays in flight until it has
        ended."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                with self._leases.held():  # the request it is for may be answered before this has ended
                    self._copy_claimed(claimed)
            except BaseException as error:
                failed.append(error)

        helper = threading.Thread(target=work, name="copy-before-write")
        # At most one a request that has not been answered, and one a range that is being copied too late.
        self._helpers = [other for other in self._helpers if other.is_alive()]
        self._helpers.append(helper)
        helper.start()
        helper.join(max(0.0, deadline - monotonic()))
        if helper.is_alive():
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if failed:
            raise failed[0]

    def copy_range(self, offset: int, length: int) -> None:
        """Copies a range of the source, which is in flight, to the target."""
        at, end = offset, offset + length
        while at < end:
            step = min(_AT_ONCE if not self.compress else max(self.unit, _AT_ONCE), end - at)
            for start, size, kind in [(at, step, DATA)] if self.compress else lookup(self.child, at, step):
                if kind == DATA:
                    data = memoryview(bytearray(size))
                    self.child.readv([(start, data)])
                    if self.compress:
                        self.target.write_compressed([(start, data)])
                    else:
                        self.target.writev([(start, data)])
                elif self.stands_on_source or lookup(self.target, start, size) != [(start, size, ZERO)]:
                    self.target.write_zeros(start, size, unmap=True)
            at += step

    def _break(self, error: BaseException) -> None:
        with self.in_flight.changed:
            if self.error is None:
                self.error = error
            self.in_flight.changed.notify_all()
        if self.broken is not None:
            self.broken()

    # -- the snapshot --------------------------------------------------------------------------------

    def snapshot_readv(self, segments: Segments) -> None:
        for offset, buffer in segments:
            start, end = self._granules(offset, len(buffer))
            with self.in_flight.beside(start, end):
                self._check_access(start, end)
                for low, high, done in self._parts(offset, offset + len(buffer)):
                    part = buffer[low - offset : high - offset]
                    (self.target if done else self.child).readv([(low, part)])
            if self.error is not None:
                # It may have broken while we read: what we read may be what was written.
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def snapshot_extents(self, offset: int, length: int) -> Extents:
        runs: list[Extent] = []
        end = offset + length
        while offset < end:
            step = min(_LOOKED_UP - offset % _LOOKED_UP, end - offset)
            start, stop = self._granules(offset, step)
            with self.in_flight.beside(start, stop):
                self._check_access(start, stop)
                for low, high, done in self._parts(offset, offset + step):
                    for at, size, kind in lookup(self.target if done else self.child, low, high - low):
                        runs.append(Extent(at, size, DATA if kind == DATA else ZERO, -1))
            offset += step
        return Extents.of(runs)

    def snapshot_discard(self, offset: int, length: int) -> None:
        unit, size = self.unit, self.child.size
        start = align_up(offset, unit)
        end = size if offset + length >= size else align_down(offset + length, unit)
        if start >= end:
            return
        with self.in_flight.changed:
            self.access_map.clear(start, end - start)
            self.todo.clear(start, end - start)
        self.target.discard(start, end - start)

    def _check_access(self, start: int, end: int) -> None:
        granules = -(-(min(end, align_up(self.child.size, self.unit)) - start) // self.unit)
        if self.error is not None or self.access_map.count_in(start, end - start) != granules:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def _parts(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """``(start, end, whether the target has it)`` of a range that no copy is in flight of."""
        while offset < end:
            done = self.done.get(offset)
            stop = offset
            while stop < end and self.done.get(stop) == done:
                stop = align_down(stop, self.unit) + self.unit
            yield offset, min(stop, end), done
            offset = stop


def granule_for(target: Node) -> int:
    """What is copied to ``target`` at once: whole clusters of it, a power of two. Raises GraphError for one whose
    clusters are too large."""
    cluster = target.cluster_size
    if cluster > MAX_GRANULE:
        raise GraphError(f"Clusters of {cluster} bytes are more than the {MAX_GRANULE} that can be copied at once")
    return max(DEFAULT_GRANULARITY, 1 << (cluster - 1).bit_length())


DRIVERS = (CopyBeforeWrite,)
