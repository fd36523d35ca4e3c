"""Counts of references to host clusters, held for a window of them at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diskwright.errors import LimitExceeded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hosts = NDArray[np.int64]
    Counts = NDArray[np.uint16]

WINDOW: Final = 1 << 25
"""Host clusters whose counts are held at a time: 128 MiB for both kinds, 2 TiB of image at 64 KiB clusters. As many as
the largest refcount block counts, or a multiple of it."""

MAX_WINDOWS: Final = 128
"""Windows looked at, at most: each is a walk over all tables. 256 TiB of file at 64 KiB clusters."""

TOP: Final = 0xFFFF
"""Counts above this are not told apart."""


class References:
    """How often each cluster of a window, ``[low, high)``, is referred to, and which other windows are."""

    def __init__(self, path: str, low: int, high: int) -> None:
        self._path, self.low, self.high = path, low, high
        self.references: Counts = np.zeros(high - low, np.uint16)
        self.windows: set[int] = set()
        """Numbers of other windows that are referred to."""

    def add_run(self, first: int, last: int, weight: int = 1) -> None:
        for number in range(first // WINDOW, last // WINDOW + 1):
            self.touch(number)
        start, stop = max(first, self.low), min(last + 1, self.high)
        if start < stop:
            part = self.references[start - self.low : stop - self.low]
            np.minimum(part.astype(np.uint32) + np.uint32(min(weight, TOP)), TOP, out=part, casting="unsafe")

    def add(self, hosts: Hosts, weights: Hosts | None = None) -> None:
        """A reference (or ``weights``) to each of ``hosts``, which may repeat."""
        if not len(hosts):
            return
        first, last = int(hosts.min()), int(hosts.max())
        if first < self.low or last >= self.high:
            for number in np.unique(hosts // WINDOW).tolist():
                self.touch(number)
            inside = (hosts >= self.low) & (hosts < self.high)
            hosts = hosts[inside]
            if not len(hosts):
                return
            weights = weights[inside] if weights is not None else None
            first, last = int(hosts.min()), int(hosts.max())
        span = last - first + 1
        if span <= 4 * len(hosts):
            added: NDArray[Any] = np.bincount(hosts - first, weights, span)
            part = self.references[first - self.low : last + 1 - self.low]
            np.minimum(part + added.astype(np.int64), TOP, out=part, casting="unsafe")
            return
        places = hosts - self.low
        if weights is None and self._add_each(places):
            return
        # Far apart: counting by sorting takes no memory for what lies between.
        places, inverse = np.unique(places, return_inverse=True)
        sums = np.bincount(inverse, weights).astype(np.int64)
        self.references[places] = np.minimum(self.references[places] + sums, TOP).astype(np.uint16)

    def _add_each(self, places: Hosts) -> bool:
        """One reference for each of ``places``; False, and nothing done, when a count might not fit any more."""
        if len(places) + int(self.references[places].max()) > TOP:
            return False
        # Fast, unlike most uses of it, because all types agree.
        np.add.at(self.references, places, np.uint16(1))
        return True

    def touch(self, number: int) -> None:
        if number * WINDOW < self.low or number * WINDOW >= self.high:
            self.windows.add(number)
            if len(self.windows) > MAX_WINDOWS:
                raise LimitExceeded(f"{self._path}: its clusters lie too far apart to be checked")
