"""The library's front door: what programs that ``import diskwright`` call.

Image names are file names, or mappings of options as ``core.graph.Graph.open`` takes them. Files that an
image names (backing files, ...) are opened through ``gate``; the default admits only those in the
image's own directory. All sizes and offsets are bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from diskwright.core.disk import Disk
from diskwright.core.driver import COMPRESSION, CheckReport, CompactReport, not_supported
from diskwright.core.graph import Graph, Spec, parse_json
from diskwright.core.node import FormatNode, Node, below_filters, format_of
from diskwright.core.options import describe
from diskwright.core.permissions import ALL, READ, WRITE, Access
from diskwright.core.registry import find
from diskwright.core.secrets import Secrets, needed_to_open
from diskwright.errors import JobError, OptionError
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    from diskwright.core.gate import Gate
    from diskwright.core.snapshots import SnapshotInfo, VmState
    from diskwright.engine.package import Package
    from diskwright.exports.nbd import NbdServer
    from diskwright.jobs.job import EventSink

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from a worker thread, some times a second."""

SecretValues = Mapping[str, bytes | str]
"""Passphrases and keys by the ids under which options name them."""

GUEST = Access(READ | WRITE, ALL & ~WRITE)
"""A guest that a job may follow, and nobody else may write beside."""


def open(
    image: Spec | os.PathLike[str],
    *,
    format: str | None = None,
    writable: bool = False,
    gate: Gate | None = None,
    force_share: bool = False,
    cache: str | None = None,
    snapshot: str | None = None,
    secrets: SecretValues | None = None,
    objects: Mapping[str, object] | None = None,
) -> Disk:
    """Opens an image as a ``Disk``; closing the disk closes everything that was opened for it.

    ``secrets`` holds what options name by an id: ``open({"filename": "a.luks", "key-secret": "sec0"},
    secrets={"sec0": b"passphrase"})``. ``objects`` does so for throttle groups (``core.throttle``).

    ``format`` None means probe: for a raw disk that somebody else may write to, state it. ``cache`` is none,
    writeback, writethrough, directsync or unsafe. ``snapshot`` opens the internal snapshot with this id, or else this
    name, read-only. Raises ImageError, OptionError or OSError.
    """
    graph = Graph(gate, Secrets(secrets), objects)
    try:
        spec = _spec(image) if snapshot is None else _with_snapshot(_spec(image), snapshot)
        node = graph.open(spec, driver=format, writable=writable, force_share=force_share, cache=cache)
        disk = graph.disk(node, GUEST if writable else None, owns_graph=True)
        graph.release(node)
        return disk
    except BaseException:
        graph.close()
        raise


def create(
    filename: str | os.PathLike[str],
    format: str = "raw",
    size: int | str | None = None,
    *,
    gate: Gate | None = None,
    secrets: SecretValues | None = None,
    **options: object,
) -> None:
    """Makes a new image; an existing file is overwritten, unless another process is using it (ImageLocked).

    ``options`` are the format's, with underscores: ``cluster_size=65536``, ``backing_file="base.qcow2"``. Without
    ``size`` it is that of the backing file.
    """
    from diskwright.core.create import create_image

    if size is not None:
        options["size"] = size
    create_image(os.fspath(filename), format, options, gate=gate, secrets=Secrets(secrets))


def format_by_name(filename: str, otherwise: str) -> str:
    """The format whose usual ending a new image's name has, else ``otherwise``. Of an image that exists its name proves
    nothing: that is probed."""
    from diskwright.core.registry import builtin_formats

    fitting = [driver.name for driver in builtin_formats() if filename.lower().endswith(driver.suffixes or ("\0",))]
    return fitting[0] if fitting else otherwise


def open_target(
    graph: Graph,
    filename: str,
    size: int,
    *,
    format: str,
    options: Mapping[str, object] | None = None,
    existing: bool = False,
    cache: str | None = None,
    opening: Mapping[str, object] | None = None,
) -> Node:
    """The node a copy of ``size`` bytes is to be written to, held for the caller: a new image, or with ``existing`` one
    that is there already. ``options`` are for creating it, ``opening`` for opening it."""
    if not existing:
        from diskwright.core.create import create_image, refuse_to_overwrite

        refuse_to_overwrite(graph, filename)
        create_image(
            filename, format, {"size": size, **(options or {})}, gate=graph.gate, secrets=graph.secrets, sparing=graph
        )
    spec = {"driver": format, "filename": filename, **needed_to_open(options or {}), **(opening or {})}
    return graph.open(spec, driver=format, writable=True, cache=cache)


class Mirror:
    """A mirror of a disk that is in use. Also a context manager: leaving it abandons a mirror that has not ended.

    The job itself, with QMP's verbs and states, is ``job``.
    """

    def __init__(
        self,
        disk: Disk,
        target: Node,
        *,
        target_is_new: bool = True,
        id: str = "mirror",
        on_event: EventSink | None = None,
        **options: Any,
    ) -> None:
        """``options`` are those of ``jobs.mirror.Mirror``. ``target`` is released when this is closed."""
        from diskwright.jobs import mirror

        self._disk, self._graph, self.source, self.target = disk, disk.graph, disk.node, target
        self._changed = threading.Condition()
        self._on_event = on_event
        self.job = mirror.Mirror(
            id,
            disk.graph,
            below_filters(disk.node),
            target,
            target_is_zero=target_is_new,
            on_event=self._event,
            auto_dismiss=False,
            **options,
        )

    def _event(self, name: str, data: dict[str, object]) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._on_event is not None:
            self._on_event(name, data)

    def start(self) -> Self:
        self.job.start()
        return self

    @property
    def ready(self) -> bool:
        """Whether the target is in sync, so that ``finish`` takes a moment only."""
        return self.job.ready

    @property
    def ended(self) -> bool:
        return self.job.has_ended

    def progress(self) -> tuple[int, int]:
        """``(done, all)`` in bytes; equal when nothing is dirty."""
        return self.job.progress()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Waits until the target is in sync; False when ``timeout`` seconds were not enough. Raises JobError."""
        with self._changed:
            done = self._changed.wait_for(lambda: self.ready or self.ended, timeout)
        if self.ended:
            self.job.result(0)
        return done

    def finish(self, *, pivot: bool = False, wait: bool = True) -> None:
        """Ends a mirror that is ready: the target is then the source as it was at one moment. With ``pivot`` the
        disk's users go on upon the target. Without ``wait`` it only asks for that. Raises JobError when the mirror is
        not ready, or fails."""
        if not self.ready:
            self.job.result(0) if self.ended else None
            raise JobError("The mirror is not ready yet: wait for it, or abandon it")
        if pivot:
            self.job.complete()
        else:
            self.job.cancel(force=False)
        if wait:
            self.result()

    def abandon(self) -> None:
        """Stops at once. The target is not a copy of anything then."""
        if not self.job.has_ended:
            self.job.cancel(force=True)
            self.job.wait()

    def result(self, timeout: float | None = None) -> None:
        """Waits for the end. Raises JobError when the mirror failed or was abandoned."""
        self.job.result(timeout)

    def verify(self) -> int | None:
        """Reads source and target again, both whole, and compares: None when equal, else the offset of the first
        difference. Says something only while nobody writes to either."""
        from diskwright.engine.compare import first_difference

        return first_difference(self.source, self.target, self._graph.leases)

    def close(self) -> None:
        """Abandons a mirror that has not ended, and lets go of the target."""
        if self.job.has_ended or self.job.state.value != "created":
            self.abandon()
        try:
            self._graph.release(self.target)
        except OSError:
            # A target that has failed may fail once more when it is closed; that is not news.
            if self.job.error is None:
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mirror(
    disk: Disk,
    target: str | os.PathLike[str] | Node,
    *,
    format: str | None = None,
    options: Mapping[str, object] | None = None,
    existing: bool = False,
    on_event: EventSink | None = None,
    **job: Any,
) -> Mirror:
    """Starts to mirror a disk in use. ``target`` is a new image's name (``format`` defaults to what its ending says,
    else to the disk's own), an existing image's with ``existing``, or an open node of the disk's graph.

    ``job``: sync, granularity, buf_size, speed, copy_mode, on_source_error, on_target_error, unmap; see
    ``jobs.mirror.Mirror``. Raises ImageError, OptionError or OSError.
    """
    if isinstance(target, Node):
        node = target
        disk.graph.hold(node)
    else:
        node = open_target(
            disk.graph,
            os.fspath(target),
            disk.size,
            format=format or format_by_name(os.fspath(target), below_filters(disk.node).driver_name),
            options=options,
            existing=existing,
        )
    try:
        is_new = not existing and not isinstance(target, Node)
        handle = Mirror(disk, node, target_is_new=is_new, on_event=on_event, **job)
    except BaseException:
        disk.graph.release(node)
        raise
    return handle.start()


def convert(
    source: Spec | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    format: str | None = None,
    options: Mapping[str, object] | None = None,
    sparse: int = 4096,
    compress: bool | int = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    secrets: SecretValues | None = None,
) -> None:
    """Copies an image into a new one of ``format`` (default: by its ending, else raw), durable when this returns.

    ``format`` ova or ovf makes a package of a machine with that disk.

    ``compress``: write compressed clusters, at a level when it is a number: 1 (the quickest) to 9, with zstd to 19; see
    ``docs/cli.md``. OSError with ENOTSUP where the format has none.

    ``progress`` is called with (done, all) some times a second. A target that could not be completed is left as it
    is. Raises ImageError or OSError.
    """
    from diskwright.engine.compress import CompressedConversion
    from diskwright.engine.convert import Conversion, CopyFailed

    graph = Graph(gate, Secrets(secrets))
    try:
        node = graph.open(_spec(source), driver=source_format)
        name = os.fspath(target)
        driver = format or format_by_name(name, "raw")
        package = _package(graph, name, driver, options, node.size, compress)
        if package is not None:
            new = package.disk
        elif compress is not False and not getattr(find(driver), "compresses", False):
            raise not_supported(COMPRESSION)
        else:
            opening = {} if isinstance(compress, bool) else {"compression-level": compress}
            new = open_target(graph, name, node.size, format=driver, options=options, opening=opening)
        kind = Conversion if compress is False and not new.packs else CompressedConversion
        work = kind(new, graph.leases, node.size, target_is_zero=new.zero_init, sparse=sparse)
        with _reporting(work.progress, progress):
            work.copy(node, 0)
            if package is not None:
                package.finish()
            else:
                new.flush()
    except CopyFailed as error:
        raise error.__cause__ or error from None
    finally:
        graph.close()


def _package(
    graph: Graph, name: str, kind: str, options: Mapping[str, object] | None, size: int, compress: bool | int
) -> Package | None:
    """The package that is wanted, in the making; None when it is an image."""
    if kind not in ("ova", "ovf"):
        return None
    from diskwright.engine.package import Package

    level = None if isinstance(compress, bool) else compress
    return Package(graph, name, kind, options or {}, align_up(size, SECTOR), level)


def compare(
    left: Spec | os.PathLike[str],
    right: Spec | os.PathLike[str],
    *,
    left_format: str | None = None,
    right_format: str | None = None,
    gate: Gate | None = None,
    secrets: SecretValues | None = None,
) -> int | None:
    """The offset of the first byte in which two images differ, or None. What one has beyond the other's end counts as
    compared with zeros."""
    from diskwright.engine.compare import beyond_is_zero, first_difference

    graph = Graph(gate, Secrets(secrets))
    try:
        a, b = graph.open(_spec(left), driver=left_format), graph.open(_spec(right), driver=right_format)
        found = first_difference(a, b, graph.leases)
        if found is None and a.size != b.size:
            longer = a if a.size > b.size else b
            found = beyond_is_zero(longer, graph.leases, min(a.size, b.size))
        return found
    finally:
        graph.close()


def check(
    image: Spec | os.PathLike[str], *, format: str | None = None, repair: str = "none", gate: Gate | None = None
) -> CheckReport:
    """Looks for damage in an image's metadata; ``repair`` is none, leaks or all. Raises OSError with ENOTSUP for a
    format that has nothing to check."""
    graph = Graph(gate)
    try:
        node = graph.open(_spec(image), driver=format, writable=repair != "none", backing=False, guest_data=False)
        return format_of(node).check(repair)
    finally:
        graph.close()


def snapshots(image: Disk | Spec | os.PathLike[str]) -> list[SnapshotInfo]:
    """The internal snapshots of an image, or of a disk that is open. None where there cannot be any."""
    from diskwright.core.snapshots import list_of

    with _root(image, writable=False) as node:
        return list_of(node)


def create_snapshot(
    image: Disk | Spec | os.PathLike[str], name: str, *, vm_state: VmState | None = None
) -> SnapshotInfo:
    """Keeps the present state of an image, or of an open disk, whose requests wait meanwhile. It is durable, and either
    whole or not there. Raises ImageError, LimitExceeded, or OSError (ENOTSUP for a format without snapshots)."""
    from diskwright.core.snapshots import create

    with _root(image, writable=True) as node:
        return create(node, name, vm_state=vm_state)


def apply_snapshot(image: Disk | Spec | os.PathLike[str], snapshot: str) -> None:
    """The image becomes what it was, in size too; ``snapshot`` is an id, or else a name. What it is now is lost, unless
    a snapshot has it. Raises SnapshotNotFound."""
    from diskwright.core.snapshots import apply, find_any, list_of

    with _root(image, writable=True) as node:
        apply(node, find_any(list_of(node), snapshot).id)


def delete_snapshot(image: Disk | Spec | os.PathLike[str], snapshot: str) -> None:
    """Deletes the snapshot with this id, or else the first with this name. Raises SnapshotNotFound."""
    from diskwright.core.snapshots import delete, find_any, list_of

    with _root(image, writable=True) as node:
        delete(node, find_any(list_of(node), snapshot).id)


@contextmanager
def _root(image: Disk | Spec | os.PathLike[str], *, writable: bool) -> Iterator[Node]:
    """The node of a disk, with no request in flight, or of an image that is opened for this."""
    if isinstance(image, Disk):
        with image.graph.drained():
            yield image.node
        return
    graph = Graph()
    try:
        yield graph.open(_spec(image), writable=writable, backing=False)
    finally:
        graph.close()


def rebase(
    image: Spec | os.PathLike[str],
    backing: str | os.PathLike[str] | None,
    backing_format: str | None = None,
    *,
    format: str | None = None,
    unsafe: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> None:
    """Gives an image another backing file, or none (then it holds everything itself). ``backing`` is named as the image
    shall name it: relative to the image's directory; its format has to be said.

    The image takes over whatever the new one reads otherwise, and reads as before; with ``unsafe`` only the name is
    changed. A crash leaves the image as it was, or as it is to be. Raises ImageError, OptionError or OSError.
    """
    from diskwright.core.gate import resolve
    from diskwright.engine.rebase import Rebase, RebaseFailed

    name = None if backing is None else os.fspath(backing)
    if name is not None and backing_format is None:
        raise OptionError("The format of a backing file has to be given")
    graph = Graph(gate)
    try:
        node = below_filters(graph.open(_spec(image), driver=format, writable=True, backing=not unsafe))
        if not format_of(node).has_backing:
            raise OptionError(f"Images of format '{node.driver_name}' have no backing files")
        if not unsafe:
            new = None if name is None else graph.open(resolve(name, node.filename), driver=backing_format)
            old = node.backing
            if old is not None:
                graph.hold(old)
            graph.set_backing(node, new)
            work = Rebase(node, old, new, graph.leases)
            with _reporting(work.progress, progress):
                work.run()
        format_of(node).change_backing(name, backing_format)
    except RebaseFailed as error:
        raise error.__cause__ or error from None
    finally:
        graph.close()


def commit(
    image: Disk | Spec | os.PathLike[str],
    base: str | None = None,
    *,
    format: str | None = None,
    keep: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> None:
    """Puts what an image has into its backing file, and empties it then unless ``keep``. With ``base``, an image
    further down the chain, it goes into that one, with what lies between, and nothing is emptied.

    The base is durable before anything is given up. Other overlays of the base, or of images between, read something
    else afterwards. Raises OptionError when there is no such base, ImageError or OSError.

    A disk that is open may be in use: what is written to it meanwhile is committed as well, and it goes on upon the
    base afterwards, by default the lowest of the chain; its former images are neither emptied nor used any more.
    ``live_commit`` does that as a job. Raises JobError, GraphError, ImageError or OSError.
    """
    if isinstance(image, Disk):
        return _commit_disk(image, base, progress)
    from diskwright.core.chain import chain, depth_of
    from diskwright.engine.commit import Commit
    from diskwright.engine.convert import CopyFailed

    depth: int | None = 1
    graph = Graph(gate)
    try:
        if base is not None:
            node = graph.open(_spec(image), driver=format)
            depth = depth_of(node, base)
            graph.release(node)
            if depth is None:
                raise OptionError(f"'{base}' is not in the backing chain")
        top = graph.open(_spec(image), driver=format, writable=True, writable_backing=depth or 1)
        images = list(chain(top))
        if len(images) == 1:
            raise OptionError("The image has no backing file")
        work = Commit(top, images[depth or 1], graph.leases)
        with _reporting(work.progress, progress):
            work.run()
        if base is None and not keep:
            format_of(top).make_empty()
    except CopyFailed as error:
        raise error.__cause__ or error from None
    finally:
        graph.close()


def _commit_disk(disk: Disk, base: str | None, progress: Progress | None) -> None:
    from diskwright.jobs.commit import commit_job

    seen = threading.Event()
    job = commit_job(
        "commit", disk.graph, below_filters(disk.node), base=base, auto_dismiss=False,
        on_event=lambda name, data: seen.set() if name in ("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") else None,
    )  # fmt: skip
    job.start()
    with _reporting(job.progress, progress):
        seen.wait()
        if job.ready:
            job.complete()
        job.result()


def compact(
    image: Spec | os.PathLike[str],
    *,
    format: str | None = None,
    detect_zeros: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> CompactReport:
    """Makes a qcow2 image's file as short as what it holds, in place and without further space. With ``detect_zeros``
    clusters full of zeros are given up too. ``progress`` is called between batches, in bytes moved.

    It can end at any moment without loss; another call goes on from there. Raises ImageLocked when anybody else has
    the image open, ImageError for a damaged one, OSError with ENOTSUP for other formats.
    """
    graph = Graph(gate)
    try:
        looked_at = graph.open(_spec(image), driver=format, backing=False)
        known = {option.name for option in describe(type(format_of(looked_at)).options)}
        graph.release(looked_at)
        spec = _spec(image)
        if isinstance(spec, str):
            spec = parse_json(spec[5:]) if spec.startswith("json:") else {"filename": spec}
        # So that neither the map nor a dirty image's repair is begun before the file is ours alone.
        more: dict[str, object] = {"repair": True} if "repair" in known else {}
        node = graph.open({**spec, **more}, driver=format, writable=True, backing=False)
        graph.hold_exclusively(node)
        return format_of(node).compact(
            detect_zeros=detect_zeros, progress=progress if progress is not None else lambda done, total: None
        )
    finally:
        graph.close()


def info(image: Spec | os.PathLike[str], *, format: str | None = None, force_share: bool = False) -> dict[str, object]:
    """What an image is: the facts of ``qemu-img info --output=json``, under the same names. Backing files are named,
    not opened."""
    from diskwright.core.gate import ClosedGate

    graph = Graph(ClosedGate())
    try:
        node = graph.open(_spec(image), driver=format, force_share=force_share, backing=False, guest_data=False)
        facts: dict[str, object] = {
            "filename": node.filename,
            "format": node.driver_name,
            "virtual-size": node.size,
        }
        if isinstance(node, FormatNode):
            details = node.format.info()
            facts["cluster-size"], facts["dirty-flag"] = details.cluster_size, details.dirty
            if node.format.backing is not None:
                facts["backing-filename"] = node.format.backing.filename
                facts["backing-filename-format"] = node.format.backing.format
            if details.encrypted:
                facts["encrypted"] = True
            if details.specific is not None:
                facts["format-specific"] = {"type": node.driver_name, "data": dict(details.specific)}
        return {name: value for name, value in facts.items() if value is not None}
    finally:
        graph.close()


def serve(disk: Disk, path: str | os.PathLike[str], *, name: str = "", read_only: bool = False) -> NbdServer:
    """Serves a disk over NBD on the unix socket ``path``, until the server's ``close``."""
    from diskwright.exports.nbd import NbdExport, NbdServer

    server = NbdServer()
    server.add_export(NbdExport(name, disk, read_only=read_only))
    server.listen_unix(os.fspath(path))
    server.start()
    return server


def _with_snapshot(spec: Spec, snapshot: str) -> Spec:
    """``spec`` with the option that shows a snapshot."""
    from diskwright.core.graph import parse_json

    if isinstance(spec, str):
        spec = parse_json(spec[5:]) if spec.startswith("json:") else {"filename": spec}
    return {**spec, "snapshot": snapshot}


def _spec(image: Spec | os.PathLike[str]) -> Spec:
    return image if isinstance(image, (str, Mapping)) else os.fspath(image)


@contextmanager
def _reporting(measure: Callable[[], tuple[int, int]], progress: Progress | None) -> Iterator[None]:
    """Calls ``progress`` from a thread of its own, and once more at the end."""
    if progress is None:
        yield
        return
    over = threading.Event()

    def report() -> None:
        while not over.wait(0.25):
            progress(*measure())

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        progress(*measure())
