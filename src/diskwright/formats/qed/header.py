"""qed: the header. Source: "QED Image File Format", sections Header and Features."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import BackingHint
from diskwright.errors import CorruptImage, ImageError, LimitExceeded, OptionError, UnsupportedFeature
from diskwright.units import MAX_BACKING_NAME, SECTOR, align_up, is_power_of_two

if TYPE_CHECKING:
    from diskwright.core.node import Node

MAGIC: Final = b"QED\0"

HAS_BACKING: Final = 1
NEED_CHECK: Final = 2
"""The image has to be checked before it is used."""
BACKING_IS_RAW: Final = 4
KNOWN_FEATURES: Final = HAS_BACKING | NEED_CHECK | BACKING_IS_RAW
AT_FEATURES: Final = 16

MIN_CLUSTER: Final = 4096
MAX_CLUSTER: Final = 64 << 20
MAX_TABLE: Final = 16
"""Clusters of a table at most."""

_HEADER: Final = struct.Struct("<4sIIIQQQQQII")
NAME_PLACES: Final = (64, 64 + 1024)
"""Where in the header's cluster the name of a backing file is put: a new one never over the one in use."""


@dataclass
class Header:
    """The fields under the specification's names. ``table_size`` and ``header_size`` are in clusters."""

    magic: bytes
    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    image_size: int
    backing_filename_offset: int = 0
    backing_filename_size: int = 0

    def encode(self) -> bytes:
        return _HEADER.pack(*vars(self).values())

    @property
    def table_bytes(self) -> int:
        return self.table_size * self.cluster_size

    @property
    def table_entries(self) -> int:
        return self.table_bytes // 8

    @property
    def most(self) -> int:
        """The largest disk in bytes that such tables can describe."""
        return most(self.cluster_size, self.table_size)


def most(cluster_size: int, table_size: int) -> int:
    entries = cluster_size * table_size // 8
    return entries * entries * cluster_size


def plan(size: int, cluster_size: int, table_size: int) -> Header:
    """The header of a new image. Raises OptionError."""
    if not is_power_of_two(cluster_size) or not MIN_CLUSTER <= cluster_size <= MAX_CLUSTER:
        raise OptionError(f"QED cluster size must be within range [{MIN_CLUSTER}, {MAX_CLUSTER}] and power of 2")
    if not is_power_of_two(table_size) or not 1 <= table_size <= MAX_TABLE:
        raise OptionError(f"QED table size must be within range [1, {MAX_TABLE}] and power of 2")
    size = align_up(size, SECTOR)
    if size > most(cluster_size, table_size):
        raise OptionError(
            "QED image size must be a non-zero multiple of cluster size and less than "
            f"{most(cluster_size, table_size)} bytes"
        )
    return Header(MAGIC, cluster_size, table_size, 1, 0, 0, 0, cluster_size, size)


def read_header(file: Node) -> tuple[Header, BackingHint | None]:
    """The header, checked. Raises CorruptImage, UnsupportedFeature, ImageError or LimitExceeded."""
    path = file.filename
    if file.size < _HEADER.size:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than a QED header")
    header = Header(*_HEADER.unpack(file.pread(0, _HEADER.size)))
    if header.magic != MAGIC:
        raise ImageError("Image not in QED format")
    if header.features & ~KNOWN_FEATURES:
        raise UnsupportedFeature(f"Unsupported QED features: {header.features & ~KNOWN_FEATURES:x}")
    cluster = header.cluster_size
    if not is_power_of_two(cluster) or not MIN_CLUSTER <= cluster <= MAX_CLUSTER:
        raise CorruptImage(path, "cluster_size", cluster, 4, f"not a power of two from {MIN_CLUSTER} to {MAX_CLUSTER}")
    if not is_power_of_two(header.table_size) or header.table_size > MAX_TABLE:
        raise CorruptImage(path, "table_size", header.table_size, 8, f"a power of two up to {MAX_TABLE} is possible")
    if header.image_size % SECTOR or header.image_size > header.most:
        raise CorruptImage(path, "image_size", header.image_size, 48, f"its tables can describe {header.most} bytes")
    l1 = header.l1_table_offset
    if l1 % cluster or l1 < max(1, header.header_size) * cluster or l1 + header.table_bytes > file.size:
        raise CorruptImage(path, "l1_table_offset", f"{l1:#x}", 40, "no table can lie there")
    if header.header_size > (1 << 30) // cluster:
        raise LimitExceeded(f"{path}: has a header of {header.header_size} clusters")
    return header, _backing(file, header)


def _backing(file: Node, header: Header) -> BackingHint | None:
    if not header.features & HAS_BACKING:
        return None
    path, length = file.filename, header.backing_filename_size
    if length > MAX_BACKING_NAME:
        raise LimitExceeded(
            f"{path}: names a backing file with {length} bytes; at most {MAX_BACKING_NAME} are possible"
        )
    if header.backing_filename_offset + length > header.header_size * header.cluster_size:
        raise CorruptImage(path, "backing_filename_offset", header.backing_filename_offset, 56, "behind the header")
    name = file.pread(header.backing_filename_offset, length) if length else b""
    # A name ends at its first zero byte, if it has one.
    text = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return BackingHint(text, "raw" if header.features & BACKING_IS_RAW else None)
