"""L1 tables with all that hangs from them, walked over in bulk: the active one, and those of snapshots alike.

Unlike ``scan``, which tells of everything that is wrong, this is for changing images: whatever is wrong ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from diskwright.errors import CorruptImage
from diskwright.formats.qcow2.layout import COMPRESSED, OFFSET_MASK
from diskwright.formats.qcow2.mapping import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.formats.qcow2.header import Header
    from diskwright.formats.qcow2.layout import Geometry

    Hosts = NDArray[np.int64]
    Entries = NDArray[np.uint64]

_BATCH: Final = 1 << 20
"""Bytes of L2 tables looked at together."""


class Tree:
    """An L1 table. ``tables`` has the file offset of the L2 table of each entry, 0 for none."""

    def __init__(self, file: Node, geometry: Geometry, tables: Hosts) -> None:
        self.file, self.path, self.g, self.tables = file, file.filename, geometry, tables

    @classmethod
    def read(cls, file: Node, header: Header) -> Tree:
        """The tree below the L1 table that ``header`` names. Raises CorruptImage when the table, or a place in it, is
        impossible, or when two entries name one L2 table."""
        g = header.geometry
        entries = read_table(file, "l1_table_offset", header.l1_table_offset, header.l1_size)
        tables = (np.frombuffer(entries, np.uint64) & np.uint64(OFFSET_MASK)).astype(np.int64)
        named = tables[tables != 0]
        why = ""
        if (named & g.cluster_mask).any() or (named >= file.size).any():
            why = "names an L2 table in an impossible place"
        elif len(np.unique(named)) < len(named):
            why = "names an L2 table twice"
        if why:
            raise CorruptImage(
                file.filename, "L1 table", f"at {header.l1_table_offset:#x}", None, f"{why}; check and repair the image"
            )
        return cls(file, g, tables)

    def part(self, start: int, stop: int | None = None) -> Tree:
        """The same for some of the L1 entries only; beyond the last there are empty ones."""
        tables = self.tables[start:stop]
        if stop is not None and len(tables) < stop - start:
            tables = np.concatenate((tables, np.zeros(stop - start - len(tables), np.int64)))
        return Tree(self.file, self.g, tables.copy())

    def batches(self) -> Iterator[tuple[Hosts, Entries]]:
        """``(indices, words)``: some entries of the L1 table that name tables, and these tables as rows."""
        named = np.flatnonzero(self.tables)
        per_batch = max(1, _BATCH >> self.g.cluster_bits)
        for at in range(0, len(named), per_batch):
            indices = named[at : at + per_batch]
            yield indices, self._read(self.tables[indices])

    def _read(self, places: Hosts) -> Entries:
        size = self.g.cluster_size
        words = np.empty((len(places), size >> 3), np.uint64)
        raw = memoryview(words.view(np.uint8).reshape(-1).data).cast("B")
        self.file.readv([(place, raw[i * size : (i + 1) * size]) for i, place in enumerate(places.tolist())])
        if sys.byteorder == "little":
            words.byteswap(inplace=True)
        return words

    def descriptors(self, words: Entries) -> Entries:
        """The words of ``words`` that say where clusters are: all, or with extended L2 entries every second one."""
        return words[:, :: words.shape[1] >> self.g.l2_bits]

    def standard(self, descriptors: Entries) -> NDArray[np.bool_]:
        """Which of them name a whole cluster. Raises CorruptImage when such a place is impossible."""
        compressed = descriptors & np.uint64(COMPRESSED) != 0
        places = descriptors & np.uint64(OFFSET_MASK)
        found: NDArray[np.bool_] = ~compressed & (places != 0)
        if (found & (places & np.uint64(self.g.cluster_mask) != 0)).any():
            raise CorruptImage(
                self.path, "an L2 entry", "not aligned to a cluster", None, "check and repair the image first"
            )
        return found

    def hosts(self) -> Iterator[Hosts]:
        """The host clusters of everything below the L1 table, in parts: each as often as it is referred to."""
        g = self.g
        for indices, words in self.batches():
            yield self.tables[indices] >> g.cluster_bits
            descriptors = self.descriptors(words)
            standard = self.standard(descriptors)
            yield (descriptors[standard] & np.uint64(OFFSET_MASK)).astype(np.int64) >> g.cluster_bits
            compressed = descriptors[descriptors & np.uint64(COMPRESSED) != 0]
            if not len(compressed):
                continue
            place = (compressed & np.uint64(g.compressed_mask)).astype(np.int64)
            sectors = ((compressed >> np.uint64(g.sectors_shift)) & np.uint64(g.sectors_mask)).astype(np.int64) + 1
            first, last = place >> g.cluster_bits, (place + sectors * 512 - (place & 511) - 1) >> g.cluster_bits
            for step in range(3):  # compressed data is at most two clusters long, and so touches up to three
                yield first[first + step <= last] + step


def big_endian_words(words: Entries) -> memoryview:
    """Entries as they belong into the file."""
    return memoryview(words.astype(">u8").tobytes())
