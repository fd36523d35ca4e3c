"""What a user of a node does with it, and what it lets others do meanwhile.

Each use of a node carries two sets: ``needs`` and ``shares``. Two uses go together when neither needs
what the other does not share. The same sets, taken over all uses of a file, become its locks, so the
rule holds between processes too; the bit numbers are those QEMU locks bytes for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from diskwright.errors import GraphError

READ: Final = 1 << 0
"""Read, and rely on what is read staying meaningful while others write."""
WRITE: Final = 1 << 1
"""Change what others would read."""
WRITE_UNCHANGED: Final = 1 << 2
"""Write what is already there, as a copy from backing does."""
RESIZE: Final = 1 << 3
"""Change the size."""
ALL: Final = READ | WRITE | WRITE_UNCHANGED | RESIZE

_NAMES: Final = {READ: "consistent read", WRITE: "write", WRITE_UNCHANGED: "write unchanged", RESIZE: "resize"}


@dataclass(frozen=True)
class Access:
    """The two sets of one use."""

    needs: int
    shares: int

    def conflicts(self, other: Access) -> int:
        """The permissions that stand between the two uses; 0 when they go together."""
        return (self.needs & ~other.shares) | (other.needs & ~self.shares)


READER: Final = Access(READ, READ | WRITE_UNCHANGED)
"""Reads a disk that nobody may change."""
LIVE_READER: Final = Access(READ, ALL)
"""Reads a disk whose writes it follows by its own means, as a mirror follows its source."""
WRITER: Final = Access(READ | WRITE, READ | WRITE_UNCHANGED)
"""A guest: the one writer."""
FORCED: Final = Access(0, ALL)
"""``force-share``: reads whatever is there, promised nothing."""


def names(permissions: int) -> str:
    return ", ".join(text for bit, text in _NAMES.items() if permissions & bit)


def combine(uses: list[Access]) -> Access:
    """What all uses together need, and what all of them share. Raises GraphError when two conflict."""
    needs, shares = 0, ALL
    for i, use in enumerate(uses):
        for earlier in uses[:i]:
            if bad := use.conflicts(earlier):
                raise GraphError(f"Conflicting uses of a node: one needs '{names(bad)}', another does not share it")
        needs |= use.needs
        shares &= use.shares
    return Access(needs, shares)
