"""Changing what was chosen when an image was created: version, refcount width, lazy refcounts, size, key slots.

Called with no other request in flight. Every step is durable before the next begins, and each leaves a sound image
wherever a crash ends it. The header changes by one write within its first sector.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING, Final

from diskwright.core.options import describe
from diskwright.errors import DiskwrightError, ImageError, OptionError, UnsupportedFeature
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.encryption import amend_encryption
from diskwright.formats.qcow2.header import Header, feature_table
from diskwright.formats.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO
from diskwright.formats.qcow2.mapping import read_table
from diskwright.formats.qcow2.ordering import Cause
from diskwright.units import SECTOR, align_up, is_power_of_two

if TYPE_CHECKING:
    from diskwright.core.driver import Progress
    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.options import Qcow2AmendOptions
    from diskwright.formats.qcow2.writing import Writer

_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_AT_COMPATIBLE: Final = 80
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")


def amend(
    image: Qcow2,
    options: Qcow2AmendOptions,
    resize: Callable[[int], None],
    progress: Progress | None,
    *,
    force: bool,
) -> None:
    """See ``Format.amend``. An upgrade comes first and a downgrade last, so that what is in between is possible."""
    if image.writer is None:
        raise ImageError(f"{image.children[0].filename}: is open read-only")
    report = progress or _unheard
    report(0, 1)
    old = image.header.version
    version = old if options.compat is None else _VERSIONS.get(options.compat, 0)
    _check(image, options, version)
    if version > old:
        _upgrade(image)
    slots = _about_encryption(options)
    if slots:
        amend_encryption(image, slots, force=force)
    order = image.header.refcount_order
    if options.refcount_bits is not None and options.refcount_bits != 1 << order:
        from diskwright.formats.qcow2.refcount_width import change_width

        change_width(image, options.refcount_bits.bit_length() - 1, report)
    if options.data_file is not None:
        _name_data_file(image, options.data_file)
    if options.data_file_raw is False and image.header.autoclear_features & fields.RAW_DATA_FILE:
        new = copy(image.header)
        new.autoclear_features &= ~fields.RAW_DATA_FILE
        _commit(image, new)
    if options.lazy_refcounts is not None:
        _set_lazy(image, options.lazy_refcounts)
    if options.size is not None and align_up(options.size, SECTOR) != image.size:
        resize(align_up(options.size, SECTOR))
    if version < old:
        _downgrade(image, report)
    report(1, 1)


def _about_encryption(options: Qcow2AmendOptions) -> dict[str, object]:
    """Those of the options that are given and concern key slots."""
    names = [info for info in describe(type(options)) if info.name.startswith("encrypt.")]
    return {info.name: value for info in names if (value := getattr(options, info.field)) is not None}


def _unheard(done: int, total: int) -> None:
    return None


def _check(image: Qcow2, options: Qcow2AmendOptions, version: int) -> None:
    """Refuses what cannot be, before anything is changed. Raises OptionError."""
    header = image.header
    if not version:
        raise OptionError(f"Unknown compatibility level {options.compat}")
    width = options.refcount_bits
    if width is not None:
        if not is_power_of_two(width) or width > 64:
            raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
        if version < 3 and width != 16:
            raise OptionError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or "
                "greater)"
            )
    if options.data_file is not None and not header.incompatible_features & fields.DATA_FILE:
        raise OptionError("data-file can only be set for images that use an external data file")
    if options.data_file_raw and not header.autoclear_features & fields.RAW_DATA_FILE:
        raise OptionError("data-file-raw cannot be set on existing images")
    if options.backing_file is not None or options.backing_fmt is not None:
        hint = header.backing
        if hint is None or (options.backing_file, options.backing_fmt) != (hint.filename, hint.format):
            raise OptionError("Cannot amend the backing file")
    if options.lazy_refcounts and version < 3 and not header.compatible_features & fields.LAZY_REFCOUNTS:
        raise OptionError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    if version < header.version:
        _check_downgrade(image, 1 << header.refcount_order if width is None else width, options.size)


def _set_lazy(image: Qcow2, lazy: bool) -> None:
    header = image.header
    if bool(header.compatible_features & fields.LAZY_REFCOUNTS) == lazy:
        return
    new = header.compatible_features ^ fields.LAZY_REFCOUNTS
    assert image.writer is not None
    image.writer.write_header(_AT_COMPATIBLE, struct.pack(">Q", new))
    header.compatible_features = new


def _name_data_file(image: Qcow2, name: str) -> None:
    new = copy(image.header)
    others = [extension for extension in new.extensions if extension[0] != fields.EXT_DATA_FILE]
    new.extensions = [*others, (fields.EXT_DATA_FILE, os.fsencode(name))] if name else others
    _commit(image, new)


# -- the header ----------------------------------------------------------------------------------------


def _commit(image: Qcow2, header: Header) -> None:
    """Puts ``header`` in the place of the image's, all of it or nothing, and goes on with what is in the file.

    Its first sector is written in one piece. What does not fit in there is written and durable before, and only to
    sectors the old header does not use. Raises UnsupportedFeature when that cannot be done.
    """
    writer = image.writer
    assert writer is not None
    writer.close()
    file, cluster_size = image.children[0], image.cluster_size
    first, rest = _arranged(header, _used(image.header, file), cluster_size)
    try:
        for offset, data in rest:
            file.pwrite(offset, data)
        if rest:
            file.flush()
        file.pwrite(0, first)
        file.flush()
        _tidy(file, header, rest, cluster_size)
    finally:
        with suppress(DiskwrightError, OSError):  # an error that led here is the one to tell
            image.reload()


def _used(header: Header, file: Node) -> int:
    """How many of the first bytes of the file mean anything."""
    extensions = sum(8 + align_up(len(data), 8) for _, data in header.extensions) + 8
    return max(header.header_length + extensions, header.backing_file_offset + len(header.backing_file))


def _arranged(header: Header, used: int, cluster_size: int) -> tuple[bytes, list[tuple[int, bytes]]]:
    """The first sector, and the pieces ``(offset, data)`` that come before it."""
    whole = header.encode()
    sector = min(SECTOR, cluster_size)
    if len(whole) <= sector or used <= sector:
        # The room behind the first sector is free, if it is needed at all.
        return whole[:sector].ljust(sector, b"\0"), [(sector, whole[sector:])] if len(whole) > sector else []
    for without in ((), (fields.EXT_FEATURE_NAMES,)):
        smaller = copy(header)
        smaller.extensions = [extension for extension in header.extensions if extension[0] not in without]
        name, smaller.backing_file = smaller.backing_file, b""
        beginning = bytearray(smaller.encode())
        start = align_up(used, sector)
        if len(beginning) <= sector and start + len(name) <= cluster_size:
            # Behind all that the old header has there is room for the name: it may lie anywhere in the cluster.
            struct.pack_into(">QI", beginning, 8, start, len(name))
            return bytes(beginning).ljust(sector, b"\0"), [(start, name)]
    raise UnsupportedFeature(
        "The header cannot be changed safely: its extensions and the backing file name take too much room"
    )


def _tidy(file: Node, header: Header, rest: list[tuple[int, bytes]], cluster_size: int) -> None:
    """Zeros what the old header left in its cluster. Nothing depends on it."""
    at = min(SECTOR, cluster_size)
    for offset, data in [*rest, (cluster_size, b"")]:
        if at < offset:
            file.pwrite(at, bytes(offset - at))
        at = offset + len(data)
    file.flush()


# -- version 3 -----------------------------------------------------------------------------------------


def _upgrade(image: Qcow2) -> None:
    new = copy(image.header)
    new.version = 3
    new.incompatible_features = new.compatible_features = new.autoclear_features = 0
    new.extensions = [extension for extension in new.extensions if extension[0] != fields.EXT_FEATURE_NAMES]
    if image.cluster_size > 4096:
        new.extensions.append((fields.EXT_FEATURE_NAMES, feature_table()))
    _commit(image, new)


# -- version 2 -----------------------------------------------------------------------------------------


def _check_downgrade(image: Qcow2, refcount_bits: int, size: int | None) -> None:
    """Raises OptionError for what version 2 cannot say."""
    header = image.header
    if header.incompatible_features & fields.DATA_FILE:
        raise OptionError("Cannot downgrade an image with a data file")
    if refcount_bits != 16:
        raise OptionError("compat=0.10 requires refcount_bits=16")
    disk = image.size if size is None else align_up(size, SECTOR)
    for snapshot in _snapshots(image):
        # Both are told in the part of its entry that version 2 does not promise to keep.
        if snapshot.disk_size not in (None, disk) or snapshot.vm_state:
            raise OptionError("Internal snapshots prevent downgrade of image")
    known = fields.DIRTY | fields.COMPRESSION
    if header.incompatible_features & ~known:
        raise OptionError(
            f"Cannot downgrade an image with incompatible features {header.incompatible_features & ~known:#x} set"
        )
    if header.compression_type and any(entry & COMPRESSED for entry in _different_entries(image)):
        raise OptionError(
            f"Cannot downgrade an image with {header.compression} compression type and existing compressed clusters"
        )
    if header.extension(fields.EXT_BITMAPS) is not None:
        raise OptionError("Cannot downgrade an image with persistent bitmaps, which would be lost; remove them first")
    for entry in _snapshot_entries(image):
        if entry & ZERO and not entry & COMPRESSED:
            raise OptionError("Cannot downgrade an image of which an internal snapshot has zero clusters")


class _Snapshot:
    """Of a snapshot, what a downgrade depends on. ``disk_size`` None: the entry does not say."""

    def __init__(self, l1_offset: int, l1_size: int, vm_state: int, disk_size: int | None) -> None:
        self.l1_offset, self.l1_size, self.vm_state, self.disk_size = l1_offset, l1_size, vm_state, disk_size


def _snapshots(image: Qcow2) -> Iterator[_Snapshot]:
    """Opening the image for writing has shown that their table is no longer than accepted."""
    file, header = image.children[0], image.header
    at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        offset, size, id_length, name_length, *_, state, extra_length = _SNAPSHOT.unpack(file.pread(at, _SNAPSHOT.size))
        extra = file.pread(at + _SNAPSHOT.size, min(extra_length, 16))
        if len(extra) >= 8:
            state = struct.unpack_from(">Q", extra)[0]
        disk = struct.unpack_from(">Q", extra, 8)[0] if len(extra) >= 16 else None
        yield _Snapshot(offset, size, state, disk)
        at += align_up(_SNAPSHOT.size + extra_length + id_length + name_length, 8)


def _different_entries(image: Qcow2) -> Iterator[int]:
    """Entries of all L2 tables, those of snapshots too, each table's different values once."""
    for number in range(len(image.mapping.l1) << (image.header.geometry.l2_bits - image.header.geometry.slice_bits)):
        items = image.mapping.load(number)
        if items is not None:
            yield from set(items)
    yield from _snapshot_entries(image)


def _snapshot_entries(image: Qcow2) -> Iterator[int]:
    file, cluster_size = image.children[0], image.cluster_size
    seen: set[int] = set()
    for snapshot in _snapshots(image):
        for entry in read_table(file, "l1_table_offset of a snapshot", snapshot.l1_offset, snapshot.l1_size):
            place = entry & OFFSET_MASK
            if place and place not in seen:
                seen.add(place)
                yield from set(read_table(file, "L1 entry of a snapshot", place, cluster_size // 8))


def _downgrade(image: Qcow2, progress: Progress) -> None:
    writer = image.writer
    assert writer is not None
    _write_out_zeros(image, writer, progress)
    new = copy(image.header)
    new.version = 2
    # Dirty: its refcounts were made right when it was opened. Compression: no cluster is compressed, or it is zlib.
    new.incompatible_features = new.compatible_features = new.autoclear_features = 0
    new.compression_type = 0
    new.header_length = fields.V2_LENGTH
    new.extensions = [extension for extension in new.extensions if extension[0] != fields.EXT_FEATURE_NAMES]
    _commit(image, new)


def _write_out_zeros(image: Qcow2, writer: Writer, progress: Progress) -> None:
    """Leaves no zero cluster: where space is kept, or a backing file would show through, zeros are written; elsewhere
    what is not on the map reads as zeros anyway. At every moment the guest reads the same."""
    g = writer.geometry
    total = len(writer.map.l1) << (g.l2_bits - g.slice_bits)
    for number in range(total):
        for first, end, kept in _zero_runs(writer.map.load(number), bool(image.header.backing_file)):
            start = number << g.slice_bits
            if kept and (start + first) << g.cluster_bits < image.size:
                _fill(writer, start + first, start + end)
            else:
                writer.unmap(start + first, start + end, Cause.OTHER)
        progress(number, total + 1)
    writer.checkpoint()


def _zero_runs(items: array[int] | None, backed: bool) -> list[tuple[int, int, bool]]:
    """Runs ``(first, end, whether zeros must be written)`` of zero clusters in a slice, by index."""
    if items is None:
        return []
    import numpy as np

    entries = np.frombuffer(items, np.uint64)
    zero = entries & np.uint64(COMPRESSED | ZERO) == np.uint64(ZERO)
    kept = zero & ((entries & np.uint64(OFFSET_MASK) != 0) | backed)
    state = zero.astype(np.int8) + kept
    cuts = np.flatnonzero(np.diff(state)) + 1
    starts = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), len(items)]
    return [(first, end, int(state[first]) == 2) for first, end in zip(starts, ends, strict=True) if state[first]]


def _fill(writer: Writer, first: int, end: int) -> None:
    """Writes zeros to guest clusters, which read as zeros so far."""
    g = writer.geometry
    while first < end:
        placed = writer.reserve(first << g.cluster_bits, (end - first) << g.cluster_bits)
        run = placed.extents[0]
        try:
            writer.file.write_zeros(run.file_offset, run.length)
        except BaseException:
            placed.abort()
            raise
        placed.publish()
        first += run.length >> g.cluster_bits
