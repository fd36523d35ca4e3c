"""Files in memory that keep a record of all that changed them, can be played back as after a crash, and fail on order.

Nothing here knows a format.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from diskwright.core.driver import Segments, Storage

SECTOR = 512
"""What a medium writes whole or not at all."""


class Change(NamedTuple):
    """``kind`` is write (``data`` at ``offset``), size (``offset`` is the new one), discard (``data`` is what was
    there) or flush."""

    file: str
    kind: str
    offset: int = 0
    data: bytes = b""


class Fault(NamedTuple):
    """An error at the ``at``-th step from now on (0 is the next one), of ``kinds``; ``lasting`` times. A write may
    have got some ``sectors`` done before it fails."""

    at: int
    error: int = errno.EIO
    kinds: tuple[str, ...] = ("write", "size", "flush")
    lasting: int = 1
    sectors: int = 0


class Recording:
    """Some files by name, and one record of the changes of all of them."""

    def __init__(self, **files: bytes) -> None:
        self.start = dict(files)
        self.changes: list[Change] = []
        self.files = {name: RecordedFile(self, name, data) for name, data in files.items()}
        self._fault: Fault | None = None
        self._steps = 0
        self.failed = 0
        """Steps that have failed on order."""

    def fail(self, fault: Fault | None) -> None:
        """Orders an error; None takes the order back."""
        self._fault, self._steps = fault, 0

    def step(self, change: Change) -> None:
        """Records and applies a change, or fails."""
        fault = self._fault
        if fault is not None and change.kind in fault.kinds:
            number, self._steps = self._steps, self._steps + 1
            if fault.at <= number < fault.at + fault.lasting:
                self.failed += 1
                if change.kind == "write" and fault.sectors:
                    self._do(change._replace(data=change.data[: fault.sectors * SECTOR]))
                raise OSError(fault.error, os.strerror(fault.error))
        self._do(change)

    def _do(self, change: Change) -> None:
        self.changes.append(change)
        apply(self.files[change.file].data, change)

    def contents(self) -> dict[str, bytes]:
        return {name: bytes(file.data) for name, file in self.files.items()}

    # -- playing back ------------------------------------------------------------------------------

    def after(self, position: int, chance: random.Random | None = None) -> dict[str, bytes]:
        """What media may hold after a crash when ``position`` changes had been made. What a file was told before its
        last flush is there. Of the rest everything is there, or with ``chance`` whatever it decides: any of the
        changes, and of a write any of its sectors."""
        data = {name: bytearray(start) for name, start in self.start.items()}
        durable = dict.fromkeys(data, 0)
        for i in range(position - 1, -1, -1):
            change = self.changes[i]
            if change.kind == "flush" and not durable[change.file]:
                durable[change.file] = i
        for i, change in enumerate(self.changes[:position]):
            certain = chance is None or i < durable[change.file]
            for piece in (change,) if certain else _luck(change, chance):  # type: ignore[arg-type]
                apply(data[change.file], piece)
        return {name: bytes(held) for name, held in data.items()}

    def crashes(self, chance: random.Random, *, most: int = 0, each: int = 1) -> Iterator[tuple[int, dict[str, bytes]]]:
        """``(position, contents)`` of crashes: at every position, or when there are more than ``most`` of them at
        some that chance chooses, those about each flush among them. Each is given as a clean cut, and ``each``
        times as chance has it."""
        positions = set(range(len(self.changes) + 1))
        if most and len(positions) > most:
            flushes = [i for i, change in enumerate(self.changes) if change.kind == "flush"]
            near = {p for i in flushes for p in (i, i + 1)}
            keep = near if len(near) <= most else set(chance.sample(sorted(near), most))
            positions = keep | set(chance.sample(sorted(positions), most - len(keep)))
        for position in sorted(positions):
            yield position, self.after(position)
            for _ in range(each):
                yield position, self.after(position, chance)


def _luck(change: Change, chance: random.Random) -> list[Change]:
    """The parts of an unflushed change that a crash let happen."""
    fate = chance.random()
    if fate < 0.4:
        return [change]
    if change.kind != "write" or fate >= 0.7:
        return []
    pieces = []
    for at in range(0, len(change.data), SECTOR):
        if chance.random() < 0.5:
            pieces.append(change._replace(offset=change.offset + at, data=change.data[at : at + SECTOR]))
    return pieces


def apply(data: bytearray, change: Change) -> None:
    """Changes ``data`` as a medium would."""
    kind, offset, piece = change.kind, change.offset, change.data
    if kind == "size":
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    elif kind in ("write", "discard"):
        if offset + len(piece) > len(data):
            data.extend(bytes(offset + len(piece) - len(data)))
        data[offset : offset + len(piece)] = piece if kind == "write" else bytes(len(piece))


class RecordedFile(Storage):
    """One of the files of a recording."""

    name = "recorded"
    zero_init = True

    def __init__(self, recording: Recording, name: str, data: bytes) -> None:
        self.recording, self._name = recording, name
        self.data = bytearray(data)
        self.filename = name

    @classmethod
    def open(cls, options: Any, *, writable: bool) -> RecordedFile:
        raise NotImplementedError

    @property
    def changes(self) -> list[Change]:
        return self.recording.changes

    @property
    def size(self) -> int:
        return len(self.data)

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        for offset, buffer in segments:
            buffer[:] = bytes(self.data[offset : offset + len(buffer)]).ljust(len(buffer), b"\0")

    def writev(self, segments: Segments) -> None:
        for offset, buffer in segments:
            self.recording.step(Change(self._name, "write", offset, bytes(buffer)))

    def flush(self) -> None:
        self.recording.step(Change(self._name, "flush"))

    def discard(self, offset: int, length: int) -> None:
        inside = bytes(self.data[offset : offset + length])
        if inside:
            self.recording.step(Change(self._name, "discard", offset, inside))

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        self.recording.step(Change(self._name, "size", size))


def recorded(data: bytes) -> RecordedFile:
    """A file of its own."""
    return Recording(file=data).files["file"]
