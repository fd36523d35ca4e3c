"""What blkdebug does when: events, rules, states, and requests that wait to be resumed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from diskwright.core.options import BOOL, INT, OneOf, option
from diskwright.errors import OptionError

EVENTS: Final = (
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table",
    "l2_load", "l2_update", "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write",
    "read_aio", "read_backing_aio", "read_compressed", "write_aio", "write_compressed", "vmstate_load", "vmstate_save",
    "cow_read", "cow_write", "reftable_load", "reftable_grow", "reftable_update",
    "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc", "refblock_alloc_hookup",
    "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table",
    "refblock_alloc_switch_table", "cluster_alloc", "cluster_alloc_bytes", "cluster_free",
    "flush_to_os", "flush_to_disk", "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail",
    "pwritev_rmw_after_tail", "pwritev", "pwritev_zero", "pwritev_done", "empty_image_prepare",
    "l1_shrink_write_table", "l1_shrink_free_l2_clusters", "cor_write", "cluster_alloc_space", "none",
)  # fmt: skip
"""QAPI's enumeration BlkdebugEvent of QEMU 7.2. ``none`` happens once, when the filter is opened."""

IOTYPES: Final = ("read", "write", "write-zeroes", "discard", "flush", "block-status")

MAX_BREAKPOINTS: Final = 4096
"""Breakpoints that may be set, and requests that may be suspended, at once."""

SECTOR: Final = 512

_EVERY_STATE: Final = 0
_ANYWHERE: Final = -1


class _Word(OneOf):
    """A word out of a list, refused in the words users of such configurations know."""

    def parse(self, name: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise OptionError(f"invalid parameter value: {value}")
        return value


@dataclass(frozen=True, kw_only=True)
class InjectError:
    """From ``event`` on, requests fail that match."""

    event: str | None = option(_Word(*EVENTS), "event that makes the rule active", default=None)
    state: int = option(INT, "state in which it does; 0: any", default=_EVERY_STATE)
    iotype: str | None = option(
        _Word(*IOTYPES), "kind of requests that fail; default: all but block-status", default=None
    )
    errno: int = option(INT, "number of the error; 0: none", default=errno.EIO)
    sector: int = option(INT, "sector of 512 bytes a request must touch to fail; -1: any", default=_ANYWHERE)
    once: bool = option(BOOL, "whether the rule is gone once it has made a request fail", default=False)
    immediately: bool = option(BOOL, "accepted; there is nothing an error would wait for", default=False)

    def __post_init__(self) -> None:
        _check_event(self.event)

    def hits(self, kind: str, offset: int, length: int) -> bool:
        if self.iotype != kind and not (self.iotype is None and kind != "block-status"):
            return False
        return self.sector == _ANYWHERE or offset <= self.sector * SECTOR < offset + length


@dataclass(frozen=True, kw_only=True)
class SetState:
    """``event`` changes the state."""

    event: str | None = option(_Word(*EVENTS), "event that changes the state", default=None)
    state: int = option(INT, "state in which it does; 0: any", default=_EVERY_STATE)
    new_state: int = option(INT, "the state afterwards", default=0)

    def __post_init__(self) -> None:
        _check_event(self.event)


def _check_event(event: str | None) -> None:
    if event is None:
        raise OptionError("Missing event name for rule")


@dataclass(frozen=True)
class _Breakpoint:
    event: str
    tag: str
    state: int


@dataclass(frozen=True)
class _Suspended:
    tag: str
    resumed: threading.Event


class Rules:
    """The rules of one filter, and its state, which is 1 in the beginning. Thread-safe."""

    def __init__(self, errors: Iterable[InjectError], changes: Iterable[SetState]) -> None:
        self._lock = threading.Lock()
        self._errors: dict[str, list[InjectError]] = {}
        self._changes: dict[str, list[SetState]] = {}
        for error in errors:
            self._errors.setdefault(str(error.event), []).append(error)
        for change in changes:
            self._changes.setdefault(str(change.event), []).append(change)
        self._active: list[InjectError] = []
        self._breakpoints: list[_Breakpoint] = []
        self._suspended: list[_Suspended] = []
        self.state = 1
        self.heard: Callable[[str], None] | None = None
        """Called with every event, for who wants to watch."""

    # -- events ----------------------------------------------------------------------------------

    def event(self, name: str) -> None:
        """Does what the rules say for ``name``, and waits while a breakpoint holds the caller.

        The first rule that applies wins, among errors as among states. Errors for an event take the place of those
        that were active; an event that has none leaves them as they are.
        """
        if self.heard is not None:
            self.heard(name)
        with self._lock:
            state = self.state
            errors = [rule for rule in self._errors.get(name, ()) if rule.state in (_EVERY_STATE, state)]
            if errors:
                self._active = errors
            for change in self._changes.get(name, ()):
                if change.state in (_EVERY_STATE, state):
                    self.state = change.new_state
                    break
            held = [each for each in self._breakpoints if each.event == name and each.state == state]
            if held:
                self._breakpoints = [each for each in self._breakpoints if each not in held]
            waiting = [_Suspended(each.tag, threading.Event()) for each in held]
            self._suspended.extend(waiting)
        for each in waiting:
            each.resumed.wait()

    def check(self, kind: str, offset: int = 0, length: int = 0) -> None:
        """Raises the OSError that a request is to fail with, if any."""
        if not self._active:
            return
        with self._lock:
            rule = next((rule for rule in self._active if rule.hits(kind, offset, length)), None)
            if rule is None or not rule.errno:
                return
            if rule.once:
                self._active = [each for each in self._active if each is not rule]
                kept = [each for each in self._errors[str(rule.event)] if each is not rule]
                self._errors[str(rule.event)] = kept
        raise OSError(abs(rule.errno), os.strerror(abs(rule.errno)))

    # -- breakpoints -----------------------------------------------------------------------------

    def breakpoint(self, event: str, tag: str) -> None:
        """The next request that comes to ``event`` in the present state is suspended. Raises OSError with ENOENT
        for an unknown event."""
        if event not in EVENTS:
            raise OSError(errno.ENOENT, f"There is no event '{event}'")
        with self._lock:
            if len(self._breakpoints) + len(self._suspended) >= MAX_BREAKPOINTS:
                raise OSError(errno.ENOSPC, f"There are {MAX_BREAKPOINTS} breakpoints, the most accepted")
            self._breakpoints.append(_Breakpoint(event, tag, self.state))

    def remove_breakpoint(self, tag: str) -> None:
        """Removes the breakpoints of ``tag`` and lets its requests go on. Raises OSError with ENOENT when there are no
        such breakpoints any more; one is gone as soon as a request is suspended by it."""
        with self._lock:
            kept = [each for each in self._breakpoints if each.tag != tag]
            found = len(kept) < len(self._breakpoints)
            self._breakpoints = kept
            self._let_go([each for each in self._suspended if each.tag == tag])
        if not found:
            raise OSError(errno.ENOENT, f"There is no breakpoint '{tag}'")

    def resume(self, tag: str) -> None:
        """Lets the request suspended last under ``tag`` go on. Raises OSError with ENOENT when there is none."""
        with self._lock:
            going = [each for each in self._suspended if each.tag == tag][-1:]
            if not going:
                raise OSError(errno.ENOENT, f"No request is suspended as '{tag}'")
            self._let_go(going)

    def is_suspended(self, tag: str) -> bool:
        with self._lock:
            return any(each.tag == tag for each in self._suspended)

    def resume_all(self) -> None:
        with self._lock:
            self._breakpoints = []
            self._let_go(list(self._suspended))

    def _let_go(self, going: list[_Suspended]) -> None:
        self._suspended = [each for each in self._suspended if each not in going]
        for each in going:
            each.resumed.set()
