"""Checking and mending a Parallels image.

Wrong can be: the mark of an image in use, a cluster beyond the end of the file, two clusters in one place, and space
at the end that nothing uses. A cluster that is not there is taken off the table; of two in one place the second gets a
copy.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import CheckReport
from diskwright.formats.parallels.header import BAT, IN_USE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.formats.parallels.driver import Parallels

_STEP: Final = 1 << 20
"""Table entries looked at together."""


def check(image: Parallels, repair: str) -> CheckReport:
    """See ``Format.check``. The messages are those of qemu-img, and one more. Raises OSError."""
    import numpy as np

    report, mend = CheckReport(), repair == "all"
    size, cluster = image.file.size, image.cluster_size
    _in_use(image, report, mend)
    blocks, places = _table(image)
    outside = (places > size) | (places < image.first_place)
    for block in blocks[outside].tolist():
        _found(report, f"cluster {block} is outside image", mend)
    if mend:
        _write(image, dict.fromkeys(blocks[outside].tolist(), 0))
        blocks, places = blocks[~outside], places[~outside]
    end = max(image.first_place, int(places.max()) + cluster) if len(places) else image.first_place
    end = _duplicates(image, blocks, places, end, report, mend)
    report.total_clusters = image.header.bat_entries
    report.allocated_clusters = len(places)
    report.fragmented_clusters = int(np.count_nonzero((np.diff(places) != cluster) & (np.diff(blocks) == 1)))
    report.image_end_offset = end
    if size > end:
        leaked = -(-(size - end) // cluster)
        report.leaks += leaked
        fixing = repair in ("all", "leaks")
        report.say(f"{'Repairing' if fixing else 'ERROR'} space leaked at the end of the image {size - end}")
        if fixing:
            image.file.resize(end)
            report.leaks_fixed, report.leaks = report.leaks_fixed + leaked, report.leaks - leaked
    if report.corruptions_fixed or report.leaks_fixed:
        image.file.flush()
        image.table.clear()
    return report


def _in_use(image: Parallels, report: CheckReport, mend: bool) -> None:
    if image.header.inuse == IN_USE and not image.surveyed:
        _found(report, "image was not closed correctly", mend)
        if mend:
            image.mark(0)


def _found(report: CheckReport, what: str, mend: bool) -> None:
    report.say(f"{'Repairing' if mend else 'ERROR'} {what}")
    if mend:
        report.corruptions_fixed += 1
    else:
        report.corruptions += 1


def _table(image: Parallels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(blocks, places)`` of all clusters that have a place, in the disk's order."""
    import numpy as np

    parts = list(image.used_places())
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([blocks for blocks, _ in parts]), np.concatenate([places for _, places in parts])


def _duplicates(
    image: Parallels,
    blocks: NDArray[np.int64],
    places: NDArray[np.int64],
    end: int,
    report: CheckReport,
    mend: bool,
) -> int:
    """Clusters that overlap one before them; returns where the last one ends then."""
    import numpy as np

    order = np.argsort(places, kind="stable")
    close = np.flatnonzero(np.diff(places[order]) < image.cluster_size) + 1
    entries: dict[int, int] = {}
    for at in sorted(order[close].tolist()):
        block = int(blocks[at])
        _found(report, f"cluster {block} has the place of another one", mend)
        if mend:
            end += -end % image.alignment
            data = image.file.pread(int(places[at]), image.cluster_size)
            image.file.writev([(end, memoryview(data))])
            entries[block] = image.entry_for(end)
            end += image.cluster_size
    if entries:
        image.file.flush()
        _write(image, entries)
    return end


def _write(image: Parallels, entries: dict[int, int]) -> None:
    if entries:
        pieces = [(BAT + 4 * block, memoryview(struct.pack("<I", entry))) for block, entry in entries.items()]
        image.file.writev(pieces)
        image.file.flush()
