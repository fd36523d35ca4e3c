"""Stored units (SPECIAL extents) in bulk: neighbours are read with one read, and placed and written as one run."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage
from diskwright.units import KiB, MiB

if TYPE_CHECKING:
    from diskwright.core.driver import Format, Segment, Segments
    from diskwright.extents import Extent

MAX_STORED: Final = 64 * MiB
"""The longest stored unit of a SPECIAL extent that is read: above the largest cluster or chunk any format has."""

MAX_TOGETHER: Final = 4 * MiB
"""Stored bytes read at once when several units lie next to each other: as much memory a reader needs for them."""

MAX_GAP: Final = 64 * KiB
"""Bytes between two units that are read along: one more call costs more than they do."""

Wanted = tuple["Extent", memoryview]
"""A SPECIAL extent, and where its guest bytes belong."""


def read_stored(form: Format, wanted: list[Wanted], nowait: bool) -> None:
    """Reads and decodes SPECIAL extents. Raises CorruptImage, OSError, or BlockingIOError with ``nowait``."""
    start = end = child = -1
    group: list[Wanted] = []
    for item in wanted:
        run = item[0]
        if not 0 < run.stored <= MAX_STORED:
            path = form.children[run.child].filename
            raise CorruptImage(path, "stored length", run.stored, run.file_offset, "not a possible length")
        stop = run.file_offset + run.stored
        if (
            group
            and child == run.child
            and start <= run.file_offset <= end + MAX_GAP
            and max(end, stop) - start <= MAX_TOGETHER
        ):
            group.append(item)
            end = max(end, stop)
            continue
        if group:
            _read_group(form, group, start, end, nowait)
        start, end, child, group = run.file_offset, stop, run.child, [item]
    if group:
        _read_group(form, group, start, end, nowait)


def _read_group(form: Format, group: list[Wanted], start: int, end: int, nowait: bool) -> None:
    raw = memoryview(bytearray(end - start))
    form.children[group[0][0].child].readv([(start, raw)], nowait=nowait)
    for run, into in group:
        at = run.file_offset - start
        form.decode(run, raw[at : at + run.stored], into)


class StoredWriter:
    """Whole clusters on their way to compressed places. Making one compresses them; ``write`` does the rest.

    ``plain``  what does not get smaller, for the caller to write as it is, after ``write``: units that are packed
               behind each other should not have clusters taken between them
    """

    def __init__(self, form: Format, segments: Segments) -> None:
        """Raises OSError with EINVAL for segments that are not whole clusters."""
        self._form = form
        self.plain: list[Segment] = []
        self._units: list[tuple[int, int]] = []  # (guest offset, stored length)
        self._stored: list[bytes] = []
        unit = form.cluster_size
        for offset, buffer in segments:
            end = offset + len(buffer)
            if offset % unit or (end % unit and end != form.size):
                raise OSError(errno.EINVAL, f"{len(buffer)} bytes at {offset} are not whole clusters of {unit}")
            for at in range(0, len(buffer), unit):
                self._encode(offset + at, buffer[at : at + unit])

    def _encode(self, offset: int, piece: memoryview) -> None:
        stored = self._form.encode_at(offset, piece)
        if stored is not None:
            self._units.append((offset, len(stored)))
            self._stored.append(stored)
        else:
            self.plain.append((offset, piece))

    def write(self) -> None:
        """Places the compressed units, writes them and puts them on the map."""
        form, done = self._form, 0
        while done < len(self._units):
            reservation = form.reserve_stored(self._units[done:])
            try:
                count = len(reservation.extents)
                self._move(reservation.extents, self._stored[done : done + count])
            except BaseException:
                reservation.abort()
                raise
            reservation.publish()
            done += count

    def _move(self, extents: Sequence[Extent], stored: list[bytes]) -> None:
        writes: dict[int, list[Segment]] = {}
        parts: list[bytes] = []
        start = end = child = -1
        for run, data in zip(extents, stored, strict=True):
            if run.file_offset != end or run.child != child:
                if parts:
                    writes.setdefault(child, []).append((start, memoryview(b"".join(parts))))
                start, child, parts = run.file_offset, run.child, []
            parts.append(data)
            if run.stored > len(data):
                parts.append(bytes(run.stored - len(data)))
            end = run.file_offset + run.stored
        writes.setdefault(child, []).append((start, memoryview(b"".join(parts))))
        for index, segments in writes.items():
            self._form.children[index].announce("write_compressed")
            self._form.children[index].writev(segments)
