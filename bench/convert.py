"""bench convert: copying an image with real files in it into another format, against qemu-img convert.

qemu-img flushes nothing unless it is told to (its default is ``-t unsafe``), so both are compared that way, which shows
the copying itself, and once more with ``-t writeback``, where both end with a flush and the disk has its say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tests.peers.process import PeerError
from tests.peers.process import run as run_peer

from bench import images
from bench.report import Report, say
from bench.rounds import Sample, Series, best, play, ratio
from bench.servers import OURS
from bench.settings import Settings
from bench.tables import mebibytes, number, table
from bench.timing import CommandFailed
from bench.timing import run as timed
from bench.workspace import diskwright_command, flush, require_room, subfolder

PAIRS: Final = (("raw", "raw"), ("raw", "qcow2"), ("qcow2", "raw"))
QEMU: Final = "qemu-img"
QEMU_UNORDERED: Final = "qemu-img -W"
QEMU_OFFLOADED: Final = "qemu-img -C"
_QEMU_ALL: Final = (QEMU, QEMU_UNORDERED, QEMU_OFFLOADED)
_COMPARE_TIMEOUT: Final = 600.0


@dataclass(frozen=True)
class Task:
    """One conversion. ``cache`` is the target's cache mode, under the names both programs know."""

    source: str
    source_format: str
    target: str
    target_format: str
    cache: str

    @property
    def name(self) -> str:
        return f"{self.source_format} to {self.target_format}, -t {self.cache}"

    def command(self, who: str) -> list[str]:
        """The command line of a contender."""
        words = ["-f", self.source_format, "-O", self.target_format, "-t", self.cache]
        if who == OURS:
            return diskwright_command("convert", *words, self.source, self.target)
        return ["qemu-img", "convert", *who.split()[1:], *words, self.source, self.target]


def run(settings: Settings, folder: str, report: Report) -> None:
    """Measures all pairs of formats; adds its tables and figures to ``report``."""
    require_room(folder, 4 * settings.file_system)
    with subfolder(folder, "convert") as place:
        say("convert: making a file system of real files")
        plain, qcow2 = images.shared_file_system(folder, settings.file_system), os.path.join(place, "source.qcow2")
        images.convert(plain, "raw", qcow2, "qcow2")
        flush(qcow2)
        images.warm(qcow2)
        sources = {"raw": plain, "qcow2": qcow2}
        target = os.path.join(place, "target")
        results = {}
        for cache, rounds in (("unsafe", settings.rounds), ("writeback", settings.durable_rounds)):
            for source_format, target_format in PAIRS:
                task = Task(sources[source_format], source_format, target, target_format, cache)
                if rounds and settings.wanted(task.name):
                    results[task] = _measure(task, rounds, report)
        _tabulate(settings, results, report)


def _measure(task: Task, rounds: int, report: Report) -> dict[str, Series]:
    say(f"convert: {task.name}")
    who = [*_QEMU_ALL, OURS] if task.cache == "unsafe" else [QEMU, OURS]
    verified: set[str] = set()
    turns: dict[str, Callable[[], Sample]] = {name: partial(_turn, task, name, verified) for name in who}
    results = play(turns, rounds, expected=(CommandFailed, PeerError, OSError))
    for name, series in results.items():
        if series.failure:
            report.failure(f"convert, {task.name}", name, series.failure)
    return results


def _turn(task: Task, who: str, verified: set[str]) -> Sample:
    """One conversion, into a file that does not exist and is gone afterwards, its unwritten pages with it."""
    try:
        cost = timed(task.command(who))
        space = os.stat(task.target).st_blocks * 512
        if who not in verified:
            verified.add(who)
            words = ("-f", task.source_format, "-F", task.target_format, task.source, task.target)
            run_peer("qemu-img", "compare", *words, timeout=_COMPARE_TIMEOUT)
    finally:
        if os.path.exists(task.target):
            os.unlink(task.target)
    return Sample(cost.seconds, cost.cpu, {"peak": cost.peak, "space": space})


def _tabulate(settings: Settings, results: dict[Task, dict[str, Series]], report: Report) -> None:
    names = [*_QEMU_ALL, OURS]
    rows, costs, records = [], [], []
    for task, series in results.items():
        found = [series.get(name, Series(name)) for name in names]
        ours = series[OURS]
        quickest = best([series[name] for name in _QEMU_ALL if name in series], highest=False)
        to_plain = ratio(series[QEMU], ours)
        to_best = ratio(quickest, ours) if quickest else None
        rows.append([task.name, *(number(one.median) for one in found), str(to_plain or "-"), str(to_best or "-")])
        peaks = [mebibytes(one.note("peak")) for one in found]
        costs.append([task.name, *(number(one.cpu) for one in found), *peaks])
        records.append(_record(task, found, to_plain, to_best))
    title = f"convert, {settings.file_system >> 30} GiB ext4, {images.FILL:.0%} full"
    head = ["seconds", *names, "speed to qemu-img", "to its best"]
    report.table(table(title, head, rows))
    head = ["CPU seconds; peak memory", *(f"{name} CPU" for name in names), *(f"{name} mem." for name in names)]
    report.table(table(f"{title}: CPU time and memory", head, costs))
    report.add("convert", records)


def _record(task: Task, found: list[Series], to_plain: Any, to_best: Any) -> dict[str, Any]:
    return {
        "case": task.name,
        "seconds": {one.name: one.values for one in found},
        "cpu_seconds": {one.name: one.cpu for one in found},
        "peak_bytes": {one.name: one.note("peak") for one in found},
        "target_bytes_on_disk": {one.name: one.note("space") for one in found},
        "speed_ratio_to_qemu_img": vars(to_plain) if to_plain else None,
        "speed_ratio_to_best_qemu_img": vars(to_best) if to_best else None,
    }
