"""vmdk: how large a new image will be: all of its files together."""

from __future__ import annotations

from typing import Final

from diskwright.core.driver import MeasuredSource, Measurement
from diskwright.formats.vmdk.create import VmdkCreateOptions, lengths
from diskwright.formats.vmdk.header import GRAIN_MARKER, TABLE_ENTRIES, Header, plan, plan_stream
from diskwright.units import SECTOR, KiB, align_up

_DESCRIPTOR: Final = 4 * KiB
"""What a descriptor of its own takes, with room for its extents' names."""
_OVERHEAD: Final = 64
"""Bytes by which a zlib stream of a grain that does not get smaller is longer, at most."""
_TABLE: Final = TABLE_ENTRIES * 4


def measured(options: VmdkCreateOptions, source: MeasuredSource | None) -> Measurement:
    """See ``Format.measure``. Of a streamOptimized image, how long it can become at most."""
    size = align_up(options.size, SECTOR)
    if options.flat:
        return Measurement(size + _DESCRIPTOR, size + _DESCRIPTOR)
    stream = options.subformat == "streamOptimized"
    headers = [plan_stream(size)] if stream else [
        plan(length, zeroed_grain=options.zeroed_grain) for length in lengths(options)
    ]  # fmt: skip
    unit = headers[0].grain_size * SECTOR if headers else SECTOR
    fixed = sum(_fixed(header) for header in headers) + (_DESCRIPTOR if options.split else 0)
    stored = align_up(unit + GRAIN_MARKER.size + _OVERHEAD, SECTOR) if stream else unit
    used = source.allocated(unit) // unit if source is not None else 0
    full = fixed + stored * sum(-(-header.capacity // header.grain_size) for header in headers)
    return Measurement(min(full, fixed + used * stored), full)


def _fixed(header: Header) -> int:
    """What an extent takes beside its grains."""
    start = header.over_head * SECTOR
    if header.rgd_offset:
        return start
    tables = header.tables * (SECTOR + _TABLE)
    return start + tables + SECTOR + align_up(4 * header.tables, SECTOR) + 3 * SECTOR
