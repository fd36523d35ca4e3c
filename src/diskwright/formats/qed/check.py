"""Checking and mending a QED image. Source: "QED Image File Format", section Consistency checking.

Wrong can be: a table or a cluster where none can be, clusters or tables that share a place, and clusters of the file
that nothing uses. What is not there is taken off the table; the second of two in one place gets a copy; what nothing
uses at the end is cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from diskwright.core.driver import CheckReport
from diskwright.errors import LimitExceeded
from diskwright.formats.qed.header import NEED_CHECK

if TYPE_CHECKING:
    from diskwright.formats.qed.driver import Qed

_MOST: Final = 1 << 30
"""Clusters of a file that can be checked: 128 MiB of memory."""


def check(image: Qed, repair: str) -> CheckReport:
    """See ``Format.check``. Raises OSError, LimitExceeded."""
    work = _Check(image, repair == "all")
    work.tables()
    work.clusters()
    work.leaks(repair in ("all", "leaks"))
    report = work.report
    if repair == "all" and not report.corruptions and not report.check_errors:
        image.set_features(image.header.features & ~NEED_CHECK)
    return report


class _Check:
    def __init__(self, image: Qed, mend: bool) -> None:
        import numpy as np

        self.image, self.mend, self.report = image, mend, CheckReport()
        self.cluster, self.file = image.cluster_size, image.file
        self.count = -(-self.file.size // self.cluster)
        if self.count > _MOST:
            raise LimitExceeded(f"{image.path}: has {self.count} clusters; at most {_MOST} can be checked")
        self.used = np.zeros(self.count, bool)
        header = image.header
        self.used[: max(1, header.header_size)] = True
        self._claim(header.l1_table_offset, header.table_size)
        self.end = self.count * self.cluster
        self.report.total_clusters = -(-image.size // self.cluster)

    def _possible(self, place: int, clusters: int) -> bool:
        # The last cluster of the file may be short of its end.
        return (
            place % self.cluster == 0
            and place >= self.image.first_place
            and place // self.cluster + clusters <= self.count
        )

    def _claim(self, place: int, clusters: int) -> bool:
        """Whether nobody had it before."""
        part = self.used[place // self.cluster : place // self.cluster + clusters]
        free = not part.any()
        part[:] = True
        return free

    def _found(self, what: str) -> None:
        self.report.say(f"{'Repairing' if self.mend else 'ERROR'} {what}")
        if self.mend:
            self.report.corruptions_fixed += 1
        else:
            self.report.corruptions += 1

    def tables(self) -> None:
        """L2 tables: one that cannot be there, or is another's, is given up with all it says."""
        directory, size = self.image.directory, self.image.header.table_size
        for index, place in enumerate(directory.entries):
            if not place:
                continue
            if not self._possible(place, size):
                self._found(f"L1 entry {index}: no table can lie at {place:#x}")
            elif not self._claim(place, size):
                self._found(f"L1 entry {index}: the table at {place:#x} shares its place")
            else:
                continue
            if self.mend:
                directory.set(index, 0)
        if directory.changed:
            self.image.table.clear()
            self.image.write_back()

    def clusters(self) -> None:
        """Entries of the L2 tables; a damaged table (when nothing is mended) is left out."""
        image, span = self.image, self.image.header.table_entries
        for index, table in enumerate(image.directory.entries):
            first = index * span
            if not table or first * self.cluster >= image.size or not self._possible(table, image.header.table_size):
                continue
            self._table(first, min(span, -(-image.size // self.cluster) - first))

    def _table(self, first: int, count: int) -> None:
        import numpy as np

        entries = self.image.entries(first, count)
        assert entries is not None
        at = np.flatnonzero(entries > 1)
        places = entries[at].astype(np.int64)
        number = places // self.cluster
        bad = (places % self.cluster != 0) | (places < self.image.first_place) | (number >= self.count)
        self.report.allocated_clusters += len(at)
        self.report.fragmented_clusters += int(np.count_nonzero(np.diff(places) != self.cluster))
        for block, place in zip((at[bad] + first).tolist(), places[bad].tolist(), strict=True):
            self._found(f"guest cluster {block}: no cluster can lie at {place & (1 << 64) - 1:#x}")
            self._set(block, 0)
        good = number[~bad]
        _, earliest = np.unique(good, return_index=True)
        shared = self.used[good]
        repeated = np.ones(len(good), bool)
        repeated[earliest] = False
        self.used[good] = True
        for block, place in zip(
            (at[~bad][shared | repeated] + first).tolist(), places[~bad][shared | repeated].tolist(), strict=True
        ):
            self._found(f"guest cluster {block}: its place {place:#x} is another's too")
            if self.mend:
                self._set(block, self._copy(place))
        if self.image.table.changed:
            self.image.write_back()

    def _set(self, block: int, entry: int) -> None:
        if self.mend:
            number, index = divmod(block, self.image.table.items)
            items = self.image.table.edit(number)
            assert items is not None
            items[index] = entry
            self.image.table.mark(number, index, index)

    def _copy(self, place: int) -> int:
        data = self.file.pread(place, self.cluster)
        new, self.end = self.end, self.end + self.cluster
        self.file.writev([(new, memoryview(data))])
        return new

    def leaks(self, mend: bool) -> None:
        import numpy as np

        # What is less than a cluster at the end does not count.
        free = np.flatnonzero(~self.used[: self.file.size // self.cluster])
        self.report.leaks += len(free)
        taken = np.flatnonzero(self.used)
        last = int(taken[-1]) + 1 if len(taken) else 0
        tail = self.count - last
        if mend and tail and self.end == self.count * self.cluster and not self.report.corruptions:
            self.file.resize(last * self.cluster)
            self.file.flush()
            cut = int(np.count_nonzero(free >= last))
            self.report.leaks -= cut
            self.report.leaks_fixed += cut
