"""throttle: requests wait as the limits of a throttle group say (see ``core.throttle``)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diskwright.core.draining import Draining
from diskwright.core.driver import Filter, OpenContext, Segments
from diskwright.core.node import Node
from diskwright.core.options import STR, option
from diskwright.core.throttle import ThrottleGroup
from diskwright.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class ThrottleOptions:
    throttle_group: str | None = option(STR, "id of the throttle group whose limits hold", default=None)


class Throttle(Filter):
    """Reads, and everything that changes something; flushes do not wait. Nor does anything while somebody drains."""

    name = "throttle"
    options: ClassVar[type] = ThrottleOptions

    def __init__(self, child: Node, group: ThrottleGroup, draining: Draining) -> None:
        self.child, self.group, self._draining = child, group, draining
        self._member = group.join()
        draining.listen(group.wake)

    @classmethod
    def open(cls, context: OpenContext, options: ThrottleOptions) -> Throttle:
        if options.throttle_group is None:
            raise OptionError("Please specify a throttle group")
        group = context.objects.get(options.throttle_group)
        if not isinstance(group, ThrottleGroup):
            raise OptionError(f"Throttle group '{options.throttle_group}' does not exist")
        return cls(context.file, group, context.draining)

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        if self.group.limits_any(False):
            if nowait:  # a request that is repeated would count twice
                raise BlockingIOError(errno.EAGAIN, "A throttled request may have to wait")
            for _, buffer in segments:
                self._admit(False, len(buffer))
        self.child.readv(segments, nowait=nowait)

    def writev(self, segments: Segments) -> None:
        for _, buffer in segments:
            self._admit(True, len(buffer))
        self.child.writev(segments)

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        for _, buffer in segments:
            self._admit(True, len(buffer))
        self.child.write_compressed(segments, turn=turn)

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._admit(True, length)
        self.child.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        self._admit(True, length)
        self.child.discard(offset, length)

    def transparent(self) -> bool:
        return False

    def close(self) -> None:
        self._draining.forget(self.group.wake)
        self.group.leave(self._member)

    def _admit(self, write: bool, length: int) -> None:
        if self.group.limits_any(write):
            self.group.admit(self._member, write, length, self._drained)

    def _drained(self) -> bool:
        return self._draining.active > 0


DRIVERS = (Throttle,)
