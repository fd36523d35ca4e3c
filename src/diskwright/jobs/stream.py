"""Stream: an image takes over what images below it have, while it is in use, and needs them no more then.

A range is read through the chain and written into the image by a copy that nobody's write can overlap: a filter over
the image keeps writes out of the few clusters being filled at a moment. What a write has put into the image before is
found there, and not copied; what it puts there later comes later. So the copy never puts old bytes over new ones.

What the disk reads as never changes, and the image's header names the old backing file until everything has been taken
over and is durable. A crash at any moment costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from diskwright.core.bitmap import DEFAULT_GRANULARITY
from diskwright.core.chain import chain, depth_of
from diskwright.core.disk import Disk
from diskwright.core.driver import Filter, Segments
from diskwright.core.graph import Graph
from diskwright.core.inflight import InFlight
from diskwright.core.leases import Leases
from diskwright.core.lookup import Run, lookup
from diskwright.core.node import FilterNode, FormatNode, Node, below_filters, format_of
from diskwright.core.permissions import ALL, READ, RESIZE, WRITE_UNCHANGED, Access
from diskwright.core.status import status
from diskwright.engine.clock import Clock
from diskwright.engine.copy import Copier, Range, ReadFailed, WriteFailed
from diskwright.engine.policy import OnError
from diskwright.errors import DiskwrightError, GraphError, OptionError
from diskwright.extents import DATA, UNALLOCATED, ZERO, windows
from diskwright.jobs.commit import closed, name_seen_from
from diskwright.jobs.job import EventSink
from diskwright.jobs.sweep import Sweep
from diskwright.units import MiB, align_down, align_up

_FILLER: Final = Access(READ | WRITE_UNCHANGED, ALL & ~RESIZE)
"""Of the image that is filled: others may write to it, but its size has to stay."""

_KEPT: Final = Access(READ, READ)
"""Of images it fills from: their chain has to stay as it is."""
_BASE: Final = Access(READ, ALL)
"""Of the base: it has to stay in the chain."""


def stream_job(
    id: str,
    graph: Graph,
    device: Node,
    *,
    base: str | None = None,
    base_node: str | None = None,
    bottom: str | None = None,
    backing_file: str | None = None,
    speed: int = 0,
    on_error: str = "report",
    filter_node_name: str | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
    on_event: EventSink | None = None,
) -> Stream:
    """What QMP's ``block-stream`` makes. ``device`` is the root of a disk, or an image within a chain; ``base`` is a
    file name, ``base_node`` and ``bottom`` names of nodes. Raises GraphError and OptionError with QEMU's texts."""
    for one, other in (("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")):
        given = {"base": base, "base-node": base_node, "bottom": bottom}
        if given[one] is not None and given[other] is not None:
            raise OptionError(f"'{one}' and '{other}' cannot be specified at the same time")
    top = below_filters(device)
    images = list(chain(top))
    lowest = images[-1]
    if base is not None:
        depth = depth_of(top, base)
        if depth is None:
            raise GraphError(f"Can't find '{base}' in the backing chain")
        lowest = images[depth - 1]
    elif base_node is not None:
        below = below_filters(graph.node(base_node))
        if below not in images[1:]:
            raise GraphError(f"Node '{base_node}' is not a backing image of '{device.name}'")
        lowest = images[images.index(below) - 1]
    elif bottom is not None:
        lowest = graph.node(bottom)
        if isinstance(lowest, FilterNode):
            raise GraphError(f"Node '{bottom}' is a filter, use a non-filter node as 'bottom'")
        if lowest not in images:
            raise GraphError(f"Node '{bottom}' is not in a chain starting from '{device.name}'")
    if backing_file is not None and lowest.backing is None:
        raise OptionError("backing file specified, but streaming the entire chain")
    return Stream(
        id, graph, top, lowest=lowest, backing_file=backing_file, speed=speed, on_error=on_error,
        filter_node_name=filter_node_name, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event,
    )  # fmt: skip


class Stream(Sweep):
    """Fills ``top`` from the images below it down to ``lowest``, which may be ``top`` itself; what is below that
    becomes its backing file.

    ``backing_file``      what is written into the header as the new backing file's name; default: its file name
    ``on_error``          report, stop, enospc; ignore: go on, and fail at the end
    ``filter_node_name``  the name of the filter over ``top`` while the job runs

    Raises GraphError when ``lowest`` is not in the chain, or an image of it is used in a way that does not go together
    with this; ImageLocked or OSError when ``top`` cannot be opened for writing.
    """

    type = "stream"
    skips_errors = True
    told_as = "read"  # as QEMU has it: to stream is to read with copy-on-read

    def __init__(
        self,
        id: str,
        graph: Graph,
        top: Node,
        *,
        lowest: Node | None = None,
        backing_file: str | None = None,
        speed: int = 0,
        on_error: str = "report",
        filter_node_name: str | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
    ) -> None:
        policy = OnError(on_error)
        self.graph, self.top = graph, below_filters(top)
        images = list(chain(self.top))
        self._lowest = lowest or images[-1]
        if self._lowest not in images:
            raise GraphError(f"'{self._lowest.name}' is not in the backing chain of '{self.top.name}'")
        self._images = images[1 : images.index(self._lowest) + 1]
        self.base = self._lowest.backing
        self._backing_file, self._filter_name = backing_file, filter_node_name
        self._filter: FilterNode | None = None
        self._reopened = False
        super().__init__(
            id, self.top.size, {"read": policy, "write": policy}, granularity=_granule(self.top), speed=speed,
            auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event,
        )  # fmt: skip
        with ExitStack() as undo:
            undo.callback(graph.end_use, self)
            for image in self._images:
                graph.use(self, image, _KEPT)
            if self.base is not None:
                graph.use(self, self.base, _BASE)
            self._reopened = bool(graph.set_writable(self.top, True))
            undo.callback(self._close_again)
            self._gate = graph.disk(self.top, _FILLER)
            undo.pop_all()

    def marks(self, offset: int, length: int) -> list[tuple[int, int]]:
        with self._gate.request():
            rows = status(self.top, offset, length, base=self.base)
        # Without a base the image reads as zeros what it has not.
        wanted = [row for row in rows if row.present and row.depth and not (row.zero and self.base is None)]
        return [(row.offset, row.length) for row in wanted]

    def run(self) -> None:
        filter = _KeepOut(self.top, self.in_flight, self._unit)
        with self.quiet():
            self._filter = self.graph.insert_filter(filter, name=self._filter_name)
        self.graph.hold(self._filter)
        self.sweep(_Filler(self.top, self.base, self.graph.leases, self._gate))
        if self.skipped is not None:
            raise self.skipped
        self.flush(self._flush_top)

    def _flush_top(self) -> None:
        with self._gate.request():
            self.top.flush()

    def prepare(self) -> None:
        """Names the new backing file in the header, and goes on upon it."""
        with self.quiet(), self.graph.drained():
            base = self.base and below_filters(self.base)
            if base is None:
                format_of(self.top).change_backing(None, None)
            else:
                name = self._backing_file if self._backing_file is not None else name_seen_from(self.top, base)
                format_of(self.top).change_backing(name, base.driver_name)
            self.graph.set_backing(self.top, self.base)

    def clean(self) -> None:
        with self.quiet():
            if self._filter is not None:
                node, self._filter = self._filter, None
                self.graph.remove_filter(node)
                self.graph.release(node)
            self.graph.end_use(self)
            with self._held_open():
                closed(self._gate.close)
                self._close_again()

    @contextmanager
    def _held_open(self) -> Iterator[None]:
        """The gate may be the last user of the image; what is to be closed for writing must still be there."""
        self.graph.hold(self.top)
        try:
            yield
        finally:
            self.graph.release(self.top)

    def _close_again(self) -> None:
        if self._reopened:
            self._reopened = False
            self.graph.set_writable(self.top, False)


class _KeepOut(Filter):
    """Changes wait while a copy of their granules is in flight, and keep copies away; not each other."""

    name = "copy-on-read"

    def __init__(self, child: Node, in_flight: InFlight, unit: int) -> None:
        self.child, self._in_flight, self._unit = child, in_flight, unit

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            with self._beside(segment[0], len(segment[1])):
                self.child.writev([segment])

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        for segment in segments:
            with self._beside(segment[0], len(segment[1])):
                self.child.write_compressed([segment], turn=turn)

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        with self._beside(offset, length):
            self.child.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        with self._beside(offset, length):
            self.child.discard(offset, length)

    def _beside(self, offset: int, length: int) -> Any:
        return self._in_flight.beside(align_down(offset, self._unit), align_up(offset + length, self._unit))


class _Filler(Copier):
    """Puts into ``top`` what it reads out of images between itself and ``base``."""

    def __init__(self, top: Node, base: Node | None, leases: Leases, gate: Disk) -> None:
        super().__init__(top, top, leases, gate=gate)
        self.top = top
        self._below = base and below_filters(base)
        self._zeros_matter = base is not None  # else the image reads as zeros what nobody has

    def copy(
        self, ranges: Sequence[Range], buffer: memoryview, clock: Clock, turn: Callable[[], None] | None = None
    ) -> int:
        moved = 0
        for offset, length in ranges:
            for start, size, kind in self._missing(offset, length):
                if kind == DATA:
                    for at, step in windows(start, size, len(buffer)):
                        self._fill(at, buffer[:step], clock)
                    moved += size
                elif kind == ZERO and self._zeros_matter:
                    self._write(lambda: self.top.write_zeros_unchanged(start, size))  # noqa: B023 - called at once
        return moved

    def _fill(self, offset: int, piece: memoryview, clock: Clock) -> None:
        try:
            self.top.readv([(offset, piece)])
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        clock.lap("read")
        self._write(lambda: self.top.write_unchanged([(offset, piece)]))
        clock.lap("write")

    def _write(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (OSError, DiskwrightError) as error:
            raise WriteFailed from error

    def _missing(self, offset: int, length: int) -> list[Run]:
        """What of a range ``top`` has not itself, and images above the base have."""
        found: list[Run] = []
        end = offset + length
        backing = self.top.backing and below_filters(self.top.backing)
        try:
            while offset < end:
                run = self.top.extent_at(offset, end - offset)
                if run.kind == UNALLOCATED and backing is not None and backing is not self._below:
                    inside = max(0, min(run.length, backing.size - offset))
                    if inside:
                        found += lookup(backing, offset, inside, self._below)
                    if inside < run.length:
                        found.append((offset + inside, run.length - inside, ZERO))
                offset = run.end
        except (OSError, DiskwrightError) as error:
            raise ReadFailed from error
        return found


def _granule(image: Node) -> int:
    """A power of two: whole clusters of ``image``. Raises GraphError for an image that has none, as it cannot take over
    anything either."""
    if not isinstance(image, FormatNode) or not image.format.has_backing:
        raise GraphError(f"'{image.name}' ({image.driver_name}) has no backing file to take anything over from")
    return min(max(DEFAULT_GRANULARITY, 1 << (image.cluster_size - 1).bit_length()), 2 * MiB)
