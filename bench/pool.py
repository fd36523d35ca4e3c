"""The processes that generate load: one per connection, started once, so that preparing costs no measured time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, Self

from bench.client import Connection, ServerError
from bench.load import Outcome, Ring, Workload, drive
from bench.paced import Paced, PacedOutcome, drive_paced

MAX_WORKERS: Final = 16
LEAD: Final = 0.02
"""Seconds between the word to start and the start, for the word to reach every process."""
PATIENCE: Final = 120.0
"""Seconds a process may take for an answer beyond what it was asked to run for."""
_RINGS_KEPT: Final = 2


class LoadFailed(Exception):
    """A connection of the load generator failed; the message says how."""


@dataclass(frozen=True)
class Turn:
    """What one turn of all connections came to."""

    rate: float  # requests per second, all connections together
    busy: float  # CPU the busiest generator process used, as a share of one CPU
    issued: tuple[int, ...]  # requests sent per connection, ever

    @property
    def requests(self) -> int:
        return sum(self.issued)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Pipe


@dataclass
class Pool:
    """``size`` load generator processes; as a context manager they end with the block."""

    size: int
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Self:
        if not 0 < self.size <= MAX_WORKERS:
            raise ValueError(f"{self.size} connections are not between 1 and {MAX_WORKERS}")
        context = multiprocessing.get_context("spawn")  # no open sockets, no threads, no memory of ours
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()  # which they take as the end
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def run(self, path: str, work: Workload, connections: int, *, warm_up: float, seconds: float) -> Turn:
        """Connects ``connections`` times to the socket ``path``, warms up, measures ``seconds``. Raises LoadFailed."""
        workers = self._workers[:connections]
        for lane, worker in enumerate(workers):
            worker.pipe.send(("load", path, replace(work, lane=lane, lanes=connections)))
        self._collect(workers, 0)
        start = time.monotonic() + LEAD + warm_up
        for worker in workers:
            worker.pipe.send((start, start + seconds))
        outcomes: Sequence[Outcome] = self._collect(workers, warm_up + seconds)
        rate = sum(one.done / one.seconds for one in outcomes)
        return Turn(rate, max(one.busy / one.seconds for one in outcomes), tuple(one.issued for one in outcomes))

    def start_paced(self, path: str, paced: Paced) -> None:
        """Starts a steady load on one connection, as soon as somebody listens at ``path``."""
        self._workers[0].pipe.send(("paced", path, paced))

    def paced_connected(self) -> None:
        """Waits until the steady load runs."""
        self._collect(self._workers[:1], 0)

    def stop_paced(self) -> PacedOutcome:
        """Ends the steady load and returns what it saw. Raises LoadFailed."""
        self._workers[0].pipe.send("stop")
        outcome: PacedOutcome = self._collect(self._workers[:1], 0)[0]
        return outcome

    def _collect(self, workers: Sequence[_Worker], seconds: float) -> list[Any]:
        """One answer of each. All are taken before a failure is raised, so that the next turn starts clean."""
        end = time.monotonic() + seconds + PATIENCE
        answers, failure = [], ""
        for worker in workers:
            if not worker.pipe.poll(max(0.0, end - time.monotonic())):
                raise LoadFailed("a load generator process does not answer")
            try:
                good, answer = worker.pipe.recv()
            except (EOFError, ConnectionError):
                raise LoadFailed("a load generator process ended") from None
            answers.append(answer)
            failure = failure if good else str(answer)
        if failure:
            for worker in workers:
                worker.pipe.send(None)  # whoever is ready to start does not
            for worker in workers:
                while worker.pipe.recv() != (True, "idle"):
                    pass
            raise LoadFailed(failure)
        return answers


def _work(pipe: Pipe) -> None:
    """A load generator process: does what it is told until the pipe closes."""
    rings: dict[Workload, Ring] = {}
    try:
        while True:
            task = pipe.recv()
            if task is None:
                pipe.send((True, "idle"))
            elif task != "stop":  # else the load has failed meanwhile, and said so
                try:
                    _do(pipe, task, rings)
                except (OSError, ServerError) as error:
                    pipe.send((False, f"{type(error).__name__}: {error}"))
    except (EOFError, OSError, KeyboardInterrupt):
        return  # nobody is at the other end any more


def _do(pipe: Pipe, task: tuple[str, str, Any], rings: dict[Workload, Ring]) -> None:
    what, path, given = task
    if what == "load":
        _load(pipe, path, given, rings)
    else:
        drive_paced(pipe, path, given)


def _load(pipe: Pipe, path: str, work: Workload, rings: dict[Workload, Ring]) -> None:
    if work not in rings:
        while len(rings) >= _RINGS_KEPT:
            del rings[next(iter(rings))]
        rings[work] = Ring(work)
    connection = Connection(path, structured=work.structured)
    try:
        pipe.send((True, "ready"))
        window = pipe.recv()
        if window is None:
            pipe.send((True, "idle"))
            return
        pipe.send((True, drive(connection, rings[work], work, *window)))
    finally:
        connection.close()
