"""vdi: VirtualBox's disk image, dynamic and static.

A header, a table with one 32-bit number a block, and the blocks. The format is not published as a text; the facts are
those VirtualBox's own images show. A block's number in the table is its place among the blocks in the file; two
numbers say that it is not there. The header counts the blocks in use, and VirtualBox puts the next one behind them; so
the count must never be too low (see ``capture_first``), and a block keeps its place for good.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, ZEROS, FlatMap
from diskwright.core.driver import Info, MeasuredSource, Measurement, OpenContext
from diskwright.core.options import BOOL, SIZE, OneOf, option
from diskwright.core.tables import Piece
from diskwright.errors import CorruptImage, LimitExceeded, OptionError, UnsupportedFeature
from diskwright.units import SECTOR, KiB, MiB, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
_ALLOCATED: Final = 388
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


@dataclass(frozen=True, kw_only=True)
class VdiCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    static: bool = option(BOOL, "take the space of all blocks at once", default=False)
    preallocation: str = option(
        OneOf("off", "metadata", "falloc", "full"), "how space is taken in advance", default="off"
    )


class Vdi(FlatMap):
    """One open VDI image."""

    name = "vdi"
    create_options = VdiCreateOptions
    suffixes = (".vdi",)
    zero_entry = DISCARDED

    def __init__(self, file: Node, header: Header) -> None:
        self.header = header
        super().__init__(
            file,
            align_up(header.disk_size, SECTOR),
            header.block_size,
            table_offset=header.offset_bmap,
            entries=header.blocks_in_image,
            typecode="I",
            byteorder="little",
            first_place=header.offset_data,
        )
        self._counted = self._counting = header.blocks_allocated  # what the header in the file says, and will say

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head[64:68] == SIGNATURE.to_bytes(4, "little") else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Vdi:
        return cls(context.file, read_header(context.file))

    # -- what an entry means -----------------------------------------------------------------------

    def place_of(self, entry: int) -> int:
        if entry >= DISCARDED:
            return NOWHERE if entry == FREE else ZEROS
        return self.first_place + entry * self.stride

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = entries.astype(np.int64) * self.stride + self.first_place
        places[entries == FREE] = NOWHERE
        places[entries == DISCARDED] = ZEROS
        return places

    def entry_for(self, place: int) -> int:
        index = (place - self.first_place) // self.stride
        if index >= self.header.blocks_in_image:
            raise LimitExceeded(f"{self.path}: has no room for another block; its blocks leave holes in the file")
        return index

    def next_place(self, used: int, size: int) -> int:
        return used  # what lies behind belongs to nobody: a crash came before the table was written

    # -- counting ----------------------------------------------------------------------------------

    def capture_first(self) -> list[Piece]:
        self._counting = max(self._counted, (self._end - self.first_place) // self.stride)
        if self._counting == self._counted:
            return []
        return [(_ALLOCATED, memoryview(struct.pack("<I", self._counting)))]

    def _settle(self) -> None:
        super()._settle()
        self._counted = self._counting

    def info(self) -> Info:
        return Info(cluster_size=self.cluster_size)

    # -- creating ----------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: VdiCreateOptions) -> None:
        header = plan(options)
        blocks, everything = header.blocks_in_image, header.image_type == STATIC
        file.writev([(0, memoryview(header.encode()))])
        step = 1 << 18
        for first in range(0, blocks, step):
            count = min(step, blocks - first)
            table = _numbers(first, count) if everything else b"\xff" * (4 * count)
            file.writev([(header.offset_bmap + 4 * first, memoryview(table))])
        taken = header.offset_data + (blocks * header.block_size if everything else 0)
        file.resize(taken, preallocation="off" if options.preallocation == "metadata" else options.preallocation)

    @classmethod
    def measure(cls, options: VdiCreateOptions, source: MeasuredSource | None) -> Measurement:
        header = plan(options)
        full = header.offset_data + header.blocks_in_image * header.block_size
        if header.image_type == STATIC:
            return Measurement(full, full)
        used = source.allocated(header.block_size) if source is not None else 0
        return Measurement(header.offset_data + align_up(used, header.block_size), full)


def _numbers(first: int, count: int) -> bytes:
    import numpy as np

    return np.arange(first, first + count, dtype="<u4").tobytes()


def plan(options: VdiCreateOptions) -> Header:
    """The header of the image that ``options`` ask for. Raises LimitExceeded."""
    block = MiB
    blocks = -(-options.size // block)
    if blocks > MAX_BLOCKS:
        raise LimitExceeded(
            f"Unsupported VDI image size (size is {options.size:#x}, max supported is {MAX_BLOCKS * block:#x})"
        )
    static = options.static or options.preallocation == "metadata"
    if options.preallocation in ("falloc", "full") and not static:
        raise OptionError("Preallocation of the whole image needs static=on")
    return Header(
        _TEXT, SIGNATURE, VERSION, 0x180, STATIC if static else DYNAMIC, 0, b"", SECTOR,
        align_up(SECTOR + 4 * blocks, SECTOR), 0, 0, 0, SECTOR, 0, align_up(options.size, SECTOR), block, 0, blocks,
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
        raise CorruptImage(path, "blocks_allocated", header.blocks_allocated, _ALLOCATED, "more than there are blocks")
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


DRIVERS: Final[tuple[Any, ...]] = (Vdi,)
