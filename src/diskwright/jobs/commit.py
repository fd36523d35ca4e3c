"""Commit: what the images above a base have goes into the base, while the disk is in use; then they leave the chain.

Of an *intermediate* image, and those between it and the base, nobody writes anything meanwhile: each byte is copied
once. Readers notice nothing: where the base is written to, an image above has just those bytes itself. At the end the
overlay goes on upon the base, in its header too. The base is durable before, so a crash at any moment costs nothing.

Of the *active* image, which is written to, it is a mirror into the base: what is copied is what the images above the
base have, then what is written meanwhile; when it is ready, ``complete`` puts the disk's users on the base.

Both make the base useless to others: the images above it, whoever else has them open, read something else then. So
nobody may be reading the base's overlays directly, and they can be used no more afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final

from diskwright.core.bitmap import DEFAULT_GRANULARITY
from diskwright.core.chain import chain, depth_of
from diskwright.core.gate import has_prefix, resolve
from diskwright.core.graph import Graph, identity
from diskwright.core.node import FormatNode, Node, below_filters, format_of
from diskwright.core.permissions import WRITE, WRITE_UNCHANGED, WRITER, Access
from diskwright.core.status import status
from diskwright.engine.copy import Copier
from diskwright.engine.policy import OnError
from diskwright.errors import DiskwrightError, GraphError, OptionError
from diskwright.jobs.job import EventSink, Job
from diskwright.jobs.mirror import Mirror
from diskwright.jobs.sweep import Sweep
from diskwright.units import MiB

_PASSED: Final = Access(0, WRITE | WRITE_UNCHANGED)
"""Of an image above the base: nobody else may rely on what it reads as."""


def commit_job(
    id: str,
    graph: Graph,
    device: Node,
    *,
    top: str | None = None,
    top_node: str | None = None,
    base: str | None = None,
    base_node: str | None = None,
    backing_file: str | None = None,
    speed: int = 0,
    on_error: str = "report",
    filter_node_name: str | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
    on_event: EventSink | None = None,
) -> Job:
    """What QMP's ``block-commit`` makes: an ``ActiveCommit`` when ``top`` is written to or nothing is over it, else a
    ``Commit``. ``device`` is the disk's root; images are named by file name or by node.

    Raises GraphError and OptionError with QEMU's texts, and what the jobs' constructors raise.
    """
    if top is not None and top_node is not None:
        raise OptionError("'top-node' and 'top' are mutually exclusive")
    if base is not None and base_node is not None:
        raise OptionError("'base-node' and 'base' are mutually exclusive")
    if graph.parents(device):
        raise GraphError("Need a root block node")
    upper = _top(graph, device, top, top_node)
    lower = _base(graph, upper, base, base_node)
    options: dict[str, Any] = {
        "speed": speed, "on_error": on_error, "auto_finalize": auto_finalize, "auto_dismiss": auto_dismiss,
        "on_event": on_event,
    }  # fmt: skip
    if upper is below_filters(device) or graph.is_written(upper):
        if backing_file is not None:
            raise OptionError("'backing-file' specified, but 'top' is the active layer")
        return ActiveCommit(id, graph, upper, lower, **options)
    return Commit(id, graph, upper, lower, backing_file=backing_file, **options)


def _top(graph: Graph, device: Node, name: str | None, node_name: str | None) -> Node:
    if node_name is not None:
        node = below_filters(graph.node(node_name))
        if node not in list(chain(device)):
            raise GraphError(f"'{node_name}' is not in this backing file chain")
        return node
    if name is not None and identity(name) != identity(below_filters(device).filename):
        depth = depth_of(device, name)
        if depth is None:
            raise GraphError(f"Top image file {name} not found")
        return list(chain(device))[depth]
    return below_filters(device)


def _base(graph: Graph, top: Node, name: str | None, node_name: str | None) -> Node:
    images = list(chain(top))
    if node_name is not None:
        node = below_filters(graph.node(node_name))
        if node not in images:
            raise GraphError(f"'{node_name}' is not in this backing file chain")
    elif name is not None:
        depth = 0 if identity(name) == identity(top.filename) else depth_of(top, name)
        if depth is None:
            raise GraphError(f"Can't find '{name}' in the backing chain")
        node = images[depth]
    else:
        node = images[-1]
    if node is top:
        raise GraphError("cannot commit an image into itself")
    return node


class _Base:
    """The base, and what must hold of it and the images above it for as long as a job writes to it."""

    def __init__(self, graph: Graph, user: Job, top: Node, base: Node, passed: list[Node]) -> None:
        images = list(chain(top))
        if base not in images[1:]:
            raise GraphError(f"'{base.name}' is not in the backing chain of '{top.name}'")
        _check_alone(graph, images[: images.index(base) + 1])
        self.graph, self.base = graph, base
        self._reopened: list[Node] = []
        with ExitStack() as undo:
            for node in passed:
                graph.use(user, node, _PASSED)
            undo.callback(graph.end_use, user)
            graph.hold(base)
            undo.callback(graph.release, base)
            self._reopened += graph.set_writable(base, True)
            undo.callback(self.close)
            if base.size < top.size:
                with graph.drained():
                    base.resize(top.size)
            undo.pop_all()
        self._user = user

    def reopen(self, node: Node) -> None:
        """Opens a further image for writing until ``close``."""
        self._reopened += self.graph.set_writable(node, True)

    def close(self, *, keep_writable: bool = False) -> None:
        """Lets go, and has what was opened for writing opened for reading only again. Raises OSError or
        DiskwrightError; everything has been let go of then."""
        reopened, self._reopened = self._reopened, []
        try:
            if not keep_writable:
                for node in reversed(reopened):
                    if node in self.graph.nodes():
                        self.graph.set_writable(node, False)
        finally:
            self.graph.end_use(self._user)
            self.graph.release(self.base)


def _check_alone(graph: Graph, images: list[Node]) -> None:
    """Raises GraphError when another image than these reads through one of them but the first: its contents would
    change."""
    for node in graph.nodes():
        below = node.backing and below_filters(node.backing)
        if below in images[1:] and node not in images:
            raise GraphError(f"'{node.name}' has '{below.name}', which is to change, as its backing file too")


class Commit(Sweep):
    """Commits ``top``, to which nobody writes, and what lies between into ``base``.

    ``backing_file``  what is written into the overlay's header as the base's name; default: its file name
    ``on_error``      report, ignore (the part is tried again later), enospc, stop
    ``speed``         bytes a second; 0: no limit

    Raises GraphError when the base is not below ``top``, or somebody uses one of the images in a way that does not go
    together with this; ImageLocked or OSError when the base or an overlay cannot be opened for writing.
    """

    type = "commit"

    def __init__(
        self,
        id: str,
        graph: Graph,
        top: Node,
        base: Node,
        *,
        backing_file: str | None = None,
        speed: int = 0,
        on_error: str = "report",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
    ) -> None:
        policy = OnError(on_error)
        self.graph, self.top, self.base = graph, below_filters(top), below_filters(base)
        self._backing_file = backing_file
        images = list(chain(self.top))
        passed = images[: images.index(self.base)] if self.base in images else images
        self._below = passed[-1].backing  # the base, with filters over it if there are any
        self._overlays = _overlays(graph, self.top)
        with ExitStack() as undo:
            self._held = _Base(graph, self, self.top, self.base, passed)
            undo.callback(self._held.close)
            for overlay in self._overlays:
                self._held.reopen(overlay)
            self._gate = graph.disk(self.base, WRITER)
            undo.callback(closed, self._gate.close)
            super().__init__(
                id, self.top.size, {"read": policy, "write": policy}, granularity=self._granule(),
                speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event,
            )  # fmt: skip
            undo.pop_all()

    def _granule(self) -> int:
        """A power of two: whole clusters of the base, as far as that is sensible."""
        return min(max(DEFAULT_GRANULARITY, 1 << (self.base.cluster_size - 1).bit_length()), 2 * MiB)

    def marks(self, offset: int, length: int) -> list[tuple[int, int]]:
        with self._gate.request():
            rows = status(self.top, offset, length, base=self.base)
        return [(row.offset, row.length) for row in rows if row.present]

    def run(self) -> None:
        copier = Copier(self.top, self.base, self.graph.leases, sparse=0, base=self.base, gate=self._gate)
        self.sweep(copier)
        self.flush(self._flush_base)

    def _flush_base(self) -> None:
        with self._gate.request():
            self.base.flush()

    def prepare(self) -> None:
        """Takes the images out of the chain."""
        with self.quiet(), self.graph.drained():
            if set(_overlays(self.graph, self.top)) != set(self._overlays):
                raise GraphError(f"Other images than at the beginning have '{self.top.name}' as their backing file")
            for overlay in self._overlays:  # the base is durable, and nobody but this job has written to it
                name = self._backing_file
                if name is None:
                    name = name_seen_from(overlay, self.base)
                format_of(overlay).change_backing(name, self.base.driver_name)
                self.graph.set_backing(overlay, self._below)

    def clean(self) -> None:
        closed(self._gate.close)
        with self.quiet():
            self._held.close()


class ActiveCommit(Mirror):
    """Commits ``top``, the image a disk's users write to, and what lies between into ``base``; then, when told to
    ``complete``, the users go on upon the base. A cancel without force, once it is ready, leaves them where they are:
    the base is then what the disk was at that moment.

    Options and errors as those of ``Commit``; also GraphError when the base is larger than the disk.
    """

    type = "commit"

    def __init__(
        self,
        id: str,
        graph: Graph,
        top: Node,
        base: Node,
        *,
        speed: int = 0,
        on_error: str = "report",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        top, base = below_filters(top), below_filters(base)
        if base.size > top.size:
            raise GraphError(
                f"The base '{base.name}' has {base.size} bytes, more than the {top.size} of the disk, "
                "which could not go on upon it"
            )
        images = list(chain(top))
        passed = images[1 : images.index(base)] if base in images else []
        self._held = _Base(graph, self, top, base, passed)
        try:
            super().__init__(
                id, graph, top, base, base=base, speed=speed, on_source_error=on_error, on_target_error=on_error,
                auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, on_event=on_event, at_end=at_end,
            )  # fmt: skip
        except BaseException:
            closed(self._held.close)
            raise

    def clean(self) -> None:
        try:
            super().clean()
        finally:
            with self.quiet():
                self._held.close(keep_writable=self._finished and self._finishing == "pivot")


def name_seen_from(overlay: Node, base: Node) -> str:
    """A name for ``base`` that leads to it from where ``overlay`` lies."""
    name = base.filename
    if os.path.isabs(name) or has_prefix(name) or identity(resolve(name, overlay.filename)) == identity(name):
        return name
    return os.path.abspath(name)


def _overlays(graph: Graph, image: Node) -> list[Node]:
    return [
        node
        for node in graph.nodes()
        if isinstance(node, FormatNode) and node.backing is not None and below_filters(node.backing) is image
    ]


def closed(close: Callable[[], None]) -> None:
    """What had to be durable has been flushed, and told: whether the flush of a close works is no matter."""
    with suppress(OSError, DiskwrightError):
        close()
