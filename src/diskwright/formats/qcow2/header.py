"""The qcow2 header and its extensions (specification: sections Header, Header extensions, Feature name table)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import Final

from diskwright.core.driver import BackingHint
from diskwright.core.node import Node
from diskwright.errors import CorruptImage, ImageError, LimitExceeded, UnsupportedFeature
from diskwright.formats.qcow2.layout import (
    MAGIC,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    Geometry,
)
from diskwright.units import MAX_BACKING_NAME, MAX_DISK_SIZE

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
V2_LENGTH: Final = _V2.size  # 72
V3_LENGTH: Final = _V2.size + _V3.size  # 104
LENGTH: Final = 112
"""Header length written by us: with compression_type and its padding."""

# Incompatible features.
DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
DATA_FILE: Final = 1 << 2
COMPRESSION: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
# Compatible features.
LAZY_REFCOUNTS: Final = 1 << 0
# Autoclear features.
BITMAPS: Final = 1 << 0
RAW_DATA_FILE: Final = 1 << 1

EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_ENCRYPTION: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441

COMPRESSION_NAMES: Final = ("zlib", "zstd")

FEATURE_NAMES: Final[tuple[tuple[int, int, str], ...]] = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
"""``(kind, bit, name)``: 0 incompatible, 1 compatible, 2 autoclear. The names are those every tool writes."""

_READABLE: Final = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
"""Incompatible features with which an image can be read here."""

_FEATURE_ENTRY: Final = struct.Struct(">BB46s")

# Where fields that change in place lie.
AT_SIZE: Final = 24
AT_L1: Final = 36
AT_REFTABLE: Final = 48
AT_INCOMPATIBLE: Final = 72
AT_AUTOCLEAR: Final = 88


@dataclass
class Header:
    """The fields, named as in the specification. Version 2 images get the values version 3 would have."""

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = 0
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = LENGTH
    compression_type: int = 0
    backing_file: bytes = b""
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    """``(type, data)`` in file order, without the end marker; unknown ones included."""

    @property
    def geometry(self) -> Geometry:
        extended = bool(self.incompatible_features & EXTENDED_L2)
        return Geometry(self.cluster_bits, self.refcount_order, extended=extended)

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of that type."""
        return next((data for found, data in self.extensions if found == kind), None)

    @property
    def data_file(self) -> str | None:
        """The name of the external data file, '' when the image does not say it, None when there is none."""
        if not self.incompatible_features & DATA_FILE:
            return None
        return os.fsdecode(self.extension(EXT_DATA_FILE) or b"")

    @property
    def raw_data_file(self) -> bool:
        """Whether the data file has to read, by itself, as the guest's disk does."""
        return bool(self.incompatible_features & DATA_FILE and self.autoclear_features & RAW_DATA_FILE)

    @property
    def backing(self) -> BackingHint | None:
        if not self.backing_file:
            return None
        format = self.extension(EXT_BACKING_FORMAT)
        return BackingHint(os.fsdecode(self.backing_file), os.fsdecode(format) if format else None)

    @property
    def compression(self) -> str:
        return COMPRESSION_NAMES[self.compression_type]

    def encode(self) -> bytes:
        """The header, its extensions and the backing file name, as they begin the file.

        Raises ImageError when that is more than a cluster.
        """
        fields = bytearray(LENGTH if self.version >= 3 else V2_LENGTH)
        extensions = bytearray()
        for kind, data in self.extensions:
            extensions += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        extensions += bytes(8)
        self.header_length = len(fields)
        self.backing_file_size = len(self.backing_file)
        self.backing_file_offset = len(fields) + len(extensions) if self.backing_file else 0
        _V2.pack_into(
            fields, 0, MAGIC, self.version, self.backing_file_offset, self.backing_file_size, self.cluster_bits,
            self.size, self.crypt_method, self.l1_size, self.l1_table_offset, self.refcount_table_offset,
            self.refcount_table_clusters, self.nb_snapshots, self.snapshots_offset,
        )  # fmt: skip
        if self.version >= 3:
            _V3.pack_into(
                fields, V2_LENGTH, self.incompatible_features, self.compatible_features, self.autoclear_features,
                self.refcount_order, self.header_length,
            )  # fmt: skip
            fields[V3_LENGTH] = self.compression_type
        encoded = bytes(fields + extensions) + self.backing_file
        if len(encoded) > 1 << self.cluster_bits:
            raise ImageError(
                f"A header of {len(encoded)} bytes does not fit into a cluster of {1 << self.cluster_bits} bytes; "
                "take a larger cluster size or a shorter backing file name"
            )
        return encoded


def feature_table() -> bytes:
    """The data of the feature name table extension."""
    return b"".join(_FEATURE_ENTRY.pack(kind, bit, name.encode()) for kind, bit, name in FEATURE_NAMES)


def read_header(file: Node) -> Header:
    """The checked header of the image in ``file``.

    Raises CorruptImage, LimitExceeded, or UnsupportedFeature for what cannot even be read here.
    """
    path = file.filename
    head = file.pread(0, LENGTH)
    if head[:4] != MAGIC:
        raise CorruptImage(path, "magic", head[:4].hex(), 0, "not a qcow2 image")
    header = Header()
    (
        _, header.version, header.backing_file_offset, header.backing_file_size, header.cluster_bits, header.size,
        header.crypt_method, header.l1_size, header.l1_table_offset, header.refcount_table_offset,
        header.refcount_table_clusters, header.nb_snapshots, header.snapshots_offset,
    ) = _V2.unpack_from(head)  # fmt: skip
    if header.version not in (2, 3):
        raise UnsupportedFeature(f"{path}: qcow2 version {header.version} is not known; versions 2 and 3 are")
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise CorruptImage(
            path, "cluster_bits", header.cluster_bits, 20, f"must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )
    if header.version == 2:
        header.header_length = V2_LENGTH
    else:
        _read_v3(path, head, header)
    _read_extensions(file, header)
    _check_features(path, header)
    _check_tables(path, header)
    _read_backing(file, header)
    return header


def _read_v3(path: str, head: bytes, header: Header) -> None:
    (
        header.incompatible_features, header.compatible_features, header.autoclear_features, header.refcount_order,
        header.header_length,
    ) = _V3.unpack_from(head, V2_LENGTH)  # fmt: skip
    if not V3_LENGTH <= header.header_length <= 1 << header.cluster_bits:
        raise CorruptImage(
            path, "header_length", header.header_length, 100, f"must be {V3_LENGTH} to the size of a cluster"
        )
    if header.refcount_order > 6:
        raise CorruptImage(path, "refcount_order", header.refcount_order, 96, "must not exceed 6")
    if header.header_length > V3_LENGTH:
        header.compression_type = head[V3_LENGTH]


def _read_extensions(file: Node, header: Header) -> None:
    """Extensions lie between the header and the backing file name, or the cluster's end."""
    end = 1 << header.cluster_bits
    if header.backing_file_offset:
        if header.backing_file_offset > end:
            raise CorruptImage(
                file.filename, "backing_file_offset", header.backing_file_offset, 8, "not in the first cluster"
            )
        end = header.backing_file_offset
    start = header.header_length
    area = file.pread(start, min(end, file.size) - start) if start < min(end, file.size) else b""
    at = 0
    while at + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, at)
        if kind == EXT_END:
            return
        if length > len(area) - at - 8:
            raise CorruptImage(
                file.filename, f"length of header extension {kind:#x}", length, start + at + 4,
                "reaches beyond the area for extensions",
            )  # fmt: skip
        header.extensions.append((kind, area[at + 8 : at + 8 + length]))
        at += 8 + (length + 7 & ~7)


def _check_features(path: str, header: Header) -> None:
    names = _names_in(header)
    unknown = header.incompatible_features & ~_READABLE
    if unknown:
        what = ", ".join(names.get((0, bit), f"unknown feature {bit}") for bit in range(64) if unknown >> bit & 1)
        raise UnsupportedFeature(f"{path}: needs qcow2 features that are not supported here: {what}")
    if header.incompatible_features & EXTENDED_L2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise CorruptImage(
            path, "cluster_bits", header.cluster_bits, 20,
            f"with extended L2 entries it must be at least {MIN_EXTENDED_CLUSTER_BITS}",
        )  # fmt: skip
    name = header.data_file or ""
    if len(name) > MAX_BACKING_NAME or "\0" in name:
        raise CorruptImage(path, "external data file name", f"{len(name)} bytes", None, "too long, or it contains NUL")
    if header.crypt_method > 2:
        raise UnsupportedFeature(f"{path}: encryption method {header.crypt_method} is not known here")
    if header.compression_type >= len(COMPRESSION_NAMES):
        raise UnsupportedFeature(f"{path}: compression type {header.compression_type} is not known")
    if bool(header.compression_type) != bool(header.incompatible_features & COMPRESSION):
        raise CorruptImage(
            path, "compression_type", header.compression_type, V3_LENGTH, "contradicts the compression type bit"
        )


def _names_in(header: Header) -> dict[tuple[int, int], str]:
    """Feature names: the image's own table first, for features made after this was written."""
    names = {(kind, bit): name for kind, bit, name in FEATURE_NAMES}
    table = header.extension(EXT_FEATURE_NAMES) or b""
    for at in range(0, len(table) - _FEATURE_ENTRY.size + 1, _FEATURE_ENTRY.size):
        kind, bit, name = _FEATURE_ENTRY.unpack_from(table, at)
        text = "".join(c for c in name.rstrip(b"\0").decode("utf-8", "replace") if c.isprintable())
        if text:
            names[kind, bit] = text
    return names


def _check_tables(path: str, header: Header) -> None:
    """Places and sizes of tables, before anything is allocated for them."""
    cluster_size = 1 << header.cluster_bits
    if header.size > MAX_DISK_SIZE:
        raise CorruptImage(path, "size", header.size, AT_SIZE, f"no disk is larger than {MAX_DISK_SIZE} bytes")
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise LimitExceeded(
            f"{path}: l1_size is {header.l1_size} at offset {AT_L1:#x}; at most {MAX_L1_BYTES // 8} are accepted"
        )
    if header.l1_size < header.geometry.l1_entries(header.size):
        raise CorruptImage(path, "l1_size", header.l1_size, AT_L1, f"too small for a disk of {header.size} bytes")
    if header.refcount_table_clusters * cluster_size > MAX_REFTABLE_BYTES:
        raise LimitExceeded(
            f"{path}: refcount_table_clusters is {header.refcount_table_clusters} at offset {AT_REFTABLE + 8:#x}; "
            f"at most {MAX_REFTABLE_BYTES} bytes are accepted"
        )
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise LimitExceeded(
            f"{path}: nb_snapshots is {header.nb_snapshots} at offset 0x3c; at most {MAX_SNAPSHOTS} are accepted"
        )
    for name, at, place, used in (
        ("l1_table_offset", AT_L1 + 4, header.l1_table_offset, header.l1_size),
        ("refcount_table_offset", AT_REFTABLE, header.refcount_table_offset, header.refcount_table_clusters),
        ("snapshots_offset", 64, header.snapshots_offset, header.nb_snapshots),
    ):
        if used and (place & (cluster_size - 1) or place >= 1 << 63):
            raise CorruptImage(path, name, f"{place:#x}", at, "not aligned to a cluster")
        if used and place == 0:
            raise CorruptImage(path, name, place, at, "the header itself lies there")


def _read_backing(file: Node, header: Header) -> None:
    if not header.backing_file_offset:
        return
    room = (1 << header.cluster_bits) - header.backing_file_offset
    limit = min(MAX_BACKING_NAME, room)
    if header.backing_file_size > limit:
        raise CorruptImage(file.filename, "backing_file_size", header.backing_file_size, 16, f"at most {limit} fit")
    name = file.pread(header.backing_file_offset, header.backing_file_size)
    if b"\0" in name:
        raise CorruptImage(
            file.filename, "backing file name", repr(name), header.backing_file_offset, "no file name contains NUL"
        )
    header.backing_file = name
