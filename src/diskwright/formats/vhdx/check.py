"""vhdx: checking and mending.

Wrong can be: a log that is still to be replayed (opening the image for repair has done it) or cannot be, an entry of
the table in a state there is none of, a block where none can be (in the log, in a region, behind the end of the file),
two blocks in one place. A block that is not there is taken off the table; of two in one place the second gets a copy.
What a differencing image has of a block is not known without the sector bitmap: nothing can mend a lost one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from diskwright.core.driver import CheckReport
from diskwright.units import MiB, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.formats.vhdx.driver import Vhdx

_STEP: Final = 1 << 18
"""Table entries looked at together."""
_MOST: Final = 1 << 26
"""Blocks with a place that a check takes at most: 1 GiB of memory."""
_PIECE: Final = MiB


def check(image: Vhdx, repair: str) -> CheckReport:
    """See ``Format.check``. Raises OSError."""
    report, mend = CheckReport(), repair == "all"
    _check_log(image, report)
    new: dict[int, int] = {}
    image.check_bitmap(report)
    blocks, places = _table(image, new, report, mend)
    copies = _duplicates(image, blocks, places, report, mend)
    if mend and (new or copies):
        _mend(image, new, copies)
    return report


def _found(report: CheckReport, what: str, mend: bool) -> None:
    report.say(f"{'Repairing' if mend else 'ERROR'} {what}")
    if mend:
        report.corruptions_fixed += 1
    else:
        report.corruptions += 1


def _check_log(image: Vhdx, report: CheckReport) -> None:
    log = image.log
    if log.replayed:
        report.corruptions_fixed += 1
        log.replayed = False
    elif log.source is not None:
        _found(report, "the log has not been replayed", False)
    elif log.damaged:
        _found(report, "the log has no whole entry; it is given up", image.writable)
        log.damaged = not image.writable


def _table(
    image: Vhdx, new: dict[int, int], report: CheckReport, mend: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(blocks, places)`` of all that lie where a block can. What the others get goes to ``new``."""
    import numpy as np

    size = align_up(image.file.size, MiB)
    taken = np.array(sorted(image.tables()), np.int64).reshape(-1, 2)
    found_blocks, found_places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, image.about.blocks, _STEP):
        entries = image.entries(first, min(_STEP, image.about.blocks - first))
        assert entries is not None
        blocks, places, invalid = image.claimed(entries)
        last = np.minimum(image.size - (first + blocks) * image.cluster_size, image.cluster_size)
        bad = (places < image.first_place) | (places + last > size)
        at = np.searchsorted(taken[:, 1], places, "right")
        inside = at < len(taken)
        bad[inside] |= places[inside] + image.stride > taken[at[inside], 0]
        for block in invalid.tolist():
            _found(report, f"block {first + block} is in a state that is not known", mend)
            new[first + block] = image.absent_entry
        for index in np.flatnonzero(bad).tolist():
            block = first + int(blocks[index])
            _found(report, f"block {block} lies at {int(places[index]):#x}, where no block can lie", mend)
            new[block] = image.absent_entry
        found_blocks.append(blocks[~bad] + first)
        found_places.append(places[~bad])
    return np.concatenate(found_blocks), np.concatenate(found_places)


def _duplicates(
    image: Vhdx, blocks: NDArray[np.int64], places: NDArray[np.int64], report: CheckReport, mend: bool
) -> list[tuple[int, int]]:
    """``(block, place)`` of blocks that overlap one before them."""
    import numpy as np

    order = np.argsort(places, kind="stable")
    close = np.flatnonzero(np.diff(places[order]) < image.stride) + 1
    found = []
    for at in sorted(order[close].tolist()):
        _found(report, f"block {int(blocks[at])} has the place of another one", mend)
        found.append((int(blocks[at]), int(places[at])))
    return found


def _mend(image: Vhdx, new: dict[int, int], copies: list[tuple[int, int]]) -> None:
    """Copies first; they are durable before the table names them."""
    file = image.file
    end = align_up(max([file.size, *(end for _, end in image.tables())]), MiB)
    with image.flush_lock, image.lock:
        image.begin(contents=bool(new))
    for block, place in copies:
        for at in range(0, image.cluster_size, _PIECE):
            file.writev([(end + at, memoryview(file.pread(place + at, _PIECE)))])
        new[block] = image.moved_entry(block, end)
        end += image.cluster_size
    image.set_entries(new, end)
