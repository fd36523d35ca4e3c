"""The same jobs on the same images by qemu-storage-daemon and by us: events, their data, texts, and what is on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskwright.core import bitmaps
from diskwright.core.graph import Graph
from diskwright.core.node import Node
from diskwright.errors import DiskwrightError
from diskwright.jobs.backup import Backup
from diskwright.jobs.commit import commit_job
from diskwright.jobs.create import Create
from diskwright.jobs.job import Job
from diskwright.jobs.mirror import Mirror
from diskwright.jobs.stream import stream_job
from diskwright.units import MiB
from tests.jobs.chains import Chain, backing_of, read_file
from tests.jobs.mirrors import WAIT
from tests.peers.qemu_storage_daemon import QemuStorageDaemon
from tests.peers.qmp import Qmp, QmpError

SIZE = 2 * MiB

Event = tuple[str, dict[str, Any]]

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon")


class Theirs:
    """A daemon of QEMU's."""

    def __init__(self, daemon: QemuStorageDaemon) -> None:
        self.qmp: Qmp = daemon.qmp
        self.stopped: list[str] = []

    def add(self, options: dict[str, Any]) -> None:
        self.qmp.execute("blockdev-add", options)

    def bitmap(self, node: str, name: str) -> None:
        self.qmp.execute("block-dirty-bitmap-add", node=node, name=name)

    def job(self, command: str, arguments: dict[str, Any]) -> list[Event]:
        """Starts a job, completes it when it is ready, and returns its events."""
        self.qmp.events.clear()
        self.qmp.execute(command, {"job-id": "j", **arguments})
        return self._until_end()

    def _until_end(self) -> list[Event]:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            self.qmp.execute("query-jobs")
            found = [(event["event"], event["data"]) for event in self.qmp.events]
            names = [name for name, _ in found]
            if "BLOCK_JOB_READY" in names and not any(data.get("status") == "waiting" for _, data in found):
                try:
                    self.qmp.execute("block-job-complete", device="j")
                except QmpError:
                    pass  # it has been asked already
            self._resume()
            if any(data.get("status") == "concluded" for _, data in found):
                if command_keeps(found):
                    self.qmp.execute("job-dismiss", id="j")
                return [(e["event"], e["data"]) for e in self.qmp.events if e["event"] in EVENTS]
            time.sleep(0.01)
        raise AssertionError("the job did not end")

    def _resume(self) -> None:
        """Lets a job that stopped for an error go on."""
        for job in self.qmp.execute("query-block-jobs"):
            if job["io-status"] != "ok":
                self.stopped.append(job["io-status"])
                self.qmp.execute("block-job-resume", device="j")

    def refusal(self, command: str, arguments: dict[str, Any]) -> str:
        try:
            self.qmp.execute(command, {"job-id": "j", **arguments})
        except QmpError as error:
            return error.text
        return "not refused"


EVENTS = (
    "JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_PENDING",
)  # fmt: skip


def command_keeps(events: list[Event]) -> bool:
    """Whether the job stays until it is dismissed: those that are no block jobs."""
    return not any(name.startswith("BLOCK_JOB") for name, _ in events)


class Ours:
    """The library, called as a daemon would call it."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.stopped: list[str] = []

    def add(self, options: dict[str, Any]) -> None:
        self.graph.open(options, writable=True)

    def bitmap(self, node: str, name: str) -> None:
        bitmaps.add(self.graph.node(node), name)

    def make(self, command: str, arguments: dict[str, Any], events: list[Event]) -> Job:
        words: dict[str, Any] = {name.replace("-", "_"): value for name, value in arguments.items()}
        words["on_event"] = lambda name, data: events.append((name, data))
        if command == "blockdev-create":
            return Create("j", self.graph, words["options"], on_event=words["on_event"])
        device: Node = self.graph.node(words.pop("device"))
        if command == "block-commit":
            return commit_job("j", self.graph, device, **words)
        if command == "block-stream":
            return stream_job("j", self.graph, device, **words)
        target = self.graph.node(words.pop("target"))
        return {"blockdev-backup": Backup, "blockdev-mirror": Mirror}[command]("j", self.graph, device, target, **words)

    def job(self, command: str, arguments: dict[str, Any]) -> list[Event]:
        events: list[Event] = []
        job = self.make(command, arguments, events)
        job.start()
        end = time.monotonic() + WAIT
        while not job.wait(0.01):
            assert time.monotonic() < end
            if job.io_status != "ok":
                self.stopped.append(job.io_status)
                job.resume()
            elif job.ready:
                job.complete()
                job.result(WAIT)
        if not job.block:
            job.dismiss()
        return events

    def refusal(self, command: str, arguments: dict[str, Any]) -> str:
        with pytest.raises((DiskwrightError, OSError)) as caught:
            self.make(command, arguments, [])
        return str(caught.value)


@pytest.fixture
def theirs() -> Iterator[Theirs]:
    with QemuStorageDaemon() as daemon:
        yield Theirs(daemon)


@pytest.fixture
def ours() -> Iterator[Ours]:
    made = Ours()
    try:
        yield made
    finally:
        made.graph.close()


def images(folder: Path) -> list[str]:
    """A chain of four images, and two empty ones, made anew: the same every time."""
    folder.mkdir(exist_ok=True)
    for name in folder.iterdir():
        name.unlink()
    chain = Chain(folder, [SIZE] * 4)
    chain.close()
    from diskwright.core.create import create_image

    for name in ("target.qcow2", "new.raw"):
        create_image(str(folder / name), name.partition(".")[2], {"size": SIZE})
    return chain.names


def open_chain(side: Theirs | Ours, names: list[str]) -> None:
    """As libvirt does: each image with a node name of its own."""
    for i, name in enumerate(names):
        options: dict[str, Any] = {"driver": "qcow2", "node-name": f"n{i}", "backing": f"n{i - 1}" if i else None}
        file: dict[str, Any] = {"driver": "file", "filename": name}
        if i < 3:
            options["read-only"] = True
            if isinstance(side, Theirs):
                file["auto-read-only"] = True
        side.add({**options, "file": file})


def open_targets(side: Theirs | Ours, folder: Path) -> None:
    for name, kind in (("target.qcow2", "qcow2"), ("new.raw", "raw")):
        file = {"driver": "file", "filename": str(folder / name)}
        side.add({"driver": kind, "node-name": name.partition(".")[0], "file": file})


JOBS: list[tuple[str, dict[str, Any]]] = [
    ("block-commit", {"device": "n3", "top-node": "n2", "base-node": "n0"}),
    ("block-commit", {"device": "n3", "top-node": "n2", "base-node": "n1", "backing-file": "1.qcow2"}),
    ("block-commit", {"device": "n3"}),
    ("block-commit", {"device": "n3", "base-node": "n2"}),
    ("block-stream", {"device": "n3"}),
    ("block-stream", {"device": "n3", "base-node": "n1"}),
    ("block-stream", {"device": "n3", "bottom": "n2"}),
    ("block-stream", {"device": "n2", "base-node": "n0", "backing-file": "0.qcow2"}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "full"}),
    ("blockdev-backup", {"device": "n3", "target": "new", "sync": "full", "auto-finalize": True}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "incremental", "bitmap": "b"}),
    ("blockdev-mirror", {"device": "n3", "target": "target", "sync": "full"}),
    ("blockdev-create", {"options": {"driver": "file", "filename": "@/made", "size": MiB}}),
]


@pytest.mark.parametrize(("command", "arguments"), JOBS, ids=[f"{command} {i}" for i, (command, _) in enumerate(JOBS)])
def test_events_and_results(
    tmp_path: Path, theirs: Theirs, ours: Ours, command: str, arguments: dict[str, Any]
) -> None:
    told: list[list[Event]] = []
    left: list[list[Any]] = []
    for side in (theirs, ours):
        folder = tmp_path / "images"
        names = images(folder)
        given = {key: _placed(value, folder) for key, value in arguments.items()}
        open_chain(side, names)
        open_targets(side, folder)
        if "bitmap" in arguments:
            side.bitmap("n3", "b")
        told.append(side.job(command, given))
        if isinstance(side, Ours):
            side.graph.close()
        else:
            for node in [node["node-name"] for node in reversed(side.qmp.execute("query-named-block-nodes"))]:
                try:
                    side.qmp.execute("blockdev-del", node_name=node)
                except QmpError:
                    pass  # a child of another, or of none any more
            for i in (3, 2, 1, 0):
                try:
                    side.qmp.execute("blockdev-del", node_name=f"n{i}")
                except QmpError:
                    pass
        left.append([(read_file(name), _header(name)) for name in _of_interest(command, names, folder)])
    assert [_comparable(event) for event in _steady(told[0])] == [_comparable(event) for event in told[1]]
    assert left[0] == left[1]


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    return value.replace("@", str(folder)) if isinstance(value, str) else value


def _of_interest(command: str, names: list[str], folder: Path) -> list[str]:
    return [str(folder / "made")] if command == "blockdev-create" else [*names[2:], str(folder / "target.qcow2")]


def _header(name: str) -> object:
    return backing_of(name)


def _steady(events: list[Event]) -> list[Event]:
    """Without the pauses a job of QEMU's makes when a graph it is part of is drained."""
    states = [data.get("status") for _, data in events]
    while "paused" in states:
        at = states.index("paused")
        assert states[at + 1] == "running"
        del events[at : at + 2], states[at : at + 2]
    return events


def _comparable(event: Event) -> Event:
    """Without how much a job counted as work: an empty target is recognised earlier here, or later."""
    name, data = event
    data = dict(data)
    if data.get("type") in ("commit", "mirror"):
        assert data.pop("len") >= data.pop("offset")
    return name, data


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("block-commit", {"device": "n3", "top-node": "n2", "top": "x"}),
    ("block-commit", {"device": "n3", "base-node": "n2", "base": "x"}),
    ("block-commit", {"device": "n3", "top": "nowhere"}),
    ("block-commit", {"device": "n3", "base": "nowhere"}),
    ("block-commit", {"device": "n2", "top-node": "n3"}),
    ("block-commit", {"device": "n3", "top-node": "n1", "base-node": "n2"}),
    ("block-commit", {"device": "n3", "top-node": "n1", "base-node": "n1"}),
    ("block-commit", {"device": "n3", "top-node": "n0"}),
    ("block-commit", {"device": "n3", "backing-file": "x"}),
    ("block-commit", {"device": "n3", "speed": -1}),
    ("block-stream", {"device": "n3", "base": "x", "base-node": "n1"}),
    ("block-stream", {"device": "n3", "base": "x", "bottom": "n1"}),
    ("block-stream", {"device": "n3", "bottom": "n1", "base-node": "n1"}),
    ("block-stream", {"device": "n3", "base": "nowhere"}),
    ("block-stream", {"device": "n3", "base-node": "n3"}),
    ("block-stream", {"device": "n2", "base-node": "n3"}),
    ("block-stream", {"device": "n2", "bottom": "n3"}),
    ("block-stream", {"device": "n3", "backing-file": "x"}),
    ("blockdev-backup", {"device": "n3", "target": "n3", "sync": "full"}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "incremental"}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "incremental", "bitmap": "nix"}),
    (
        "blockdev-backup",
        {"device": "n3", "target": "target", "sync": "incremental", "bitmap": "b", "bitmap-mode": "never"},
    ),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "full", "bitmap": "b"}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "full", "bitmap": "b", "bitmap-mode": "never"}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "none", "bitmap": "b", "bitmap-mode": "always"}),
    ("blockdev-backup", {"device": "n3", "target": "target", "sync": "full", "bitmap-mode": "always"}),
    ("blockdev-mirror", {"device": "n3", "target": "target", "sync": "full", "granularity": 100}),
    ("blockdev-mirror", {"device": "n3", "target": "target", "sync": "full", "granularity": 5000}),
    ("blockdev-mirror", {"device": "n3", "target": "target", "sync": "full", "buf-size": -1}),
    ("blockdev-mirror", {"device": "n3", "target": "n3", "sync": "full"}),
]


def test_refusals(tmp_path: Path, theirs: Theirs, ours: Ours) -> None:
    differing: list[tuple[str, dict[str, Any], str, str]] = []
    for side in (theirs, ours):
        folder = tmp_path / type(side).__name__
        open_chain(side, images(folder))
        open_targets(side, folder)
        side.bitmap("n3", "b")
    for command, arguments in REFUSED:
        said = [side.refusal(command, arguments) for side in (theirs, ours)]
        if said[0] != said[1]:
            differing.append((command, arguments, *said))  # type: ignore[arg-type]
    assert not differing


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("block-commit", {"device": "n3", "top-node": "n2", "base-node": "n0"}, "on-error"),
    ("block-stream", {"device": "n3"}, "on-error"),
    ("blockdev-backup", {"device": "n3", "target": "faulty", "sync": "full"}, "on-target-error"),
    ("blockdev-mirror", {"device": "n3", "target": "faulty", "sync": "full"}, "on-target-error"),
]


@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "ignore"])
@pytest.mark.parametrize(("command", "arguments", "word"), FAULTS, ids=[command for command, _, _ in FAULTS])
def test_an_error_as_the_policy_says(
    tmp_path: Path, theirs: Theirs, ours: Ours, command: str, arguments: dict[str, Any], word: str, policy: str
) -> None:
    """One write fails, by ``blkdebug``. What is told of it, what the job's state is, and how it ends."""
    number = 28 if policy == "enospc" else 5
    told: list[list[Event]] = []
    for side in (theirs, ours):
        folder = tmp_path / type(side).__name__
        names = images(folder)
        # One write to the image that is written to fails, and no other.
        broken = {"block-commit": 0, "block-stream": 3}.get(command)
        fault = {"event": "write_aio", "errno": number, "once": True, "iotype": "write"}
        for i, name in enumerate(names):
            file: dict[str, Any] = {"driver": "file", "filename": name}
            if i < 3 and isinstance(side, Theirs):
                file["auto-read-only"] = True
            if i == broken:
                file = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
            options = {"driver": "qcow2", "node-name": f"n{i}", "backing": f"n{i - 1}" if i else None, "file": file}
            side.add(options | ({"read-only": True} if i < 3 else {}))
        if broken is None:
            file = {"driver": "file", "filename": str(folder / "target.qcow2")}
            file = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
            side.add({"driver": "qcow2", "node-name": "faulty", "file": file})
        events = side.job(command, {**arguments, word: policy})
        kept = [(name, data) for name, data in events if name in ("BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED")]
        told.append([(name, {k: v for k, v in data.items() if k not in ("len", "offset")}) for name, data in kept])
    assert told[0] == told[1]
    assert theirs.stopped == ours.stopped
