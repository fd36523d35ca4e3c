"""vhdx: the log as it is found: which of its entries count, and what they say. MS-VHDX 2.3.

The log is a ring of entries, each a list of 4 KiB pages of metadata that are to be written somewhere in the file. Which
of them have to be written (again) after a crash, the newest whole *sequence* tells: entries one behind the other with
numbers that follow each other, of which the last one says where the sequence begins.

A log may hold anything: what old entries have left, half an entry, and what somebody made up to cost us time. So the
cheap marks of an entry are looked at first, checksums are made for a bounded number of bytes, and an entry's length
is bounded too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.formats.vhdx.header import Header, is_whole
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.driver import Segments
    from diskwright.core.node import Node

PAGE: Final = 4096
"""Bytes of a log sector, and of what one data descriptor changes."""
ENTRY: Final = struct.Struct("<4sIIIQII16sQQ")
DESCRIPTOR: Final = struct.Struct("<4sIQQQ")
DATA_HEAD: Final = struct.Struct("<4sI")

_MOST_ENTRY: Final = 64 * MiB
"""Longest entry that is read; Hyper-V's and QEMU's whole logs have 1 MiB unless somebody asks for more."""
_CHECKSUMS: Final = 4
"""Bytes checksummed at most, in lengths of the log: entries that count do not overlap, others are told apart sooner."""
_STEPS: Final = 1 << 20
"""Entries looked at in all when sequences are tried."""
_MOST_OFFSET: Final = 1 << 47
"""No VHDX file is longer: its disk has 64 TiB at most."""
_MOST_GROWTH: Final = 1 << 40
"""Bytes by which replaying may make a file longer."""
_MOST_ZEROED: Final = 4096
"""Ranges of zeros that a log in memory may have."""
_MOST_PAGES: Final = 1 << 14
"""Pages that a log in memory may have: 64 MiB."""
_WINDOW: Final = MiB


@dataclass(frozen=True)
class Change:
    """What one descriptor says: a page of the file gets ``data``; or, without, ``length`` bytes become zeros."""

    offset: int
    length: int
    data: bytes | None


@dataclass(frozen=True)
class Entry:
    """MS-VHDX 2.3.1.1. ``position`` and ``tail`` are bytes from the log's beginning."""

    position: int
    length: int
    tail: int
    sequence_number: int
    flushed_file_offset: int
    last_file_offset: int
    descriptor_count: int


class Log:
    """The log region of a file with a current header whose ``log_guid`` is set."""

    def __init__(self, file: Node, header: Header) -> None:
        self._file, self._header = file, header
        self._known: dict[int, Entry | None] = {}
        self._checksummed = 0

    def active(self, *, repair: bool = False) -> list[Entry]:
        """The entries to replay, in order. Raises CorruptImage when there are none, or the file has been cut off; to
        ``repair`` it, there may be none, and as much of the file as there is."""
        path = self._file.filename
        best: list[Entry] = []
        steps = 0
        starts = list(self._starts())
        at, length = 0, self._header.log_length
        while at < len(starts):
            tail = starts[at]
            sequence = self._sequence(tail)
            steps += len(sequence) + 1
            if steps > _STEPS:
                raise CorruptImage(path, "log", "damaged", self._header.log_offset, "its entries make no sequence")
            at += 1
            positions = [entry.position for entry in sequence]
            if not sequence or sequence[-1].tail not in positions:
                continue
            if not best or sequence[-1].sequence_number > best[-1].sequence_number:
                best = sequence[positions.index(sequence[-1].tail) :]
            end = tail + sum(entry.length for entry in sequence)
            if end >= length:
                break  # it goes on at the log's beginning, where the search came from
            while at < len(starts) and starts[at] < end:
                at += 1
        if not best and repair:
            return []
        if not best:
            raise CorruptImage(
                path, "log", "damaged", self._header.log_offset,
                "the header says that it is in use, and no entry in it is whole; 'check -r all' gives it up",
            )  # fmt: skip
        if self._file.size < best[-1].flushed_file_offset and not repair:
            raise CorruptImage(
                path, "length of the file", self._file.size, None,
                f"it had {best[-1].flushed_file_offset} bytes when its log was written: it has been cut off",
            )  # fmt: skip
        return best

    def _starts(self) -> Iterator[int]:
        """Where an entry may begin."""
        header = self._header
        for at in range(0, header.log_length, _WINDOW):
            data = self._file.pread(header.log_offset + at, _WINDOW)
            found = data.find(b"loge")
            while found >= 0:
                if found % PAGE == 0:
                    yield at + found
                found = data.find(b"loge", found + 1)

    def _sequence(self, tail: int) -> list[Entry]:
        """Entries that follow each other from ``tail`` on."""
        entries: list[Entry] = []
        length = self._header.log_length
        position, room = tail, length
        while room > 0:
            entry = self._entry(position)
            if entry is None or entry.length > room:
                break
            if entries and entry.sequence_number != entries[-1].sequence_number + 1:
                break
            entries.append(entry)
            room -= entry.length
            position = (position + entry.length) % length
        return entries

    def _entry(self, position: int) -> Entry | None:
        if position not in self._known:
            self._known[position] = self._examine(position)
        return self._known[position]

    def _examine(self, position: int) -> Entry | None:
        """The entry at ``position`` when it is whole."""
        header = self._header
        head = self._read(position, ENTRY.size)
        signature, _, length, tail, number, count, _, guid, flushed, last = ENTRY.unpack(head)
        if signature != b"loge" or guid != header.log_guid or not number:
            return None
        if not length or length % PAGE or length > header.log_length or tail % PAGE or tail >= header.log_length:
            return None
        entry = Entry(position, length, tail, number, flushed, last, count)
        if descriptor_pages(count) * PAGE > length:
            return None
        if length > _MOST_ENTRY:
            raise LimitExceeded(
                f"{self._file.filename}: has a log entry of {length} bytes; at most {_MOST_ENTRY} are accepted"
            )
        try:
            whole = self._read(position, length)
            for _ in self._changes(entry, whole):
                pass
        except _Torn:
            return None
        self._checksummed += length
        if self._checksummed > _CHECKSUMS * header.log_length:
            raise CorruptImage(
                self._file.filename, "log", "damaged", header.log_offset, "its entries overlap again and again"
            )
        return entry if is_whole(whole) else None

    def _read(self, position: int, length: int) -> bytes:
        """Bytes of the ring."""
        header = self._header
        first = min(length, header.log_length - position)
        data = self._file.pread(header.log_offset + position, first)
        if first < length:
            data += self._file.pread(header.log_offset, length - first)
        return data

    def changes(self, entry: Entry) -> Iterator[Change]:
        """What an entry says, in its order."""
        return self._changes(entry, self._read(entry.position, entry.length))

    def _changes(self, entry: Entry, whole: bytes) -> Iterator[Change]:
        place = descriptor_pages(entry.descriptor_count) * PAGE
        low, high = entry.sequence_number & 0xFFFFFFFF, entry.sequence_number >> 32
        for at in range(ENTRY.size, ENTRY.size + entry.descriptor_count * DESCRIPTOR.size, DESCRIPTOR.size):
            signature, trailing, leading, offset, number = DESCRIPTOR.unpack_from(whole, at)
            if number != entry.sequence_number or offset % PAGE or offset > _MOST_OFFSET:
                raise _Torn
            if signature == b"zero":
                if leading % PAGE or leading > _MOST_OFFSET:
                    raise _Torn
                yield Change(offset, leading, None)
                continue
            sector = whole[place : place + PAGE]
            place += PAGE
            if signature != b"desc" or len(sector) < PAGE or DATA_HEAD.unpack_from(sector) != (b"data", high):
                raise _Torn
            if int.from_bytes(sector[-4:], "little") != low:
                raise _Torn
            body = leading.to_bytes(8, "little") + sector[8:-4] + trailing.to_bytes(4, "little")
            yield Change(offset, PAGE, body)


class _Torn(Exception):
    """An entry is not as it was written, or was never one."""


def descriptor_pages(count: int) -> int:
    """How many pages an entry's header takes with ``count`` descriptors."""
    return -(-(ENTRY.size + count * DESCRIPTOR.size) // PAGE)


class Replayed:
    """A file as it is once its log has been replayed, without a change to the file: for reading metadata."""

    def __init__(self, file: Node, changes: Sequence[Change], size: int) -> None:
        """``size``: how long replaying would make it at least. Raises LimitExceeded for a log that takes too much
        memory."""
        self._file, self.filename = file, file.filename
        self.size = max(file.size, size)
        self._pages: dict[int, bytes] = {}
        self._zeroed: list[tuple[int, int]] = []
        for change in changes:
            end = change.offset + change.length
            self.size = max(self.size, end)
            if change.data is not None:
                self._pages[change.offset] = change.data
            elif change.length:
                self._pages = {at: page for at, page in self._pages.items() if not change.offset <= at < end}
                self._zeroed.append((change.offset, end))
            if len(self._pages) > _MOST_PAGES or len(self._zeroed) > _MOST_ZEROED:
                raise LimitExceeded(
                    f"{file.filename}: its log is too long to be replayed in memory; 'check -r all' does"
                )

    def ranges(self) -> list[tuple[int, int]]:
        """``(start, end)`` of all that differs from the file, in order."""
        return sorted([*self._zeroed, *((at, at + PAGE) for at in self._pages)])

    def pread(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        if length:
            self.readv([(offset, memoryview(buffer))])
        return bytes(buffer)

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        self._file.readv(segments, nowait=nowait)
        for offset, buffer in segments:
            end = offset + len(buffer)
            for start, stop in self._zeroed:
                low, high = max(start, offset), min(stop, end)
                if low < high:
                    buffer[low - offset : high - offset] = bytes(high - low)
            for start in range(offset - offset % PAGE, end, PAGE):
                page = self._pages.get(start)
                if page is not None:
                    low, high = max(start, offset), min(start + PAGE, end)
                    buffer[low - offset : high - offset] = page[low - start : high - start]

    def announce(self, name: str) -> None:
        self._file.announce(name)

    def flush(self) -> None:
        """There is nothing to flush."""


def check_growth(file: Node, log: Log, entries: Sequence[Entry]) -> None:
    """Raises LimitExceeded when replaying would make the file longer than can be meant."""
    end = max((entry.last_file_offset for entry in entries[-1:]), default=0)
    for entry in entries:
        end = max(end, *(change.offset + change.length for change in log.changes(entry)), 0)
    if end - file.size > _MOST_GROWTH:
        raise LimitExceeded(f"{file.filename}: its log would make the file {end} bytes long, and it has {file.size}")


def replay(file: Node, log: Log, entries: Sequence[Entry]) -> None:
    """Writes what the entries say to where it belongs, durably. The same once more does no harm."""
    for entry in entries:
        for change in log.changes(entry):
            if change.data is not None:
                file.writev([(change.offset, memoryview(change.data))])
            elif change.length:
                if change.offset + change.length > file.size:
                    file.resize(change.offset + change.length)
                file.write_zeros(change.offset, change.length)
    if entries and entries[-1].last_file_offset > file.size:
        file.resize(entries[-1].last_file_offset)
    file.flush()
