"""Cached metadata tables with ordered write-back.

An image's big tables (L2, refcount, block allocation, grain tables) are worked on in *slices*: pieces of
one fixed length, numbered by their user, each an ``array`` of native integers. A ``SliceCache`` holds the
slices in use, and knows which parts of which have changed. What it does not know is order: the user asks
for what has changed (``capture``), writes it at the right moment between two flushes, and says how it went
(``settle`` or ``restore``).

Reading is the hot path and takes no lock: ``cache.young.get(number)`` is one look-up in a dictionary, and
indexing the array one more. Only a miss goes through ``get``.

Slices age in two generations. New ones and those found again enter ``young``; when it is full it becomes
the old generation, and what was old is forgotten. That keeps what is used often without a note being made
at every look-up. Changed and pinned slices are never forgotten.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

from diskwright.errors import CorruptImage
from diskwright.units import SECTOR

if TYPE_CHECKING:
    from diskwright.core.node import Node

BLOCK: Final = 4096
"""Changed parts of a slice are written in pieces of this many bytes, aligned within the slice: a page of the
host's cache, so that no write makes the kernel read first."""

OVERHEAD: Final = 256
"""Bytes reckoned per cached slice beyond its items: the array object, a dictionary entry, an int."""

Piece = tuple[int, memoryview]
"""``(file_offset, bytes)``: changed bytes of a slice, in the byte order of the file."""


class SliceCache:
    """Slices of one kind of table in one file.

    ``locate(number)`` gives the file offset of a slice, or -1 when there is no such slice in the file; it may
    raise CorruptImage, and is called under the cache's lock, so it must not call back. ``budget`` bounds the
    bytes of slices that are neither changed nor pinned.

    Who changes slices must hold one lock of its own around ``edit``, ``put``, ``mark``, ``drop`` and
    ``capture``; ``get`` may be called by anyone at any time.
    """

    def __init__(
        self,
        file: Node,
        locate: Callable[[int], int],
        *,
        typecode: Literal["B", "H", "I", "Q"],
        items: int,
        byteorder: Literal["big", "little"],
        budget: int,
        total: int | None = None,
        event: str = "none",
    ) -> None:
        """``total``: how many items there are in all slices together, when the last slice is shorter than ``items``;
        nothing behind its end is read or written then. ``event`` is announced to the file before a slice is read."""
        self._event = event
        self._file, self._locate, self.typecode = file, locate, typecode
        self.swapped = byteorder != sys.byteorder and typecode != "B"
        """Whether items lie in the file in the other byte order."""
        self.items, self._total = items, total
        self.slice_bytes = items * array(typecode).itemsize
        self._blocks = -(-self.slice_bytes // BLOCK)
        self._block_items = items // self._blocks
        self._generation = max(1, budget // (self.slice_bytes + OVERHEAD) // 2)
        self.young: dict[int, array[int]] = {}
        """Look here first, without a lock; its identity never changes."""
        self._old: dict[int, array[int]] = {}
        self._changed: dict[int, int] = {}  # number -> bit mask of changed blocks; 0: about to be changed
        self._writing: dict[int, int] = {}  # the same, for what has been captured
        self._pins: dict[int, int] = {}
        self._loading: set[int] = set()
        self._guard = threading.Lock()
        self._loaded = threading.Condition(self._guard)

    # -- looking up ------------------------------------------------------------------------------

    def get(self, number: int) -> array[int] | None:
        """The slice, read from the file when it is not here; None when ``locate`` knows of none.

        Many may ask at once: one reads, the others wait for it. Raises OSError, or what ``locate`` raises.
        """
        items = self.young.get(number)
        if items is not None:
            return items
        with self._guard:
            while True:
                items = self.young.get(number)
                if items is not None:
                    return items
                items = self._old.get(number)
                if items is not None:
                    self._admit(number, items)
                    return items
                if number not in self._loading:
                    break
                self._loaded.wait()
            offset = self._locate(number)
            if offset < 0:
                return None
            self._loading.add(number)
        try:
            items = self._read(number, offset)
        except BaseException:
            with self._guard:
                self._loading.discard(number)
                self._loaded.notify_all()
            raise
        with self._guard:
            self._loading.discard(number)
            self._admit(number, items)
            self._loaded.notify_all()
        return items

    def peek(self, number: int) -> array[int] | None:
        """The slice when it is cached. Nothing is read and nothing ages. Takes no lock, and never misses a slice
        that is changed or pinned."""
        items = self.young.get(number)
        return self._old.get(number) if items is None else items

    def _read(self, number: int, offset: int) -> array[int]:
        items = self._blank(number)
        self._file.announce(self._event)
        self._file.readv([(offset, memoryview(items).cast("B"))])
        if self.swapped:
            items.byteswap()
        return items

    def _blank(self, number: int) -> array[int]:
        missing = 0 if self._total is None else max(0, (number + 1) * self.items - self._total)
        return array(self.typecode, bytes(self.slice_bytes - missing * (self.slice_bytes // self.items)))

    def _admit(self, number: int, items: array[int]) -> None:
        """Puts a slice into the young generation. Under the guard.

        Whoever looks without a lock looks at young first and then at old, so a slice is at no time in neither:
        it stays in the old generation when it is found there, and generations change hands in one step.
        """
        young = self.young
        if len(young) >= self._generation:
            changed, writing, pins = self._changed, self._writing, self._pins
            old = {n: a for n, a in self._old.items() if n in changed or n in writing or n in pins}
            old.update(young)
            self._old = old
            young.clear()
        young[number] = items

    def age(self) -> None:
        """Forgets what has not been used since the call before this one, and could be read again."""
        with self._guard:
            changed, writing, pins = self._changed, self._writing, self._pins
            kept = {n: a for n, a in self._old.items() if n in changed or n in writing or n in pins}
            kept.update(self.young)
            self._old = kept  # before young is emptied: a slice is at no time in neither
            self.young.clear()

    # -- changing --------------------------------------------------------------------------------

    def edit(self, number: int) -> array[int] | None:
        """The slice, to be changed and then marked: it stays cached from now on until it has been written."""
        if number in self._changed:  # so it cannot age out, and only our caller writes it back
            items = self.peek(number)
            if items is not None:
                return items
        while True:
            items = self.get(number)
            if items is None:
                return None
            with self._guard:
                # Between the two it may have aged out, and a change to it would then be lost.
                if self.peek(number) is items:
                    self._changed.setdefault(number, 0)
                    return items

    def put(self, number: int) -> array[int]:
        """A new slice of zeros, all of it changed. There must be none of that number."""
        items = self._blank(number)
        with self._guard:
            self._changed[number] = (1 << self._blocks) - 1
            self._admit(number, items)
        return items

    def mark(self, number: int, first: int, last: int) -> None:
        """Items ``first`` to ``last`` (inclusive) of a slice got from ``edit`` have been changed."""
        low, high = first // self._block_items, last // self._block_items
        self._changed[number] = self._changed.get(number, 0) | ((2 << high) - (1 << low))

    def mark_all(self, number: int) -> None:
        """The whole slice has to be written: it has changed, or is to lie elsewhere."""
        self._changed[number] = (1 << self._blocks) - 1

    def pin(self, number: int) -> None:
        """Keeps a slice that ``edit`` has just returned cached until ``unpin``; pins are counted."""
        with self._guard:
            self._pins[number] = self._pins.get(number, 0) + 1

    def unpin(self, number: int) -> None:
        with self._guard:
            left = self._pins[number] - 1
            if left:
                self._pins[number] = left
            else:
                del self._pins[number]

    def drop(self, number: int) -> None:
        """Forgets a slice that is no longer part of the image, changes and all. Nobody may be using it."""
        with self._guard:
            self.young.pop(number, None)
            self._old.pop(number, None)
            self._changed.pop(number, None)
            self._writing.pop(number, None)

    def clear(self) -> None:
        """Forgets everything, changes included. Nobody may be using any of it."""
        with self._guard:
            self.young.clear()
            self._old.clear()
            self._changed.clear()
            self._writing.clear()

    # -- writing back ----------------------------------------------------------------------------

    @property
    def changed(self) -> int:
        """How many slices hold changes that have not been captured."""
        return len(self._changed)

    def capture(self) -> list[Piece]:
        """Copies of all changed blocks, for writing, ordered by file offset. They count as being written until
        ``settle`` or ``restore`` is called; one of them must be, before the next capture."""
        assert not self._writing
        pieces: list[Piece] = []
        with self._guard:
            self._writing, self._changed = {n: m for n, m in self._changed.items() if m}, {}
            for number, mask in self._writing.items():
                items = self.peek(number)
                assert items is not None, "a changed slice must stay cached"
                self._collect(self._locate(number), items, mask, pieces)
        pieces.sort(key=_file_offset)
        return pieces

    def _collect(self, offset: int, items: array[int], mask: int, pieces: list[Piece]) -> None:
        per = self._block_items
        bytes_per = self.slice_bytes // self._blocks
        while mask:
            low = (mask & -mask).bit_length() - 1
            run = mask >> low
            count = (~run & (run + 1)).bit_length() - 1
            part = items[low * per : (low + count) * per]  # of a shorter slice, less
            if self.swapped:
                part.byteswap()
            if part:
                pieces.append((offset + low * bytes_per, memoryview(part).cast("B")))
            mask &= ~(((1 << count) - 1) << low)

    def settle(self) -> None:
        """What was captured is in the file."""
        with self._guard:
            self._writing = {}

    def restore(self) -> None:
        """Writing what was captured failed; it counts as changed again."""
        with self._guard:
            for number, mask in self._writing.items():
                self._changed[number] = self._changed.get(number, 0) | mask
            self._writing = {}


class Generations:
    """A dictionary from int to array of bounded size that may forget, in two generations like ``SliceCache``.

    For what can be worked out again. Look-ups are ``young.get`` without a lock; the user serialises all else.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: how many entries are kept at most."""
        self._half = max(1, limit // 2)
        self.young: dict[int, array[int]] = {}
        self._old: dict[int, array[int]] = {}

    def get(self, key: int) -> array[int] | None:
        """The entry, which is young again thereby."""
        found = self.young.get(key)
        if found is None:
            found = self._old.pop(key, None)
            if found is not None:
                self.set(key, found)
        return found

    def set(self, key: int, value: array[int]) -> None:
        if len(self.young) >= self._half:
            self._old = dict(self.young)
            self.young.clear()
        self.young[key] = value

    def age(self) -> None:
        """Forgets what has not been used since the call before this one."""
        self._old = dict(self.young)
        self.young.clear()

    def peek(self, key: int) -> array[int] | None:
        """The entry, wherever it is."""
        found = self.young.get(key)
        return self._old.get(key) if found is None else found

    def clear(self) -> None:
        self.young.clear()
        self._old.clear()


class Directory:
    """A table of tables that is wholly in memory: where each table of a second level lies. What has changed is written
    in whole sectors. The user serialises changes."""

    def __init__(
        self,
        file: Node,
        field: str,
        offset: int,
        count: int,
        *,
        typecode: Literal["I", "Q"],
        byteorder: Literal["big", "little"],
    ) -> None:
        """Reads ``count`` entries at ``offset``, which the caller has checked against a limit. ``field`` is the name
        the specification gives the table's offset. Raises CorruptImage when the file ends before they do."""
        self.offset, self.entries = offset, array(typecode, bytes(count * array(typecode).itemsize))
        self._swap = byteorder != sys.byteorder
        self._changed: set[int] = set()
        self._writing: set[int] = set()
        self._per_sector = SECTOR // self.entries.itemsize
        size = count * self.entries.itemsize
        if size and offset + size > file.size:
            raise CorruptImage(
                file.filename, field, f"{offset:#x}", None,
                f"a table of {size} bytes there reaches beyond the end of the file ({file.size} bytes)",
            )  # fmt: skip
        if size:
            file.readv([(offset, memoryview(self.entries).cast("B"))])
            if self._swap:
                self.entries.byteswap()

    def set(self, index: int, value: int) -> None:
        self.entries[index] = value
        self._changed.add(index // self._per_sector)

    @property
    def changed(self) -> bool:
        return bool(self._changed)

    def capture(self) -> list[Piece]:
        """Copies of the changed sectors; they count as being written until ``settle`` or ``restore`` is called."""
        self._writing, self._changed = self._changed, set()
        return [self._sector(number) for number in sorted(self._writing)]

    def _sector(self, number: int) -> Piece:
        part = self.entries[number * self._per_sector : (number + 1) * self._per_sector]
        if self._swap:
            part.byteswap()
        return self.offset + number * SECTOR, memoryview(part).cast("B")

    def settle(self) -> None:
        """What was captured is in the file."""
        self._writing = set()

    def restore(self) -> None:
        """Writing what was captured failed; it counts as changed again."""
        self._changed |= self._writing
        self._writing = set()


def _file_offset(piece: Piece) -> int:
    return piece[0]
