"""A guest at work on a recorded image, and the judge of every crash it may meet: what was flushed is there, what was
not is old or new sector by sector, and the image is sound but for leaks.

    def test_crash_in_my_operation() -> None:
        work = Workload(created(size=1 << 20, cluster_size=4096))
        with work:
            work.write(0, b"a" * 10000)
            work.flush()
            work.image.format.my_operation()             # anything that does not change what the guest reads
            work.changing(lambda: work.image.format.revert("one"))   # anything that does
        work.verify(random.Random(1))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from tests.crash.recording import SECTOR, RecordedFile, Recording, recorded
from tests.formats.qcow2.support import Image

Files = dict[str, RecordedFile]
Opener = Callable[[Files, bool], Any]
"""Opens the image in files of these names, for writing or not: something with ``disk``, ``format``, ``node`` and
``close``, like ``support.Image``."""
Judge = Callable[[int, dict[str, bytes], bool], None]
"""``(position, files, finished)``: looks at an image after a crash for what else has to hold. ``finished`` tells
whether all that was done had been done and flushed before."""


def open_file(files: Files, writable: bool) -> Image:
    """An image that lies in ``file`` alone."""
    return Image(files["file"], writable=writable)  # type: ignore[arg-type]


class Ledger:
    """What a guest did, and what its sectors may hold after a crash at any position of the record."""

    def __init__(self, disk: bytes) -> None:
        self.now = bytearray(disk)
        self.history: list[tuple[int, int, bytes]] = []  # (position when it began, offset, new bytes)
        self.flushed: list[tuple[int, int, bytes]] = [(0, 0, bytes(disk))]  # (position, history length, disk)

    def does(self, position: int, offset: int, data: bytes) -> None:
        self.history.append((position, offset, data))
        self.now.extend(bytes(max(0, offset + len(data) - len(self.now))))
        self.now[offset : offset + len(data)] = data

    def has_flushed(self, position: int) -> None:
        self.flushed.append((position, len(self.history), bytes(self.now)))

    def check(self, position: int, found: bytes) -> None:
        """``found`` is the disk after a crash at ``position``; it may have been cut or grown meanwhile."""
        _, done, durable = next(entry for entry in reversed(self.flushed) if entry[0] <= position)
        if found == durable:
            return
        allowed: dict[int, list[bytes]] = {}
        for begun, offset, data in self.history[done:]:
            if begun >= position:
                break
            for at in range(0, len(data), SECTOR):
                allowed.setdefault(offset + at, []).append(data[at : at + SECTOR])
        for at in range(0, min(len(durable), len(found)), SECTOR):
            sector = found[at : at + SECTOR]
            if sector != durable[at : at + SECTOR]:
                assert sector in allowed.get(at, []), f"sector at {at} was lost in a crash at {position}"


class Workload:
    """An open recorded image. All that is done to the guest's disk is done by its methods."""

    def __init__(self, start: bytes, *, opener: Opener = open_file, **beside: bytes) -> None:
        """``start`` is the image; ``beside`` other files it needs, by names that ``opener`` knows."""
        self.recording = Recording(file=start, **beside)
        self._opener = opener
        self.image = opener(self.recording.files, True)
        self.ledger = Ledger(self.disk.pread(0, self.disk.size))
        self._checkpoint()

    @property
    def disk(self) -> Any:
        return self.image.disk

    @property
    def position(self) -> int:
        return len(self.recording.changes)

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.image.node.flush()
            self._checkpoint()
        self.image.close()

    def _checkpoint(self) -> None:
        self.ledger.has_flushed(self.position)

    # -- the guest -----------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes) -> None:
        self.ledger.does(self.position, offset, data)
        self.disk.pwrite(offset, data)

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.ledger.does(self.position, offset, bytes(length))
        self.disk.zero(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        """Each sector then holds zeros or what it held; which, is seen by looking."""
        position = self.position
        self.disk.trim(offset, length)
        self.ledger.does(position, offset, self.disk.pread(offset, length))

    def flush(self) -> None:
        self.disk.flush()
        self._checkpoint()

    def resize(self, size: int) -> None:
        before = self.disk.size
        if size < before:
            # What is beyond does not have to be there any more, from the beginning of the call on.
            position, done, disk = self.ledger.flushed[-1]
            self.ledger.flushed[-1] = position, done, disk[:size]
        self.image.node.resize(size)
        del self.ledger.now[size:]
        self.ledger.now.extend(bytes(size - len(self.ledger.now)))

    def changing(self, operation: Callable[[], object]) -> None:
        """An operation that changes what the guest reads as a whole: until it is flushed any sector may be old or
        new."""
        position = self.position
        operation()
        after = self.disk.pread(0, self.disk.size)
        self.ledger.does(position, 0, after)
        self.ledger.now[:] = after

    def play(self, chance: random.Random, steps: int, *, actions: str = "wwwwwzzdddff") -> None:
        """Random steps: w(rite), z(ero), d(iscard), f(lush), g(row)."""
        cluster = self.image.format.cluster_size
        for _ in range(steps):
            sectors = self.disk.size // SECTOR
            offset = chance.randrange(sectors) * SECTOR
            length = chance.choice((1, 2, 3, cluster // SECTOR, 2 * cluster // SECTOR + 1)) * SECTOR
            length = min(self.disk.size - offset, length)
            action = chance.choice(actions)
            if action == "w":
                self.write(offset, chance.randbytes(length))
            elif action == "z":
                self.zero(offset, length, unmap=chance.random() < 0.5)
            elif action == "d":
                self.discard(offset, length)
            elif action == "g":
                self.resize(self.disk.size + chance.randrange(1, 40) * cluster + SECTOR)
            else:
                self.flush()

    # -- the judge -----------------------------------------------------------------------------------

    def verify(
        self, chance: random.Random, *, most: int = 0, each: int = 1, reopen: int = 40, also: Iterable[Judge] = ()
    ) -> None:
        """Looks at crashes, see ``Recording.crashes``; one in ``reopen`` of them is written to as well. The guest may
        have been told nothing of a flush that failed: then call ``flush`` again before the end."""
        end = self.ledger.flushed[-1][0]
        for number, (position, files) in enumerate(self.recording.crashes(chance, most=most, each=each)):
            self._judge(position, files)
            for judge in also:
                judge(position, files, position >= end)
            if number % reopen == reopen // 2:
                self._go_on(files)
        self._judge(self.position, self.recording.contents())

    def _open(self, files: dict[str, bytes], *, writable: bool) -> Any:
        return self._opener(Recording(**files).files, writable)

    def _judge(self, position: int, files: dict[str, bytes]) -> None:
        image = self._open(files, writable=False)
        try:
            report = image.format.check("off")
            assert not report.corruptions and not report.check_errors, (position, report.messages)
            self.ledger.check(position, image.disk.pread(0, image.disk.size))
        finally:
            image.close()

    def _go_on(self, files: dict[str, bytes]) -> None:
        """After a crash the image is opened, its leaks are returned, and it is written to as if nothing had been."""
        recording = Recording(**files)
        image = self._opener(recording.files, True)
        try:
            expected = bytearray(image.disk.pread(0, image.disk.size))
            report = image.format.check("leaks")
            assert not report.leaks and not report.corruptions, report.messages
            length = min(3000, len(expected))
            for offset in (0, len(expected) // 2 // SECTOR * SECTOR, len(expected) - length):
                data = b"%08d" % (offset % 10**8) * (length // 8)
                image.disk.pwrite(offset, data)
                expected[offset : offset + len(data)] = data
            image.disk.flush()
            assert image.disk.pread(0, len(expected)) == expected
        finally:
            image.close()
        self._open_clean(recording.contents(), bytes(expected))

    def _open_clean(self, files: dict[str, bytes], expected: bytes) -> None:
        image = self._open(files, writable=False)
        try:
            report = image.format.check("off")
            assert (report.corruptions, report.leaks) == (0, 0), report.messages
            assert image.disk.pread(0, image.disk.size) == expected
        finally:
            image.close()


__all__ = ["Ledger", "Recording", "Workload", "recorded"]
