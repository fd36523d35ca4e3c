"""quorum: one disk kept on several children. Writes go to all of them; what most of them say is what a read gives.

A read that its children answer differently is put to a vote: the contents that most of them have win, if those are at
least ``vote-threshold``; else the read fails. Children that were outvoted, or failed, are reported, and with
``rewrite-corrupted`` set right. With ``read-pattern=fifo`` only one child is read, the first that does not fail. A
write succeeds when it did on at least ``vote-threshold`` children.

A vote is taken with no write in flight in its range: children differ while one is under way, and there is nothing
wrong with them then.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from diskwright.core.driver import Filter, OpenContext, Role, Segments, not_supported
from diskwright.core.graph import nest
from diskwright.core.lookup import lookup
from diskwright.core.node import Node
from diskwright.core.options import BOOL, INT, STR, option
from diskwright.core.permissions import READ, WRITE, WRITE_UNCHANGED, Access
from diskwright.core.ranges import Ranges
from diskwright.errors import DiskwrightError, FatalError, GraphError, LimitExceeded, OptionError, errno_of
from diskwright.extents import DATA, ZERO, Extent, Extents
from diskwright.units import SECTOR, align_up

MAX_CHILDREN: Final = 32
"""Each is read, compared and written to for every request."""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class QuorumOptions:
    vote_threshold: int = option(INT, "how many children have to agree", default=0)
    blkverify: bool = option(BOOL, "two children that differ are the end of everything", default=False)
    rewrite_corrupted: bool = option(BOOL, "children that were outvoted are written to", default=False)
    read_pattern: str = option(STR, "quorum: read all children; fifo: the first that can be read", default="quorum")


class Quorum(Filter):
    """``report``, when it is set, is told of what QMP knows as events: ``QUORUM_REPORT_BAD`` and ``QUORUM_FAILURE``,
    with their data but for the reference, which is the node's name."""

    name = "quorum"
    options: ClassVar[type] = QuorumOptions
    opaque: ClassVar[bool] = True

    def __init__(
        self,
        children: Sequence[Node],
        threshold: int,
        *,
        blkverify: bool = False,
        rewrite_corrupted: bool = False,
        fifo: bool = False,
        writable: bool = True,
    ) -> None:
        """Raises OptionError for options that do not go together, GraphError for children of different sizes."""
        if not children:
            raise OptionError("Number of provided children must be 1 or more")
        if threshold < 1:
            raise OptionError("Parameter 'vote-threshold' expects a value >= 1")
        if threshold > len(children):
            raise OptionError("threshold may not exceed children count")
        if blkverify and (len(children) != 2 or threshold != 2):
            raise OptionError("blkverify=on can only be set if there are exactly two files and vote-threshold is 2")
        if blkverify and rewrite_corrupted:
            raise OptionError("rewrite-corrupted=on cannot be used with blkverify=on")
        if len({child.size for child in children}) > 1:
            raise GraphError("The children of a quorum must be of one size")
        self.child = children[0]
        self.roles = tuple(Role(f"children.{i}", image=True) for i in range(len(children)))
        self.further = {f"children.{i}": child for i, child in enumerate(children) if i}
        ours = Access(READ | (WRITE if writable else 0), READ | WRITE_UNCHANGED)
        self.needs = {role.name: ours for role in self.roles}
        self.threshold, self.blkverify, self.rewrite, self.fifo = threshold, blkverify, rewrite_corrupted, fifo
        self.report: Callable[[str, dict[str, object]], None] | None = None
        self._ranges = Ranges()

    @classmethod
    def child_roles(cls, options: dict[str, object]) -> tuple[Role, ...]:
        """Its children are a list, ``children``: each is the name of a node, or options."""
        given = options.pop("children", ())
        if isinstance(given, Mapping):
            given = nest(given)
            ordered = [given[str(i)] for i in range(len(given)) if str(i) in given]
            if len(ordered) != len(given):
                raise OptionError("Children of a quorum are numbered from 0 on")
        elif isinstance(given, list | tuple):
            ordered = list(given)
        else:
            raise OptionError(f"Option 'children' needs a list, not {given!r}")
        if not ordered:
            raise OptionError("Number of provided children must be 1 or more")
        if len(ordered) > MAX_CHILDREN:
            raise LimitExceeded(f"{len(ordered)} children are more than the {MAX_CHILDREN} a quorum can have")
        options.update((f"children.{i}", child) for i, child in enumerate(ordered))
        return tuple(Role(f"children.{i}", image=True) for i in range(len(ordered)))

    @classmethod
    def open(cls, context: OpenContext, options: QuorumOptions) -> Quorum:
        if options.read_pattern not in ("quorum", "fifo"):
            raise OptionError("Please set read-pattern as fifo or quorum")
        return cls(
            list(context.children.values()), options.vote_threshold, blkverify=options.blkverify,
            rewrite_corrupted=options.rewrite_corrupted and options.read_pattern == "quorum",
            fifo=options.read_pattern == "fifo", writable=context.writable,
        )  # fmt: skip

    @property
    def children(self) -> list[Node]:
        """Those that there are now: one may have been replaced."""
        return [self.child, *self.further.values()]

    @property
    def alignment(self) -> int:
        return max(child.alignment for child in self.children)

    # -- reading -------------------------------------------------------------------------------------

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "Several children are read")
        for offset, buffer in segments:
            if self.fifo:
                self._read_first(offset, buffer)
            elif not self._read_alike(offset, buffer):
                start = offset - offset % SECTOR
                with self._ranges.alone(start, align_up(offset + len(buffer), SECTOR)):
                    self._vote(offset, buffer)

    def _read_first(self, offset: int, buffer: memoryview) -> None:
        failure: Exception | None = None
        for child in self.children:
            try:
                return child.readv([(offset, buffer)])
            except (OSError, DiskwrightError) as error:
                failure = error
                self._bad("read", child, offset, len(buffer), error)
        assert failure is not None
        raise failure

    def _read_alike(self, offset: int, buffer: memoryview) -> bool:
        """Reads all children; whether none failed and all agree."""
        try:
            self.child.readv([(offset, buffer)])
            other = bytearray(len(buffer))
            for child in self.further.values():
                child.readv([(offset, memoryview(other))])
                if other != buffer:
                    return False
        except (OSError, DiskwrightError):
            return False
        return True

    def _vote(self, offset: int, buffer: memoryview) -> None:
        """Reads all children once more, and decides. No write is in flight here."""
        length = len(buffer)
        answers: list[tuple[Node, bytes]] = []
        errors: list[Exception] = []
        for child in self.children:
            try:
                answers.append((child, child.pread(offset, length)))
            except (OSError, DiskwrightError) as error:
                self._bad("read", child, offset, length, error)
                errors.append(error)
        if len(answers) < self.threshold:
            self._fail(offset, length)
            raise _most_common(errors)
        if self.blkverify and answers[0][1] != answers[1][1]:
            at = next(i for i in range(length) if answers[0][1][i] != answers[1][1][i])
            raise FatalError(f"quorum: offset={offset} bytes={length} contents mismatch at offset {at}")
        winner, votes = Counter(answer for _, answer in answers).most_common(1)[0]
        if votes < self.threshold:
            self._fail(offset, length)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        buffer[:] = winner
        for child, answer in answers:
            if answer != winner:
                self._bad("read", child, offset, length, None)
                if self.rewrite and child.writable:
                    self._set_right(child, offset, winner)

    def _set_right(self, child: Node, offset: int, data: bytes) -> None:
        try:
            child.pwrite(offset, data)
        except (OSError, DiskwrightError) as error:
            self._bad("write", child, offset, len(data), error)

    # -- changing ------------------------------------------------------------------------------------

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            offset, length = segment[0], len(segment[1])
            self._all("write", offset, length, lambda child: child.writev([segment]))  # noqa: B023 - called at once

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        if fast:
            raise not_supported("Fast zeroing of several children")
        self._all("write", offset, length, lambda child: child.write_zeros(offset, length, unmap=unmap))

    def discard(self, offset: int, length: int) -> None:
        """Nothing: what a discard leaves may differ from child to child."""

    def flush(self) -> None:
        self._all("flush", 0, 0, lambda child: child.flush())

    def resize(self, size: int, *, preallocation: str) -> None:
        for child in self.children:
            child.resize(size, preallocation=preallocation)

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        raise not_supported("Filter 'quorum' cannot write compressed")

    def _all(self, what: str, offset: int, length: int, step: Callable[[Node], None]) -> None:
        """``step`` for each child. Raises the error most of them met when it succeeded on too few."""
        if not length:
            return self._each(what, offset, length, step)
        with self._ranges.alone(offset - offset % SECTOR, align_up(offset + length, SECTOR)):
            return self._each(what, offset, length, step)

    def _each(self, what: str, offset: int, length: int, step: Callable[[Node], None]) -> None:
        errors: list[Exception] = []
        for child in self.children:
            try:
                step(child)
            except (OSError, DiskwrightError) as error:
                self._bad(what, child, offset, length, error)
                errors.append(error)
        if len(self.children) - len(errors) < self.threshold:
            self._fail(offset, length)
            raise _most_common(errors)

    # -- what a range holds --------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        return next(iter(self.extents(offset, length)))

    def extents(self, offset: int, length: int) -> Extents:
        """ZERO is what all children say is zeros; all else has to be read."""
        data: list[tuple[int, int]] = []
        for child in self.children:
            try:
                runs = lookup(child, offset, length)
            except (OSError, DiskwrightError):
                return Extents.of([Extent(offset, length, DATA, -1)])
            for start, size, kind in runs:
                if kind == DATA:
                    data.append((start, start + size))
        data.sort()
        found: list[Extent] = []
        at, end = offset, offset + length
        for start, stop in data:
            if start > at:
                found.append(Extent(at, start - at, ZERO, -1))
                at = start
            if stop > at:
                found.append(Extent(at, stop - at, DATA, -1))
                at = stop
        if at < end:
            found.append(Extent(at, end - at, ZERO, -1))
        return Extents.of(found)

    def transparent(self) -> bool:
        return False

    # -- reports -------------------------------------------------------------------------------------

    def _bad(self, what: str, child: Node, offset: int, length: int, error: Exception | None) -> None:
        text = "contents differ" if error is None else str(error)
        _log.warning("quorum: %s of %d bytes at %d: child '%s': %s", what, length, offset, child.name, text)
        data: dict[str, object] = {"type": what, "node-name": child.name, **_sectors(offset, length)}
        if error is not None:
            data["error"] = os.strerror(errno_of(error))
        if self.report is not None:
            self.report("QUORUM_REPORT_BAD", data)

    def _fail(self, offset: int, length: int) -> None:
        if self.report is not None:
            self.report("QUORUM_FAILURE", _sectors(offset, length))


def _sectors(offset: int, length: int) -> dict[str, object]:
    first = offset // SECTOR
    return {"sector-num": first, "sectors-count": align_up(offset + length, SECTOR) // SECTOR - first}


def _most_common(errors: list[Exception]) -> Exception:
    number = Counter(errno_of(error) for error in errors).most_common(1)[0][0]
    return next(error for error in errors if errno_of(error) == number)


DRIVERS = (Quorum,)
