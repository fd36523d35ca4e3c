"""Moving compressed clusters: several lie in one host cluster, at any byte, and may reach into the next.

What they hold is not looked at. A descriptor counts whole sectors, so the end of a stream is not known, and the last
sector of one is often the first of the next: those that adjoin are moved as they lie, and every one keeps its place
within its first sector, so that the descriptor's count of sectors stays right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from diskwright.formats.qcow2.words import Words, stored_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.formats.qcow2.compact import Compaction

_SECTOR: Final = 512
_BATCH: Final = 4096
"""Compressed clusters moved between two flushes at most."""


class Repacking:
    """Moves compressed clusters ahead of ``boundary``, into host clusters it takes for them."""

    def __init__(self, work: Compaction, boundary: int) -> None:
        self.work, self.boundary = work, boundary
        self.counts = work.refcounts
        self._bits, self._size = work.g.cluster_bits, work.g.cluster_size
        self._most = (1 << (1 << work.header.refcount_order)) - 1
        # Where the next one may go, in what has been taken.
        self._at = self._end = 0

    def move(self, words: Words) -> None:
        """Moves what ``words`` name, until there is no place left."""
        header, g = self.work.header, self.work.g
        offsets = (words.value & np.uint64(g.compressed_mask)).astype(np.int64)
        order = np.lexsort((words.value, offsets))
        words, offsets = words.at(order), offsets[order]
        heads = np.flatnonzero(np.diff(words.value, prepend=words.value[:1] + np.uint64(1)))
        lengths = stored_lengths(header, words.value[heads])
        bounds = np.append(heads, len(offsets))
        weights = np.add.reduceat(words.weight, heads) if len(heads) else words.weight
        for at in range(0, len(heads), _BATCH):
            self.work.ask()
            part = slice(at, at + _BATCH)
            found = zip(offsets[heads[part]].tolist(), lengths[part].tolist(), weights[part].tolist(), strict=True)
            if not self._batch(list(found), words, bounds[at : at + _BATCH + 1]):
                return

    def _batch(self, todo: list[tuple[int, int, int]], words: Words, bounds: NDArray[np.int64]) -> bool:
        """Moves some, given as ``(file offset, length, references)``, of which number ``i`` is named by the words from
        ``bounds[i]`` to ``bounds[i + 1]``; False when not all found a place."""
        moves: list[tuple[int, int, int]] = []  # from, to, length in bytes
        shifts: list[int] = []
        for offset, length, weight in todo:
            to = self._place(offset, length, moves[-1] if moves else None, weight)
            if to is None:
                break
            self._count(to, length, weight)
            shifts.append(to - offset)
            if moves and to - offset == moves[-1][1] - moves[-1][0] and offset <= sum(moves[-1][::2]):
                moves[-1] = *moves[-1][:2], max(moves[-1][2], offset + length - moves[-1][0])
            else:
                moves.append((offset, to, length))
        count = len(shifts)
        if not count:
            return False
        part = slice(int(bounds[0]), int(bounds[count]))
        shift = np.repeat(np.array(shifts, np.int64), np.diff(bounds[: count + 1]))
        self.work.carry_out_bytes(moves, words.place[part], words.value[part] + shift.view(np.uint64))
        left = todo[:count]
        before = self._in_use(left)
        for offset, length, weight in left:
            self._count(offset, length, -weight)
        self.work.advance(before - self._in_use(left))
        return count == len(todo)

    def _in_use(self, ranges: list[tuple[int, int, int]]) -> int:
        hosts = {host for offset, length, _ in ranges for host in self._touched(offset, length)}
        return sum(1 for host in hosts if self.counts.get(host))

    def _touched(self, offset: int, length: int) -> range:
        return range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1)

    def _count(self, offset: int, length: int, more: int) -> None:
        for host in self._touched(offset, length):
            self.counts.put(host, self.counts.get(host) + more)

    def _place(self, offset: int, length: int, last: tuple[int, int, int] | None, weight: int) -> int | None:
        """A place for ``length`` bytes that lie at ``offset``, in clusters that are taken then; None when there is
        none. ``last`` is the run of bytes that was placed last."""
        to = self._at + (offset - self._at) % _SECTOR
        if last is not None and offset - offset % _SECTOR <= last[0] + last[2]:
            to = last[1] + offset - last[0]
        if to + length > self._end or not self._room_to_count(to, length, weight):
            if self._end and self._grown(to, length):
                self._end = ((to + length - 1) >> self._bits) + 1 << self._bits
            else:
                needed = -(-(offset % _SECTOR + length) >> self._bits)
                hole = self.work.hole(needed, self.boundary)
                if hole is None or weight > self._most:
                    return None
                self._take(hole, needed)
                to = (hole << self._bits) + offset % _SECTOR
                self._end = (hole + needed) << self._bits
        self._at = to + length
        return to

    def _grown(self, to: int, length: int) -> bool:
        """Takes the clusters behind the last one, if that makes room for ``length`` bytes at ``to``."""
        first = self._end >> self._bits
        needed = ((to + length - 1) >> self._bits) + 1 - first
        if needed <= 0 or first + needed > self.boundary or to > self._end:
            return False
        if self.counts.free_run(needed, first) != (first, needed):
            return False
        self._take(first, needed)
        return True

    def _take(self, first: int, count: int) -> None:
        self.counts.take_at(first, count)
        for host in range(first, first + count):
            self.counts.put(host, 0)  # what is placed there is counted one by one

    def _room_to_count(self, to: int, length: int, weight: int) -> bool:
        return all(self.counts.get(host) + weight <= self._most for host in self._touched(to, length))
