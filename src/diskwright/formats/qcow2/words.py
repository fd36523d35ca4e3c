"""Everything in an image that says where something else lies, in one form.

Whatever refers to host clusters does it by a 64-bit word at a multiple of 8 bytes of the file: fields of the header,
of the snapshot table and of the bitmap directory, and the entries of L1, L2, refcount and bitmap tables. So whoever
moves clusters need not know what they hold: a word with its *place* (file offset) is all there is to a reference, and
as a word never crosses a sector, exchanging it is atomic.

The image has been checked: nothing here doubts what it reads.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from diskwright.errors import LimitExceeded
from diskwright.formats.qcow2 import bitmaps
from diskwright.formats.qcow2.header import AT_L1, AT_REFTABLE, DATA_FILE, EXT_BITMAPS, EXT_ENCRYPTION, Header
from diskwright.formats.qcow2.layout import COMPRESSED, OFFSET_MASK, REFTABLE_OFFSET_MASK
from diskwright.formats.qcow2.mapping import read_table
from diskwright.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node

    Places = NDArray[np.int64]
    Values = NDArray[np.uint64]

_AT_SNAPSHOTS: Final = 64
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_BITMAP: Final = struct.Struct(">QIIBBHI")
_BATCH: Final = 256 << 10
"""Bytes of L2 tables looked at together."""


class Run(NamedTuple):
    """Metadata in one piece, ``clusters`` long from ``offset`` on, named by the word at ``place``. ``entries`` are
    further words at its beginning that name clusters under ``mask``; ``l2`` says that these are L2 tables."""

    place: int
    offset: int
    clusters: int
    entries: int = 0
    mask: int = 0
    l2: bool = False


class Words(NamedTuple):
    """References, in columns: places, values, and how many times each counts (a shared table's words do so for every
    entry that names the table)."""

    place: Places
    value: Values
    weight: NDArray[np.int64]

    def at(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Words:
        return Words(self.place[chosen], self.value[chosen], self.weight[chosen])


def join(parts: list[Words]) -> Words:
    if not parts:
        return Words(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64))
    return Words(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def top_runs(file: Node, header: Header) -> list[Run]:
    """What the header names."""
    g = header.geometry
    table = header.refcount_table_clusters
    found = [Run(AT_REFTABLE, header.refcount_table_offset, table, table << g.cluster_bits - 3, REFTABLE_OFFSET_MASK)]
    if header.l1_size:
        found.append(_l1(header, AT_L1 + 4, header.l1_table_offset, header.l1_size))
    _, length = read_snapshots(file, header)
    if length:
        found.append(Run(_AT_SNAPSHOTS, header.snapshots_offset, g.clusters(length)))
    place = header.header_length
    for kind, data in header.extensions:
        place += 8
        if kind == EXT_BITMAPS and bitmaps.directory(header) is not None:
            _, _, size, offset = struct.unpack_from(">IIQQ", data)
            found.append(Run(place + 16, offset, g.clusters(size)))
        elif kind == EXT_ENCRYPTION and len(data) >= 16:
            offset, size = struct.unpack_from(">QQ", data)
            found.append(Run(place, offset, g.clusters(size)))
        place += len(data) + 7 & ~7
    return found


def inner_runs(file: Node, header: Header) -> list[Run]:
    """What the snapshot table and the bitmap directory name."""
    g = header.geometry
    found = []
    at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        offset, size, id_length, name_length, *_, extra = _SNAPSHOT.unpack(file.pread(at, _SNAPSHOT.size))
        if size:
            found.append(_l1(header, at, offset, size))
        at += _SNAPSHOT.size + extra + id_length + name_length
        at += -at % 8
    directory = bitmaps.directory(header)
    if directory is not None:
        start, size, count = directory
        data, at = file.pread(start, size), 0
        for _ in range(count):
            offset, entries, *_, name_length, extra = _BITMAP.unpack_from(data, at)
            if entries:
                found.append(Run(start + at, offset, g.clusters(entries * 8), entries, OFFSET_MASK))
            at += _BITMAP.size + name_length + extra
            at += -at % 8
    return found


def _l1(header: Header, place: int, offset: int, size: int) -> Run:
    return Run(place, offset, header.geometry.clusters(size * 8), size, OFFSET_MASK, True)


def table_words(file: Node, header: Header) -> tuple[Words, Places, NDArray[np.int64]]:
    """The words that name whole clusters of metadata (L2 tables, refcount blocks, bitmaps' clusters); and the L2
    tables, each once, with the number of times it is named."""
    parts: list[Words] = []
    tables: list[Places] = []
    for run in (*top_runs(file, header), *inner_runs(file, header)):
        if not run.entries:
            continue
        entries = np.frombuffer(read_table(file, "a table", run.offset, run.entries), np.uint64)
        named = np.flatnonzero(entries & np.uint64(run.mask))
        if not len(named):
            continue
        values = entries[named]
        parts.append(Words(run.offset + named * 8, values, np.ones(len(named), np.int64)))
        if run.l2:
            tables.append((values & np.uint64(OFFSET_MASK)).astype(np.int64))
    places, times = np.unique(np.concatenate(tables) if tables else np.zeros(0, np.int64), return_counts=True)
    return join(parts), places, times.astype(np.int64)


class Wanted(NamedTuple):
    """Host clusters ``[low, high)``, and the most references to them that are collected."""

    low: int
    high: int
    most: int


class TooMany(Exception):
    """More references than were wanted. Never leaves the driver."""


def data_words(file: Node, header: Header, wanted: Wanted) -> tuple[Words, Words]:
    """The L2 entries that name the wanted host clusters: standard ones, and compressed ones. Raises TooMany."""
    empty = join([])
    if header.incompatible_features & DATA_FILE:
        return empty, empty  # they speak of another file
    g = header.geometry
    _, tables, times = table_words(file, header)
    standard: list[Words] = []
    compressed: list[Words] = []
    count = 0
    per_batch = max(1, _BATCH >> g.cluster_bits)
    for at in range(0, len(tables), per_batch):
        for words, packed in _entries(file, header, tables[at : at + per_batch], times[at : at + per_batch]):
            if packed:
                start = (words.value & np.uint64(g.compressed_mask)).astype(np.int64)
                found = words.at(_reach(header, words.value, start, wanted))
                compressed.append(found)
            else:
                hosts = (words.value & np.uint64(OFFSET_MASK)).astype(np.int64) >> g.cluster_bits
                found = words.at((hosts >= wanted.low) & (hosts < wanted.high))
                standard.append(found)
            count += len(found.place)
            if count > wanted.most:
                raise TooMany
    return join(standard), join(compressed)


def stored_lengths(header: Header, values: Values) -> NDArray[np.int64]:
    """How many bytes compressed entries speak of."""
    g = header.geometry
    sectors = ((values >> np.uint64(g.sectors_shift)) & np.uint64(g.sectors_mask)).astype(np.int64) + 1
    return sectors * 512 - (values & np.uint64(511)).astype(np.int64)


def _reach(header: Header, values: Values, start: Places, wanted: Wanted) -> NDArray[np.bool_]:
    bits = header.cluster_bits
    last = start + stored_lengths(header, values) - 1
    return (last >> bits >= wanted.low) & (start >> bits < wanted.high)


def _entries(file: Node, header: Header, tables: Places, times: NDArray[np.int64]) -> Iterator[tuple[Words, bool]]:
    """Words of L2 tables that name something, standard ones and compressed ones (True) apart."""
    g = header.geometry
    size, per_table = g.cluster_size, g.cluster_size // 8
    entries = np.empty((len(tables), per_table), np.uint64)
    raw = memoryview(entries.view(np.uint8).data).cast("B")
    file.readv([(place, raw[i * size : (i + 1) * size]) for i, place in enumerate(tables.tolist())])
    if sys.byteorder == "little":
        entries.byteswap(inplace=True)
    step = per_table >> g.l2_bits  # of the words of an entry only the first names a place
    first = entries[:, ::step].ravel()
    named = np.flatnonzero(first & np.uint64(OFFSET_MASK | COMPRESSED))
    if not len(named):
        return
    table, index = named >> g.l2_bits, named & ((1 << g.l2_bits) - 1)
    words = Words(tables[table] + index * (8 * step), first[named], times[table])
    packed = words.value & np.uint64(COMPRESSED) != 0
    if packed.any():
        yield words.at(packed), True
        words = words.at(~packed)
    if len(words.place):
        yield words, False


def refuse_too_many(path: str, wanted: Wanted) -> LimitExceeded:
    return LimitExceeded(
        f"{path}: more than {wanted.most} references to {wanted.high - wanted.low} clusters: too many to be followed"
    )
