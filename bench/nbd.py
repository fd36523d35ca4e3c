"""bench nbd: serving over NBD, against qemu-nbd in both its modes and nbdkit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from tests.peers import MissingPeer
from tests.peers.process import PeerError

from bench import images
from bench.client import ServerError
from bench.expected import Expected, WrongData, check_tables
from bench.fio import fio_turn
from bench.goals import nbd_goal, verdict
from bench.load import Workload
from bench.pool import LoadFailed, Pool
from bench.report import Report, say
from bench.rounds import Sample, Series, best, play, ratio
from bench.servers import KINDS, NBDKIT, OURS, QEMU_THREADS, QEMU_URING, Kind, NbdServer
from bench.settings import Settings
from bench.tables import mebibytes, number, table
from bench.workspace import require_room, settle, subfolder

MOST_CONNECTIONS: Final = 4
_QEMU: Final = (QEMU_THREADS, QEMU_URING)
_FAILURES: Final = (LoadFailed, PeerError, MissingPeer, OSError, ServerError, WrongData)


@dataclass(frozen=True)
class Case:
    """One configuration: ``block`` bytes a request, ``depth`` requests in flight on each of ``connections``."""

    write: bool
    block: int
    depth: int
    connections: int

    @property
    def sequential(self) -> bool:
        return self.block > 65536

    @property
    def name(self) -> str:
        what = f"{'1 MiB seq.' if self.sequential else '4 KiB random'} {'write' if self.write else 'read'}"
        return f"{what}, depth {self.depth}, {self.connections} conn."

    @property
    def scale(self) -> float:
        """From requests per second to what the table shows: MiB/s for large requests."""
        return self.block / (1 << 20) if self.sequential else 1.0


def cases(settings: Settings) -> Iterator[Case]:
    """The configurations on an image that is fully allocated."""
    for write in (False, True):
        for connections in (1, 4):
            for depth in (1, 16, 64):
                if not settings.quick or depth == 16 or (connections, depth) == (1, 1):
                    yield Case(write, 4096, depth, connections)
            if not settings.quick or connections == 1:
                yield Case(write, 1 << 20, 4 if connections == 1 else 2, connections)


def allocating_cases(settings: Settings) -> Iterator[Case]:
    """The configurations on an image that starts empty."""
    yield Case(True, 4096, 16, 1)
    if not settings.quick:
        yield Case(True, 4096, 1, 1)
        yield Case(True, 1 << 20, 4, 1)


@dataclass
class Bench:
    """What all parts share. ``dead`` are contenders that failed a check or a turn, and why: they are out."""

    settings: Settings
    folder: str
    pool: Pool
    report: Report
    dead: dict[str, str] = field(default_factory=dict)

    def workload(self, case: Case, size: int) -> Workload:
        settings = self.settings
        return Workload(
            write=case.write,
            block=case.block,
            depth=case.depth,
            sequential=case.sequential,
            size=size,
            seed=case.depth * 1000 + case.connections,
            structured=settings.structured and not case.write,
            one_by_one=settings.one_by_one,
        )

    def turn(self, server: NbdServer, case: Case, size: int, expected: Expected) -> Sample:
        """One contender's turn."""
        settle(server.image)
        before = server.cpu
        if self.settings.fio:
            return fio_turn(server, case.write, case.block, case.depth, case.connections, size, self.settings)
        work = self.workload(case, size)
        done = self.pool.run(
            server.socket, work, case.connections, warm_up=self.settings.warm_up, seconds=self.settings.seconds
        )
        spent = server.cpu - before
        if case.write:
            for lane, issued in enumerate(done.issued):
                expected.mark(lane_of(work, lane, case.connections), issued)
        return Sample(done.rate * case.scale, spent / max(1, done.requests), {"generator": done.busy})


def lane_of(work: Workload, lane: int, lanes: int) -> Workload:
    """The workload of one of several connections, as the pool deals them out."""
    return replace(work, lane=lane, lanes=lanes)


def run(settings: Settings, folder: str, report: Report) -> None:
    """Measures all formats and cases; adds its tables and figures to ``report``."""
    require_room(folder, 12 * settings.disk + (8 << 30))
    with Pool(MOST_CONNECTIONS) as pool, subfolder(folder, "nbd") as place:
        reference = os.path.join(place, "reference")
        images.random_raw(reference, settings.disk)
        for fmt in ("raw", "qcow2"):
            bench = Bench(settings, place, pool, report)
            _allocated(bench, fmt, reference)
        if not settings.fio:
            _allocating(Bench(settings, place, pool, report))


def _allocated(bench: Bench, fmt: str, reference: str) -> None:
    """Servers side by side, each on its own copy of an image full of random data."""
    if not _wanted(bench, f"{fmt}, ", cases(bench.settings)):
        return
    kinds = [kind for kind in KINDS if fmt in kind.formats]
    size = bench.settings.disk
    with subfolder(bench.folder, fmt) as place, ExitStack() as stack:
        master = reference
        if fmt != "raw":
            master = os.path.join(place, "master")
            images.convert(reference, "raw", master, fmt)
        servers: dict[str, NbdServer] = {}
        expected: dict[str, Expected] = {}
        for kind in kinds:
            say(f"nbd {fmt}: starting {kind.name}")
            image = os.path.join(place, f"{kind.name.replace(' ', '-')}.{fmt}")
            images.copy(master, image)
            images.warm(image)
            try:
                server = stack.enter_context(NbdServer(kind, image, fmt))
                expected[kind.name] = Expected(size, reference)
                expected[kind.name].check_server(server.socket, structured=bench.settings.structured)
                servers[kind.name] = server
            except _FAILURES as error:
                bench.report.failure(f"nbd {fmt}", kind.name, error)
                bench.dead[kind.name] = str(error)
        results = {}
        for case in _wanted(bench, f"{fmt}, ", cases(bench.settings)):
            turns: dict[str, Callable[[], Sample]] = {
                name: partial(bench.turn, server, case, size, expected[name])
                for name, server in servers.items()
                if name not in bench.dead
            }
            results[case] = _play(bench, f"nbd {fmt}", case, turns)
        peaks = {name: server.peak for name, server in servers.items() if server.returncode is None}
        for server in servers.values():
            server.stop()
        for name, server in servers.items():
            if name not in bench.dead:
                _check_after(bench, fmt, server, expected[name], results)
        _tabulate(bench, f"NBD, {fmt}, allocated", f"nbd {fmt}", kinds, results, peaks)


def _allocating(bench: Bench) -> None:
    """Writes into an empty qcow2 image, a new one and a new server for each turn."""
    kinds = [kind for kind in KINDS if "qcow2" in kind.formats]
    peaks: dict[str, int] = {}
    results = {}
    for case in _wanted(bench, "qcow2, empty, ", allocating_cases(bench.settings)):
        turns: dict[str, Callable[[], Sample]] = {
            kind.name: partial(_allocating_turn, bench, kind, case, peaks)
            for kind in kinds
            if kind.name not in bench.dead
        }
        results[case] = _play(bench, "nbd empty qcow2", case, turns)
    _tabulate(bench, "NBD, qcow2, empty at first (allocating writes)", "nbd empty qcow2", kinds, results, peaks)


def _allocating_turn(bench: Bench, kind: Kind, case: Case, peaks: dict[str, int]) -> Sample:
    size = bench.settings.empty_disk
    with subfolder(bench.folder, "empty") as place:
        image = os.path.join(place, "image.qcow2")
        images.empty_qcow2(image, size)
        expected = Expected(size, None)
        with NbdServer(kind, image, "qcow2") as server:
            sample = bench.turn(server, case, size, expected)
            peaks[kind.name] = max(peaks.get(kind.name, 0), server.peak)
        check_tables(image)
        with NbdServer(KINDS[0], image, "qcow2") as server:  # an independent reader
            expected.check_written(server.socket)
        return sample


def _wanted(bench: Bench, prefix: str, found: Iterator[Case]) -> list[Case]:
    return [case for case in found if bench.settings.wanted(prefix + case.name)]


def _play(bench: Bench, part: str, case: Case, turns: dict[str, Callable[[], Sample]]) -> dict[str, Series]:
    say(f"{part}: {case.name}")
    results = play(turns, bench.settings.rounds, expected=_FAILURES)
    for name, series in results.items():
        if series.failure:
            bench.dead[name] = series.failure
            bench.report.failure(f"{part}, {case.name}", name, series.failure)
    return results


def _check_after(
    bench: Bench, fmt: str, server: NbdServer, expected: Expected, results: dict[Case, dict[str, Series]]
) -> None:
    """Compares all that the server has left with all that it was told to write. Who lost data has no figures at all."""
    say(f"nbd {fmt}: checking what {server.kind.name} has written")
    try:
        if not bench.settings.fio:  # fio's writes are its own
            expected.check_image(server.image, fmt)
        elif fmt != "raw":
            check_tables(server.image)
    except _FAILURES as error:
        bench.dead[server.kind.name] = str(error)
        bench.report.failure(f"nbd {fmt}, afterwards", server.kind.name, error)
        for series in results.values():
            series[server.kind.name].failure = str(error)


def _tabulate(
    bench: Bench,
    title: str,
    part: str,
    kinds: list[Kind],
    results: dict[Case, dict[str, Series]],
    peaks: dict[str, int],
) -> None:
    if not results:
        return
    title += _manner(bench.settings)
    names = [kind.name for kind in kinds]
    rows, costs, records = [], [], []
    for case, series in results.items():
        found = [series.get(name, Series(name, failure=bench.dead.get(name, "no turn"))) for name in names]
        ours = series.get(OURS, Series(OURS))
        qemu = best([series[name] for name in _QEMU if name in series], highest=True)
        to_qemu = ratio(ours, qemu) if qemu else None
        to_nbdkit = ratio(ours, series[NBDKIT]) if NBDKIT in series else None
        goal = verdict(nbd_goal(case.block, case.depth), to_qemu, to_nbdkit)
        rates = [number(one.median) for one in found]
        rows.append([_unit(case), *rates, str(to_qemu or "-"), str(to_nbdkit or "-"), goal])
        busy = max((one.note("generator") or 0.0 for one in found), default=0.0)
        costs.append([case.name, *(number(_micro(one.cpu)) for one in found), f"{busy:.0%}"])
        records.append(_record(case, found, to_qemu, to_nbdkit, goal))
    head = ["requests/s or MiB/s", *names, "to better qemu", "to nbdkit", "goal"]
    bench.report.table(table(title, head, rows))
    if not bench.settings.fio:
        head = ["server CPU, us per request", *names, "busiest generator"]
        bench.report.table(table(f"{title}: CPU time", head, costs))
    if peaks:
        head = ["", *names]
        memory = ["peak memory", *(mebibytes(peaks.get(name)) for name in names)]
        bench.report.table(table(f"{title}: memory", head, [memory]))
    bench.report.add(part, {"cases": records, "peak_bytes": peaks, "failures": dict(bench.dead)})


def _manner(settings: Settings) -> str:
    """What is not as usual, for a title."""
    if settings.fio:
        return ", load from fio"
    return ", structured replies" * settings.structured + ", one by one" * settings.one_by_one


def _unit(case: Case) -> str:
    return f"{case.name}, {'MiB/s' if case.sequential else '1/s'}"


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _record(case: Case, found: list[Series], to_qemu: Any, to_nbdkit: Any, goal: str) -> dict[str, Any]:
    return {
        "case": case.name,
        "unit": "MiB/s" if case.sequential else "requests/s",
        "rounds": {one.name: one.values for one in found},
        "server_cpu_us_per_request": {one.name: _micro(one.cpu) for one in found},
        "generator_busy": {one.name: one.note("generator") for one in found},
        "ratio_to_better_qemu": vars(to_qemu) if to_qemu else None,
        "ratio_to_nbdkit": vars(to_nbdkit) if to_nbdkit else None,
        "goal": goal,
    }
