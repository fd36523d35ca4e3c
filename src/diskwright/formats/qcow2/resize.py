"""Changing a disk's size, and allocating clusters in advance.

Called with no other request in flight. Every step is durable before the next one relies on it, so that a crash
leaves the old size or the new one, and at worst leaked clusters.
"""

from __future__ import annotations

import errno
import struct
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from diskwright.errors import ImageError, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, SPECIAL, Extent
from diskwright.formats.qcow2.encryption import seal, unseal
from diskwright.formats.qcow2.header import AT_L1, AT_SIZE
from diskwright.formats.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from diskwright.formats.qcow2.ordering import Cause
from diskwright.formats.qcow2.refcounts import big_endian
from diskwright.formats.qcow2.writing import PlacedClusters
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.writing import Writer

_STEP = 1 << 30


def resize(image: Qcow2, size: int, preallocation: str, conceal: Callable[[], None] | None = None) -> None:
    """See ``Format.resize``. Raises ImageError for a read-only image, UnsupportedFeature or LimitExceeded."""
    writer = image.writer
    path = image.children[0].filename
    if writer is None:
        raise ImageError(f"{path}: is open read-only")
    if writer.header.nb_snapshots and writer.header.version < 3:
        raise UnsupportedFeature("Can't resize a v2 image which has snapshots")
    entries = writer.geometry.l1_entries(size)
    if entries * 8 > MAX_L1_BYTES:
        most = (MAX_L1_BYTES // 8) << (writer.geometry.l2_bits + writer.geometry.cluster_bits)
        raise LimitExceeded(
            f"{path}: {size} bytes are too many for clusters of {image.cluster_size} bytes, with which a disk has at "
            f"most {most} bytes"
        )
    if size < image.size:
        if preallocation != "off":
            raise UnsupportedFeature("Preallocation can only be used for growing images")
        _shrink(image, writer, size)
    elif size > image.size:
        old = image.size
        if writer.data_file is not None:
            zeroed = writer.header.raw_data_file or preallocation != "off"
            _grow_data_file(writer.data_file, old, size, preallocation, zeroed)
        _grow(image, writer, size, entries, conceal)
        if preallocation == "off" and writer.header.raw_data_file:
            preallocation = "metadata"  # a raw data file is all data
        if preallocation != "off":
            preallocate(image, writer, old, preallocation)


def _set_size(image: Qcow2, writer: Writer, size: int) -> None:
    try:
        writer.write_header(AT_SIZE, struct.pack(">Q", size))
    except BaseException:
        image.size = writer.size = writer.header.size
        raise
    image.size = writer.size = writer.header.size = size


# -- growing -------------------------------------------------------------------------------------------


def _grow(image: Qcow2, writer: Writer, size: int, l1_entries: int, conceal: Callable[[], None] | None) -> None:
    g, old = writer.geometry, image.size
    # Nothing should be mapped beyond the end, but a crash while shrinking, or another program, may have left it.
    _unmap(writer, g.clusters(image.size), min(g.clusters(size), len(writer.map.l1) << g.l2_bits), Cause.OTHER)
    if image.size & g.cluster_mask:
        _zero_tail(image, writer, min(size, g.clusters(image.size) << g.cluster_bits))
    if l1_entries > len(writer.map.l1):
        grow_l1(writer, l1_entries)
    try:
        if conceal is not None:
            image.size = writer.size = size  # here in memory; in the file only when nothing wrong can be seen there
            conceal()
        writer.checkpoint()
    except BaseException:
        image.size = writer.size = old
        raise
    _set_size(image, writer, size)


def _zero_tail(image: Qcow2, writer: Writer, end: int) -> None:
    """Zeros the rest of the last cluster, up to ``end``, which the guest could not see so far."""
    at = image.size
    while at < end:
        run = image.mapping.extent_at(at, end - at)
        if run.kind in (DATA, SPECIAL):
            _zero_run(image, writer, run)
        at = run.end


def _zero_run(image: Qcow2, writer: Writer, run: Extent) -> None:
    """Writes zeros to a run behind the disk's end."""
    target = image.children[image.data_child]
    place = writer.in_place(run.offset, run.length)
    if place >= 0:
        _put_zeros(image, target, run.offset, run.length, place)
        return
    done = 0
    while done < run.length:
        placed = writer.reserve(run.offset + done, run.length - done)
        try:
            for part in placed.extents:
                _put_zeros(image, target, part.offset, part.length, part.file_offset)
                done += part.length
            for fill in placed.fills:
                stored = seal(image, memoryview(_stored(image, fill)), fill.offset, fill.file_offset)
                target.pwrite(fill.file_offset, stored)
        except BaseException:
            placed.abort()
            raise
        placed.publish()


def _put_zeros(image: Qcow2, target: Node, offset: int, length: int, place: int) -> None:
    """Makes guest bytes that lie at ``place`` read as zeros."""
    if image.cipher is None:
        target.write_zeros(place, length)
    else:
        target.pwrite(place, seal(image, memoryview(bytes(length)), offset, place))


def _stored(image: Qcow2, fill: Extent) -> bytearray:
    """What this layer has for a range, up to the disk's end; zeros behind it."""
    found = bytearray(fill.length)
    at, end = fill.offset, min(fill.offset + fill.length, image.size)
    while at < end:
        run = image.mapping.extent_at(at, end - at)
        part = memoryview(found)[at - fill.offset : run.end - fill.offset]
        child = image.children[run.child]
        if run.kind == SPECIAL:
            image.decode(run, memoryview(bytearray(child.pread(run.file_offset, run.stored))), part)
        elif run.kind == DATA:
            child.readv([(run.file_offset, part)])
            unseal(image, part, run)
        at = run.end
    return found


def _grow_data_file(data_file: Node, old: int, size: int, preallocation: str, zeroed: bool) -> None:
    """Makes room for a larger disk. ``zeroed``: the map will say that there is data, so what may be there must go."""
    if zeroed and data_file.size > old:
        data_file.write_zeros(old, min(size, data_file.size) - old, unmap=True)
    if data_file.size < size:
        data_file.resize(size, preallocation=preallocation if preallocation in ("falloc", "full") else "off")
        data_file.flush()


def grow_l1(writer: Writer, entries: int) -> None:
    """Moves the L1 table to a larger place."""
    g, mapping = writer.geometry, writer.map
    clusters = g.clusters(entries * 8)
    writer.file.announce("l1_grow_alloc_table")
    first = writer.take_adjoining(clusters)
    writer.checkpoint()  # the new place is counted before anything says that the table is there
    table = array("Q", mapping.l1)
    table.extend([0] * (entries - len(table)))
    offset = first << g.cluster_bits
    writer.file.announce("l1_grow_write_table")
    writer.file.writev([(offset, big_endian(table))])
    writer.file.flush()
    writer.file.announce("l1_grow_activate_table")
    writer.write_header(AT_L1, struct.pack(">IQ", entries, offset))
    writer.switch_l1(table, offset)


# -- shrinking -----------------------------------------------------------------------------------------


def _shrink(image: Qcow2, writer: Writer, size: int) -> None:
    writer.checkpoint()
    writer.file.announce("l1_shrink_write_table")
    _set_size(image, writer, size)
    writer.file.announce("l1_shrink_free_l2_clusters")
    _drop(writer, writer.geometry.clusters(size), Cause.ALWAYS)
    if writer.data_file is not None and writer.data_file.size > size:
        _shorten(writer.data_file, size)


def make_empty(image: Qcow2) -> None:
    """See ``Format.make_empty``. Raises ImageError for a read-only image."""
    if image.writer is None:
        raise ImageError(f"{image.children[0].filename}: is open read-only")
    image.writer.checkpoint()
    image.writer.file.announce("empty_image_prepare")
    _drop(image.writer, 0, Cause.SNAPSHOT)


def _drop(writer: Writer, first: int, cause: Cause) -> None:
    """Takes all guest clusters from ``first`` on off the map, tables too, and cuts off what is free at the end."""
    g = writer.geometry
    _unmap(writer, first, len(writer.map.l1) << g.l2_bits, cause)
    writer.drop_tables(-(-first >> g.l2_bits), cause)
    writer.checkpoint()
    writer.drop_blocks()
    writer.checkpoint()
    _trim(writer)


def _trim(writer: Writer) -> None:
    """Cuts off what lies behind the last cluster in use, where the storage can be made smaller."""
    end = writer.refcounts.end() << writer.geometry.cluster_bits
    if end < writer.file.size:
        _shorten(writer.file, end)


def _shorten(file: Node, size: int) -> None:
    try:
        file.resize(size)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def _unmap(writer: Writer, first: int, end: int, cause: Cause) -> None:
    """Takes guest clusters off the map."""
    g = writer.geometry
    while first < end:
        if not writer.map.l1[first >> g.l2_bits] & OFFSET_MASK:
            first = ((first >> g.l2_bits) + 1) << g.l2_bits
            continue
        stop = min(end, ((first >> g.slice_bits) + 1) << g.slice_bits)
        writer.unmap(first, stop, cause)
        first = stop


# -- allocating in advance -----------------------------------------------------------------------------


def preallocate(image: Qcow2, writer: Writer, start: int, mode: str) -> None:
    """Gives every cluster from guest offset ``start`` on, none of which has a place, one that reads as zeros.
    ``mode`` metadata: only that; falloc: the file system reserves the space; full: zeros are written to it. A data file
    has the space, and zeros in it, already.

    In an encrypted image what is in such places would not read as zeros: the map calls them zeros, or where it cannot,
    in version 2, they are written. While such an image is made it has no key yet; then they read as anything."""
    veiled = image.cipher is not None
    g, file, own = writer.geometry, writer.file, writer.data_file is None
    start += -start & g.cluster_mask
    if mode != "metadata" and own:
        # At the end and in one piece, so that the storage can make the space in one go.
        end = g.clusters(file.size)
        writer.refcounts.take_from(end)
        _extend(file, _estimate(writer, end, g.clusters(image.size - start)), mode)
    while start < image.size:
        placed = writer.reserve(start, min(_STEP, image.size - start))
        run = placed.extents[0]
        length = run.length + (-run.length & g.cluster_mask)
        try:
            if veiled and writer.header.version < 3:
                _seal_zeros(image, file, run.offset, length, run.file_offset)
            elif not placed.zeroed and own:
                file.write_zeros(run.file_offset, length)
            # Before the map can name them: what lies beyond the end of the file counts as damage.
            if own:
                _extend(file, run.file_offset + length, mode)
        except BaseException:
            placed.abort()
            raise
        if isinstance(placed, PlacedClusters):
            writer.publish_empty(placed, veiled=veiled and writer.header.version >= 3)
        else:
            placed.publish()
        start += run.length
    writer.checkpoint()
    if mode != "metadata" and own:
        _trim(writer)


def _seal_zeros(image: Qcow2, file: Node, offset: int, length: int, place: int) -> None:
    zeros = memoryview(bytes(min(length, MiB)))
    for at in range(0, length, len(zeros)):
        part = zeros[: length - at]
        file.pwrite(place + at, seal(image, part, offset + at, place + at))


def _estimate(writer: Writer, start: int, clusters: int) -> int:
    """Where the file will end when ``clusters`` are allocated from host cluster ``start`` on, with their tables."""
    g = writer.geometry
    total = clusters + (clusters >> g.l2_bits) + 2
    total += (total >> g.block_bits) + 2
    return (start + total) << g.cluster_bits


def _extend(file: Node, size: int, mode: str) -> None:
    if size > file.size:
        file.resize(size, preallocation="off" if mode == "metadata" else mode)
