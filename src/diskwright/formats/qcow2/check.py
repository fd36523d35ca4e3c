"""Checking an image: whether refcounts, copied flags and references agree. See ``scan`` for how they are counted.

The numbers are those of ``qemu-img check``: a cluster counted too low is a corruption, one counted too high a leak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from diskwright.core.driver import CheckReport
from diskwright.errors import ImageError
from diskwright.formats.qcow2.header import Header, read_header

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.scan import Scan

_NAMED: Final = 100
"""Mismatches that get a message of their own, in a window."""
_AT_ONCE: Final = 1 << 20
"""Clusters compared together."""


def check(image: Qcow2, repair: str) -> CheckReport:
    """See ``Format.check``; ``repair`` is off (or none), leaks or all. Memory is bounded by ``references.WINDOW``.

    Raises ImageError when repair is asked of a read-only image, OSError, LimitExceeded.
    """
    file = image.children[0]
    if repair not in ("leaks", "all"):
        if image.writer is not None:
            image.writer.close()
        return inspect(file, read_header(file)).report
    if not image.can_repair:
        raise ImageError(f"{file.filename}: is open read-only, and cannot be repaired")
    if image.writer is not None:
        image.writer.close()
    from diskwright.formats.qcow2.repair import mend

    try:
        return mend(file, repair)
    finally:
        image.reload()


class Findings:
    """The report, and what a repair needs to know beside it."""

    def __init__(self, report: CheckReport) -> None:
        self.report = report
        self.rebuild = False
        self.beyond = False
        """Whether clusters behind the end of the file are referred to, near enough to be taken for real."""
        self.windows: list[int] = []
        """All windows that anything lies in."""


def inspect(file: Node, header: Header) -> Findings:
    """Walks over the image, once for every window of host clusters, and changes nothing."""
    from diskwright.formats.qcow2.scan import Scan, nearby

    report = CheckReport(total_clusters=header.geometry.clusters(header.size))
    findings = Findings(report)
    clusters = header.geometry.clusters(file.size)
    highest, done, waiting = 0, set[int](), {0}
    while waiting:
        number = min(waiting)
        scan = Scan(file, header, report, number, quiet=bool(done))
        scan.beyond = None if done else nearby(file, header)
        scan.run()
        findings.beyond |= scan.beyond is not None and bool(scan.beyond.any())
        highest = max(highest, _compare(scan, clusters))
        findings.rebuild |= scan.rebuild
        done.add(number)
        waiting = (waiting | scan.windows) - done
    findings.windows = sorted(done)
    report.image_end_offset = (highest + 1) * header.geometry.cluster_size
    return findings


def _compare(scan: Scan, clusters: int) -> int:
    """Reports where refcounts and references of a window differ; returns the last cluster with either. The file has
    ``clusters`` of them, and one more when something refers to what begins at its end."""
    import numpy as np

    report, highest, named = scan.report, 0, 0
    count = max(0, min(scan.high, clusters) - scan.low)
    if scan.low <= clusters < scan.high and scan.references[clusters - scan.low]:
        count += 1
    for start, stop in scan.unknown:
        scan.references[start - scan.low : stop - scan.low] = 0
    for start in range(0, count, _AT_ONCE):
        refcounts = scan.refcounts[start : min(count, start + _AT_ONCE)]
        references = scan.references[start : min(count, start + _AT_ONCE)]
        if refcounts[-1] or references[-1]:
            highest = start + len(refcounts) - 1
        elif len(used := np.flatnonzero(refcounts | references)):
            highest = start + int(used[-1])
        if np.array_equal(refcounts, references):
            continue
        differ = np.flatnonzero(refcounts != references)
        low = refcounts[differ] < references[differ]
        report.corruptions += int(np.count_nonzero(low))
        report.leaks += int(np.count_nonzero(~low))
        scan.rebuild |= bool((refcounts[differ] == 0).any())
        for cluster in differ[: max(0, _NAMED - named)].tolist():
            counted, found = int(refcounts[cluster]), int(references[cluster])
            word = "ERROR" if counted < found else "Leaked"
            report.say(f"{word} cluster {scan.low + start + cluster} refcount={counted} reference={found}")
        named += len(differ)
    if named > _NAMED:
        report.say(f"and {named - _NAMED} clusters more whose refcounts are wrong")
    return scan.low + highest if count else 0
