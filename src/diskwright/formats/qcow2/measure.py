"""How large an image will be: the tables that follow from the disk's size, and the clusters of what it holds."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import MeasuredSource, Measurement
from diskwright.errors import LimitExceeded, OptionError
from diskwright.formats.qcow2.encryption import planned
from diskwright.formats.qcow2.layout import MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS
from diskwright.units import SECTOR, align_up, is_power_of_two

if TYPE_CHECKING:
    from diskwright.formats.qcow2.options import Qcow2CreateOptions

_EXTENDED_L2_MIN_CLUSTER: Final = 16384
_BITMAP_ENTRY: Final = struct.Struct(">QIIBBHI")


def measure(options: Qcow2CreateOptions, source: MeasuredSource | None) -> Measurement:
    """See ``Format.measure``. Raises OptionError for a geometry that does not exist, LimitExceeded for a disk that
    is too large for it."""
    cluster_size, order, entry_bytes = _geometry(options)
    size = align_up(align_up(options.size, SECTOR), cluster_size)
    clusters = size // cluster_size
    l2_tables = -(-clusters * entry_bytes // cluster_size)
    if l2_tables * 8 > MAX_L1_BYTES:
        raise LimitExceeded("The image size is too large (try using a larger cluster size)")
    tables = 1 + l2_tables + -(-l2_tables * 8 // cluster_size)  # header, L2, L1
    metadata = (tables + _refcount_clusters(clusters + tables, cluster_size, order)) * cluster_size
    if options.encrypt_format == "luks":
        metadata += align_up(planned(options).payload_start, cluster_size)
    if options.preallocation in ("falloc", "full"):
        data = size
    elif source is None:
        data = 0
    elif options.backing_file is not None:
        data = size  # nobody can say yet what the backing file will spare us
    else:
        data = source.allocated(cluster_size)
    bitmaps = None
    if source is not None and source.bitmaps is not None and options.compat not in ("0.10", "v2"):
        bitmaps = sum(_bitmap_bytes(source.size, granularity, cluster_size) for granularity, _ in source.bitmaps)
        bitmaps += align_up(sum(_directory_bytes(name) for _, name in source.bitmaps), cluster_size)
    return Measurement(metadata + data, metadata + size, bitmaps)


def _geometry(options: Qcow2CreateOptions) -> tuple[int, int, int]:
    """``(cluster size, refcount order, bytes of an L2 entry)``."""
    cluster_size, width = options.cluster_size, options.refcount_bits
    if not is_power_of_two(cluster_size) or not MIN_CLUSTER_BITS <= cluster_size.bit_length() - 1 <= MAX_CLUSTER_BITS:
        raise OptionError(
            f"Cluster size must be a power of two between {1 << MIN_CLUSTER_BITS} and {1 << (MAX_CLUSTER_BITS - 10)}k"
        )
    version = 2 if options.compat in ("0.10", "v2") else 3
    entry_bytes = 16 if getattr(options, "extended_l2", False) else 8
    if entry_bytes > 8 and version < 3:
        raise OptionError("Extended L2 entries are only supported with compatibility level 1.1 and above "
                          "(use version=v3 or greater)")  # fmt: skip
    if entry_bytes > 8 and cluster_size < _EXTENDED_L2_MIN_CLUSTER:
        raise OptionError(
            f"Extended L2 entries are only supported with cluster sizes of at least {_EXTENDED_L2_MIN_CLUSTER} bytes"
        )
    if not is_power_of_two(width) or width > 64:
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and width != 16:
        raise OptionError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use compat=1.1 or greater)"
        )
    return cluster_size, width.bit_length() - 1, entry_bytes


def _refcount_clusters(counted: int, cluster_size: int, order: int) -> int:
    """Clusters of the refcount blocks and table for ``counted`` other clusters. They count themselves too, so that
    more of them can make more of them necessary."""
    per_block = cluster_size * 8 >> order
    total = 0
    while True:
        blocks = -(-(counted + total) // per_block)
        needed = blocks + -(-blocks * 8 // cluster_size)
        if needed == total:
            return total
        total = needed


def _bitmap_bytes(size: int, granularity: int, cluster_size: int) -> int:
    """What a bitmap of a disk of ``size`` bytes takes with every cluster of it in use: bits and their table."""
    bits = -(-size // granularity)
    clusters = -(-bits // (8 * cluster_size))
    return clusters * cluster_size + align_up(clusters * 8, cluster_size)


def _directory_bytes(name: str) -> int:
    return align_up(_BITMAP_ENTRY.size + len(name.encode(errors="surrogateescape")), 8)
