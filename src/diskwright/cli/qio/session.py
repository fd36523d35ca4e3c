"""What commands work upon: the disk that is open, its requests under way, and buffers."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from diskwright.cli.qio.language import CommandError, Refused
from diskwright.cli.qio.opening import WRITE_THROUGH, Opening, effective_cache, open_disk
from diskwright.errors import DiskwrightError, FatalError, errno_of, message_of

if TYPE_CHECKING:
    from diskwright.cli.qio.background import Background
    from diskwright.core.disk import Disk
    from diskwright.core.driver import Segment
    from diskwright.core.node import Node
    from diskwright.core.secrets import Secrets

_KEPT: Final = 64 << 20
"""The longest buffer kept for the next request, in bytes."""

_HUGE: Final = 2 << 20

_SECTOR: Final = 512


class Session:
    """One run of the program."""

    def __init__(
        self, secrets: Secrets, *, image_opts: bool = False, groups: Mapping[str, object] | None = None
    ) -> None:
        """``groups``: throttle groups that options of images may name."""
        self.secrets, self.image_opts, self.groups = secrets, image_opts, groups
        self.disk: Disk | None = None
        self.name: str | None = None
        self.how = Opening()
        self.writes_through = False
        """Whether every write is to be durable, an image's metadata included, of which the file below knows nothing."""
        self.finished = False
        self.tags: dict[str, bool] = {}
        """Tags of breakpoints that were set, and whether their request is known to be suspended."""
        self._buffer: mmap.mmap | None = None
        self._background: Background | None = None

    # -- the disk --------------------------------------------------------------------------------

    def open(self, name: str | None, how: Opening) -> None:
        """Raises Refused."""
        if self.disk is not None:
            raise Refused("file open already, try 'help close'")
        self.disk = open_disk(name, how, self.secrets, self.groups)
        self.name, self.how = name, how
        self.writes_through = effective_cache(how) in WRITE_THROUGH

    def close(self) -> None:
        """Closes the disk, when its requests have ended. Raises what its last flush raises."""
        if self.disk is None:
            return
        self.settle()
        disk, self.disk = self.disk, None
        disk.close()

    def settle(self) -> None:
        """Waits for requests under way, those at breakpoints too, and prints how they went."""
        if self._background is not None:
            if self.tags:
                from diskwright.cli.qio.breakpoints import resume_all

                resume_all(self)
            self._background.finish_all()

    @property
    def open_disk(self) -> Disk:
        assert self.disk is not None, "commands that need a disk are not called without one"
        return self.disk

    @property
    def node(self) -> Node:
        return self.open_disk.node

    @property
    def size(self) -> int:
        """As a guest sees it: in whole sectors."""
        size = self.node.size
        return size + -size % _SECTOR

    # -- requests --------------------------------------------------------------------------------

    def check(self, offset: int, length: int) -> None:
        """Raises OSError for a range that is not on the disk."""
        if offset + length > self.size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, segments: Sequence[Segment]) -> None:
        """Fills the buffers. From any thread."""
        with self.open_disk.request():
            self.node.readv(self._on_disk(segments, reading=True))

    def write(self, segments: Sequence[Segment], *, durably: bool = False) -> None:
        """Writes the buffers; ``durably`` returns when they are on the medium. From any thread."""
        with self.open_disk.request():
            node = self.node
            if segments:
                node.writev(self._on_disk(segments, reading=False))
            if durably or self.writes_through:
                node.flush()

    def write_compressed(self, segments: Sequence[Segment]) -> None:
        """Writes whole clusters, compressed. From any thread."""
        with self.open_disk.request():
            self.node.write_compressed(segments)
            if self.writes_through:
                self.node.flush()

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool = False, durably: bool = False) -> None:
        """Makes a range read as zeros. From any thread."""
        with self.open_disk.request():
            if length:
                self.node.write_zeros(offset, length, unmap=unmap, fast=fast)
            if durably or self.writes_through:
                self.node.flush()

    def _on_disk(self, segments: Sequence[Segment], *, reading: bool) -> Sequence[Segment]:
        """What of the buffers is on the disk: a size that is no whole number of sectors ends within its last one, of
        which the rest reads as zeros. A raw file grows when that is written to."""
        size = self.node.size
        if all(offset + len(buffer) <= size for offset, buffer in segments):
            return segments
        if not reading and self.node.driver_name == "raw":
            return segments
        inside = []
        for offset, buffer in segments:
            here = max(0, min(len(buffer), size - offset))
            if reading:
                buffer[here:] = bytes(len(buffer) - here)
            if here:
                inside.append((offset, buffer[:here]))
        return inside

    @property
    def background(self) -> Background:
        if self._background is None:
            from diskwright.cli.qio.background import Background

            self._background = Background()
        return self._background

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return self._background is not None and self._background.busy

    def deliver(self) -> None:
        """Prints how requests went that have ended since."""
        if self._background is not None:
            self._background.deliver()
            if self.tags:
                from diskwright.cli.qio.breakpoints import note_suspensions

                note_suspensions(self)

    def end(self) -> None:
        """Ends all there is. Call it once, last."""
        try:
            self.close()
        finally:
            if self._background is not None:
                self._background.end()

    # -- buffers ---------------------------------------------------------------------------------

    def buffer(self, length: int) -> memoryview:
        """``length`` bytes, with anything in them, until the next call. Aligned to pages, as O_DIRECT wants it."""
        if length > _KEPT:
            return own_buffer(length)
        if self._buffer is None or len(self._buffer) < length:
            self._buffer = _pages(max(length, 1 << 16))
        return memoryview(self._buffer)[:length]


def own_buffer(length: int) -> memoryview:
    """Zeros of its own for a request that others overtake, aligned to pages."""
    return memoryview(_pages(length)) if length else memoryview(bytearray())


def _pages(length: int) -> mmap.mmap:
    # Private memory, which may get huge pages: touching it for the first time is most of a large request's cost.
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if length >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them
    return pages


def cut(buffer: memoryview, offset: int, lengths: Sequence[int]) -> list[Segment]:
    """Adjoining segments of these lengths from ``offset`` on, without empty ones."""
    segments, at = [], 0
    for length in lengths:
        if length:
            segments.append((offset + at, buffer[at : at + length]))
            at += length
    return segments


def attempt(what: str, action: Callable[[], None]) -> None:
    """Does it. Raises CommandError, ``what failed: why``."""
    try:
        action()
    except (DiskwrightError, OSError, MemoryError) as error:
        raise failure(what, error) from error


def failure(what: str, error: BaseException) -> CommandError:
    """``what failed: why``. Raises FatalError on."""
    if isinstance(error, FatalError):
        raise error
    return CommandError(f"{what} failed: {reason(error)}")


def reason(error: BaseException) -> str:
    """Why, in the kernel's words; more about it, where there is more, goes to standard error."""
    if not isinstance(error, OSError):
        explain(error)
    return os.strerror(errno_of(error))


def explain(error: BaseException) -> None:
    """Says on standard error what an error number does not tell."""
    import sys

    from diskwright.cli.faces import program

    print(f"{program()}: {message_of(error)}", file=sys.stderr)
