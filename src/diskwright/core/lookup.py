"""What a short range of a node holds, by asking for one run after the other.

``core.status`` answers for long ranges, in columns; for the few hundred KiB that a copy looks at at a time
that costs more than the copying. This gives the same answer from single extents of plain ints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from diskwright.core.node import FormatNode, Node, StorageNode, below_filters, looked_through
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO

ABSENT: Final = UNALLOCATED
"""No layer above ``base`` says anything of the range."""

Run = tuple[int, int, int]
"""``(offset, length, kind)``; kind is DATA (also when it has to be decoded), ZERO or ABSENT."""


def lookup(node: Node, offset: int, length: int, base: Node | None = None) -> list[Run]:
    """The runs of a range of ``node``, merged, in order and without gaps. Call it under a lease.

    With ``base``, what only ``base`` (a node of the backing chain) or one below it has is ABSENT, and so is
    what nobody has. Without, it reads as zeros.
    """
    runs: list[Run] = []
    _walk(looked_through(node, offset, length), offset, length, 0, base and below_filters(base), base is not None, runs)
    return runs


def _walk(node: Node, offset: int, length: int, shift: int, base: Node | None, absent: bool, runs: list[Run]) -> None:
    """Appends the runs of ``[offset, offset + length)`` of ``node``, told ``shift`` bytes further on."""
    straight = isinstance(node, FormatNode) and node.format.linear is not None
    if straight:
        assert isinstance(node, FormatNode)
        move = node.format.linear or 0
        # What a straight-line format holds is what its file holds; a file has no backing node.
        file = looked_through(node.format.children[0], offset + move, length)
        return _walk(file, offset + move, length, shift - move, None, False, runs)
    end = offset + length
    storage = isinstance(node, StorageNode)
    while offset < end:
        run = node.extent_at(offset, end - offset)
        kind = run[2]
        if kind in (DATA, SPECIAL):
            _append(runs, run[0] + shift, run[1], DATA)
        elif kind == ZERO or storage:
            _append(runs, run[0] + shift, run[1], ZERO)
        else:
            _below(node, run[0], run[1], shift, base, absent, runs)
        offset += run[1]
    return None


def _below(node: Node, offset: int, length: int, shift: int, base: Node | None, absent: bool, runs: list[Run]) -> None:
    """A run ``node`` says nothing of."""
    backing = node.backing and below_filters(node.backing)
    if backing is None or backing is base:
        return _append(runs, offset + shift, length, ABSENT if absent else ZERO)
    inside = max(0, min(length, backing.size - offset))
    if inside:
        _walk(backing, offset, inside, shift, base, absent, runs)
    if inside < length:
        _append(runs, offset + inside + shift, length - inside, ZERO)
    return None


def _append(runs: list[Run], offset: int, length: int, kind: int) -> None:
    if runs:
        last = runs[-1]
        if last[2] == kind:  # they adjoin
            runs[-1] = (last[0], last[1] + length, kind)
            return
    runs.append((offset, length, kind))


def widen(runs: Sequence[Run], unit: int) -> list[Run]:
    """The same ranges with DATA grown outwards over ZERO to whole units of ``unit`` bytes, so that what a target
    allocates as a whole is written as a whole. ABSENT is never grown over, nor are the ends of the whole."""
    if unit <= 1 or len(runs) < 2:
        return list(runs)
    wide: list[Run] = []
    for i, (offset, length, kind) in enumerate(runs):
        end = offset + length
        if kind == DATA:
            if wide and wide[-1][2] == ZERO:
                offset = _take_back(wide, offset - offset % unit)
            if i + 1 < len(runs) and runs[i + 1][2] == ZERO:
                end = min(end + -end % unit, runs[i + 1][0] + runs[i + 1][1])
        elif wide:
            offset = max(offset, wide[-1][0] + wide[-1][1])
        if offset < end:
            _append(wide, offset, end - offset, kind)
    return wide


def _take_back(wide: list[Run], offset: int) -> int:
    """Shortens the ZERO run that is last, so that DATA may begin at ``offset``; returns where it may begin."""
    begin, length, _ = wide[-1]
    if offset <= begin:
        wide.pop()
        return begin
    if offset < begin + length:
        wide[-1] = (begin, offset - begin, ZERO)
        return offset
    return begin + length
