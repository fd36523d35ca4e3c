"""The jobs of one program, by id."""

from __future__ import annotations

import re
import threading
from typing import Final

from diskwright.errors import JobError, LimitExceeded
from diskwright.jobs.job import Job

MAX_JOBS: Final = 1024
"""Each job has threads and buffers; a program that needs more has lost count of them."""

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Jobs:
    """Jobs by id. A job leaves by itself when it is dismissed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        """Raises JobError for an id that is malformed or taken, LimitExceeded beyond ``MAX_JOBS``."""
        if not _ID.fullmatch(job.id):
            raise JobError(f"Invalid job ID '{job.id}'")
        with self._lock:
            if job.id in self._jobs:
                raise JobError(f"Job ID '{job.id}' already in use")
            if len(self._jobs) >= MAX_JOBS:
                raise LimitExceeded(f"There are {MAX_JOBS} jobs already, as many as there can be")
            self._jobs[job.id] = job
        job.when_vanished(self._forget)

    def get(self, id: str) -> Job:
        """Raises JobError when there is none."""
        with self._lock:
            try:
                return self._jobs[id]
            except KeyError:
                raise JobError("Job not found") from None

    def all(self) -> list[Job]:
        """In the order they were added."""
        with self._lock:
            return list(self._jobs.values())

    def cancel_all(self, timeout: float | None = None) -> bool:
        """Cancels every job by force and waits for each; False when one was not done in ``timeout`` seconds."""
        jobs = self.all()
        for job in jobs:
            try:
                job.cancel(force=True)
            except JobError:
                continue  # it has ended
        ended = [job.wait(timeout) for job in jobs]  # each is waited for, also after one that was not done
        return all(ended)

    def _forget(self, job: Job) -> None:
        with self._lock:
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]
