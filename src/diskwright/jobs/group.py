"""Groups of jobs that succeed together or not at all: QMP's ``completion-mode`` grouped."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from diskwright.errors import JobError, LimitExceeded

if TYPE_CHECKING:
    from diskwright.jobs.job import Job

MAX_GROUP: Final = 256
"""Jobs in one group; a transaction has one for each disk of a machine."""


class JobGroup:
    """Each job of a group that has done its work waits for the others. When all have, they become pending; they take
    their last steps when all may, and have succeeded when all of those have. When one fails or is cancelled before,
    the others are cancelled. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._jobs: list[Job] = []
        self._waiting: set[Job] = set()
        self._prepared: set[Job] = set()
        self._failed = False

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(self._jobs)

    def add(self, job: Job) -> None:
        """Before any of the group is started. Raises LimitExceeded beyond ``MAX_GROUP`` jobs, JobError for a job that
        is in a group already."""
        if job.group is not None:
            raise JobError(f"Job '{job.id}' is in a group already")
        if len(self._jobs) >= MAX_GROUP:
            raise LimitExceeded(f"There are {MAX_GROUP} jobs in the group already, as many as there can be")
        job.group = self
        self._jobs.append(job)

    def waited(self, job: Job) -> None:
        """``job`` has done its work: returns when all have. Raises Cancelled when one will not."""
        self._meet(self._waiting, job)

    def prepared(self, job: Job) -> None:
        """``job`` has taken its last step that may fail: returns when all have, and from then on none can fail. Raises
        Cancelled when one will not."""
        self._meet(self._prepared, job)

    def failed(self, job: Job) -> None:
        """``job`` has failed, or was cancelled: the others are cancelled too."""
        with self._changed:
            if self._failed:
                return
            self._failed = True
            self._changed.notify_all()
        for other in self._jobs:
            if other is not job:
                try:
                    other.cancel(force=True)
                except JobError:
                    continue  # it has ended by itself

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _meet(self, there: set[Job], job: Job) -> None:
        from diskwright.jobs.job import Cancelled

        with self._changed:
            there.add(job)
            self._changed.notify_all()
            # Whoever sees that all are there goes on, whatever came to pass meanwhile: they decide alike.
            while len(there) < len(self._jobs):
                if self._failed or job.cancelled:
                    there.discard(job)
                    raise Cancelled
                self._changed.wait()
