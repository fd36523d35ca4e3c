"""Checking and mending a VDI image.

Wrong can be: a number beyond the blocks there can be, two blocks with one place, and the count in the header. A number
that cannot be is forgotten; of two blocks with one place the second gets a copy of what is there; the last blocks move
into places nobody has, so that the count can be what VirtualBox takes it for, the place of the next block.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import CheckReport
from diskwright.formats.vdi.header import AT_ALLOCATED, DISCARDED, FREE, MAX_BLOCKS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.formats.vdi.driver import Vdi

_STEP: Final = 1 << 20
"""Table entries looked at together."""


def check(image: Vdi, repair: str) -> CheckReport:
    """See ``Format.check``. The messages are those of qemu-img. Raises OSError."""
    import numpy as np

    report = CheckReport()
    total = image.header.blocks_in_image
    # A growing that was interrupted leaves blocks behind the last place; they are there, so they are not wrong.
    places = min(MAX_BLOCKS, max(total, (image.file.size - image.first_place) // image.stride))
    owner = np.zeros(places, bool)  # of each place whether a block has it
    wrong: list[tuple[int, int]] = []
    for first in range(0, total, _STEP):
        entries = image.entries(first, min(_STEP, total - first))
        assert entries is not None
        wrong += _faults(entries, first, owner, report)
    used = int(np.count_nonzero(owner)) + sum(entry < places for _, entry in wrong)
    counted = image.header.blocks_allocated
    if used != counted:
        report.corruptions += 1
        report.say(f"ERROR: allocated blocks mismatch, is {used}, should be {counted}")
    if repair == "all" and report.corruptions:
        _mend(image, wrong, owner, report)
    return report


def _faults(
    entries: NDArray[np.uint32], first: int, owner: NDArray[np.bool_], report: CheckReport
) -> list[tuple[int, int]]:
    """``(block, entry)`` of the blocks from ``first`` on with an impossible place or somebody else's."""
    import numpy as np

    total = len(owner)
    at = np.flatnonzero(entries < DISCARDED)
    numbers = entries[at].astype(np.int64)
    possible = numbers < total
    _, earliest = np.unique(numbers, return_index=True)
    repeated = np.ones(len(numbers), bool)
    repeated[earliest] = False
    bad = ~possible | repeated
    bad[possible] |= owner[numbers[possible]]
    owner[numbers[possible]] = True
    found = list(zip((at[bad] + first).tolist(), numbers[bad].tolist(), strict=True))
    report.corruptions += len(found)
    for block, entry in found[: report.MAX_MESSAGES]:
        # Of a place that two blocks have, qemu-img tells the place twice.
        what = f"{block} too large, is {entry}" if entry >= total else f"{entry} also used by {entry}"
        report.say(f"ERROR: block index {what}")
    return found


def _mend(image: Vdi, wrong: list[tuple[int, int]], owner: NDArray[np.bool_], report: CheckReport) -> None:
    """Mends in steps, each durable before the next; the count is too high rather than too low meanwhile."""
    import numpy as np

    count = int(np.flatnonzero(owner)[-1]) + 1 if owner.any() else 0
    entries: dict[int, int] = {}
    for block, entry in wrong:
        entries[block] = FREE
        place = count if entry < len(owner) else -1
        if 0 <= place < image.header.blocks_in_image:
            _copy_block(image, entry, place)
            entries[block], count = place, count + 1
            if place < len(owner):
                owner[place] = True
    _write_count(image, max(count, image.header.blocks_allocated))
    _write_entries(image, entries)
    used = 0
    moves: dict[int, int] = {}
    for _, places in image.used_places():
        used += len(places)
    free = iter(np.flatnonzero(~owner[:used]).tolist())
    for blocks, places in image.used_places():
        numbers = (places - image.first_place) // image.stride
        for at in np.flatnonzero(numbers >= used).tolist():
            moves[int(blocks[at])] = place = next(free)
            _copy_block(image, int(numbers[at]), place)
    _write_entries(image, moves)
    _write_count(image, used)
    report.corruptions_fixed, report.corruptions = report.corruptions, 0


def _copy_block(image: Vdi, entry: int, place: int) -> None:
    data = image.file.pread(image.first_place + entry * image.stride, image.cluster_size)
    image.file.writev([(image.first_place + place * image.stride, memoryview(data))])


def _write_count(image: Vdi, count: int) -> None:
    image.file.writev([(AT_ALLOCATED, memoryview(struct.pack("<I", min(count, image.header.blocks_in_image))))])
    image.file.flush()


def _write_entries(image: Vdi, entries: dict[int, int]) -> None:
    """Once what they name is durable."""
    image.file.flush()
    if entries:
        at = image.header.offset_bmap
        image.file.writev([(at + 4 * block, memoryview(struct.pack("<I", entry))) for block, entry in entries.items()])
        image.file.flush()
        image.table.clear()
