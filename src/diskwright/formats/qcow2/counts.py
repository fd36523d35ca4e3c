"""All refcounts of an image at once, to be changed together and written to new places.

``Refcounts`` serves a running image, a few slices at a time. What is here serves operations that touch nearly every
count there is: counts are one array, and nothing in the file changes. What ``pieces_to_move`` gives is a second set of
refcount structures in places that are free by the first, so that pointing the header from one to the other changes
every count in one step.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.formats.qcow2.layout import (
    MAX_HOST_OFFSET,
    MAX_REFTABLE_BYTES,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
)
from diskwright.formats.qcow2.mapping import read_table
from diskwright.formats.qcow2.refcounts import expand_bytes
from diskwright.formats.qcow2.repair import encode_counts
from diskwright.units import MiB

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.core.tables import Piece
    from diskwright.formats.qcow2.header import Header

    Hosts = NDArray[np.int64]

MAX_BYTES: Final = 512 * MiB
"""Refcount blocks that are held at most: 16 TiB in use at 64 KiB clusters and refcounts of 16 bits."""

_DTYPES: Final = {3: np.uint8, 4: np.uint16, 5: np.uint32, 6: np.uint64}


class Counts:
    """The refcounts of all host clusters that have a refcount block. Hosts are numbers of host clusters."""

    def __init__(self, file: Node, header: Header, is_metadata: Callable[[int, int], bool]) -> None:
        """``is_metadata``: whether one of (first, count) clusters holds metadata. Raises CorruptImage for refcount
        structures that are not sound, LimitExceeded for more than ``MAX_BYTES`` of them."""
        self.file, self.path, self.header = file, file.filename, header
        self.g = g = header.geometry
        self._is_metadata = is_metadata
        self._order = header.refcount_order
        self._most = (1 << (1 << self._order)) - 1
        count = header.refcount_table_clusters << (g.cluster_bits - 3)
        table = np.frombuffer(read_table(file, "refcount_table_offset", header.refcount_table_offset, count), np.uint64)
        self._numbers: Hosts = np.flatnonzero(table).astype(np.int64)
        """Which block each row of ``_counts`` is, ascending."""
        self._places: Hosts = self._checked(table[self._numbers])
        self._counts: NDArray[Any] = self._read()
        self._free: NDArray[np.bool_] = self._counts == 0
        """Never used by the image as it is, nor taken here."""
        self._changed: NDArray[np.bool_] = np.zeros(len(self._numbers), np.bool_)
        self._replaced: list[Hosts] = [np.zeros(0, np.int64)]
        self._dense = bool((self._numbers == np.arange(len(self._numbers))).all())

    def _checked(self, entries: NDArray[np.uint64]) -> Hosts:
        g = self.g
        places = (entries & np.uint64(REFTABLE_OFFSET_MASK)).view(np.int64)
        bad = (places <= 0) | (places & g.cluster_mask != 0) | (places >= self.file.size)
        bad |= entries & np.uint64(REFTABLE_RESERVED) != 0
        if bad.any() or len(np.unique(places)) < len(places):
            which = int(self._numbers[np.argmax(bad)])
            raise self._corrupt("refcount table", f"entry {which} or a later one cannot be right")
        if len(places) << g.cluster_bits > MAX_BYTES:
            raise LimitExceeded(
                f"{self.path}: its refcounts take {len(places) << g.cluster_bits} bytes; snapshots are worked on with "
                f"at most {MAX_BYTES}"
            )
        return places

    def _read(self) -> NDArray[Any]:
        g = self.g
        raw = np.zeros((len(self._places), g.cluster_size), np.uint8)
        view = memoryview(raw.reshape(-1).data).cast("B")
        size = g.cluster_size
        if len(self._places):
            self.file.readv([(at, view[i * size : (i + 1) * size]) for i, at in enumerate(self._places.tolist())])
        if self._order < 3:
            return expand_bytes(raw.reshape(-1), self._order).reshape(len(raw), -1)
        counts = raw.view(_DTYPES[self._order])
        return counts.byteswap(inplace=True) if sys.byteorder == "little" else counts

    def _corrupt(self, what: str, why: str) -> CorruptImage:
        return CorruptImage(self.path, what, "wrong", None, f"{why}; check and repair the image first")

    # -- looking and counting --------------------------------------------------------------------

    def _places_of(self, hosts: Hosts) -> tuple[Hosts, Hosts]:
        """Rows and columns of counts. Raises CorruptImage when one is not counted at all."""
        blocks = hosts >> self.g.block_bits
        if self._dense:
            rows, bad = blocks, blocks >= len(self._numbers)
        else:
            rows = np.searchsorted(self._numbers, blocks)
            rows[rows == len(self._numbers)] = 0
            bad = self._numbers[rows] != blocks
        if bad.any():
            raise self._uncounted(int(hosts[np.argmax(bad)]))
        return rows, hosts & ((1 << self.g.block_bits) - 1)

    def _uncounted(self, host: int) -> CorruptImage:
        return self._corrupt(f"refcount of host cluster {host}", "it is in use and counted as free")

    def of(self, hosts: Hosts) -> NDArray[Any]:
        """The counts of hosts that are in use. Raises CorruptImage where one is 0."""
        found: NDArray[Any] = self._counts[self._places_of(hosts)]
        if not found.all():
            raise self._uncounted(int(hosts[np.argmin(found)]))
        return found

    def add(self, hosts: Hosts) -> None:
        """One reference more to each of ``hosts``, which may repeat. They are in use, if only until a moment ago.
        Raises LimitExceeded when that does not fit into a refcount, CorruptImage."""
        hosts, times = _counted(hosts)
        rows, columns = self._places_of(hosts)
        free = self._free[rows, columns]
        if free.any():
            raise self._uncounted(int(hosts[np.argmax(free)]))
        counts = self._counts[rows, columns]
        more = times.astype(counts.dtype)
        if (more != times).any() or (more > self._most).any() or (counts > self._most - more).any():
            raise LimitExceeded(
                f"{self.path}: refcounts of {1 << self._order} bits cannot count that many users of a cluster: "
                f"at most {self._most}"
            )
        self._store(rows, columns, counts + more)

    def drop(self, hosts: Hosts) -> None:
        """One reference less to each of ``hosts``, which may repeat. Raises CorruptImage when there were fewer."""
        hosts, times = _counted(hosts)
        rows, columns = self._places_of(hosts)
        counts = self._counts[rows, columns]
        less = times.astype(counts.dtype)
        if (less != times).any() or (counts < less).any():
            raise self._corrupt("refcounts", "there are more references than they count")
        self._store(rows, columns, counts - less)

    def _store(self, rows: Hosts, columns: Hosts, counts: NDArray[Any] | int) -> None:
        self._counts[rows, columns] = counts
        self._changed[rows] = True

    def drop_region(self, offset: int, length: int) -> None:
        """One reference less to each cluster of ``length`` bytes at ``offset``."""
        if length:
            self.drop(self._clusters(offset, length))

    def _clusters(self, offset: int, length: int) -> Hosts:
        bits = self.g.cluster_bits
        return np.arange(offset >> bits, (offset + length - 1 >> bits) + 1, dtype=np.int64)

    def replace(self, hosts: Hosts) -> None:
        """``drop`` for tables that are written anew elsewhere. The next change will want such places, so it is not
        worth while to give the file system what lies between."""
        self.drop(hosts)
        self._replaced.append(hosts)

    def freed(self) -> list[tuple[int, int]]:
        """``(first, count)`` runs of clusters that were in use and are no longer, without replaced tables."""
        rows, columns = np.nonzero((self._counts == 0) & ~self._free)
        hosts = (self._numbers[rows] << self.g.block_bits) + columns
        return runs_of(np.setdiff1d(hosts, np.concatenate(self._replaced), assume_unique=True))

    # -- taking ----------------------------------------------------------------------------------

    def take(self, count: int) -> Hosts:
        """``count`` clusters that are free and have been all along; their count is now 1."""
        if not count:
            return np.zeros(0, np.int64)
        while True:
            hosts = self._free_hosts(count)
            if len(hosts) >= count:
                return self._taken(hosts[:count])
            self._extend(count - len(hosts))

    def take_adjoining(self, count: int) -> int:
        """The first of ``count`` adjoining clusters, otherwise as ``take``."""
        if not count:
            return 0
        while True:
            hosts = self._free_hosts(None)
            first = next((first for first, length in runs_of(hosts) if length >= count), None)
            if first is not None:
                self._taken(np.arange(first, first + count, dtype=np.int64))
                return first
            self._extend(count)

    def _free_hosts(self, count: int | None) -> Hosts:
        """Free clusters in ascending order; only ``count`` of them, when so few are enough."""
        per_block = 1 << self.g.block_bits
        found: list[Hosts] = []
        have = 0
        step = max(1, (1 << 20) >> self.g.block_bits)
        for row in range(0, len(self._numbers), step):
            rows, columns = np.nonzero(self._free[row : row + step])
            found.append((self._numbers[row + rows] * per_block) + columns)
            have += len(rows)
            if count is not None and have >= count:
                break
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _taken(self, hosts: Hosts) -> Hosts:
        if (int(hosts[-1]) + 1) << self.g.cluster_bits > MAX_HOST_OFFSET:
            raise LimitExceeded(f"{self.path}: a qcow2 image cannot use more than {MAX_HOST_OFFSET} bytes of its file")
        for first, count in runs_of(hosts):
            if self._is_metadata(first, count):
                raise self._corrupt(f"refcount of host cluster {first}", "it holds metadata and is counted as free")
        rows, columns = self._places_of(hosts)
        self._free[rows, columns] = False
        self._store(rows, columns, 1)
        return hosts

    def _extend(self, clusters: int) -> None:
        """Room for at least ``clusters`` more, behind all there are counts for."""
        more = -(-clusters // (1 << self.g.block_bits))
        first = int(self._numbers[-1]) + 1 if len(self._numbers) else 0
        shape = (more, 1 << self.g.block_bits)
        self._numbers = np.concatenate((self._numbers, np.arange(first, first + more, dtype=np.int64)))
        self._places = np.concatenate((self._places, np.zeros(more, np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(shape, self._counts.dtype)))
        self._free = np.concatenate((self._free, np.ones(shape, np.bool_)))
        self._changed = np.concatenate((self._changed, np.zeros(more, np.bool_)))

    # -- a second set of structures --------------------------------------------------------------

    def move(self) -> tuple[int, int, list[Piece]]:
        """Gives every changed block, and the table, a new place: ``(offset, clusters, pieces)`` of the table, and what
        has to be written. After this the counts are final. Raises LimitExceeded."""
        g, header = self.g, self.header
        clusters = header.refcount_table_clusters
        self.replace(self._clusters(header.refcount_table_offset, clusters << g.cluster_bits))
        table = self.take_adjoining(clusters)
        moved = np.zeros(len(self._numbers), np.bool_)
        while True:
            # A block's move changes other counts: of the place it goes to, and of that it leaves.
            moved = np.concatenate((moved, np.zeros(len(self._numbers) - len(moved), np.bool_)))
            wanted = np.flatnonzero(self._changed & ~moved)
            needed = -(-(int(self._numbers[-1]) + 1) * 8 >> g.cluster_bits)
            if needed > clusters:
                self._forget(table, clusters)
                clusters = needed + (needed + 1) // 2
                if clusters << g.cluster_bits > MAX_REFTABLE_BYTES:
                    raise LimitExceeded(
                        f"{self.path}: the refcount table would exceed {MAX_REFTABLE_BYTES} bytes, the most accepted"
                    )
                table = self.take_adjoining(clusters)
            elif not len(wanted):
                break
            else:
                moved[wanted] = True
                left = self._places[wanted]
                self.replace(left[left > 0] >> g.cluster_bits)
                self._places[wanted] = self.take(len(wanted)) << g.cluster_bits
        pieces = [
            (int(self._places[row]), memoryview(encode_counts(self._counts[row], self._order)))
            for row in np.flatnonzero(moved).tolist()
        ]
        entries = np.zeros(clusters << (g.cluster_bits - 3), ">u8")
        entries[self._numbers] = self._places
        pieces.append((table << g.cluster_bits, memoryview(entries.tobytes())))
        return table << g.cluster_bits, clusters, pieces

    def _forget(self, first: int, count: int) -> None:
        """Gives back what was taken here and has not been written."""
        rows, columns = self._places_of(np.arange(first, first + count, dtype=np.int64))
        self._counts[rows, columns] = 0
        self._free[rows, columns] = True


def _counted(hosts: Hosts) -> tuple[Hosts, Hosts]:
    """Each host once, and how often it was there."""
    if (np.diff(hosts) > 0).all():
        return hosts, np.ones(len(hosts), np.int64)
    return np.unique(hosts, return_counts=True)


def runs_of(hosts: Hosts) -> list[tuple[int, int]]:
    """``(first, count)`` runs that ascending numbers make."""
    if not len(hosts):
        return []
    starts = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(np.diff(hosts) != 1) + 1))
    return list(zip(hosts[starts].tolist(), np.diff(starts, append=len(hosts)).tolist(), strict=True))
