"""The programs that mirror: each serves the source over NBD, mirrors it, says when it is ready, and finishes."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tests.peers.process import environment, short_folder
from tests.peers.qemu_storage_daemon import QemuStorageDaemon

from bench.paced import Paced
from bench.servers import OURS
from bench.timing import cpu_seconds, peak_memory
from bench.workspace import diskwright_command

LONGEST: Final = 300.0
"""Seconds after which a mirror is given up."""


class MirrorFailed(Exception):
    """A program ended, or said nothing, before its mirror was ready, or could not finish it."""


class Load(Protocol):
    """The guest: ``start`` at a socket that may not be there yet, ``connected`` once it is, ``stop``."""

    def start(self, socket: str) -> None: ...
    def connected(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Mirrored:
    """When the work began and when it was ready, in time.monotonic() seconds; CPU seconds in between; and the
    program's peak memory in bytes until then."""

    started: float
    ready: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Mirrorer:
    """A way to mirror. ``mirror(source, source_format, target, target_format, size, load)`` leaves the target a copy of
    the source, neither being open; ``load`` is what its guest has to know."""

    name: str
    mirror: Callable[[str, str, str, str, int, Load | None], Mirrored]
    load: Paced = field(default_factory=lambda: Paced(0, 0))


def _qemu(aio: str) -> Callable[[str, str, str, str, int, Load | None], Mirrored]:
    """Mirrors with blockdev-mirror of qemu-storage-daemon, as a script of its QMP would."""

    def blockdev(name: str, path: str, fmt: str) -> dict[str, Any]:
        file = {"driver": "file", "filename": path, "aio": aio, "discard": "unmap"}
        return {"node-name": name, "driver": fmt, "discard": "unmap", "file": file}

    def mirror(source: str, fmt: str, target: str, target_format: str, size: int, load: Load | None) -> Mirrored:
        with QemuStorageDaemon(blockdev("source", source, fmt)) as daemon:
            qmp = daemon.qmp
            daemon.serve_nbd("source")
            if load:
                load.start(daemon.nbd_socket)
                load.connected()
            try:
                started, before = time.monotonic(), cpu_seconds(daemon.pid)
                with open(target, "wb") as file:
                    file.truncate(size if target_format == "raw" else 0)
                if target_format != "raw":
                    qmp.execute("blockdev-add", blockdev("made", target, target_format)["file"] | {"node-name": "made"})
                    options = {"driver": target_format, "file": "made", "size": size}
                    qmp.execute("blockdev-create", job_id="create", options=options)
                    qmp.wait_job("create", "concluded", LONGEST)
                    qmp.execute("job-dismiss", id="create")
                    qmp.execute("blockdev-del", node_name="made")
                qmp.execute("blockdev-add", blockdev("target", target, target_format))
                qmp.execute("blockdev-mirror", job_id="mirror", device="source", target="target", sync="full")
                qmp.wait_event("BLOCK_JOB_READY", LONGEST)
                ready = time.monotonic()
                found = Mirrored(started, ready, cpu_seconds(daemon.pid) - before, peak_memory(daemon.pid))
            finally:
                if load:
                    load.stop()
            qmp.execute("block-job-cancel", device="mirror")  # when ready, it ends the copy at a consistent moment
            qmp.wait_event("BLOCK_JOB_COMPLETED", LONGEST)
            return found

    return mirror


def _ours(source: str, fmt: str, target: str, target_format: str, size: int, load: Load | None) -> Mirrored:
    """Mirrors with the command line. Started by its first line of output, which comes before it creates the target."""
    scratch = tempfile.mkdtemp(prefix="dw", dir=short_folder())
    socket = os.path.join(scratch, "s")
    words = ["-f", fmt, "-O", target_format, "--serve", socket, "--progress=json", source, target]
    process = subprocess.Popen(
        diskwright_command("mirror", *words),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        lines = _Lines(process)
        if load:
            load.start(socket)
        try:
            lines.wait(lambda line: line.startswith("Serving"))
            started, before = time.monotonic(), cpu_seconds(process.pid)
            if load:
                load.connected()
            lines.wait(lambda line: _event(line) == "BLOCK_JOB_READY")
            ready = time.monotonic()
            found = Mirrored(started, ready, cpu_seconds(process.pid) - before, peak_memory(process.pid))
        finally:
            if load:
                load.stop()
        process.send_signal(signal.SIGINT)  # asks for the end
        lines.until_end()
        if process.wait(LONGEST):
            raise MirrorFailed(f"diskwright mirror ended with {process.returncode}: {lines.said()}")
        return found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
        shutil.rmtree(scratch, ignore_errors=True)


class _Lines:
    """What a program prints on its two streams, line by line as it comes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout and process.stderr
        self._process = process
        self._open = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
        self._ready: list[str] = []
        self._all: list[str] = []

    def wait(self, match: Callable[[str], bool]) -> None:
        """Reads until a line that matches. Raises MirrorFailed when the program ends before, or it takes too long."""
        end = time.monotonic() + LONGEST
        while True:
            while self._ready:
                if match(self._ready.pop(0)):
                    return
            if not self._open:
                raise MirrorFailed(f"diskwright mirror ended: {self.said()}")
            if time.monotonic() > end:
                raise MirrorFailed(f"diskwright mirror is not ready after {LONGEST:g} s: {self.said()}")
            self._read()

    def until_end(self) -> None:
        """Reads until both streams are closed. Raises MirrorFailed."""
        end = time.monotonic() + LONGEST
        while self._open:
            if time.monotonic() > end:
                raise MirrorFailed(f"diskwright mirror does not end: {self.said()}")
            self._read()

    def said(self) -> str:
        """The last lines."""
        return " / ".join(self._all[-3:])

    def _read(self) -> None:
        for fd in select.select(list(self._open), [], [], 0.5)[0]:
            data = os.read(fd, 65536)
            *lines, rest = (self._open[fd] + data).split(b"\n")
            self._open[fd] = rest
            if not data:
                del self._open[fd]
                lines = [rest] if rest else []
            texts = [line.decode("utf-8", "replace") for line in lines]
            self._ready += texts
            self._all = [*self._all, *texts][-50:]


def _event(line: str) -> str | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found.get("event") if isinstance(found, dict) else None


MIRRORERS: Final = (
    Mirrorer("qsd threads", _qemu("threads"), Paced(0, 0, export="source")),
    Mirrorer("qsd io_uring", _qemu("io_uring"), Paced(0, 0, export="source")),
    Mirrorer(OURS, _ours, Paced(0, 0, may_close=True)),
)
