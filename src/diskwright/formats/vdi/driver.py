"""vdi: the driver.

A header, a table with one 32-bit number a block, and the blocks. The format is not published as a text; the facts are
those VirtualBox's own images show. A block's number in the table is its place among the blocks in the file; two
numbers say that it is not there. The header counts the blocks in use, and VirtualBox puts the next one behind them; so
the count must never be too low (see ``capture_first``), and a block keeps its place for good.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, ZEROS, FlatMap
from diskwright.core.driver import CheckReport, Info, MeasuredSource, Measurement, OpenContext
from diskwright.core.options import BOOL, SIZE, option
from diskwright.core.tables import Piece
from diskwright.errors import LimitExceeded, UnsupportedFeature
from diskwright.formats.vdi.header import AT_ALLOCATED, DISCARDED, FREE, SIGNATURE, STATIC, Header, plan, read_header
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

_STEP: Final = 1 << 18
"""Table entries written at a time."""


@dataclass(frozen=True, kw_only=True)
class VdiCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    static: bool = option(BOOL, "take the space of all blocks at once", default=False)


class Vdi(FlatMap):
    """One open VDI image."""

    name = "vdi"
    create_options = VdiCreateOptions
    suffixes = (".vdi",)
    zero_entry = DISCARDED

    def __init__(self, file: Node, header: Header) -> None:
        self.header = header
        self.holes = "always" if header.image_type == STATIC else "never"
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
        return [(AT_ALLOCATED, memoryview(struct.pack("<I", self._counting)))]

    def _settle(self) -> None:
        super()._settle()
        self.header.blocks_allocated = self._counted = self._counting

    # -- the rest ----------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        """Larger only. A table that does not fit any more goes where the first blocks were, and those to the end."""
        from diskwright.formats.vdi.resize import grown

        if preallocation != "off":
            raise UnsupportedFeature(f"Preallocation mode '{preallocation}' is not supported when resizing VDI images")
        if size < self.size:
            raise UnsupportedFeature("VDI images cannot be made smaller")
        self.survey()
        self.write_back()
        self._start_again(grown(self, size))

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.vdi.check import check

        self.write_back()
        report = check(self, repair)
        if report.corruptions_fixed:
            self._start_again(read_header(self.file))
        return report

    def _start_again(self, header: Header) -> None:
        """The file holds another map now: nothing of the old one may be left in a cache."""
        self.__init__(self.file, header)  # type: ignore[misc]

    def info(self) -> Info:
        return Info(cluster_size=self.cluster_size, dirty=False)

    # -- creating ----------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: VdiCreateOptions) -> None:
        header = plan(options.size, static=options.static)
        blocks = header.blocks_in_image
        file.writev([(0, memoryview(header.encode()))])
        for first in range(0, blocks, _STEP):
            count = min(_STEP, blocks - first)
            table = _numbers(first, count) if options.static else b"\xff" * (4 * count)
            file.writev([(header.offset_bmap + 4 * first, memoryview(table))])
        file.resize(header.offset_data + (blocks * header.block_size if options.static else 0))

    @classmethod
    def measure(cls, options: VdiCreateOptions, source: MeasuredSource | None) -> Measurement:
        header = plan(options.size, static=options.static)
        full = header.offset_data + header.blocks_in_image * header.block_size
        if options.static:
            return Measurement(full, full)
        used = source.allocated(header.block_size) if source is not None else 0
        return Measurement(header.offset_data + align_up(used, header.block_size), full)


def _numbers(first: int, count: int) -> bytes:
    import numpy as np

    return np.arange(first, first + count, dtype="<u4").tobytes()


DRIVERS: Final[tuple[Any, ...]] = (Vdi,)
