"""vhdx: writing metadata through the log. MS-VHDX 2.2.2.1 and 2.3.

Metadata changes in these steps: what it relies upon is made durable; an entry with the new pages goes into the log,
durably; the pages go to their places. Those are durable at the latest when the next entry is written, so every entry
makes a sequence by itself, and replaying the newest one is always enough.

While the log is in use it must hold a whole entry at every moment: a file without one counts as damaged. So a new entry
never lies over the one before it (an entry takes a third of the log at most), and the log is put to use with an
entry that says nothing, written before the header names the log: nobody looks at it until then.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from diskwright.errors import UnsupportedFeature
from diskwright.formats.vhdx.header import NO_GUID, Headers, Region, new_guid, with_checksum
from diskwright.formats.vhdx.log import DATA_HEAD, DESCRIPTOR, ENTRY, PAGE, Change, descriptor_pages
from diskwright.units import MiB, align_down, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.core.tables import Piece

_LONGEST: Final = 4 * MiB
"""Bytes of an entry at most, however long the log is: so much is in memory at a time."""


class Journal:
    """The log of a file that is written to. The user serialises calls."""

    def __init__(self, file: Node, headers: Headers) -> None:
        self._file, self.headers = file, headers
        self.active = False
        self._guid = NO_GUID
        self._number = 0
        self._next = 0  # where in the log the next entry goes
        self._unapplied: dict[int, Change] = {}

    def begin(self, data_write_guid: bytes | None) -> None:
        """Before the first change of the file: gives it a new identity, and its contents too (``data_write_guid``) when
        they are to change, and puts the log to use. Raises UnsupportedFeature when it has no log."""
        header = self.headers.current
        if not header.log_length:
            raise UnsupportedFeature(f"{self._file.filename}: has no log, so it can only be read")
        if header.log_guid == NO_GUID:
            self.headers.update(
                file_write_guid=new_guid(), data_write_guid=data_write_guid or header.data_write_guid
            )  # which made all there was durable
            size = align_down(self._file.size, MiB)
            self._guid, self._number, self._next = new_guid(), 0, 0
            self._write_entry([], size, size)
        assert header.log_guid in (NO_GUID, self._guid), "the log has been replayed"
        self.headers.update(log_guid=self._guid)  # again, when it got to one of the headers the last time
        self.active = True

    def end(self) -> None:
        """Makes everything durable and takes the log out of use."""
        if not self.active:
            return
        self._catch_up()
        self._file.flush()
        self.headers.update(log_guid=NO_GUID)
        self.active = False

    def _catch_up(self) -> None:
        """Changes that the log has, and that could not be written to their places, are written there now, durably: the
        log's next entry does not have them."""
        if self._unapplied:
            self._apply([])
            self._file.flush()

    def put(self, pieces: Sequence[Piece], *, flushed: int, end: int, table: Region) -> None:
        """Writes pieces of metadata to their places, through the log. What has been written before is durable, and so
        is the file's length ``flushed``; all structures of the file end at or before ``end``.

        Where that takes more than one entry, pages of the ``table`` come last, and its own last ones first: then no
        block is partly present before its bits are there, nor before the block of bits is, whose entry stands behind.
        """
        self._catch_up()
        pages: dict[int, bytearray] = {}
        for offset, data in pieces:
            done = 0
            while done < len(data):
                start = align_down(offset + done, PAGE)
                page = pages.get(start)
                if page is None:
                    page = pages[start] = bytearray(self._file.pread(start, PAGE))
                part = data[done : done + start + PAGE - offset - done]
                page[offset + done - start : offset + done - start + len(part)] = part
                done += len(part)
        behind = sorted((start for start in pages if table.offset <= start < table.end), reverse=True)
        order = sorted(pages.keys() - behind) + behind
        changes = [Change(start, PAGE, bytes(pages[start])) for start in order]
        most = self._most_pages()
        for at in range(0, len(changes), most):
            if at:
                self._file.flush()  # the pages before are in their places
            self.commit(changes[at : at + most], flushed=flushed, end=end)

    def commit(self, changes: Sequence[Change], *, flushed: int, end: int) -> None:
        """Makes all of ``changes`` at once: after a crash there are all or none. They must fit into one entry. What
        has been written before is durable, the last call's changes too."""
        assert self.active
        self._catch_up()
        self._write_entry(changes, flushed, align_up(end, MiB))
        self._apply(changes)

    def _apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._unapplied[change.offset] = change  # until all are written
        for change in self._unapplied.values():
            if change.data is None:
                self._file.write_zeros(change.offset, change.length)
        self._file.writev([(c.offset, memoryview(c.data)) for c in self._unapplied.values() if c.data is not None])
        self._unapplied.clear()

    def _most_pages(self) -> int:
        room = min(_LONGEST, self.headers.current.log_length // 3) // PAGE
        return max(1, room - descriptor_pages(room))

    def _write_entry(self, changes: Sequence[Change], flushed: int, end: int) -> None:
        """Writes an entry, durably."""
        header = self.headers.current
        number = self._number + 1
        descriptors, sectors = [], []
        for change in changes:
            if change.data is None:
                descriptors.append(DESCRIPTOR.pack(b"zero", 0, change.length, change.offset, number))
                continue
            leading, trailing = struct.unpack("<Q4084xI", change.data)
            descriptors.append(DESCRIPTOR.pack(b"desc", trailing, leading, change.offset, number))
            head = DATA_HEAD.pack(b"data", number >> 32)
            sectors.append(head + change.data[8:-4] + (number & 0xFFFFFFFF).to_bytes(4, "little"))
        room = descriptor_pages(len(changes)) * PAGE
        length = room + PAGE * len(sectors)
        assert length <= header.log_length // 3, "an entry must leave the one before it alone"
        position = self._next if self._next + length <= header.log_length else 0
        head = ENTRY.pack(b"loge", 0, length, position, number, len(changes), 0, self._guid, flushed, end)
        entry = with_checksum((head + b"".join(descriptors)).ljust(room, b"\0") + b"".join(sectors))
        self._file.writev([(header.log_offset + position, memoryview(entry))])
        self._file.flush()
        self._number, self._next = number, position + length
