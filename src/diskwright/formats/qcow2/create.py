"""Making an image. Its metadata lies where QEMU puts it: header, refcount table, refcount block, L1 table.

Nothing has to be durable in a certain order while an image is being made: until the last step there is none.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, cast

from diskwright.core.leases import Leases
from diskwright.errors import LimitExceeded, OptionError
from diskwright.formats.qcow2 import encryption
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.header import Header, feature_table
from diskwright.formats.qcow2.layout import MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS, MIN_EXTENDED_CLUSTER_BITS
from diskwright.formats.qcow2.options import Qcow2CreateOptions, Qcow2Options
from diskwright.units import MAX_BACKING_NAME, SECTOR, align_up, is_power_of_two

if TYPE_CHECKING:
    from diskwright.codecs.luks import Luks1
    from diskwright.core.node import Node


def create(file: Node, options: Qcow2CreateOptions, data_file: Node | None = None) -> None:
    """See ``Format.create_from``; ``data_file`` is the external data file, empty and open for writing. Raises
    OptionError for options that do not go together, before anything is written."""
    header = plan(options)
    if (data_file is None) is not (header.data_file is None):
        raise OptionError("An external data file has to be made before the image")
    luks = encryption.plan(options, header)
    beginning = header.encode()
    size = header.size
    unordered = cast("Node", _Unflushed(file))
    # The image begins as one of no size, and then grows, as every image would.
    empty = Header(**{**vars(header), "size": 0})
    cluster_size = 1 << header.cluster_bits
    block = bytearray(cluster_size)
    _count_first_clusters(block, header.refcount_order)
    table = struct.pack(">Q", 2 * cluster_size).ljust(cluster_size, b"\0")
    start = (empty.encode() if beginning else b"").ljust(cluster_size, b"\0")
    file.writev([(0, memoryview(start + table + bytes(block)))])
    _grow(unordered, empty, size, options, luks, data_file)


def plan(options: Qcow2CreateOptions) -> Header:
    """The header of the image that ``options`` ask for, with a refcount table and no L1 table yet."""
    version = 2 if options.compat in ("0.10", "v2") else 3
    bits = options.cluster_size.bit_length() - 1
    if not is_power_of_two(options.cluster_size) or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise OptionError(
            f"Cluster size must be a power of two between {1 << MIN_CLUSTER_BITS} and {1 << (MAX_CLUSTER_BITS - 10)}k"
        )
    width = options.refcount_bits
    if not is_power_of_two(width) or width > 64:
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and width != 16:
        raise OptionError("Different refcount widths than 16 bits require compatibility level 1.1 or above")
    if version < 3 and options.lazy_refcounts:
        raise OptionError("Lazy refcounts need compatibility level 1.1 or above")
    if version < 3 and options.compression_type != "zlib":
        raise OptionError("Compression types other than zlib need compatibility level 1.1 or above")
    if options.extended_l2 and version < 3:
        raise OptionError(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if options.extended_l2 and bits < MIN_EXTENDED_CLUSTER_BITS:
        least = 1 << MIN_EXTENDED_CLUSTER_BITS
        raise OptionError(f"Extended L2 entries are only supported with cluster sizes of at least {least} bytes")
    if options.backing_file is not None and options.preallocation != "off" and not options.extended_l2:
        raise OptionError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    header = Header(version=version, cluster_bits=bits, size=align_up(options.size, SECTOR))
    header.refcount_order = width.bit_length() - 1
    header.refcount_table_offset, header.refcount_table_clusters = options.cluster_size, 1
    if options.lazy_refcounts:
        header.compatible_features |= fields.LAZY_REFCOUNTS
    if options.compression_type != "zlib":
        header.incompatible_features |= fields.COMPRESSION
        header.compression_type = fields.COMPRESSION_NAMES.index(options.compression_type)
    if options.extended_l2:
        header.incompatible_features |= fields.EXTENDED_L2
    _check_size(header)
    _name_backing(header, options)
    _name_data_file(header, options)
    if version >= 3 and options.cluster_size > 4096:  # in smaller clusters the room is needed for a file name
        header.extensions.append((fields.EXT_FEATURE_NAMES, feature_table()))
    return header


def _check_size(header: Header) -> None:
    g = header.geometry
    if g.l1_entries(header.size) * 8 > MAX_L1_BYTES:
        most = (MAX_L1_BYTES // 8) << (g.l2_bits + g.cluster_bits)
        raise LimitExceeded(
            f"The image size is too large: with clusters of {g.cluster_size} bytes a disk has at most {most} bytes"
        )


def _name_backing(header: Header, options: Qcow2CreateOptions) -> None:
    if options.backing_fmt is not None:
        if options.backing_file is None:
            raise OptionError("Backing format cannot be used without backing file")
        header.extensions.append((fields.EXT_BACKING_FORMAT, os.fsencode(options.backing_fmt)))
    if options.backing_file is not None:
        header.backing_file = os.fsencode(options.backing_file)
        if not 0 < len(header.backing_file) <= MAX_BACKING_NAME:
            raise OptionError(f"A backing file name has 1 to {MAX_BACKING_NAME} bytes")


def _name_data_file(header: Header, options: Qcow2CreateOptions) -> None:
    if options.data_file is None:
        if options.data_file_raw:
            raise OptionError("data-file-raw requires data-file")
        return
    if options.data_file_raw and options.backing_file is not None:
        raise OptionError("Backing file and data-file-raw cannot be used at the same time")
    if header.version < 3:
        raise OptionError(
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    name = os.fsencode(options.data_file)
    if not 0 < len(name) <= MAX_BACKING_NAME or b"\0" in name:
        raise OptionError(f"A data file name has 1 to {MAX_BACKING_NAME} bytes")
    header.incompatible_features |= fields.DATA_FILE
    if options.data_file_raw:
        header.autoclear_features |= fields.RAW_DATA_FILE
    header.extensions.append((fields.EXT_DATA_FILE, name))


def _count_first_clusters(block: bytearray, order: int) -> None:
    """Refcounts of 1 for header, refcount table and this block."""
    for cluster in range(3):
        if order < 3:
            per = 8 >> order
            block[cluster // per] |= 1 << ((cluster % per) << order)
        else:
            width = 1 << (order - 3)
            block[(cluster + 1) * width - 1] = 1


def _grow(
    file: Node, header: Header, size: int, chosen: Qcow2CreateOptions, luks: Luks1 | None, data_file: Node | None
) -> None:
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.resize import resize

    image = Qcow2(file, header, Qcow2Options(), Leases(), data_file)
    image.start_writer()
    resize(image, size, preallocation=chosen.preallocation)
    if luks is not None:
        assert image.writer is not None
        encryption.store(image.writer, luks, chosen)
    image.close()


class _Unflushed:
    """A node whose flushes are left out."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def flush(self) -> None:
        return
