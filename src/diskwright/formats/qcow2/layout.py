"""The numbers of the qcow2 format: bits, masks, limits, and the geometry that follows from the cluster size.

Sections are those of the format's specification, ``docs/interop/qcow2`` of the QEMU project.
"""

from __future__ import annotations

from typing import Final

from diskwright.units import MiB

MAGIC: Final = b"QFI\xfb"

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
"""2 MiB: no implementation makes larger clusters, and QEMU opens none."""

# L1 and L2 table entries, section "Cluster mapping".
COPIED: Final = 1 << 63
"""Refcount is exactly one: may be overwritten in place."""
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Host offset of an L2 table (in L1 entries) or of a standard cluster (in L2 entries)."""
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
"""Of standard cluster descriptors."""

# Extended L2 entries, section "Extended L2 Entries": a second word with two bits for each of 32 subclusters.
SUBCLUSTER_BITS: Final = 5
"""log2 of the subclusters of a cluster."""
ALL_SUBCLUSTERS: Final = (1 << 32) - 1
"""The lower half of the bitmap: which subclusters are allocated. The upper half: which read as zeros."""
ALL_ZERO: Final = ALL_SUBCLUSTERS << 32
MIN_EXTENDED_CLUSTER_BITS: Final = MIN_CLUSTER_BITS + SUBCLUSTER_BITS
"""16 KiB: a subcluster has at least 512 bytes."""

MAX_HOST_OFFSET: Final = 1 << 56
"""Tables can point no further."""

REFTABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
REFTABLE_RESERVED: Final = 0x1FF

# Limits: each bounds memory taken in proportion to a header field. They are those of QEMU, so that no image
# that opens there is refused here.
MAX_L1_BYTES: Final = 32 * MiB
"""Four million L2 tables: 2 EiB at 2 MiB clusters, 128 GiB at 512 byte clusters."""
MAX_REFTABLE_BYTES: Final = 8 * MiB
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE_BYTES: Final = 64 * MiB
"""A thousand bytes for each of the most snapshots there can be."""
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = 64 * MiB
"""The largest directory of that many bitmaps with names of the longest kind."""

MAX_SLICE_BYTES: Final = 65536
"""Longer L2 tables and refcount blocks are cached in pieces of this size: a table of 2 MiB would displace
much that is in use for the few entries that are."""

CACHE_BYTES: Final = 32 * MiB
"""Default bound of cached tables. At 64 KiB clusters that is L2 entries for 256 GiB, or for 128 GiB together with
refcounts for as much when the image is written to."""


class Geometry:
    """What follows from the cluster size and the refcount width. All sizes in bytes, all ``*_bits`` log2."""

    __slots__ = (
        "block_bits",
        "cluster_bits",
        "cluster_mask",
        "cluster_size",
        "compressed_mask",
        "entry_words",
        "extended",
        "l2_bits",
        "ref_slice_bits",
        "refcount_order",
        "sectors_mask",
        "sectors_shift",
        "slice_bits",
        "slice_bytes",
        "unit_bits",
    )

    def __init__(self, cluster_bits: int, refcount_order: int, *, extended: bool = False) -> None:
        """``extended``: whether L2 entries have two words, and clusters 32 subclusters."""
        self.cluster_bits, self.refcount_order, self.extended = cluster_bits, refcount_order, extended
        self.entry_words = 2 if extended else 1
        """Words of 64 bits in an L2 entry."""
        self.unit_bits = cluster_bits - SUBCLUSTER_BITS if extended else cluster_bits
        """log2 of the least a map can say anything about: a subcluster where there are any, else a cluster."""
        self.cluster_size = 1 << cluster_bits
        self.cluster_mask = self.cluster_size - 1
        self.l2_bits = cluster_bits - 2 - self.entry_words
        """Entries of an L2 table."""
        self.block_bits = cluster_bits + 3 - refcount_order
        """Clusters counted by a refcount block."""
        self.slice_bytes = min(self.cluster_size, MAX_SLICE_BYTES)
        self.slice_bits = self.slice_bytes.bit_length() - 1 - 2 - self.entry_words
        """Entries of an L2 slice."""
        self.ref_slice_bits = self.slice_bytes.bit_length() - 1 + 3 - refcount_order
        """Clusters counted by a slice of a refcount block."""
        # Compressed clusters descriptor: x = 62 - (cluster_bits - 8) separates offset and sectors.
        self.sectors_shift = 62 - (cluster_bits - 8)
        self.sectors_mask = (1 << (cluster_bits - 8)) - 1
        self.compressed_mask = (1 << self.sectors_shift) - 1

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """``(file_offset, length)`` of the whole sectors a compressed cluster's descriptor speaks of."""
        offset = entry & self.compressed_mask
        sectors = ((entry >> self.sectors_shift) & self.sectors_mask) + 1
        return offset, sectors * 512 - (offset & 511)

    def clusters(self, length: int) -> int:
        """How many clusters ``length`` bytes need."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def l1_entries(self, size: int) -> int:
        """How many L1 entries a disk of ``size`` bytes needs."""
        shift = self.cluster_bits + self.l2_bits
        return (size + (1 << shift) - 1) >> shift
