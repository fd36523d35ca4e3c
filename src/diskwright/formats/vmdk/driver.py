"""vmdk: the driver, for images in one sparse file (monolithicSparse).

A directory names tables of 512 entries, each the sector where a grain lies. Directory and tables are there twice; a
change goes to both. Each time an image is opened and written to it gets another CID, before its contents change, so
that a child that was made of it notices.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, ZEROS, DirectoryMap
from diskwright.core.driver import Info, OpenContext
from diskwright.core.options import BOOL, SIZE, STR, OneOf, option
from diskwright.core.tables import Directory, Piece
from diskwright.errors import CorruptImage, LimitExceeded, OptionError
from diskwright.formats.vmdk import descriptor
from diskwright.formats.vmdk.header import MAGIC, OTHERS, REDUNDANT, TABLE_ENTRIES, ZEROED, Header, plan, read_header
from diskwright.units import SECTOR

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

_TABLE: Final = TABLE_ENTRIES * 4


@dataclass(frozen=True, kw_only=True)
class VmdkCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    adapter_type: str = option(OneOf("ide", "lsilogic", "buslogic", "legacyESX"), "adapter type", default="ide")
    compat6: bool = option(BOOL, "hardware version 6", default=False)
    hwversion: str = option(STR, "hardware version", default="undefined")
    toolsversion: str = option(STR, "version of VMware's guest tools", default="2147483647")
    subformat: str = option(OneOf("monolithicSparse"), "kind of image", default="monolithicSparse")
    zeroed_grain: bool = option(BOOL, "grains of zeros take no space", default=False)


class Vmdk(DirectoryMap):
    """One open VMDK image."""

    name = "vmdk"
    create_options = VmdkCreateOptions
    suffixes = (".vmdk",)

    def __init__(self, file: Node, header: Header) -> None:
        self.header = header
        raw = file.pread(header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR)
        self.descriptor = descriptor.parse(file.filename, raw)
        count = header.tables
        self._has_zeroed = bool(header.flags & ZEROED)
        if self._has_zeroed:
            self.zero_entry = 1
        directory = Directory(file, "gdOffset", header.gd_offset * SECTOR, count, typecode="I", byteorder="little")
        self._redundant: Directory | None = None
        if header.flags & REDUNDANT:
            self._redundant = Directory(
                file, "rgdOffset", header.rgd_offset * SECTOR, count, typecode="I", byteorder="little"
            )
        self._twins: list[tuple[int, int]] = []
        super().__init__(
            file, header.capacity * SECTOR, header.grain_size * SECTOR, directory=directory,
            table_entries=TABLE_ENTRIES, typecode="I", byteorder="little",
            first_place=(header.descriptor_offset + header.descriptor_size) * SECTOR,
        )  # fmt: skip

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head.startswith((MAGIC, *OTHERS)) else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Vmdk:
        return cls(context.file, read_header(context.file))

    # -- what an entry means -----------------------------------------------------------------------

    def place_of(self, entry: int) -> int:
        if entry == 0:
            return NOWHERE
        return ZEROS if entry == 1 and self._has_zeroed else entry * SECTOR

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = entries.astype(np.int64) * SECTOR
        places[entries == 0] = NOWHERE
        if self._has_zeroed:
            places[entries == 1] = ZEROS
        return places

    def entry_for(self, place: int) -> int:
        if place // SECTOR > 0xFFFFFFFF:
            raise LimitExceeded(f"{self.path}: has no room for another grain: places end at 2 TiB")
        return place // SECTOR

    def table_place(self, entry: int) -> int:
        return entry * SECTOR or -1

    def table_entry(self, place: int) -> int:
        return self.entry_for(place)

    # -- the second directory and its tables -------------------------------------------------------

    def tables(self) -> Iterator[tuple[int, int]]:
        yield from super().tables()
        size = len(self.directory.entries) * 4
        for table in (self.directory, self._redundant):
            if table is not None:
                yield table.offset, table.offset + size
        if self._redundant is not None:
            for entry in self._redundant.entries:
                if entry:
                    yield entry * SECTOR, entry * SECTOR + _TABLE

    def _survey(self) -> None:
        super()._survey()
        ranges = sorted(self.tables())
        for (_, end), (start, _) in pairwise(ranges):
            if start < end:
                raise CorruptImage(self.path, "the grain directory", "damaged", None, f"two tables lie at {start:#x}")
        if ranges and ranges[0][0] < self.first_place:
            raise CorruptImage(self.path, "the grain directory", "damaged", None, "a table lies in the descriptor")
        self._pair()
        self._renew_cid()

    def _pair(self) -> None:
        if self._redundant is not None:
            pairs = zip(self.directory.entries, self._redundant.entries, strict=True)
            self._twins = sorted((one * SECTOR, two * SECTOR) for one, two in pairs if one and two)

    def _renew_cid(self) -> None:
        """Before anything else changes, and durably."""
        room = self.header.descriptor_size * SECTOR
        text = descriptor.with_cid(self.descriptor.text, new_cid())
        if len(text) > room:
            raise CorruptImage(self.path, "CID", "damaged", None, "the descriptor has no room for another")
        self.file.writev([(self.header.descriptor_offset * SECTOR, memoryview(text.ljust(room, b"\0")))])
        self.file.flush()
        self.descriptor = descriptor.parse(self.path, text)

    def add_table(self, index: int) -> None:
        super().add_table(index)
        if self._redundant is not None:
            if not self._redundant.entries[index]:
                self._redundant.set(index, self.entry_for(self._end))
                self._end += _TABLE
            self._pair()

    def _capture(self) -> list[list[Piece]]:
        tables, directory = super()._capture()
        if self._redundant is not None:
            tables += [twin for piece in tables if (twin := self._twin(piece)) is not None]
            directory += self._redundant.capture()
        return [tables, directory]

    def _twin(self, piece: Piece) -> Piece | None:
        """What has to be written to the redundant table. A piece lies within one table."""
        at = bisect_right(self._twins, (piece[0], 1 << 63)) - 1
        if at < 0 or piece[0] >= self._twins[at][0] + _TABLE:
            return None
        return self._twins[at][1] + piece[0] - self._twins[at][0], piece[1]

    def _settle(self) -> None:
        super()._settle()
        if self._redundant is not None:
            self._redundant.settle()

    def _restore(self) -> None:
        super()._restore()
        if self._redundant is not None:
            self._redundant.restore()

    # -- the rest ----------------------------------------------------------------------------------

    def info(self) -> Info:
        about = self.descriptor
        extent = {
            "virtual-size": self.size, "filename": self.path, "cluster-size": self.cluster_size, "format": "",
        }  # fmt: skip
        data = {
            "cid": about.cid, "parent-cid": about.parent_cid, "create-type": about.create_type, "extents": [extent],
        }  # fmt: skip
        return Info(cluster_size=self.cluster_size, dirty=False, specific=data)

    @classmethod
    def create(cls, file: Node, options: VmdkCreateOptions) -> None:
        if options.compat6 and options.hwversion != "undefined":
            raise OptionError("compat6 cannot be enabled with hwversion set")
        for text_given in (os.path.basename(file.filename), options.hwversion, options.toolsversion):
            if any(mark in text_given for mark in '"\r\n\0'):
                raise OptionError(f"{text_given!r} has a character that a VMDK descriptor cannot hold")
        header = plan(options.size, zeroed_grain=options.zeroed_grain)
        hardware = "6" if options.compat6 else "4" if options.hwversion == "undefined" else options.hwversion
        text = descriptor.new(
            os.path.basename(file.filename), header.capacity, new_cid(), adapter=options.adapter_type,
            hwversion=hardware, tools=options.toolsversion,
        )  # fmt: skip
        room = header.descriptor_size * SECTOR
        if len(text) > room:
            raise LimitExceeded(f"vmdk: a descriptor of {len(text)} bytes does not fit into {room}")
        file.resize(header.over_head * SECTOR)
        file.writev([(SECTOR, memoryview(text))])
        for at in (header.rgd_offset, header.gd_offset):
            file.writev([(at * SECTOR, memoryview(_directory(at, header.tables)))])
        file.writev([(0, memoryview(header.encode()))])


def _directory(at: int, tables: int) -> bytes:
    import numpy as np

    first = at + -(-tables * 4 // SECTOR)
    return (np.arange(tables, dtype="<u4") * (_TABLE // SECTOR) + first).astype("<u4").tobytes() or bytes(SECTOR)


def new_cid() -> int:
    return int.from_bytes(os.urandom(4), "little") & 0xFFFFFFFE


DRIVERS: Final[tuple[Any, ...]] = (Vmdk,)
