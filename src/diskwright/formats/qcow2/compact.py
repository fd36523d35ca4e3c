"""Compaction: what lies at the end of the file moves into free clusters further ahead, and the file becomes shorter.

As many clusters as are in use, that is how long the file can be; all beyond moves, each once, whatever it holds (see
``words``). A batch moves in this order, so that a crash at any moment costs nothing but leaked clusters:

1. the new places are taken, with the refcounts the old ones have, and the bytes are copied there; flush;
2. the words that name the old places are exchanged for the new ones, each atomically; flush;
3. the old places are given up. That needs no flush of its own: it becomes durable with the next batch's first step.

New places are always ahead of the clusters being moved, so no place is used again in the same run, and nothing needs
space beyond the file as it is. The state is all in the image: to go on after an interruption is to begin again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diskwright.core.driver import CompactReport, FilePlace
from diskwright.errors import ImageError, UnsupportedFeature
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.check import inspect
from diskwright.formats.qcow2.header import read_header
from diskwright.formats.qcow2.layout import OFFSET_MASK, ZERO
from diskwright.formats.qcow2.refcounts import Refcounts
from diskwright.formats.qcow2.words import (
    Run,
    TooMany,
    Wanted,
    Words,
    data_words,
    inner_runs,
    refuse_too_many,
    table_words,
    top_runs,
)
from diskwright.units import MiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2

WINDOW: Final = 1 << 19
"""Host clusters whose references are collected at a time, by one walk over all L2 tables: 32 GiB at 64 KiB clusters."""
MAX_WORDS: Final = 1 << 21
"""References collected at a time: 48 MiB. Where snapshots share clusters that often, windows become smaller."""
_LEAST_WINDOW: Final = 256

BATCH_BYTES: Final = 64 * MiB
BATCH_MOST: Final = 4096
"""What is moved between two flushes at most: bytes and clusters."""
_BUFFER: Final = 4 * MiB
_CACHE: Final = 16 * MiB
"""Refcounts kept in memory."""
_MOST_PASSES: Final = 16
"""A pass may leave holes behind: where refcount blocks were that count nothing any more. Two or three are enough."""

_KNOWN_AUTOCLEAR: Final = fields.BITMAPS | fields.RAW_DATA_FILE


class _Stopped(Exception):
    """The caller asked for the end."""


class Compaction:
    """One compaction of the image in ``file``, of which nobody else holds any state. For the arguments see
    ``Format.compact``."""

    def __init__(
        self,
        file: Node,
        *,
        detect_zeros: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
        stop: Callable[[], bool] = lambda: False,
        window: int = WINDOW,
    ) -> None:
        self.file, self.detect_zeros, self._progress, self._stop = file, detect_zeros, progress, stop
        self.header = read_header(file)
        self.g = self.header.geometry
        self._bits, self._size = self.g.cluster_bits, self.g.cluster_size
        self._window = window
        self.report = CompactReport(file.size)
        self._buffer = memoryview(bytearray(max(_BUFFER, self._size)))
        self._cursor = 0  # no cluster before it is free
        self._done = self._total = 0  # clusters
        self._in_kernel = True

    def run(self) -> CompactReport:
        """Raises ImageError for an image that is damaged, or holds what is not known here; OSError."""
        self._prepare()
        self.refcounts = Refcounts(self.file, self.header, _CACHE)
        try:
            self._release_zeros()
            self._passes()
            self.report.complete = True
            self._total = self._done
            self.advance(0)
        except _Stopped:
            pass
        self._save()
        self._trim()
        self.file.flush()
        self.report.after = self.file.size
        return self.report

    def _prepare(self) -> None:
        """What is moved must be known, all of it, and counted right. Leaks are given back first."""
        header, path = self.header, self.file.filename
        if header.incompatible_features & fields.CORRUPT:
            raise ImageError(f"{path}: is marked corrupt; repair it before compacting it")
        unknown = header.autoclear_features & ~_KNOWN_AUTOCLEAR
        if unknown:
            raise UnsupportedFeature(f"{path}: has data of unknown kinds (autoclear features {unknown:#x})")
        report = inspect(self.file, header).report
        repair = "all" if header.incompatible_features & fields.DIRTY else "leaks" if report.leaks else ""
        if repair != "all" and (report.corruptions or report.check_errors):
            raise ImageError(f"{path}: is damaged; check and repair it before compacting it")
        if not repair:
            return
        from diskwright.formats.qcow2.repair import mend

        report = mend(self.file, repair)
        if report.corruptions:  # clusters that were counted twice, and now are not: only their flags are wrong
            report = mend(self.file, "all")
        if report.corruptions or report.check_errors:
            raise ImageError(f"{path}: is damaged; check and repair it before compacting it")
        self.header = read_header(self.file)

    def ask(self) -> None:
        """Ends the run, between two batches, when the caller wants that."""
        if self._stop():
            raise _Stopped

    # -- one pass ----------------------------------------------------------------------------------

    def _passes(self) -> None:
        for _ in range(_MOST_PASSES):
            self._drop_blocks()
            end, used = self.refcounts.end(), self.refcounts.used()
            if end <= used:
                return
            self._total = self._done + self.refcounts.used(used)
            self._cursor = 0
            self._pass(end, used)
            self._save()
            self._trim()
            if self.refcounts.end() >= end:
                return

    def _pass(self, end: int, used: int) -> None:
        """Moves what lies beyond ``used`` clusters. What has to lie in one piece goes first, while there is choice."""
        stuck = self._move_runs(top_runs(self.file, self.header), used)
        stuck += self._move_runs(inner_runs(self.file, self.header), used)
        boundary = max(1, used - stuck)
        words, _, _ = table_words(self.file, self.header)
        hosts = self._hosts(words)
        self._move_clusters(words.at(hosts >= boundary), boundary)
        high = end
        while high > boundary:
            low = max(boundary, high - self._window)
            try:
                standard, compressed = data_words(self.file, self.header, Wanted(low, high, MAX_WORDS))
            except TooMany:
                if self._window <= _LEAST_WINDOW:
                    raise refuse_too_many(self.file.filename, Wanted(low, high, MAX_WORDS)) from None
                self._window //= 2
                continue
            self._move_clusters(standard, boundary)
            self._move_compressed(compressed, boundary)
            high = low
            self._save()
            self._trim()
        if stuck:
            self._move_runs(top_runs(self.file, self.header), boundary)
            self._move_runs(inner_runs(self.file, self.header), boundary)

    def _hosts(self, words: Words) -> NDArray[np.int64]:
        return (words.value & np.uint64(OFFSET_MASK)).astype(np.int64) >> self._bits

    def _drop_blocks(self) -> None:
        """Gives up refcount blocks that count nothing but themselves."""
        dropped = self.refcounts.drop_empty_blocks()
        if dropped:
            self._save()
            self.refcounts.release([(host, 1) for host in dropped])
            self._save()

    # -- metadata in one piece -----------------------------------------------------------------------

    def _move_runs(self, runs: Sequence[Run], boundary: int) -> int:
        """Moves runs that reach beyond ``boundary`` further ahead; returns how many clusters of them could not be."""
        stuck = 0
        moves: list[tuple[int, int, int]] = []
        places: list[int] = []
        values: list[int] = []
        starts = [run.offset for run in runs]
        for run in runs:
            first = run.offset >> self._bits
            if first + run.clusters <= boundary:
                continue
            # Two names for one place cannot be exchanged at once; nobody writes such images.
            to = self.hole(run.clusters, first) if starts.count(run.offset) == 1 else None
            if to is None:
                stuck += run.clusters
                continue
            self.refcounts.take_at(to, run.clusters)
            moves.append((first, to, run.clusters))
            places.append(run.place)
            values.append(to << self._bits)
        if moves:
            self._carry_out(moves, np.array(places, np.int64), np.array(values, np.uint64))
            self.header = read_header(self.file)
            self.refcounts.table_offset = self.header.refcount_table_offset
        return stuck

    def hole(self, count: int, below: int) -> int | None:
        """The first of ``count`` adjoining free clusters, all before ``below``."""
        start = self._cursor
        while True:
            first, n = self.refcounts.free_run(count, start)
            if first + count > below:
                return None
            if n == count:
                return first
            start = first + n

    # -- clusters ------------------------------------------------------------------------------------

    def _move_clusters(self, words: Words, boundary: int) -> None:
        """Moves the clusters that ``words`` name, as far as there are free ones before ``boundary``."""
        hosts = self._hosts(words)
        order = np.argsort(hosts, kind="stable")
        words, hosts = words.at(order), hosts[order]
        sources, starts = np.unique(hosts, return_index=True)
        bounds = [*starts.tolist(), len(hosts)]
        most = max(1, min(BATCH_MOST, BATCH_BYTES >> self._bits))
        at = 0
        while at < len(sources):
            self.ask()
            batch = sources[at : at + most].tolist()
            moves = self._take_places(batch, boundary)
            count = sum(n for _, _, n in moves)
            if not count:
                return
            part = slice(bounds[at], bounds[at + count])
            shift = np.zeros(count, np.int64)
            done = 0
            for first, to, n in moves:
                shift[done : done + n] = (to - first) << self._bits
                done += n
            times = np.diff(bounds[at : at + count + 1])
            value = words.value[part] + np.repeat(shift, times).view(np.uint64)
            self._carry_out(moves, words.place[part], value)
            at += count

    def _take_places(self, sources: Sequence[int], boundary: int) -> list[tuple[int, int, int]]:
        """``(from, to, count)`` for the first of ``sources``, whose new places are taken and counted as they are."""
        moves: list[tuple[int, int, int]] = []
        done = 0
        while done < len(sources):
            first, n = self.refcounts.free_run(len(sources) - done, self._cursor)
            n = min(n, boundary - first)
            if n <= 0:
                break
            self.refcounts.take_at(first, n)
            self._cursor = first + n
            for to in range(first, first + n):
                source = sources[done]
                done += 1
                count = self.refcounts.get(source)
                if count != 1:
                    self.refcounts.put(to, count)
                if moves and sum(moves[-1][::2]) == source and sum(moves[-1][1:]) == to:
                    moves[-1] = *moves[-1][:2], moves[-1][2] + 1
                else:
                    moves.append((source, to, 1))
        return moves

    def _carry_out(
        self, moves: Sequence[tuple[int, int, int]], places: NDArray[np.int64], values: NDArray[np.uint64]
    ) -> None:
        """All three steps for clusters ``(from, to, count)`` whose new places are taken."""
        bits = self._bits
        self.carry_out_bytes([(first << bits, to << bits, n << bits) for first, to, n in moves], places, values)
        moved = 0
        for first, _, count in moves:
            for host in range(first, first + count):
                self.refcounts.put(host, 0)
            moved += count
        self.advance(moved)

    def carry_out_bytes(
        self, moves: Sequence[tuple[int, int, int]], places: NDArray[np.int64], values: NDArray[np.uint64]
    ) -> None:
        """Steps 1 and 2 for bytes ``(from, to, length)`` whose new places are counted in memory: then ``values`` are
        at ``places``, and all is durable. The old places are still counted."""
        self._write_counts()  # before anything is copied: what is copied may be refcounts, or their table
        if self.refcounts.table_changed:
            self._settle_counts()
        for source, target, length in moves:
            self._copy(source, target, length)
        self._settle_counts()
        self._exchange(places, values)

    def _exchange(self, places: NDArray[np.int64], values: NDArray[np.uint64]) -> None:
        """Writes words to their places, and makes them durable."""
        order = np.argsort(places, kind="stable")
        places, ordered = places[order], values[order]
        breaks = np.flatnonzero(np.diff(places) != 8) + 1
        raw = memoryview(ordered.astype(">u8").view(np.uint8).data).cast("B")
        starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(places)]
        self.file.writev([(int(places[s]), raw[s * 8 : e * 8]) for s, e in zip(starts, ends, strict=True) if s < e])
        self.file.flush()
        table = self.refcounts.table_offset
        end = table + len(self.refcounts.table) * 8
        for i in np.flatnonzero((places >= table) & (places < end)).tolist():
            self.refcounts.table[(int(places[i]) - table) // 8] = int(ordered[i])

    def advance(self, clusters: int) -> None:
        """So many clusters have been given up."""
        self.report.moved += clusters
        self._done += clusters
        total = max(self._total, self._done)
        self._progress(self._done << self._bits, total << self._bits)

    # -- bytes and counts ------------------------------------------------------------------------------

    def _copy(self, source: int, target: int, length: int) -> None:
        """Copies bytes of the file; the two ranges do not overlap."""
        done = 0
        while done < length:
            step = min(len(self._buffer), length - done)
            if not self._copied_in_kernel(source + done, target + done, step):
                piece = self._buffer[:step]
                self.file.readv([(source + done, piece)])
                self.file.writev([(target + done, piece)])
            done += step

    def _copied_in_kernel(self, source: int, target: int, length: int) -> bool:
        if not self._in_kernel or source + length > self.file.size:
            return False
        try:
            place = self.file.place(source, length)
            if place is None or place.length < length:
                return False
            self.file.copy_from(target, FilePlace(place.fd, place.offset, length))
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            self._in_kernel = False
            return False
        return True

    def _write_counts(self) -> None:
        pieces = self.refcounts.cache.capture()
        try:
            if pieces:
                self.file.writev(pieces)
        except BaseException:
            self.refcounts.cache.restore()
            raise
        self.refcounts.cache.settle()

    def _settle_counts(self) -> None:
        """Makes everything written so far durable, and then the refcount table where it has changed."""
        self.file.flush()
        pieces, _ = self.refcounts.capture_table()
        if pieces:
            self.file.writev(pieces)
            self.file.flush()

    def _save(self) -> None:
        """Makes refcounts durable."""
        if self.refcounts.cache.changed or self.refcounts.table_changed:
            self._write_counts()
            self._settle_counts()

    def _trim(self) -> None:
        """Cuts off what lies behind the last cluster in use, where the storage can be made smaller."""
        end = self.refcounts.end() << self._bits
        if end < self.file.size:
            try:
                self.file.resize(end)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise

    # -- zeros -----------------------------------------------------------------------------------------

    def _release_zeros(self) -> None:
        """Gives up clusters all of whose references read as zeros."""
        header = self.header
        extended = self.g.l2_bits != self._bits - 3  # there zeros are told by subclusters
        if extended or header.incompatible_features & fields.DATA_FILE:
            return
        if header.version < 3 and not (self.detect_zeros and not header.backing_file):
            return
        low, end = 0, self.refcounts.end()
        while low < end:
            high = min(end, low + self._window)
            try:
                words, _ = data_words(self.file, header, Wanted(low, high, MAX_WORDS))
            except TooMany:
                if self._window <= _LEAST_WINDOW:
                    raise refuse_too_many(self.file.filename, Wanted(low, high, MAX_WORDS)) from None
                self._window //= 2
                continue
            self._release_zeros_of(words)
            low = high

    def _release_zeros_of(self, words: Words) -> None:
        hosts = self._hosts(words)
        sources, which = np.unique(hosts, return_inverse=True)
        if not len(sources):
            return
        told = words.value & np.uint64(ZERO) != 0
        zero = np.ones(len(sources), np.bool_)
        zero[which[~told]] = False  # for somebody it is data
        if self.detect_zeros and not self.header.crypt_method:
            self._find_zeros(sources, zero)
        weights = np.bincount(which, words.weight, len(sources)).astype(np.int64)
        for i in np.flatnonzero(zero).tolist():
            # When something else refers to it, this is not the whole story.
            zero[i] = self.refcounts.get(int(sources[i])) == weights[i]
        new = np.uint64(ZERO if self.header.version >= 3 else 0)
        chosen = np.flatnonzero(zero)
        for at in range(0, len(chosen), BATCH_MOST):
            self.ask()
            batch = chosen[at : at + BATCH_MOST]
            part = np.isin(which, batch)
            self._exchange(words.place[part], np.full(int(part.sum()), new, np.uint64))
            for host in sources[batch].tolist():
                self.refcounts.put(host, 0)
            self.report.released += len(batch)

    def _find_zeros(self, sources: NDArray[np.int64], zero: NDArray[np.bool_]) -> None:
        """Marks the clusters that hold nothing but zeros."""
        most = len(self._buffer) >> self._bits
        waiting = np.flatnonzero(~zero)
        at = 0
        while at < len(waiting):
            self.ask()
            run = waiting[at : at + most]
            first = int(sources[run[0]])
            count = int(np.argmax(np.append(sources[run] - first != np.arange(len(run)), True)))
            piece = self._buffer[: count << self._bits]
            self.file.readv([(first << self._bits, piece)])
            words = np.frombuffer(piece, np.uint64).reshape(count, -1)
            zero[run[:count]] = ~words.any(axis=1)
            at += count

    # -- compressed clusters ---------------------------------------------------------------------------

    def _move_compressed(self, words: Words, boundary: int) -> None:
        from diskwright.formats.qcow2.repacking import Repacking

        Repacking(self, boundary).move(words)


def compact(image: Qcow2, **options: Any) -> CompactReport:
    """See ``Format.compact``. Raises ImageError for a read-only image."""
    if not image.can_repair:
        raise ImageError(f"{image.children[0].filename}: is open read-only")
    if image.writer is not None:
        image.writer.close()
    try:
        return Compaction(image.children[0], **options).run()
    finally:
        image.reload()
