"""Metadata contexts: what block status can tell of an export.

``base:allocation`` is the protocol's own; ``qemu:allocation-depth`` and ``qemu:dirty-bitmap:NAME`` are QEMU's, whose
clients (and backup programs) look for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Final

from diskwright.core.node import Node, below_filters
from diskwright.errors import GraphError
from diskwright.extents import WINDOW
from diskwright.wire.nbd import constants as c

if TYPE_CHECKING:
    from diskwright.core.bitmap import DirtyBitmap
    from diskwright.core.disk import Disk
    from diskwright.core.status import Status

MAX_DESCRIPTORS: Final = 4096
"""Runs in one block status reply; a client asks again for what is left out."""

Runs = list[tuple[int, int]]
"""``(length in bytes, state flags)``, one behind the other."""


class Look:
    """One request's look at a range of a disk, within its gate; what several contexts need is looked up once."""

    def __init__(self, disk: Disk, offset: int, length: int, most: int) -> None:
        self.offset, self.length, self.most = offset, length, most
        self._disk = disk

    @cached_property
    def rows(self) -> list[Status]:
        return self._disk.status(self.offset, min(self.length, WINDOW))


class Context(ABC):
    """One context of an export."""

    name: str

    @abstractmethod
    def runs(self, look: Look) -> Runs:
        """The runs from the beginning of a range on, at least one, at most ``look.most``. They may end before the range
        does."""


class BaseAllocation(Context):
    """Where nothing is stored, and what reads as zeros."""

    name = c.BASE_ALLOCATION

    def runs(self, look: Look) -> Runs:
        runs: Runs = []
        for row in look.rows:
            state = (c.STATE_ZERO if row.zero else 0) | (0 if row.data else c.STATE_HOLE)
            if not _append(runs, row.length, state, look.most):
                break
        return runs


class AllocationDepth(Context):
    """Which image of the backing chain says what a run holds: 1 the first, 2 its backing file; 0 none does."""

    name = c.ALLOCATION_DEPTH

    def runs(self, look: Look) -> Runs:
        runs: Runs = []
        for row in look.rows:
            if not _append(runs, row.length, row.depth + 1 if row.present else 0, look.most):
                break
        return runs


class DirtyRuns(Context):
    """What is dirty in a bitmap, which ``release`` gives back."""

    def __init__(self, bitmap: DirtyBitmap, name: str) -> None:
        self.name, self._bitmap = c.DIRTY_BITMAP + name, bitmap

    def release(self) -> None:
        self._bitmap.release()

    def runs(self, look: Look) -> Runs:
        bitmap, at, end = self._bitmap, look.offset, look.offset + look.length
        runs: Runs = []
        while at < end:
            found = bitmap.next_dirty(at, end - at)
            begin = end if found is None else min(max(found[0], at), end)
            if begin > at and not _append(runs, begin - at, 0, look.most):
                break
            if found is None or begin == end:
                break
            at = min(found[0] + found[1], end)
            if not _append(runs, at - begin, c.STATE_DIRTY, look.most):
                break
        return runs


def dirty_runs(root: Node, name: str, *, read_only: bool) -> DirtyRuns:
    """The bitmap called ``name`` of the first image in a chain that has one, held until ``release``: nobody can clear
    or remove it meanwhile. Raises GraphError; also for a bitmap that goes on recording under an export that is
    read-only, whose clients rely on it to stay as it is."""
    from diskwright.core import bitmaps

    node: Node | None = root
    while node is not None:
        node = below_filters(node)
        for bitmap in bitmaps.named(node):
            if bitmap.name == name:
                if read_only and node.writable and bitmap.enabled:
                    raise GraphError(f"Enabled bitmap '{name}' incompatible with readonly export")
                bitmap.hold(allow_readonly=True)
                return DirtyRuns(bitmap, name)
        node = node.backing
    raise GraphError(f"Bitmap '{name}' is not found")


def _append(runs: Runs, length: int, state: int, most: int) -> bool:
    """One more run, as part of the last where it is the same. False when there is no room for it."""
    if runs and runs[-1][1] == state:
        runs[-1] = (runs[-1][0] + length, state)
    elif len(runs) >= most:
        return False
    else:
        runs.append((length, state))
    return True
