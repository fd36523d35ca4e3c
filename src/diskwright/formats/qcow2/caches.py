"""How much memory an open image may use for its tables, and giving up what nobody uses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from diskwright.errors import OptionError
from diskwright.formats.qcow2.layout import CACHE_BYTES
from diskwright.formats.qcow2.options import Qcow2Options
from diskwright.units import is_power_of_two

_MAX_INTERVAL = 1 << 31
"""Seconds; what QEMU accepts."""


class Budgets(NamedTuple):
    """Bytes each kind of table may take. ``places`` is what a writer remembers of where it may write."""

    l2: int
    places: int
    refcounts: int


def budgets(options: Qcow2Options, *, writable: bool) -> Budgets:
    """Shares out what the options allow. Raises OptionError for sizes that contradict each other."""
    total, l2, refcounts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if None not in (total, l2, refcounts):
        raise OptionError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
    if total is not None:
        for name, size in (("l2-cache-size", l2), ("refcount-cache-size", refcounts)):
            if size is not None and size > total:
                raise OptionError(f"{name} may not exceed cache-size")
    whole = CACHE_BYTES if total is None else total
    if not writable:
        return Budgets(whole if l2 is None else l2, 0, 0)
    if refcounts is None:
        refcounts = whole // 4 if total is None or l2 is None else whole - l2
    if l2 is None:
        l2 = max(0, whole - refcounts)
    # What is remembered of places is told by L2 tables, so it is theirs to share.
    return Budgets(l2 - l2 // 3, l2 // 3, refcounts)


def check_options(options: Qcow2Options, cluster_size: int) -> None:
    """Raises OptionError for values that no image, or not this one, can have."""
    budgets(options, writable=True)
    entry = options.l2_cache_entry_size
    if entry is not None and not (is_power_of_two(entry) and 512 <= entry <= cluster_size):
        raise OptionError(
            f"L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})"
        )
    if not 0 <= options.cache_clean_interval < _MAX_INTERVAL:
        raise OptionError(f"Cache clean interval must be 0 to {_MAX_INTERVAL - 1} seconds")


class Cleaner:
    """Calls ``clean`` every ``interval`` seconds from a thread of its own, until it is stopped."""

    def __init__(self, interval: float, clean: Callable[[], None]) -> None:
        self._interval, self._clean = interval, clean
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qcow2 cache cleaner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._clean()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
