"""dmg: the checksums of an image, all of its data read once.

A table's covers the guest bytes of its chunks in their order, but for those of the type "ignore"; the trailer's first
one covers the data fork as it is stored, and its second one the tables' checksums.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import CheckReport
from diskwright.errors import CorruptImage, UnsupportedFeature
from diskwright.extents import DATA, ZERO
from diskwright.formats.dmg.checksums import joined, of_zeros
from diskwright.formats.dmg.codecs import CODECS
from diskwright.formats.dmg.layout import master_of
from diskwright.formats.dmg.tables import IGNORE, Chunk, Table, read_tables, read_trailer
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.dmg.driver import Dmg

_PIECE: Final = 4 * MiB


def verify(image: Dmg) -> CheckReport:
    """What does not decode or has a wrong checksum, and what no chunk describes, one message each."""
    file, report = image.children[0], CheckReport()
    trailer = read_trailer(file)
    tables = list(read_tables(file, trailer))
    for number, table in enumerate(tables):
        found = _of_table(file, table, number, report)
        if found is not None and table.checksum not in (None, found):
            _wrong(
                report, f"The table of chunks {number} has the checksum {table.checksum:08x}, and its data {found:08x}"
            )
    told = [table.checksum for table in tables]
    if trailer.master is not None and None not in told:
        master = int.from_bytes(master_of([crc for crc in told if crc is not None]), "big")
        if master != trailer.master:
            _wrong(
                report, f"The trailer has the checksum {trailer.master:08x} of its tables, and they have {master:08x}"
            )
    if trailer.fork is not None:
        fork = _of_bytes(file, trailer.data_offset, trailer.data_length)
        if fork != trailer.fork:
            _wrong(report, f"The data fork has the checksum {trailer.fork:08x}, and its data {fork:08x}")
    _gaps(image, tables, report)
    return report


def _wrong(report: CheckReport, message: str) -> None:
    report.corruptions += 1
    report.say(message)


def _of_table(file: Node, table: Table, number: int, report: CheckReport) -> int | None:
    """The checksum of a table's chunks; None when one of them cannot be read."""
    crc, whole = 0, True
    for chunk in table.chunks:
        start, length, kind, place, _, method = chunk
        if kind == ZERO:
            if method != IGNORE:
                crc = joined(crc, of_zeros(length), length)
        elif kind == DATA:
            crc = joined(crc, _of_bytes(file, place, length), length)
        else:
            try:
                crc = zlib.crc32(_unpacked(file, chunk), crc)
            except CorruptImage as error:
                whole = False
                _wrong(report, f"The chunk of guest offset {start:#x} does not decode: {error.why}")
            except UnsupportedFeature as error:
                whole = False
                report.check_errors += 1
                report.say(f"The chunk of guest offset {start:#x} was not checked: {error}")
    return crc if whole else None


def _unpacked(file: Node, chunk: Chunk) -> bytes:
    start, length, _, place, stored, method = chunk
    if method not in CODECS:
        raise UnsupportedFeature(f"it is of the unknown type {method:#x}")
    field = f"stored chunk of guest offset {start:#x}"
    try:
        data = CODECS[method](memoryview(file.pread(place, stored)), length)
    except (UnsupportedFeature, MemoryError, OSError):
        raise
    except Exception as error:  # each library has errors of its own
        raise CorruptImage(file.filename, field, f"{stored} bytes", place, str(error)) from error
    if len(data) != length:
        raise CorruptImage(file.filename, field, f"{stored} bytes", place, f"its length is not {length} bytes")
    return data


def _of_bytes(file: Node, place: int, length: int) -> int:
    crc, end = 0, min(place + length, file.size)
    while place < end:
        piece = file.pread(place, min(_PIECE, end - place))
        crc = zlib.crc32(piece, crc)
        place += len(piece)
    return crc


def _gaps(image: Dmg, tables: list[Table], report: CheckReport) -> None:
    end = 0
    for start, length, *_ in sorted(chunk for table in tables for chunk in table.chunks):
        if start > end:
            _wrong(report, f"Nothing describes the disk from {end:#x} to {start:#x}")
        end = max(end, start + length)
    if end < image.size:
        _wrong(report, f"Nothing describes the disk from {end:#x} to {image.size:#x}")
