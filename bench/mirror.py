"""bench mirror: how long a disk takes to be mirrored while its guest, over NBD, idles or goes on writing.

The clock starts when the work does (creating the target included) and stops at BLOCK_JOB_READY: from then on target
and source are kept equal. Each contender mirrors its own copy of the disk to a new target. Afterwards the job is
finished, and what it made is compared with the source by qemu-img.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from tests.peers import MissingPeer
from tests.peers.process import PeerError
from tests.peers.process import run as run_peer
from tests.peers.qmp import QmpError

from bench import images
from bench.client import ServerError
from bench.mirrorers import MIRRORERS, Mirrorer, MirrorFailed
from bench.paced import Paced
from bench.pool import LoadFailed, Pool
from bench.report import Report, say
from bench.rounds import Ratio, Sample, Series, best, play, ratio
from bench.servers import OURS
from bench.settings import Settings
from bench.tables import mebibytes, number, table
from bench.workspace import flush, require_room, subfolder

PAIRS: Final = (("raw", "raw"), ("raw", "qcow2"), ("qcow2", "raw"))
_COMPARE_TIMEOUT: Final = 600.0
_FAILURES: Final = (PeerError, MissingPeer, QmpError, MirrorFailed, LoadFailed, ServerError, OSError)


@dataclass(frozen=True)
class Task:
    """One mirror. ``rate``: 4 KiB writes per second that the guest makes; 0 for an idle one."""

    source_format: str
    target_format: str
    rate: float

    @property
    def name(self) -> str:
        guest = f"{self.rate:g} writes/s" if self.rate else "idle"
        return f"{self.source_format} to {self.target_format}, {guest}"


def run(settings: Settings, folder: str, report: Report) -> None:
    """Measures all pairs of formats; adds its tables and figures to ``report``."""
    require_room(folder, 7 * settings.file_system)
    with subfolder(folder, "mirror") as place, Pool(1) as pool:
        say("mirror: making a file system of real files")
        master = images.shared_file_system(folder, settings.file_system)
        results = {}
        for fmt in ("raw", "qcow2"):
            with subfolder(place, fmt) as here:
                sources = _sources(here, master, fmt)
                for source_format, target_format in PAIRS:
                    for rate in (0.0, settings.writes_per_second):
                        task = Task(source_format, target_format, rate)
                        if source_format == fmt and settings.wanted(task.name):
                            results[task] = _measure(task, sources, pool, settings, report)
        _tabulate(settings, results, report)


def _sources(folder: str, master: str, fmt: str) -> dict[str, str]:
    """A copy of the disk for each contender, since the guest's writes change it."""
    first = os.path.join(folder, f"source.{fmt}")
    images.convert(master, "raw", first, fmt)
    sources = {}
    for mirrorer in MIRRORERS:
        path = os.path.join(folder, f"{mirrorer.name.replace(' ', '-')}.{fmt}")
        images.copy(first, path)
        flush(path)
        images.warm(path)
        sources[mirrorer.name] = path
    return sources


def _measure(task: Task, sources: dict[str, str], pool: Pool, settings: Settings, report: Report) -> dict[str, Series]:
    say(f"mirror: {task.name}")
    verified: set[str] = set()
    turns: dict[str, Callable[[], Sample]] = {
        mirrorer.name: partial(_turn, mirrorer, task, sources[mirrorer.name], pool, settings, verified)
        for mirrorer in MIRRORERS
    }
    results = play(turns, settings.mirror_rounds, expected=_FAILURES)
    for name, series in results.items():
        if series.failure:
            report.failure(f"mirror, {task.name}", name, series.failure)
    return results


def _turn(mirrorer: Mirrorer, task: Task, source: str, pool: Pool, settings: Settings, verified: set[str]) -> Sample:
    """One mirror to a new target, compared with the source the first time."""
    flush(source)
    target = source + ".target"
    load = _Load(pool, replace(mirrorer.load, rate=task.rate, size=settings.file_system)) if task.rate else None
    try:
        found = mirrorer.mirror(source, task.source_format, target, task.target_format, settings.file_system, load)
        if mirrorer.name not in verified:
            verified.add(mirrorer.name)
            words = ("-f", task.source_format, "-F", task.target_format, source, target)
            run_peer("qemu-img", "compare", *words, timeout=_COMPARE_TIMEOUT)
    finally:
        if os.path.exists(target):
            os.unlink(target)
    notes = {"peak": float(found.peak)}
    if load:
        notes["writes"], notes["p99"], notes["worst"] = load.outcome.within(found.started, found.ready)
    return Sample(found.ready - found.started, found.cpu, notes)


class _Load:
    """The guest, as the mirrorers see it."""

    def __init__(self, pool: Pool, paced: Paced) -> None:
        self._pool, self._paced = pool, paced
        self._running = False

    def start(self, socket: str) -> None:
        self._pool.start_paced(socket, self._paced)
        self._running = True

    def connected(self) -> None:
        try:
            self._pool.paced_connected()
        except LoadFailed:
            self._running = False
            raise

    def stop(self) -> None:
        if self._running:
            self._running = False
            self.outcome = self._pool.stop_paced()


def _tabulate(settings: Settings, results: dict[Task, dict[str, Series]], report: Report) -> None:
    names = [mirrorer.name for mirrorer in MIRRORERS]
    rows, guests, costs, records = [], [], [], []
    for task, series in results.items():
        found = [series[name] for name in names]
        quickest = best([one for one in found if one.name != OURS], highest=False)
        speed = ratio(quickest, series[OURS]) if quickest else None
        rows.append([task.name, *(number(one.median) for one in found), str(speed or "-")])
        costs.append([task.name, *(number(one.cpu) for one in found), *(mebibytes(one.note("peak")) for one in found)])
        if task.rate:
            guests.append([task.name, *(_guest(one) for one in found)])
        records.append(_record(task, found, speed))
    title = f"mirror until ready, {settings.file_system >> 30} GiB ext4, {images.FILL:.0%} full"
    report.table(table(title, ["seconds", *names, "speed to better daemon"], rows))
    head = ["writes/s; 99 % done in; longest", *names]
    report.table(table("mirror: what its guest saw meanwhile", head, guests))
    head = ["CPU seconds; peak memory", *(f"{name} CPU" for name in names), *(f"{name} mem." for name in names)]
    report.table(table("mirror: CPU time and memory", head, costs))
    report.add("mirror", records)


def _guest(series: Series) -> str:
    writes, p99, worst = (series.note(name) for name in ("writes", "p99", "worst"))
    if writes is None or p99 is None or worst is None:
        return "-"
    return f"{writes:.0f}/s; {p99 * 1e3:.1f} ms; {worst * 1e3:.1f} ms"


def _record(task: Task, found: list[Series], speed: Ratio | None) -> dict[str, Any]:
    return {
        "case": task.name,
        "seconds": {one.name: one.values for one in found},
        "cpu_seconds": {one.name: one.cpu for one in found},
        "peak_bytes": {one.name: one.note("peak") for one in found},
        "guest": {one.name: {name: one.note(name) for name in ("writes", "p99", "worst")} for one in found},
        "speed_ratio_to_better_daemon": vars(speed) if speed else None,
    }
