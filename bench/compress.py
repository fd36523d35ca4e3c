"""bench compress: writing and reading compressed qcow2 images of real files, against qemu-img convert.

Each contender's image is kept for the size printed beside its speed; levels of ours that are not the default are
named. Both programs leave flushing to the kernel (``-t unsafe``, qemu-img's default).
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
from bench.goals import Goal, verdict
from bench.report import Report, say
from bench.rounds import Sample, Series, play, ratio
from bench.servers import OURS
from bench.settings import Settings
from bench.tables import mebibytes, number, table
from bench.timing import CommandFailed
from bench.timing import run as timed
from bench.workspace import diskwright_command, flush, require_room, subfolder

QEMU: Final = "qemu-img"
_COMPARE_TIMEOUT: Final = 600.0
SAME_SIZE: Final = {"zlib": 6, "zstd": 3}
"""Levels of ours whose images are as large as qemu-img's."""


@dataclass(frozen=True)
class Task:
    """One conversion; ``level`` is ours, None for the default. Without ``compress`` a compressed image is read."""

    method: str
    compress: bool
    source: str
    target: str
    goal: float | None
    level: int | None = None

    @property
    def name(self) -> str:
        if not self.compress:
            return f"{self.method} to raw"
        return f"raw to {self.method}" + (f", level {self.level}" if self.level else "")

    def command(self, who: str) -> list[str]:
        """The command line of a contender."""
        if self.compress:
            words = ["-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={self.method}"]
        else:
            words = ["-f", "qcow2", "-O", "raw"]
        words += ["-t", "unsafe"]
        if who == QEMU:
            return ["qemu-img", "convert", *words, self.source, self.target]
        if self.level is not None:
            words += ["--compression-level", str(self.level)]
        return diskwright_command("convert", *words, self.source, self.target)


def run(settings: Settings, folder: str, report: Report) -> None:
    """Measures; adds its tables and figures to ``report``."""
    require_room(folder, 3 * settings.compressed_system)
    with subfolder(folder, "compress") as place:
        say("compress: making a file system of real files")
        plain = os.path.join(place, "files.raw")
        images.file_system(plain, settings.compressed_system)
        flush(plain)
        target = os.path.join(place, "target")
        results = {}
        for method, goal in (("zlib", 5.0), ("zstd", 1.5)):
            packed = os.path.join(place, f"{method}.qcow2")
            words = ("-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={method}")
            run_peer("qemu-img", "convert", *words, plain, packed, timeout=_COMPARE_TIMEOUT)
            flush(packed)
            for task in (
                Task(method, True, plain, target, goal),
                Task(method, True, plain, target, None, SAME_SIZE[method]),
                Task(method, False, packed, target, 1.5),
            ):
                if settings.wanted(task.name):
                    images.warm(task.source)
                    results[task] = _measure(task, settings.rounds, report)
        _tabulate(settings, results, report)


def _measure(task: Task, rounds: int, report: Report) -> dict[str, Series]:
    say(f"compress: {task.name}")
    verified: set[str] = set()
    turns: dict[str, Callable[[], Sample]] = {who: partial(_turn, task, who, verified) for who in (QEMU, OURS)}
    results = play(turns, rounds, expected=(CommandFailed, PeerError, OSError))
    for name, series in results.items():
        if series.failure:
            report.failure(f"compress, {task.name}", name, series.failure)
    return results


def _turn(task: Task, who: str, verified: set[str]) -> Sample:
    """One conversion, into a file that does not exist and is gone afterwards, its unwritten pages with it."""
    try:
        cost = timed(task.command(who))
        size = os.stat(task.target).st_size
        if who not in verified:
            verified.add(who)
            formats = ("raw", "qcow2") if task.compress else ("qcow2", "raw")
            words = ("-f", formats[0], "-F", formats[1], task.source, task.target)
            run_peer("qemu-img", "compare", *words, timeout=_COMPARE_TIMEOUT)
    finally:
        if os.path.exists(task.target):
            os.unlink(task.target)
    return Sample(cost.seconds, cost.cpu, {"peak": cost.peak, "size": size})


def _tabulate(settings: Settings, results: dict[Task, dict[str, Series]], report: Report) -> None:
    rows, records = [], []
    for task, series in results.items():
        theirs, ours = series[QEMU], series[OURS]
        speed = ratio(theirs, ours)
        sizes = theirs.note("size"), ours.note("size")
        size = f"{sizes[1] / sizes[0]:.3f}" if task.compress and sizes[0] and sizes[1] else "-"
        rows.append([
            task.name, number(theirs.median), number(ours.median), str(speed or "-"), size, number(theirs.cpu),
            number(ours.cpu), mebibytes(theirs.note("peak")), mebibytes(ours.note("peak")),
            verdict(Goal(task.goal), speed, None) if task.goal else "-",
        ])  # fmt: skip
        records.append(_record(task, theirs, ours, speed))
    head = ["seconds", QEMU, OURS, "speed to qemu-img", "size to qemu-img", "qemu CPU", "our CPU", "qemu memory",
            "our memory", "goal"]  # fmt: skip
    title = f"compressed qcow2, {settings.compressed_system >> 20} MiB ext4, {images.FILL:.0%} full"
    report.table(table(title, head, rows))
    report.add("compress", records)


def _record(task: Task, theirs: Series, ours: Series, speed: Any) -> dict[str, Any]:
    both = (theirs, ours)
    return {
        "case": task.name,
        "seconds": {one.name: one.values for one in both},
        "cpu_seconds": {one.name: one.cpu for one in both},
        "peak_bytes": {one.name: one.note("peak") for one in both},
        "target_bytes": {one.name: one.note("size") for one in both},
        "speed_ratio_to_qemu_img": vars(speed) if speed else None,
    }
