"""qed: the driver. Source: "QED Image File Format"."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, ZEROS, DirectoryMap
from diskwright.core.driver import BackingHint, CheckReport, Info, MeasuredSource, Measurement, OpenContext
from diskwright.core.options import SIZE, STR, option
from diskwright.core.tables import Directory
from diskwright.errors import OptionError, UnsupportedFeature
from diskwright.formats.qed.header import (
    AT_FEATURES,
    BACKING_IS_RAW,
    HAS_BACKING,
    MAGIC,
    NAME_PLACES,
    NEED_CHECK,
    Header,
    plan,
    read_header,
)
from diskwright.units import MAX_BACKING_NAME, KiB, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

ZERO_CLUSTER: Final = 1
"""The entry of a cluster that reads as zeros."""


@dataclass(frozen=True, kw_only=True)
class QedCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    backing_file: str | None = option(STR, "file name of a base image", default=None)
    backing_fmt: str | None = option(STR, "image format of the base image", default=None)
    cluster_size: int = option(SIZE, "cluster size in bytes", default=64 * KiB)
    table_size: int = option(SIZE, "L1/L2 table size in clusters", default=4)


class Qed(DirectoryMap):
    """One open QED image."""

    name = "qed"
    create_options = QedCreateOptions
    suffixes = (".qed",)
    has_backing = True
    zero_entry = ZERO_CLUSTER

    def __init__(self, file: Node, header: Header, backing: BackingHint | None) -> None:
        self.header, self.backing = header, backing
        self.alignment = header.cluster_size
        directory = Directory(
            file, "l1_table_offset", header.l1_table_offset, header.table_entries, typecode="Q", byteorder="little"
        )
        super().__init__(
            file,
            header.image_size,
            header.cluster_size,
            directory=directory,
            table_entries=header.table_entries,
            typecode="Q",
            byteorder="little",
            first_place=max(1, header.header_size) * header.cluster_size,
        )

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head[:4] == MAGIC else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Qed:
        header, backing = read_header(context.file)
        image = cls(context.file, header, backing)
        if header.features & NEED_CHECK and context.writable and context.guest_data:
            image.check("all")  # the specification wants that before anything is written
        return image

    # -- what an entry means -----------------------------------------------------------------------

    def place_of(self, entry: int) -> int:
        return entry if ZERO_CLUSTER < entry < 1 << 62 else _KINDS.get(entry, 0)

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = np.where(entries < np.uint64(1 << 62), entries, np.uint64(0)).astype(np.int64)
        places[entries == 0] = NOWHERE
        places[entries == ZERO_CLUSTER] = ZEROS
        return places

    def entry_for(self, place: int) -> int:
        return place

    # -- needing a check ---------------------------------------------------------------------------

    def survey(self) -> None:
        """Says before the first change, too, that the image needs a check, until it is closed."""
        if self.surveyed:
            return
        super().survey()
        self.set_features(self.header.features | NEED_CHECK)

    def set_features(self, features: int) -> None:
        """Writes the features, durably."""
        if features != self.header.features:
            self.header.features = features
            self.file.writev([(AT_FEATURES, memoryview(struct.pack("<Q", features)))])
            self.file.flush()

    def close(self) -> None:
        super().close()
        if self.surveyed:
            self.set_features(self.header.features & ~NEED_CHECK)

    # -- the rest ----------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        if preallocation != "off":
            raise UnsupportedFeature(f"Unsupported preallocation mode '{preallocation}'")
        if size < self.size:
            raise UnsupportedFeature("Shrinking images is currently not supported")
        if size > self.header.most:
            raise OptionError("Invalid image size specified")
        self.survey()
        old, self.size = self.size, size
        try:
            if conceal is not None:
                conceal()
            self.write_back()
            self._write_header(replace(self.header, image_size=size))
        except BaseException:
            self.size = old
            raise

    def _write_header(self, header: Header) -> None:
        """Durably. It is in one sector, so it changes as a whole."""
        self.file.writev([(0, memoryview(header.encode()))])
        self.file.flush()
        self.header = header

    def change_backing(self, filename: str | None, format: str | None) -> None:
        self.write_back()
        header = replace(self.header, features=self.header.features & ~(HAS_BACKING | BACKING_IS_RAW))
        header.backing_filename_offset = header.backing_filename_size = 0
        hint = None
        if filename is not None:
            name = _encoded(filename)
            place = NAME_PLACES[self.header.backing_filename_offset == NAME_PLACES[0]]
            self.file.writev([(place, memoryview(name))])
            self.file.flush()
            header.backing_filename_offset, header.backing_filename_size = place, len(name)
            header.features |= HAS_BACKING | (BACKING_IS_RAW if format == "raw" else 0)
            hint = BackingHint(filename, "raw" if format == "raw" else None)
        self._write_header(header)
        self.backing = hint

    def make_empty(self) -> None:
        self.survey()
        self.empty(self.header.l1_table_offset + self.header.table_bytes)

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.qed.check import check

        self.write_back()
        return check(self, repair)

    def info(self) -> Info:
        return Info(cluster_size=self.cluster_size, dirty=bool(self.header.features & NEED_CHECK))

    # -- creating ----------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: QedCreateOptions) -> None:
        header = plan(options.size, options.cluster_size, options.table_size)
        pieces = []
        if options.backing_file is not None:
            name = _encoded(options.backing_file)
            header.backing_filename_offset, header.backing_filename_size = NAME_PLACES[0], len(name)
            header.features |= HAS_BACKING | (BACKING_IS_RAW if options.backing_fmt == "raw" else 0)
            pieces.append((NAME_PLACES[0], memoryview(name)))
        file.writev([(0, memoryview(header.encode())), *pieces])
        end = header.l1_table_offset + header.table_bytes
        file.resize(end)
        if not file.zero_init:
            file.write_zeros(header.l1_table_offset, header.table_bytes)

    @classmethod
    def measure(cls, options: QedCreateOptions, source: MeasuredSource | None) -> Measurement:
        header = plan(options.size, options.cluster_size, options.table_size)
        start, cluster = header.l1_table_offset + header.table_bytes, header.cluster_size
        span = header.table_entries * cluster

        def needed(data: int, tables: int) -> int:
            return start + tables * header.table_bytes + align_up(data, cluster)

        used = source.allocated(cluster) if source is not None else 0
        tables = source.allocated(span) if source is not None else 0
        return Measurement(needed(used, -(-tables // span)), needed(header.image_size, -(-header.image_size // span)))


_KINDS: Final = {0: NOWHERE, ZERO_CLUSTER: ZEROS}
"""Entries that are no place; all that are impossible count as the place 0, where no cluster can lie."""


def _encoded(filename: str) -> bytes:
    name = filename.encode("utf-8", "surrogateescape")
    if len(name) > MAX_BACKING_NAME:
        raise OptionError(f"Backing file name too long (at most {MAX_BACKING_NAME} bytes)")
    return name


DRIVERS: Final[tuple[Any, ...]] = (Qed,)
