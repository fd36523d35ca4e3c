"""Finding zeros in data that has been read, at the speed of memory."""

from __future__ import annotations

from typing import Final

from diskwright.units import KiB

WORD: Final = 8

SPARSE: Final = 4 * KiB
"""Zeros found in data are told as such from this length on: a page, what file systems allocate."""


def is_zero(piece: memoryview) -> bool:
    """Whether every byte is zero."""
    import numpy as np

    whole = len(piece) - len(piece) % WORD
    if whole and np.frombuffer(piece, np.uint64, whole // WORD).any():
        return False
    return not any(piece[whole:])


def zero_runs(piece: memoryview, unit: int) -> list[tuple[int, int, bool]]:
    """``(start, length, zero)`` runs that cover ``piece``: it is looked at in units of ``unit`` bytes (a multiple
    of 8; the last may be shorter), and runs of units that are all zero are told from the rest."""
    length = len(piece)
    units = length // unit
    if not units:
        return [(0, length, is_zero(piece))] if length else []
    import numpy as np

    words = np.frombuffer(piece, np.uint64, units * unit // WORD).reshape(units, unit // WORD)
    # The first word of each unit first: most units that hold something have something there, and only
    # the others have to be read through.
    flags = words[:, 0] == 0
    maybe = np.flatnonzero(flags)
    if 2 * len(maybe) > units:
        flags = np.bitwise_or.reduce(words, axis=1) == 0
    else:
        for index in maybe.tolist():
            flags[index] = not words[index].any()
    runs = _runs_of(flags.tolist(), unit)
    if units * unit < length:
        _append(runs, units * unit, length - units * unit, is_zero(piece[units * unit :]))
    return runs


def _runs_of(flags: list[bool], unit: int) -> list[tuple[int, int, bool]]:
    if True not in flags:
        return [(0, len(flags) * unit, False)]
    if False not in flags:
        return [(0, len(flags) * unit, True)]
    runs: list[tuple[int, int, bool]] = []
    begin = 0
    while begin < len(flags):
        kind = flags[begin]
        try:
            end = flags.index(not kind, begin)
        except ValueError:
            end = len(flags)
        runs.append((begin * unit, (end - begin) * unit, kind))
        begin = end
    return runs


def _append(runs: list[tuple[int, int, bool]], start: int, length: int, zero: bool) -> None:
    if runs[-1][2] == zero:
        last = runs[-1]
        runs[-1] = (last[0], last[1] + length, zero)
    else:
        runs.append((start, length, zero))
