"""parallels: the driver. Source: "Parallels Expandable Image File Format"."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, FlatMap
from diskwright.core.driver import CheckReport, Info, MeasuredSource, Measurement, OpenContext
from diskwright.core.options import BOOL, SIZE, option
from diskwright.errors import ImageError, LimitExceeded
from diskwright.formats.parallels.header import AT_IN_USE, BAT, IN_USE, MAGIC, OLD_MAGIC, Header, plan, read_header
from diskwright.units import SECTOR, MiB, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node


@dataclass(frozen=True, kw_only=True)
class ParallelsOptions:
    repair: bool = option(BOOL, "open an image that is damaged, or marked as in use, to repair it", default=False)


@dataclass(frozen=True, kw_only=True)
class ParallelsCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    cluster_size: int = option(SIZE, "cluster size", default=MiB)


class Parallels(FlatMap):
    """One open Parallels image."""

    name = "parallels"
    options = ParallelsOptions
    create_options = ParallelsCreateOptions
    suffixes = (".hds", ".hdd")
    has_backing = True
    """The image names none; a user may put one beneath it."""

    def __init__(self, file: Node, header: Header) -> None:
        self.header = header
        self._multiplier = SECTOR if header.magic == OLD_MAGIC else header.cluster_size
        self.alignment = self._multiplier
        super().__init__(
            file,
            header.size,
            header.cluster_size,
            table_offset=BAT,
            entries=header.bat_entries,
            typecode="I",
            byteorder="little",
            first_place=header.data_start,
        )

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head[:16] in (MAGIC, OLD_MAGIC) and head[16:20] == b"\2\0\0\0" else 0

    @classmethod
    def open(cls, context: OpenContext, options: ParallelsOptions) -> Parallels:
        writing = context.writable and context.guest_data and not options.repair
        header = read_header(context.file, writable=writing)
        if header.inuse == IN_USE and writing:
            raise ImageError("parallels: Image was not closed correctly; cannot be opened read/write")
        return cls(context.file, header)

    # -- what an entry means -----------------------------------------------------------------------

    def place_of(self, entry: int) -> int:
        return entry * self._multiplier if entry else NOWHERE

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = entries.astype(np.int64) * self._multiplier
        places[entries == 0] = NOWHERE
        return places

    def entry_for(self, place: int) -> int:
        entry = place // self._multiplier
        if entry > 0xFFFFFFFF:
            raise LimitExceeded(f"{self.path}: no table entry can name a cluster at {place:#x}")
        return entry

    # -- being in use ------------------------------------------------------------------------------

    def survey(self) -> None:
        """Marks the image as in use, too, before the first change."""
        if self.surveyed:
            return
        super().survey()
        self.mark(IN_USE)

    def mark(self, value: int) -> None:
        """Says, durably, that the image is in use, or (0) that it is not."""
        self.header.inuse = value
        self.file.writev([(AT_IN_USE, memoryview(struct.pack("<I", value)))])
        self.file.flush()

    def close(self) -> None:
        super().close()
        if self.surveyed:
            self.mark(0)

    # -- the rest ----------------------------------------------------------------------------------

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.parallels.check import check

        self.write_back()
        return check(self, repair)

    def info(self) -> Info:
        return Info()

    # -- creating ----------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: ParallelsCreateOptions) -> None:
        header = plan(options.size, options.cluster_size)
        file.writev([(0, memoryview(header.encode()))])
        end = header.data_off * SECTOR
        file.resize(end)
        if not file.zero_init:
            file.write_zeros(BAT, end - BAT)

    @classmethod
    def measure(cls, options: ParallelsCreateOptions, source: MeasuredSource | None) -> Measurement:
        header = plan(options.size, options.cluster_size)
        start, cluster = header.data_off * SECTOR, options.cluster_size
        # What is allocated is told in units that are powers of two, of which a cluster may take a part.
        unit = cluster & -cluster
        used = source.allocated(unit) // unit if source is not None else 0
        full = start + header.bat_entries * cluster
        return Measurement(min(full, start + align_up(used * cluster, cluster)), full)


DRIVERS: Final[tuple[Any, ...]] = (Parallels,)
