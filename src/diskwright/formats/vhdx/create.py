"""vhdx: new images, and how large they will be.

QEMU's options and its choices are kept where a script can tell, with two differences. A fixed image has a place for
every block, as the specification wants it (QEMU's has none, unless ``block_state_zero`` is off). And nothing is left
empty between the metadata and the first block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import MeasuredSource, Measurement
from diskwright.core.options import BOOL, SIZE, STR, OneOf, option
from diskwright.errors import LimitExceeded, OptionError
from diskwright.formats.vhdx.header import (
    HEADER_PLACES,
    SECTION,
    SIGNATURE,
    TABLE_PLACES,
    Header,
    Region,
    encode_regions,
    new_guid,
)
from diskwright.formats.vhdx.metadata import MAX_BLOCK, MAX_SIZE, MIN_BLOCK, SECTOR_SIZES, Disk
from diskwright.units import GiB, MiB, TiB, align_up, is_power_of_two

if TYPE_CHECKING:
    from diskwright.core.node import Node

CREATOR: Final = "Diskwright"
FULLY_PRESENT: Final = 6
ZERO_STATE: Final = 2
_STEP: Final = 1 << 17
"""Table entries written at a time."""
_MOST_LOG: Final = 4 * GiB
_DIFFERENCING_BLOCK: Final = 2 * MiB
"""What Hyper-V takes: such an image has parts of many blocks."""


@dataclass(frozen=True, kw_only=True)
class VhdxCreateOptions:
    size: int = option(SIZE, "virtual disk size; at most 64 TiB")
    log_size: int = option(SIZE, "size of the log; a multiple of 1 MiB", default=MiB)
    block_size: int = option(SIZE, "size of a block, 1 MiB to 256 MiB; 0: chosen by the disk's size", default=0)
    subformat: str = option(OneOf("dynamic", "fixed"), "kind of image", default="dynamic")
    block_state_zero: bool = option(BOOL, "blocks of a dynamic image are zeros, not undefined", default=True)
    backing_file: str | None = option(STR, "the parent, a VHDX image, of a differencing image", default=None)
    backing_fmt: str | None = option(STR, "image format of the parent", default=None)
    logical_sector_size: int = option(SIZE, "bytes of the disk's sectors: 512 or 4096", default=512)
    physical_sector_size: int = option(SIZE, "bytes the disk says it writes at once: 512 or 4096", default=512)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a new image lie."""

    disk: Disk
    log: Region
    bat: Region
    metadata: Region

    @property
    def end(self) -> int:
        """Where the first block goes."""
        return self.metadata.end


def plan(options: VhdxCreateOptions, locator: bytes | None = None, parent: Disk | None = None) -> Layout:
    """The parts of a new image, which is the same disk as ``parent`` (MS-VHDX 2.6.1.2). Raises OptionError,
    LimitExceeded."""
    if options.size > MAX_SIZE:
        raise LimitExceeded("Image size too large; max of 64TB")
    if options.log_size >= _MOST_LOG:
        raise OptionError("Log size must be smaller than 4 GB")
    if options.log_size < 1:
        raise OptionError("Log size must be a multiple of 1 MB")
    for name in ("logical_sector_size", "physical_sector_size"):
        if getattr(options, name) not in SECTOR_SIZES:
            raise OptionError(f"{name} must be 512 or 4096")
    if options.subformat == "fixed" and (locator is not None or options.backing_file is not None):
        raise OptionError("An image with a parent cannot be of the subformat 'fixed'")
    sector = options.logical_sector_size if parent is None else parent.logical_sector
    disk = Disk(
        size=align_up(options.size, sector),
        block_size=_block_size(options),
        leave_allocated=options.subformat == "fixed",
        has_parent=locator is not None,
        logical_sector=sector,
        physical_sector=options.physical_sector_size if parent is None else parent.physical_sector,
        disk_id=new_guid() if parent is None else parent.disk_id,
        locator=locator,
        inherited=() if parent is None else parent.inherited,
    )
    log = Region(SECTION, align_up(options.log_size, MiB))
    bat = Region(log.end, align_up(max(1, 8 * table_entries(disk)), MiB))
    return Layout(disk, log, bat, Region(bat.end, MiB))


def table_entries(disk: Disk) -> int:
    """Entries the table has room for at least: those a differencing image has, so that it can become one."""
    return -(-disk.blocks // disk.chunk_ratio) * (disk.chunk_ratio + 1)


def _block_size(options: VhdxCreateOptions) -> int:
    size = options.block_size
    if size == 0 and options.backing_file is not None:
        return _DIFFERENCING_BLOCK
    if size == 0:
        if options.size > 32 * TiB:
            return 64 * MiB
        if options.size > 100 * GiB:
            return 32 * MiB
        return 16 * MiB if options.size > GiB else 8 * MiB
    size = min(align_up(size, MIN_BLOCK), MAX_BLOCK)
    if not is_power_of_two(size):
        raise OptionError("Block size must be a power of two")
    return size


def create(file: Node, options: VhdxCreateOptions, locator: bytes | None = None, parent: Disk | None = None) -> None:
    """Makes an empty image. The region tables and headers come last: without them it is none."""
    layout = plan(options, locator, parent)
    disk, fixed = layout.disk, options.subformat == "fixed"
    end = layout.end + (disk.blocks * disk.block_size if fixed else 0)
    file.resize(end)
    if not file.zero_init:
        file.write_zeros(0, end)
    file.writev([(layout.metadata.offset, memoryview(disk.encode()))])
    if fixed:
        _write_table(file, layout, ZERO_STATE, place=layout.end)
    elif options.block_state_zero and locator is None:
        _write_table(file, layout, ZERO_STATE)
    table = encode_regions(layout.bat, layout.metadata)
    file.writev([(place, memoryview(table)) for place in TABLE_PLACES])
    header = Header(1, new_guid(), new_guid(), bytes(16), 0, 1, layout.log.length, layout.log.offset)
    for number, place in enumerate(HEADER_PLACES):
        whole = Header(**{**vars(header), "sequence_number": 1 + number}).encode()
        file.writev([(place, memoryview(whole))])
    file.writev([(0, memoryview(SIGNATURE + CREATOR.encode("utf-16-le")))])


def _write_table(file: Node, layout: Layout, state: int, place: int = 0) -> None:
    """Entries of all blocks: one state, or (``place``) places one after the other."""
    import numpy as np

    disk = layout.disk
    for first in range(0, disk.blocks, _STEP):
        blocks = np.arange(first, min(disk.blocks, first + _STEP), dtype=np.int64)
        at = blocks + blocks // disk.chunk_ratio
        entries = np.zeros(int(at[-1] - at[0]) + 1, "<u8")
        values = place + blocks * disk.block_size + FULLY_PRESENT if place else np.full(len(blocks), state)
        entries[at - at[0]] = values.astype(np.uint64)
        file.writev([(layout.bat.offset + 8 * int(at[0]), memoryview(entries.tobytes()))])


def measure(options: VhdxCreateOptions, source: MeasuredSource | None) -> Measurement:
    """See ``Format.measure``."""
    layout = plan(options)
    disk = layout.disk
    full = layout.end + disk.blocks * disk.block_size
    if options.subformat == "fixed":
        return Measurement(full, full)
    used = source.allocated(disk.block_size) if source is not None else 0
    return Measurement(layout.end + align_up(used, disk.block_size), full)
