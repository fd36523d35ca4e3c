"""Breakpoints: a fault-injecting node of the graph suspends a request where its driver announces an event."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, cast, runtime_checkable

from diskwright.cli.qio.language import CommandError
from diskwright.core.node import FilterNode, Node
from diskwright.errors import DiskwrightError, errno_of

if TYPE_CHECKING:
    from diskwright.cli.qio.session import Session

_POLL: Final = 0.002
"""Seconds between two looks whether a request is suspended: nobody tells."""


@runtime_checkable
class Breakpoints(Protocol):
    """What a filter that can suspend requests offers. Unknown events and tags raise an OSError with ENOENT."""

    def breakpoint(self, event: str, tag: str) -> None: ...

    def remove_breakpoint(self, tag: str) -> None: ...

    def resume(self, tag: str) -> None: ...

    def is_suspended(self, tag: str) -> bool: ...


def find(node: Node) -> Breakpoints | None:
    """The first node from ``node`` down that has breakpoints, backing nodes not among them."""
    while True:
        if isinstance(node, FilterNode) and isinstance(node.filter, Breakpoints):
            return cast(Breakpoints, node.filter)
        file = node.file
        if file is None:
            return None
        node = file


def set_breakpoint(session: Session, words: list[str]) -> None:
    event, tag = words
    _ask(session, "Could not set breakpoint", lambda at: at.breakpoint(event, tag))
    session.tags[tag] = False


def remove_breakpoint(session: Session, words: list[str]) -> None:
    (tag,) = words
    note_suspensions(session)
    if session.tags.pop(tag, False):
        print(f"blkdebug: Resuming request '{tag}'")  # the breakpoint itself is gone since then, and that is told too
    _ask(session, f"Could not remove breakpoint {tag}", lambda at: at.remove_breakpoint(tag))


def resume(session: Session, words: list[str]) -> None:
    (tag,) = words
    note_suspensions(session)
    _ask(session, "Could not resume request", lambda at: at.resume(tag))
    if session.tags.pop(tag, False):
        print(f"blkdebug: Resuming request '{tag}'")


def wait_break(session: Session, words: list[str]) -> None:
    """Waits until the request of a tag is suspended. (Where nothing can suspend one, that would be for ever.)"""
    (tag,) = words
    found = find(session.node)
    if found is None:
        raise CommandError(f"Could not wait for request: {os.strerror(errno.ENOTSUP)}")
    while not found.is_suspended(tag):
        session.deliver()
        time.sleep(_POLL)
    note_suspensions(session)


def note_suspensions(session: Session) -> None:
    """Says of breakpoints that they have been reached."""
    found = find(session.node) if session.disk is not None else None
    if found is None:
        return
    for tag, known in session.tags.items():
        if not known and found.is_suspended(tag):
            session.tags[tag] = True
            print(f"blkdebug: Suspended request '{tag}'")


def resume_all(session: Session) -> None:
    """Lets every suspended request go on: what waits for all requests would wait for ever."""
    found = find(session.node)
    if found is not None:
        for tag in session.tags:
            if found.is_suspended(tag):
                found.resume(tag)
    session.tags.clear()


def _ask(session: Session, refusal: str, question: Callable[[Breakpoints], None]) -> None:
    found = find(session.node)
    number = errno.ENOTSUP
    if found is not None:
        try:
            return question(found)
        except LookupError:
            number = errno.ENOENT
        except (DiskwrightError, OSError) as error:
            number = errno_of(error)
    raise CommandError(f"{refusal}: {os.strerror(number)}")
