"""Runs a command once and says how long it took, what CPU time, and its peak memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Final

TIMEOUT: Final = 900.0  # seconds

# A program's ru_maxrss starts from the size of the process that started it, which exec hands on. So a bare interpreter
# starts it: what is below that one's 10 MiB is not told apart. It also keeps the clock, free of its own start.
_LAUNCHER: Final = """
import os, sys, time, json
fd = int(sys.argv[1])
os.set_inheritable(fd, False)
began = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - began
code = os.waitstatus_to_exitcode(status)
report = [code, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10]
os.write(fd, json.dumps(report).encode())
"""


class CommandFailed(Exception):
    """A measured command failed; the message holds the command line and what it said last."""


@dataclass(frozen=True)
class Cost:
    """What a command took: ``seconds`` of wall clock, ``cpu`` seconds, ``peak`` bytes of resident memory."""

    seconds: float
    cpu: float
    peak: int


def run(command: list[str], *, codes: tuple[int, ...] = (0,), timeout: float = TIMEOUT) -> Cost:
    """Runs ``command`` to its end, its output thrown away. Raises CommandFailed when it ends with another status."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as report, tempfile.TemporaryFile() as log:
        try:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(writer), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                start_new_session=True,  # a group of its own, so that the command can be ended with its launcher
            )
        finally:
            os.close(writer)
        try:
            launcher.wait(timeout)
            text = report.read()
        except BaseException:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            raise
        log.seek(0)
        said = " ".join(log.read()[-2000:].decode("utf-8", "replace").split())
    if not text:
        raise CommandFailed(f"{' '.join(command)}: could not be started: {said}")
    code, seconds, cpu, peak = json.loads(text)
    if code not in codes:
        raise CommandFailed(f"{' '.join(command)}: status {code}: {said}")
    return Cost(seconds, cpu, peak)


def peak_memory(pid: int) -> int:
    """Peak resident memory in bytes of a running process and its children, each at its own peak."""
    return sum(_peak(one) for one in family(pid))


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a running process and its running children have used, in all their threads."""
    total = 0.0
    for one in family(pid):
        try:
            total += time.clock_gettime((~one << 3) | 2)  # what clock_getcpuclockid(3) returns for a process
        except OSError:
            pass  # it ended meanwhile
    return total


def family(pid: int) -> list[int]:
    """A process and its descendants, itself first."""
    found = [pid]
    for one in found:  # grows while it is walked
        try:
            tasks = os.listdir(f"/proc/{one}/task")
        except OSError:
            continue
        for task in tasks:
            found.extend(int(word) for word in _read(f"/proc/{one}/task/{task}/children").split())
    return found


def _peak(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
