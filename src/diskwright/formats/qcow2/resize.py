"""Changing a disk's size, and allocating clusters in advance.

Called with no other request in flight. Every step is durable before the next one relies on it, so that a crash
leaves the old size or the new one, and at worst leaked clusters.
"""

from __future__ import annotations

import errno
import struct
from array import array
from typing import TYPE_CHECKING

from diskwright.errors import ImageError, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, SPECIAL
from diskwright.formats.qcow2.encryption import seal, unseal
from diskwright.formats.qcow2.header import AT_L1, AT_SIZE
from diskwright.formats.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from diskwright.formats.qcow2.refcounts import big_endian

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.writing import Writer

_STEP = 1 << 30


def resize(image: Qcow2, size: int, preallocation: str) -> None:
    """See ``Format.resize``. What a backing image has beyond the old size is the caller's affair: this layer does
    not know it. Raises ImageError for a read-only image, UnsupportedFeature or LimitExceeded."""
    writer = image.writer
    path = image.children[0].filename
    if writer is None:
        raise ImageError(f"{path}: is open read-only")
    if writer.header.nb_snapshots and writer.header.version < 3:
        raise UnsupportedFeature(f"{path}: a version 2 image with snapshots cannot be resized")
    entries = writer.geometry.l1_entries(size)
    if entries * 8 > MAX_L1_BYTES:
        most = (MAX_L1_BYTES // 8) << (writer.geometry.l2_bits + writer.geometry.cluster_bits)
        raise LimitExceeded(
            f"{path}: {size} bytes are too many for clusters of {image.cluster_size} bytes, with which a disk has at "
            f"most {most} bytes"
        )
    if size < image.size:
        if preallocation != "off":
            raise UnsupportedFeature(f"{path}: preallocation makes no sense for a disk that shrinks")
        _shrink(image, writer, size)
    elif size > image.size:
        old = image.size
        _grow(image, writer, size, entries)
        if preallocation != "off":
            preallocate(image, writer, old, preallocation)


def _set_size(image: Qcow2, writer: Writer, size: int) -> None:
    writer.write_header(AT_SIZE, struct.pack(">Q", size))
    image.size = writer.size = writer.header.size = size


# -- growing -------------------------------------------------------------------------------------------


def _grow(image: Qcow2, writer: Writer, size: int, l1_entries: int) -> None:
    g = writer.geometry
    # Nothing should be mapped beyond the end, but a crash while shrinking, or another program, may have left it.
    _unmap(writer, g.clusters(image.size), min(g.clusters(size), len(writer.map.l1) << g.l2_bits))
    if image.size & g.cluster_mask:
        _zero_tail(image, writer)
    if l1_entries > len(writer.map.l1):
        grow_l1(writer, l1_entries)
    writer.checkpoint()
    _set_size(image, writer, size)


def _zero_tail(image: Qcow2, writer: Writer) -> None:
    """Zeros the rest of the last cluster, which the guest could not see so far."""
    g, file = writer.geometry, writer.file
    size = image.size
    rest = g.cluster_size - (size & g.cluster_mask)
    run = image.mapping.extent_at(size, rest)
    if run.kind not in (DATA, SPECIAL):
        return
    place = writer.in_place(size, rest)
    if place >= 0:
        if image.cipher is None:
            file.write_zeros(place, rest)
        else:
            file.pwrite(place, seal(image, memoryview(bytes(rest)), size, place))
        return
    start = size - (size & g.cluster_mask)
    whole = bytearray(g.cluster_size)
    used = memoryview(whole)[: size - start]
    run = image.mapping.extent_at(start, len(used))
    if run.kind == SPECIAL:
        image.decode(run, memoryview(bytearray(file.pread(run.file_offset, run.stored))), used)
    else:
        file.readv([(run.file_offset, used)])
        unseal(image, used, run)
    placed = writer.reserve(start, g.cluster_size)
    try:
        place = placed.extents[0].file_offset
        file.pwrite(place, seal(image, memoryview(whole), start, place))
    except BaseException:
        placed.abort()
        raise
    placed.publish()


def grow_l1(writer: Writer, entries: int) -> None:
    """Moves the L1 table to a larger place."""
    g, mapping = writer.geometry, writer.map
    clusters = g.clusters(entries * 8)
    first = writer.take_adjoining(clusters)
    writer.checkpoint()  # the new place is counted before anything says that the table is there
    table = array("Q", mapping.l1)
    table.extend([0] * (entries - len(table)))
    offset = first << g.cluster_bits
    writer.file.writev([(offset, big_endian(table))])
    writer.file.flush()
    writer.write_header(AT_L1, struct.pack(">IQ", entries, offset))
    writer.switch_l1(table, offset)


# -- shrinking -----------------------------------------------------------------------------------------


def _shrink(image: Qcow2, writer: Writer, size: int) -> None:
    g = writer.geometry
    writer.checkpoint()
    _set_size(image, writer, size)
    first = g.clusters(size)
    _unmap(writer, first, len(writer.map.l1) << g.l2_bits)
    writer.drop_tables(-(-first >> g.l2_bits))
    writer.checkpoint()
    writer.drop_blocks()
    writer.checkpoint()
    _trim(writer)


def _trim(writer: Writer) -> None:
    """Cuts off what lies behind the last cluster in use, where the storage can be made smaller."""
    end = writer.refcounts.end() << writer.geometry.cluster_bits
    if end < writer.file.size:
        try:
            writer.file.resize(end)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise


def _unmap(writer: Writer, first: int, end: int) -> None:
    """Takes guest clusters off the map."""
    g = writer.geometry
    while first < end:
        if not writer.map.l1[first >> g.l2_bits] & OFFSET_MASK:
            first = ((first >> g.l2_bits) + 1) << g.l2_bits
            continue
        stop = min(end, ((first >> g.slice_bits) + 1) << g.slice_bits)
        writer.unmap(first, stop)
        first = stop


# -- allocating in advance -----------------------------------------------------------------------------


def preallocate(image: Qcow2, writer: Writer, start: int, mode: str) -> None:
    """Gives every cluster from guest offset ``start`` on, none of which has a place, one that reads as zeros.
    ``mode`` metadata: only that; falloc: the file system reserves the space; full: zeros are written to it."""
    g, file = writer.geometry, writer.file
    start += -start & g.cluster_mask
    if mode != "metadata":
        # At the end and in one piece, so that the storage can make the space in one go.
        end = g.clusters(file.size)
        writer.refcounts.take_from(end)
        _extend(file, _estimate(writer, end, g.clusters(image.size - start)), mode)
    while start < image.size:
        placed = writer.reserve(start, min(_STEP, image.size - start))
        run = placed.extents[0]
        length = run.length + (-run.length & g.cluster_mask)
        try:
            if not placed.zeroed:
                file.write_zeros(run.file_offset, length)
            # Before the map can name them: what lies beyond the end of the file counts as damage.
            _extend(file, run.file_offset + length, mode)
        except BaseException:
            placed.abort()
            raise
        placed.publish()
        start += run.length
    writer.checkpoint()
    if mode != "metadata":
        _trim(writer)


def _estimate(writer: Writer, start: int, clusters: int) -> int:
    """Where the file will end when ``clusters`` are allocated from host cluster ``start`` on, with their tables."""
    g = writer.geometry
    total = clusters + (clusters >> g.l2_bits) + 2
    total += (total >> g.block_bits) + 2
    return (start + total) << g.cluster_bits


def _extend(file: Node, size: int, mode: str) -> None:
    if size > file.size:
        file.resize(size, preallocation="off" if mode == "metadata" else mode)
