"""A job: a long operation in a thread of its own, with QMP's life cycle (see ``states``) and events.

Who writes a job subclasses ``Job`` and fills in ``run`` (the work), ``prepare`` (what must happen at the
very end, and may still fail), and ``abort`` or ``clean`` (what must be undone). The work calls
``pause_point`` wherever nothing of it is in flight; there it is paused, and learns that it was cancelled.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Final

from diskwright.engine.policy import Action, OnError, action, io_status
from diskwright.engine.rate import RateLimit
from diskwright.errors import JobError, message_of
from diskwright.jobs.group import JobGroup
from diskwright.jobs.states import ENDED, State, Verb, check_move, check_verb

EventSink = Callable[[str, dict[str, object]], None]
"""``(name, data)`` of an event, as QMP sends them."""

_log: Final = logging.getLogger(__name__)
_live: Final[weakref.WeakSet[Job]] = weakref.WeakSet()


EXIT_PATIENCE: Final = 30.0
"""Seconds an exiting interpreter waits for one job: a request that hangs must not hang it for ever."""


class Cancelled(JobError):
    """The job was cancelled."""

    def __init__(self) -> None:
        super().__init__(os.strerror(errno.ECANCELED))


class Job(ABC):
    """One job. All public methods may be called from any thread; verbs raise JobError when refused.

    ``id``             its name among the jobs of a program
    ``speed``          bytes per second, 0 for no limit
    ``auto_finalize``  whether it goes through ``pending`` by itself, else it waits for ``finalize``
    ``auto_dismiss``   whether it vanishes by itself when it has concluded, else it waits for ``dismiss``
    ``on_event``       called with each event, in their order, never while a lock is held; it may call the job
    """

    type: ClassVar[str]
    block: ClassVar[bool] = True
    """Whether it is one of QMP's block jobs: others are told of by ``JOB_STATUS_CHANGE`` only."""

    def __init__(
        self,
        id: str,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        on_event: EventSink | None = None,
    ) -> None:
        self.id, self.auto_finalize, self.auto_dismiss = id, auto_finalize, auto_dismiss
        self.rate = RateLimit(speed)
        self.error: BaseException | None = None
        self.io_status = "ok"
        self._on_event = on_event
        self._events: deque[tuple[str, dict[str, object]]] = deque()  # a handful: each is delivered at once
        self._delivering = False
        self._cond = threading.Condition(threading.RLock())
        self._state = State.CREATED
        self._user_paused = False
        self._inner_pauses = 0
        self._cancelled = False
        self._committed = False  # too late to be cancelled
        self._quiet = 0  # events are kept back while above 0
        self._finalized = auto_finalize
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self.group: JobGroup | None = None
        self._vanished: list[Callable[[Job], None]] = []
        with self._cond:
            self._emit_state()

    # -- what a job is -----------------------------------------------------------------------------

    @abstractmethod
    def run(self) -> None:
        """The work, in the job's thread. Returning means success; an exception is the job's error."""

    def prepare(self) -> None:
        """The last step, when the job has been finalized. An exception still makes the job fail."""

    def abort(self) -> None:
        """After a failure or a cancel: undo. Must not raise."""

    def clean(self) -> None:
        """At the end, however it went: let go of what is held. Must not raise."""

    def on_complete(self) -> None:
        """``complete`` was asked for. The lock is held. Raises JobError when this kind of job knows no such thing."""
        raise JobError(f"The active block job '{self.id}' cannot be completed")

    def soft_cancel(self) -> bool:
        """Whether a cancel without force, now, lets the job end by itself, and successfully. The lock is held."""
        return False

    def progress(self) -> tuple[int, int]:
        """``(offset, length)`` of one moment, in bytes."""
        return 0, 0

    def extra_info(self) -> dict[str, object]:
        """Fields of ``info`` this kind of job adds."""
        return {}

    # -- facts -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    @property
    def speed(self) -> int:
        return self.rate.speed

    @property
    def ready(self) -> bool:
        return self._state in (State.READY, State.STANDBY)

    @property
    def cancelled(self) -> bool:
        """Whether a cancel that ends the job has been asked for."""
        return self._cancelled

    @property
    def should_pause(self) -> bool:
        """Whether the work should come to a ``pause_point`` soon (a cancel is also learnt there)."""
        return self._cancelled or self._user_paused or self._inner_pauses > 0

    def info(self) -> dict[str, object]:
        """What QMP's ``query-block-jobs`` tells of it."""
        with self._cond:
            offset, length = self.progress()
            state, error = self._state, self.error
            facts: dict[str, object] = {
                "auto-finalize": self.auto_finalize,
                "io-status": self.io_status,
                "device": self.id,
                "auto-dismiss": self.auto_dismiss,
                "busy": state in (State.RUNNING, State.READY),
                "len": length,
                "offset": offset,
                "status": state.value,
                "paused": state in (State.PAUSED, State.STANDBY),
                "speed": self.speed,
                "ready": self.ready,
                "type": self.type,
            }
            facts.update(self.extra_info())
        if error is not None:
            facts["error"] = message_of(error)
        return facts

    def job_info(self) -> dict[str, object]:
        """What QMP's ``query-jobs`` tells of it."""
        with self._cond:
            offset, length = self.progress()
            facts: dict[str, object] = {
                "current-progress": offset,
                "status": self._state.value,
                "total-progress": length,
                "type": self.type,
                "id": self.id,
            }
            if self.error is not None:
                facts["error"] = message_of(self.error)
            return facts

    # -- verbs -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins the work. Raises JobError when it has begun, or was cancelled, already."""
        with self._cond:
            if self._thread is not None or self._state is not State.CREATED:
                raise JobError(f"Job '{self.id}' has been started already")
            # A daemon thread, so that an interpreter can exit; ``_cancel_all`` sees to it that it does so properly.
            self._thread = threading.Thread(target=self._main, name=f"job-{self.id}", daemon=True)
            _live.add(self)
            self._move(State.RUNNING)
        self._deliver()
        self._thread.start()

    def pause(self) -> None:
        """The job will stand still at its next pause point; its state tells when it does."""
        with self._cond:
            check_verb(self.id, self._state, Verb.PAUSE)
            if self._user_paused:
                raise JobError("Job is already paused")
            self._user_paused = True
            self.wake()

    def resume(self) -> None:
        """Undoes ``pause``, and a stop for an error."""
        with self._cond:
            if not self._user_paused:
                raise JobError("Can't resume a job that was not paused")
            check_verb(self.id, self._state, Verb.RESUME)
            self._resume()

    def set_speed(self, speed: int) -> None:
        """Bytes per second from now on; 0 for no limit."""
        check_verb(self.id, self._state, Verb.SET_SPEED)
        self.rate.speed = speed
        with self._cond:
            self.wake()

    def complete(self) -> None:
        """Asks a job that is ready to come to its end."""
        with self._cond:
            check_verb(self.id, self._state, Verb.COMPLETE)
            if self._cancelled:
                raise JobError(f"The active block job '{self.id}' cannot be completed")
            self.on_complete()
            self.wake()

    def cancel(self, *, force: bool = True) -> None:
        """Ends the job. Without ``force`` a job that is ready ends in its own, successful way; so it must not
        be paused then. Returns at once: see ``wait``. It may come too late; the job then ends as it would have."""
        with self._cond:
            check_verb(self.id, self._state, Verb.CANCEL)
            if self._committed:
                return
            if self._user_paused and not force:
                raise JobError(f"The block job for device '{self.id}' is currently paused")
            if force or not (self.ready and self.soft_cancel()):
                self._cancelled = True
            orphan = self._thread is None
            if orphan:
                self._move(State.ABORTING)
            else:
                self._resume()
        if orphan:  # never started: there is nobody else to bring it to its end
            self._conclude(Cancelled())
        self._deliver()

    def finalize(self) -> None:
        """Lets a pending job take its last step; all of a group take it together."""
        with self._cond:
            check_verb(self.id, self._state, Verb.FINALIZE)
        for job in self.group.jobs if self.group is not None else (self,):
            with job._cond:
                job._finalized = True
                job.wake()

    def dismiss(self) -> None:
        """Lets a concluded job vanish."""
        with self._cond:
            check_verb(self.id, self._state, Verb.DISMISS)
            self._vanish()
        self._deliver()

    def change(self, **options: object) -> None:
        """Changes an option while the job runs. Raises JobError for one that cannot be changed."""
        with self._cond:
            check_verb(self.id, self._state, Verb.CHANGE)
        self.on_change(options)

    def on_change(self, options: dict[str, object]) -> None:
        raise JobError(f"Job type does not support change: '{self.type}'")

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the job has concluded; False when ``timeout`` seconds were not enough."""
        return self._ended.wait(timeout)

    def result(self, timeout: float | None = None) -> None:
        """Waits likewise, and raises JobError, its cause chained, when the job failed or was cancelled."""
        if not self.wait(timeout):
            raise JobError(f"Job '{self.id}' has not ended within {timeout} seconds")
        if isinstance(self.error, Cancelled):
            raise self.error
        if self.error is not None:
            raise JobError(f"Job '{self.id}' failed: {message_of(self.error)}") from self.error

    # -- for the work ------------------------------------------------------------------------------

    def pause_point(self) -> None:
        """Stands still here while the job is paused. Raises Cancelled. Nothing may be in flight."""
        with self._cond:
            if self._cancelled:
                raise Cancelled
            if not (self._user_paused or self._inner_pauses) or self._state not in (State.RUNNING, State.READY):
                return
            back = self._state
            self._move(State.STANDBY if back is State.READY else State.PAUSED)
        self._deliver()
        with self._cond:
            self._cond.wait_for(lambda: self._cancelled or not (self._user_paused or self._inner_pauses))
            self._move(back)
            cancelled = self._cancelled
        self._deliver()
        if cancelled:
            raise Cancelled

    def hold_still(self) -> None:
        """An internal pause, on top of the user's; each needs one ``go_on``."""
        with self._cond:
            self._inner_pauses += 1
            self.wake()

    def go_on(self) -> None:
        with self._cond:
            self._inner_pauses -= 1
            self.wake()

    def commit(self) -> bool:
        """The work is about to do what cannot be undone: a cancel comes too late from now on. False when one came
        before, or the job is to pause: then nothing has been decided."""
        with self._cond:
            if not self.should_pause:
                self._committed = True
            return self._committed

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, no event is delivered: a receiver that wants to use a disk that is drained would wait for ever."""
        with self._cond:
            self._quiet += 1
        try:
            yield
        finally:
            with self._cond:
                self._quiet -= 1
            self._deliver()

    def make_ready(self) -> None:
        """The job has reached the state it keeps until it is told to complete."""
        with self._cond:
            self._move(State.READY)
            self._emit("BLOCK_JOB_READY", self._event_data())
        self._deliver()

    def handle_error(self, error: BaseException, operation: str, policy: OnError) -> Action:
        """Tells the world of a failed ``read`` or ``write`` and what is done about it. For ``STOP`` the job is
        paused from now on, as if by the user."""
        with self._cond:
            chosen = action(policy, error)
            if chosen is Action.STOP and self._state not in (State.RUNNING, State.READY):
                chosen = Action.REPORT  # too late to be paused: ``pending`` knows no such thing
            data: dict[str, object] = {"device": self.id, "operation": operation, "action": chosen.value}
            self._emit("BLOCK_JOB_ERROR", data)
            if chosen is Action.STOP:
                self._user_paused = True
                self.io_status = io_status(error)
            self.wake()
        self._deliver()
        return chosen

    def wake(self) -> None:
        """Those who wait for a change of this job look again. The lock is held, or a change just happened."""
        with self._cond:
            self._cond.notify_all()
        self.rate.wake()
        if self.group is not None:
            self.group.wake()

    # -- life --------------------------------------------------------------------------------------

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            self.run()
            self._await_finalize()
            self.prepare()
            if self.group is not None:
                self.group.prepared(self)
        except BaseException as caught:
            error = caught
        self._conclude(error)
        self._deliver()
        self._ended.set()

    def _await_finalize(self) -> None:
        with self._cond:
            if self._cancelled:
                raise Cancelled
            self._move(State.WAITING)
        if self.group is not None:
            self._deliver()
            self.group.waited(self)
        with self._cond:
            self._move(State.PENDING)
            if not self.auto_finalize:
                self._emit("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})
        self._deliver()
        with self._cond:
            self._cond.wait_for(lambda: self._all_finalized() or self._cancelled)
            if self._cancelled:
                raise Cancelled

    def _all_finalized(self) -> bool:
        return all(job._finalized for job in self.group.jobs) if self.group is not None else self._finalized

    def _conclude(self, error: BaseException | None) -> None:
        """The end of the work, whatever it was: aborting when it failed, then concluded."""
        with self._cond:
            self.error = error
            if error is not None and self._state is not State.ABORTING:
                self._move(State.ABORTING)
        self._deliver()
        if error is not None and self.group is not None:
            self.group.failed(self)
        try:
            if error is not None:
                self.abort()
            self.clean()
        except Exception as second:
            # A job that said it was done although its end went wrong would be a lie.
            _log.exception("Job '%s' could not clean up", self.id)
            error = error or second
        with self._cond:
            if error is not None and self._state is State.PENDING:
                self._move(State.ABORTING)
            self.error = error
            data = self._event_data()
            if isinstance(error, Cancelled) or (error is not None and self._cancelled):  # also when it failed on top
                self._emit("BLOCK_JOB_CANCELLED", data)
            else:
                if error is not None:
                    data["error"] = message_of(error)
                self._emit("BLOCK_JOB_COMPLETED", data)
            self._move(State.CONCLUDED)
            if self.auto_dismiss:
                self._vanish()
            if self._thread is None:
                self._ended.set()

    def _vanish(self) -> None:
        self._move(State.NULL)
        for forget in self._vanished:
            forget(self)

    def _resume(self) -> None:
        self._user_paused = False
        self.io_status = "ok"
        self.wake()

    def _move(self, state: State) -> None:
        check_move(self.id, self._state, state)
        self._state = state
        self._emit_state()
        self._cond.notify_all()

    # -- events ------------------------------------------------------------------------------------

    def _event_data(self) -> dict[str, object]:
        offset, length = self.progress()
        return {"type": self.type, "device": self.id, "len": length, "offset": offset, "speed": self.speed}

    def _emit_state(self) -> None:
        self._emit("JOB_STATUS_CHANGE", {"status": self._state.value, "id": self.id})

    def _emit(self, name: str, data: dict[str, object]) -> None:
        if self._on_event is not None and (self.block or name == "JOB_STATUS_CHANGE"):
            self._events.append((name, data))

    def _deliver(self) -> None:
        """Hands queued events out, one thread at a time so that their order holds. No lock is held meanwhile."""
        while True:
            with self._cond:
                if self._delivering or self._quiet or not self._events:
                    return
                self._delivering = True
                name, data = self._events.popleft()
            try:
                assert self._on_event is not None
                self._on_event(name, data)
            except Exception:
                _log.exception("The receiver of job events failed on %s", name)
            finally:
                with self._cond:
                    self._delivering = False

    def when_vanished(self, forget: Callable[[Job], None]) -> None:
        """``forget(job)`` is called when the job has been dismissed."""
        with self._cond:
            if self._state is not State.NULL:
                self._vanished.append(forget)
                return
        forget(self)

    @property
    def has_ended(self) -> bool:
        return self._state in ENDED


@atexit.register
def _cancel_all() -> None:
    """No job is cut off in the middle of a write because the interpreter exits."""
    for job in list(_live):
        try:
            job.cancel(force=True)
        except JobError:
            continue  # it is ending, or has ended
        job.wait(EXIT_PATIENCE)
