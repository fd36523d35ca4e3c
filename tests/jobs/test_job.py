"""The life of a job: states, verbs, events. The expected texts and orders are those QEMU 7.2 was seen to give."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest

from diskwright.engine.policy import Action, OnError
from diskwright.errors import JobError, LimitExceeded, OptionError
from diskwright.jobs import table
from diskwright.jobs.job import Cancelled, Job
from diskwright.jobs.states import ENDED, TABLE, State, Verb, check_move
from diskwright.jobs.table import Jobs

WAIT = 10


class Toy(Job):
    """Does steps of 10 bytes, one each time the test says so; ready after ``steps``, done when completed."""

    type = "toy"

    def __init__(self, id: str = "j", *, steps: int = 3, becomes_ready: bool = False, **options: object) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.seen = threading.Condition()
        super().__init__(id, on_event=self.note, **options)  # type: ignore[arg-type]
        self.steps, self.becomes_ready = steps, becomes_ready
        self.done = self.allowed = 0
        self.asked_to_complete = False
        self.log: list[str] = []
        self.fail_in: dict[str, Exception] = {}

    def note(self, name: str, data: dict[str, object]) -> None:
        with self.seen:
            self.events.append((name, data))
            self.seen.notify_all()

    def progress(self) -> tuple[int, int]:
        return self.done * 10, self.steps * 10

    def run(self) -> None:
        while self.done < self.steps:
            self.pause_point()
            with self._cond:
                if self._cond.wait_for(lambda: self.allowed > self.done or self.should_pause) and self.should_pause:
                    continue
            if "run" in self.fail_in:
                raise self.fail_in["run"]
            self.done += 1
        if self.becomes_ready:
            self.make_ready()
            while True:
                self.pause_point()
                if self.asked_to_complete:
                    return
                with self._cond:
                    self._cond.wait_for(lambda: self.asked_to_complete or self.should_pause)

    def on_complete(self) -> None:
        if not self.becomes_ready:
            return super().on_complete()
        self.asked_to_complete = True
        return None

    def soft_cancel(self) -> bool:
        self.asked_to_complete = True
        return True

    def prepare(self) -> None:
        self.step("prepare")

    def abort(self) -> None:
        self.step("abort")

    def clean(self) -> None:
        self.step("clean")

    def step(self, name: str) -> None:
        self.log.append(name)
        if name in self.fail_in:
            raise self.fail_in[name]

    def allow(self, steps: int) -> None:
        with self._cond:
            self.allowed += steps
            self.wake()

    def until(self, state: str) -> None:
        with self.seen:
            assert self.seen.wait_for(lambda: self.states()[-1:] == [state], WAIT), self.states()

    def states(self) -> list[object]:
        return [data["status"] for name, data in self.events if name == "JOB_STATUS_CHANGE"]

    def names(self) -> list[str]:
        return [name if name != "JOB_STATUS_CHANGE" else str(data["status"]) for name, data in self.events]


def test_a_job_that_simply_ends() -> None:
    job = Toy(auto_dismiss=True)
    job.start()
    job.allow(3)
    job.result(WAIT)
    assert job.names() == [
        "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
    ]  # fmt: skip
    assert job.events[4][1] == {"type": "toy", "device": "j", "len": 30, "offset": 30, "speed": 0}
    assert job.log == ["prepare", "clean"]


def test_ready_and_complete() -> None:
    job = Toy(becomes_ready=True, auto_dismiss=False)
    job.start()
    with pytest.raises(JobError, match="Job 'j' in state 'running' cannot accept command verb 'complete'"):
        job.complete()
    job.allow(3)
    job.until("ready")
    assert job.ready
    job.complete()
    job.result(WAIT)
    assert job.names() == [
        "created", "running", "ready", "BLOCK_JOB_READY", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded",
    ]  # fmt: skip
    assert job.state is State.CONCLUDED
    job.dismiss()
    assert job.states()[-1] == "null"


def test_a_job_that_cannot_be_completed_says_so() -> None:
    class Stubborn(Toy):
        def on_complete(self) -> None:
            Job.on_complete(self)

    job = Stubborn(becomes_ready=True)
    job.start()
    job.allow(3)
    job.until("ready")
    with pytest.raises(JobError, match="The active block job 'j' cannot be completed"):
        job.complete()
    job.cancel()
    assert job.wait(WAIT)


def test_pause_and_resume_while_running_and_while_ready() -> None:
    job = Toy(becomes_ready=True)
    job.start()
    job.pause()
    with pytest.raises(JobError, match=r"^Job is already paused$"):
        job.pause()
    job.until("paused")
    assert job.info()["paused"] is True
    job.allow(3)
    assert job.done == 0
    job.resume()
    with pytest.raises(JobError, match=r"^Can't resume a job that was not paused$"):
        job.resume()
    job.until("ready")
    job.pause()
    job.until("standby")
    job.complete()  # accepted; done after the resume
    assert not job.wait(0.05)
    job.resume()
    job.result(WAIT)
    assert job.states() == [
        "created", "running", "paused", "running", "ready", "standby", "ready", "waiting", "pending", "concluded",
        "null",
    ]  # fmt: skip


def test_an_inner_pause_counts_on_top_of_the_users() -> None:
    job = Toy(steps=1)
    job.start()
    job.hold_still()
    job.until("paused")
    job.pause()
    job.go_on()
    job.allow(1)
    assert not job.wait(0.05)
    assert job.state is State.PAUSED
    job.resume()
    job.result(WAIT)


@pytest.mark.parametrize("force", [False, True])
def test_cancel_before_ready_cancels(force: bool) -> None:
    job = Toy(becomes_ready=True, auto_dismiss=False)
    job.start()
    job.allow(1)
    job.cancel(force=force)
    with pytest.raises(Cancelled, match=r"^Operation canceled$"):
        job.result(WAIT)
    assert job.names() == ["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded"]
    assert job.info()["error"] == "Operation canceled"
    assert job.job_info()["error"] == "Operation canceled"
    assert job.log == ["abort", "clean"]


def test_cancel_without_force_when_ready_completes() -> None:
    job = Toy(becomes_ready=True)
    job.start()
    job.allow(3)
    job.until("ready")
    job.cancel(force=False)
    job.result(WAIT)
    assert "BLOCK_JOB_COMPLETED" in job.names()


def test_cancel_by_force_when_ready_cancels() -> None:
    job = Toy(becomes_ready=True)
    job.start()
    job.allow(3)
    job.until("ready")
    job.cancel(force=True)
    with pytest.raises(Cancelled):
        job.result(WAIT)
    assert job.names()[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


def test_cancel_of_a_paused_job_needs_force() -> None:
    job = Toy()
    job.start()
    job.pause()
    job.until("paused")
    with pytest.raises(JobError, match="The block job for device 'j' is currently paused"):
        job.cancel(force=False)
    job.cancel(force=True)
    with pytest.raises(Cancelled):
        job.result(WAIT)
    assert job.states() == ["created", "running", "paused", "running", "aborting", "concluded", "null"]


def test_cancel_of_a_job_never_started() -> None:
    job = Toy(auto_dismiss=False)
    job.cancel()
    assert job.wait(0)
    assert job.names() == ["created", "aborting", "BLOCK_JOB_CANCELLED", "concluded"]
    with pytest.raises(JobError, match="has been started already"):
        job.start()


def test_a_job_cannot_be_started_twice() -> None:
    job = Toy(steps=1)
    job.start()
    with pytest.raises(JobError, match="has been started already"):
        job.start()
    job.allow(1)
    job.result(WAIT)


@pytest.mark.parametrize("force", [False, True])
def test_a_pending_job_can_be_cancelled(force: bool) -> None:
    job = Toy(becomes_ready=True, auto_finalize=False)
    job.start()
    job.allow(3)
    job.until("ready")
    job.complete()
    with job.seen:
        assert job.seen.wait_for(lambda: "BLOCK_JOB_PENDING" in job.names(), WAIT)
    assert job.events[-1] == ("BLOCK_JOB_PENDING", {"type": "toy", "id": "j"})
    assert job.log == []
    job.cancel(force=force)
    with pytest.raises(Cancelled):
        job.result(WAIT)
    assert job.names()[-5:] == ["BLOCK_JOB_PENDING", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


def test_finalize_by_hand() -> None:
    job = Toy(steps=1, auto_finalize=False, auto_dismiss=False)
    job.start()
    with pytest.raises(JobError, match="in state 'running' cannot accept command verb 'finalize'"):
        job.finalize()
    job.allow(1)
    job.until("pending")
    with pytest.raises(JobError, match="in state 'pending' cannot accept command verb 'dismiss'"):
        job.dismiss()
    with pytest.raises(JobError, match="in state 'pending' cannot accept command verb 'set-speed'"):
        job.set_speed(1)
    job.finalize()
    job.result(WAIT)
    for verb in (job.pause, job.complete, job.finalize, job.cancel):
        with pytest.raises(JobError, match="in state 'concluded' cannot accept"):
            verb()
    with pytest.raises(JobError, match="Can't resume"):
        job.resume()
    job.dismiss()
    with pytest.raises(JobError, match="in state 'null' cannot accept command verb 'dismiss'"):
        job.dismiss()


@pytest.mark.parametrize("where", ["run", "prepare", "clean"])
def test_a_failure_is_told_and_chained(where: str) -> None:
    job = Toy(steps=1, auto_dismiss=False)
    cause = OSError(errno.EIO, "Input/output error")
    job.fail_in[where] = cause
    job.start()
    job.allow(1)
    with pytest.raises(JobError, match="Job 'j' failed: Input/output error") as caught:
        job.result(WAIT)
    assert caught.value.__cause__ is cause
    assert job.names()[-3:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded"]
    assert job.events[-2][1]["error"] == "Input/output error"
    assert job.info()["error"] == "Input/output error"


def test_a_failing_abort_does_not_hide_the_first_error() -> None:
    job = Toy(steps=1)
    job.fail_in = {"run": OSError(errno.EIO, "first"), "abort": OSError(errno.EIO, "second")}
    job.start()
    job.allow(1)
    with pytest.raises(JobError, match="first"):
        job.result(WAIT)
    assert job.states()[-1] == "null"


def test_speed() -> None:
    job = Toy(steps=1, speed=100, auto_dismiss=False)
    assert job.info()["speed"] == 100
    job.start()
    job.set_speed(7)
    assert job.speed == job.rate.speed == 7
    with pytest.raises(OptionError, match="Parameter 'speed' expects a non-negative value"):
        job.set_speed(-1)
    assert job.speed == 7
    job.allow(1)
    job.result(WAIT)


def test_query_shows_what_qmp_shows() -> None:
    job = Toy(becomes_ready=True, auto_finalize=False)
    assert job.info() == {
        "auto-finalize": False, "io-status": "ok", "device": "j", "auto-dismiss": True, "busy": False, "len": 30,
        "offset": 0, "status": "created", "paused": False, "speed": 0, "ready": False, "type": "toy",
    }  # fmt: skip
    assert job.job_info() == {
        "current-progress": 0, "status": "created", "total-progress": 30, "type": "toy", "id": "j",
    }  # fmt: skip
    job.cancel()


def test_an_error_with_policy_stop_pauses_until_resumed() -> None:
    job = Toy(steps=1, auto_dismiss=False)
    job.start()
    full = OSError(errno.ENOSPC, "No space left on device")
    assert job.handle_error(full, "write", OnError.ENOSPC) is Action.STOP
    assert job.handle_error(full, "write", OnError.STOP) is Action.STOP  # a second worker's
    job.until("paused")
    assert job.events[2] == ("BLOCK_JOB_ERROR", {"device": "j", "operation": "write", "action": "stop"})
    assert job.info()["io-status"] == "nospace"
    job.resume()
    assert job.info()["io-status"] == "ok"
    job.allow(1)
    job.result(WAIT)


@pytest.mark.parametrize(("policy", "expected"), [("report", Action.REPORT), ("ignore", Action.IGNORE)])
def test_other_policies_do_not_pause(policy: str, expected: Action) -> None:
    job = Toy(steps=1)
    job.start()
    assert job.handle_error(OSError(errno.EIO, "x"), "read", OnError(policy)) is expected
    assert ("BLOCK_JOB_ERROR", {"device": "j", "operation": "read", "action": policy}) in job.events
    job.allow(1)
    job.result(WAIT)
    assert "paused" not in job.states()


def test_a_job_that_knows_no_change_says_so() -> None:
    job = Toy(steps=1)
    with pytest.raises(JobError, match="in state 'created' cannot accept command verb 'change'"):
        job.change(copy_mode="x")
    job.start()
    with pytest.raises(JobError, match="Job type does not support change: 'toy'"):
        job.change(copy_mode="x")
    job.allow(1)
    job.result(WAIT)


def test_an_event_receiver_may_call_the_job_and_may_fail() -> None:
    events: list[str] = []

    class Eager(Toy):
        def note(self, name: str, data: dict[str, object]) -> None:
            events.append(name)
            if name == "BLOCK_JOB_READY":
                self.complete()
                raise RuntimeError("a receiver's own mistake")

    job = Eager(becomes_ready=True)
    job.start()
    job.allow(3)
    job.result(WAIT)
    assert events[-3:] == ["BLOCK_JOB_COMPLETED", "JOB_STATUS_CHANGE", "JOB_STATUS_CHANGE"]


def test_result_tells_when_the_time_is_up() -> None:
    job = Toy(steps=1)
    job.start()
    with pytest.raises(JobError, match=r"has not ended within 0\.01 seconds"):
        job.result(0.01)
    job.allow(1)
    job.result(WAIT)


def test_the_table_is_whole_and_leads_to_an_end() -> None:
    assert set(TABLE) == set(State)
    for state in State:
        seen, todo = {state}, [state]
        while todo:
            fresh = TABLE[todo.pop()][0] - seen
            seen |= fresh
            todo += fresh
        assert State.NULL in seen, f"{state} never ends"
    assert all(not TABLE[state][1] - {Verb.DISMISS} for state in ENDED)
    with pytest.raises(AssertionError, match="Job 'j' cannot go from null to running"):
        check_move("j", State.NULL, State.RUNNING)


def test_jobs_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    first, second = Toy("a", steps=1), Toy("b-1_.x", auto_dismiss=False)
    jobs.add(first)
    jobs.add(second)
    with pytest.raises(JobError, match="Job ID 'a' already in use"):
        jobs.add(Toy("a"))
    for bad in ("", "1j", "a b", "ü", "a/b"):
        with pytest.raises(JobError, match=f"Invalid job ID '{bad}'"):
            jobs.add(Toy(bad))
    monkeypatch.setattr(table, "MAX_JOBS", 2)
    with pytest.raises(LimitExceeded, match="2 jobs"):
        jobs.add(Toy("c"))
    assert jobs.get("a") is first
    assert jobs.all() == [first, second]
    first.start()
    first.allow(1)
    first.result(WAIT)
    with pytest.raises(JobError, match=r"^Job not found$"):
        jobs.get("a")
    second.start()
    assert jobs.cancel_all(WAIT)
    assert jobs.all() == [second]
    second.dismiss()
    assert jobs.all() == []
    second.when_vanished(lambda job: jobs.add(Toy("late")))
    assert [job.id for job in jobs.all()] == ["late"]


def test_an_interpreter_that_exits_cancels_its_jobs() -> None:
    script = """
import threading
from diskwright.jobs.job import Job
class Endless(Job):
    type = "endless"
    def run(self):
        while True:
            self.pause_point()
            with self._cond:
                self._cond.wait(0.01)
    def clean(self):
        print("cleaned", flush=True)
Endless("j").start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned\n", "")
