"""vdi: the header."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.units import SECTOR, KiB, MiB, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node

SIGNATURE: Final = 0xBEDA107F
VERSION: Final = 0x00010001
DYNAMIC: Final = 1
STATIC: Final = 2

FREE: Final = 0xFFFFFFFF
"""The entry of a block that was never written to."""
DISCARDED: Final = 0xFFFFFFFE
"""The entry of a block that was given up, and reads as zeros."""

MAX_BLOCKS: Final = 1 << 29
"""Blocks of an image at most: 512 TiB with the usual blocks of 1 MiB."""
_MIN_BLOCK: Final = 4 * KiB
_MAX_BLOCK: Final = 256 * MiB

_TEXT: Final = b"<<< Diskwright Virtual Disk Image >>>\n"
_HEADER: Final = struct.Struct("<64sIIIII256sIIIIIIIQIIII16s16s16s16s")
AT_ALLOCATED: Final = 388
"""Where the header counts the blocks in use."""
_TYPES: Final = {3: "an undo image", 4: "a differencing image: its parent is named by nothing but a UUID"}


@dataclass
class Header:
    """The fields of the header, under VirtualBox's names. Offsets and sizes in bytes."""

    text: bytes
    signature: int
    version: int
    header_size: int
    image_type: int
    image_flags: int
    description: bytes
    offset_bmap: int
    offset_data: int
    cylinders: int
    heads: int
    sectors: int
    sector_size: int
    unused: int
    disk_size: int
    block_size: int
    block_extra: int
    blocks_in_image: int
    blocks_allocated: int
    uuid_image: bytes
    uuid_last_snap: bytes
    uuid_link: bytes
    uuid_parent: bytes

    def encode(self) -> bytes:
        return _HEADER.pack(*vars(self).values())


def plan(size: int, *, static: bool) -> Header:
    """The header of a new image. Raises LimitExceeded."""
    block = MiB
    blocks = -(-size // block)
    if blocks > MAX_BLOCKS:
        raise LimitExceeded(f"Unsupported VDI image size (size is {size:#x}, max supported is {MAX_BLOCKS * block:#x})")
    return Header(
        _TEXT, SIGNATURE, VERSION, 0x180, STATIC if static else DYNAMIC, 0, b"", SECTOR,
        align_up(SECTOR + 4 * blocks, SECTOR), 0, 0, 0, SECTOR, 0, align_up(size, SECTOR), block, 0, blocks,
        blocks if static else 0, os.urandom(16), os.urandom(16), bytes(16), bytes(16),
    )  # fmt: skip


def read_header(file: Node) -> Header:
    """The header, checked. Raises CorruptImage, UnsupportedFeature or LimitExceeded."""
    path = file.filename
    if file.size < _HEADER.size:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than a VDI header")
    header = Header(*_HEADER.unpack(file.pread(0, _HEADER.size)))
    if header.signature != SIGNATURE:
        raise CorruptImage(path, "signature", f"{header.signature:#x}", 64, f"it should be {SIGNATURE:#x}")
    if header.version != VERSION:
        raise UnsupportedFeature(f"{path}: is of version {header.version >> 16}.{header.version & 0xFFFF}, not 1.1")
    if header.image_type not in (DYNAMIC, STATIC):
        kind = _TYPES.get(header.image_type, f"of the unknown type {header.image_type}")
        raise UnsupportedFeature(f"{path}: is {kind}")
    if header.sector_size != SECTOR:
        raise UnsupportedFeature(f"{path}: has sectors of {header.sector_size} bytes, not {SECTOR}")
    block = header.block_size
    if not _MIN_BLOCK <= block <= _MAX_BLOCK or block & (block - 1):
        raise UnsupportedFeature(f"{path}: has blocks of {block} bytes, not a power of two from 4 KiB to 256 MiB")
    if header.block_extra:
        raise UnsupportedFeature(f"{path}: has {header.block_extra} bytes of other data before each block")
    if header.blocks_in_image > MAX_BLOCKS:
        raise LimitExceeded(f"{path}: has {header.blocks_in_image} blocks; at most {MAX_BLOCKS} are possible")
    if align_up(header.disk_size, SECTOR) > header.blocks_in_image * block:
        raise CorruptImage(path, "disk_size", header.disk_size, 368, f"{header.blocks_in_image} blocks cannot hold it")
    if header.blocks_allocated > header.blocks_in_image:
        raise CorruptImage(
            path, "blocks_allocated", header.blocks_allocated, AT_ALLOCATED, "more than there are blocks"
        )
    _check_places(file, header)
    return header


def _check_places(file: Node, header: Header) -> None:
    path, end = file.filename, header.offset_bmap + 4 * header.blocks_in_image
    for name, value, at in (("offset_bmap", header.offset_bmap, 340), ("offset_data", header.offset_data, 344)):
        if value % SECTOR or value < SECTOR:
            raise CorruptImage(path, name, f"{value:#x}", at, "it must be a multiple of 512 behind the header")
    if header.offset_data < end:
        raise CorruptImage(path, "offset_data", f"{header.offset_data:#x}", 344, "the table of blocks is there")
    if end > file.size:
        raise CorruptImage(
            path, "blocks_in_image", header.blocks_in_image, 384, f"the table ends at {end}, the file at {file.size}"
        )
