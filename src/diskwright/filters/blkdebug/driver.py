"""blkdebug: the filter. Requests meet the rules, and are cut and padded to the limits of an imaginary device."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Final

from diskwright.core.driver import Filter, OpenContext, Role, Segments, not_supported
from diskwright.core.node import Node
from diskwright.core.options import SIZE, STR, ListOf, OneOf, Struct, option
from diskwright.core.permissions import READ, RESIZE, WRITE, WRITE_UNCHANGED, Access
from diskwright.core.ranges import Ranges
from diskwright.errors import OptionError
from diskwright.filters.blkdebug.config import read_config
from diskwright.filters.blkdebug.rules import InjectError, Rules, SetState
from diskwright.units import MiB, align_down, align_up, is_power_of_two

_PERMISSIONS: Final = {
    "consistent-read": READ, "write": WRITE, "write-unchanged": WRITE_UNCHANGED, "resize": RESIZE,
}  # fmt: skip
_PERMISSION_LIST: Final = ListOf(OneOf(*_PERMISSIONS))

_MOST: Final = (1 << 31) - 1
"""Limits are below this, as QEMU's are."""

MAX_ALIGN: Final = 64 * MiB
"""The largest alignment: a request of one byte takes a buffer of that many."""


@dataclass(frozen=True, kw_only=True)
class BlkdebugOptions:
    config: str | None = option(STR, "file of rules", default=None)
    inject_error: tuple[InjectError, ...] = option(ListOf(Struct(InjectError)), "errors to inject", default=())
    set_state: tuple[SetState, ...] = option(ListOf(Struct(SetState)), "events that change the state", default=())
    align: int = option(SIZE, "alignment of requests, in bytes; 0: none", default=0)
    max_transfer: int = option(SIZE, "longest read or write, in bytes; 0: any", default=0)
    opt_write_zero: int = option(SIZE, "alignment of zeroing, in bytes; what is shorter is written", default=0)
    max_write_zero: int = option(SIZE, "longest zeroing, in bytes; 0: any", default=0)
    opt_discard: int = option(SIZE, "alignment of discards, in bytes; what is shorter is left out", default=0)
    max_discard: int = option(SIZE, "longest discard, in bytes; 0: any", default=0)
    take_child_perms: tuple[str, ...] = option(_PERMISSION_LIST, "permissions to need on the child as well", default=())
    unshare_child_perms: tuple[str, ...] = option(_PERMISSION_LIST, "permissions to leave to nobody else", default=())

    def __post_init__(self) -> None:
        if self.align and (not is_power_of_two(self.align) or self.align > MAX_ALIGN):
            raise OptionError(f"Cannot meet constraints with align {self.align}")
        unit = self.align or 1
        for name in ("max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"):
            value = getattr(self, name.replace("-", "_"))
            if value > _MOST or value % unit:
                raise OptionError(f"Cannot meet constraints with {name} {value}")
        for name, most, best in (
            ("max-write-zero", self.max_write_zero, self.opt_write_zero),
            ("max-discard", self.max_discard, self.opt_discard),
        ):
            if most and best and most % best:
                raise OptionError(f"Cannot meet constraints with {name} {most}")


class Blkdebug(Filter):
    """See ``BlkdebugOptions`` and ``rules``."""

    name = "blkdebug"
    options: ClassVar[type] = BlkdebugOptions
    prefixes: ClassVar[tuple[str, ...]] = ("blkdebug",)
    roles = (Role("image"),)

    def __init__(self, child: Node, options: BlkdebugOptions) -> None:
        """Raises OptionError or OSError for a configuration that cannot be read."""
        self.child = child
        errors, changes = read_config(options.config) if options.config else ([], [])
        self.rules = Rules([*errors, *options.inject_error], [*changes, *options.set_state])
        self._options = options
        self._align = options.align or 1
        self._ranges = Ranges()
        self.event = self.rules.event
        # What suspends requests is the one thing here that users reach from outside.
        self.breakpoint, self.remove_breakpoint = self.rules.breakpoint, self.rules.remove_breakpoint
        self.resume, self.is_suspended = self.rules.resume, self.rules.is_suspended
        self.rules.event("none")

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        """``blkdebug:CONFIG:IMAGE``; without the prefix it is the image's."""
        if not filename.startswith("blkdebug:"):
            return super().parse_filename(filename)
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise OptionError("blkdebug requires both config file and image path")
        return {"image": {"filename": image}, **({"config": config} if config else {})}

    @classmethod
    def open(cls, context: OpenContext, options: BlkdebugOptions) -> Blkdebug:
        return cls(context.file, options)

    def access(self, above: Access) -> Access:
        needs, shares = above.needs, above.shares
        for name in self._options.take_child_perms:
            needs |= _PERMISSIONS[name]
        for name in self._options.unshare_child_perms:
            shares &= ~_PERMISSIONS[name]
        return Access(needs, shares)

    @property
    def alignment(self) -> int:
        return max(self._align, self.child.alignment)

    # -- requests --------------------------------------------------------------------------------

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        if nowait:  # a request that is repeated would count twice
            raise BlockingIOError(errno.EAGAIN, "Events may keep a request waiting")
        for offset, buffer in segments:
            start, end = self._padded(offset, len(buffer))
            whole = buffer if end - start == len(buffer) else memoryview(bytearray(end - start))
            self._read(start, whole)
            if whole is not buffer:
                buffer[:] = whole[offset - start : offset - start + len(buffer)]

    def _read(self, offset: int, buffer: memoryview) -> None:
        for at, step in self._steps(offset, len(buffer), self._options.max_transfer):
            self.rules.check("read", at, step)
            self.child.readv([(at, buffer[at - offset : at - offset + step])])

    def writev(self, segments: Segments) -> None:
        for offset, buffer in segments:
            with ExitStack() as stack:
                start, end = self._padded(offset, len(buffer))
                if self._align > 1:  # what is read for padding must still be there when it is written back
                    stack.enter_context(self._ranges.alone(start, end))
                self._write(start, self._with_padding(start, end, offset, buffer))

    def _write(self, offset: int, buffer: memoryview) -> None:
        self.rules.event("pwritev")
        for at, step in self._steps(offset, len(buffer), self._options.max_transfer):
            self.rules.check("write", at, step)
            self.child.writev([(at, buffer[at - offset : at - offset + step])])
        self.rules.event("pwritev_done")

    def _padded(self, offset: int, length: int) -> tuple[int, int]:
        """The range in whole units, though not longer than the disk: its end need not be aligned."""
        if self._align == 1:
            return offset, offset + length
        end = offset + length
        return align_down(offset, self._align), max(end, min(align_up(end, self._align), self.child.size))

    def _with_padding(self, start: int, end: int, offset: int, buffer: memoryview) -> memoryview:
        stop = offset + len(buffer)
        if start == offset and stop == end:
            return buffer
        whole = memoryview(bytearray(end - start))
        if start < offset:
            self.rules.event("pwritev_rmw_head")
            self._read(start, whole[: min(self._align, end - start)])
            self.rules.event("pwritev_rmw_after_head")
        if stop < end:
            tail = align_down(stop, self._align)
            if start == offset or tail > start:
                self.rules.event("pwritev_rmw_tail")
                self._read(tail, whole[tail - start :])
                self.rules.event("pwritev_rmw_after_tail")
        whole[offset - start : stop - start] = buffer
        return whole

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        options = self._options
        unit = max(options.opt_write_zero, self._align)
        self.rules.event("pwritev_zero")
        for at, step, whole in _cut(offset, length, unit):
            if not whole:
                if fast:
                    raise not_supported("Fast zeroing of less than opt-write-zero")
                self._write_zeros_out(at, step)
                continue
            for start, piece in self._steps(at, step, options.max_write_zero):
                self.rules.check("write-zeroes", start, piece)
                self.child.write_zeros(start, piece, unmap=unmap, fast=fast)
        self.rules.event("pwritev_done")

    def _write_zeros_out(self, offset: int, length: int) -> None:
        zeros = memoryview(bytes(min(length, MiB)))
        for at, step in self._steps(offset, length, len(zeros)):
            self.writev([(at, zeros[:step])])

    def discard(self, offset: int, length: int) -> None:
        unit = max(self._options.opt_discard, self._align)
        for at, step, whole in _cut(offset, length, unit):
            if whole:
                for start, piece in self._steps(at, step, self._options.max_discard):
                    self.rules.check("discard", start, piece)
                    self.child.discard(start, piece)

    def flush(self) -> None:
        if self.child.event is not None:
            self.child.event("flush_to_os")
        self.rules.check("flush")
        if self.child.event is not None:
            self.child.event("flush_to_disk")
        self.child.flush()

    def look_up(self, offset: int, length: int) -> None:
        self.rules.check("block-status", offset, length)

    def transparent(self) -> bool:
        return False

    def close(self) -> None:
        self.rules.resume_all()

    @staticmethod
    def _steps(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
        most = most or length
        for at in range(offset, offset + length, most):
            yield at, min(most, offset + length - at)


def _cut(offset: int, length: int, unit: int) -> list[tuple[int, int, bool]]:
    """``(offset, length, whether these are whole units)`` of the parts of a range."""
    end = offset + length
    first, last = align_up(offset, unit), align_down(end, unit)
    if first >= last:
        return [(offset, length, False)]
    parts: list[tuple[int, int, bool]] = [
        (offset, first - offset, False),
        (first, last - first, True),
        (last, end - last, False),
    ]
    return [part for part in parts if part[1]]
