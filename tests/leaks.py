"""Finds what tests leave behind: processes, threads, open files, mounts, loop devices, shared memory."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
import time
import uuid

import pytest

GRACE = 2.0  # seconds in which threads and processes that are already ending may end
MARK = "DISKWRIGHT_TEST_RUN"

# Python's own helper, which ends with this process.
_HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


class Snapshot:
    """The processes, threads and open files of this process at one moment, to be compared with a later one."""

    def __init__(self) -> None:
        self._children = _children()
        self._threads = {thread.ident for thread in threading.enumerate()}
        self._files = _open_files()

    def left(self, *, files: bool = True) -> list[str]:
        """Returns what there is now and was not then. Left processes are killed, to keep the next tests apart."""
        end = time.monotonic() + GRACE
        while (lives := self._living()) and time.monotonic() < end:
            time.sleep(0.01)
        if files and self._new_files():
            gc.collect()  # an object that nobody closed, but nobody has either, is no leak to the test
            lives += [f"open file {name}" for name in self._new_files()]
        for pid in _children() - self._children:
            if not _is_helper(pid):
                _kill(pid)
        return lives

    def _living(self) -> list[str]:
        found = [f"process {pid} ({_command(pid)})" for pid in _children() - self._children if not _is_helper(pid)]
        for thread in threading.enumerate():
            if thread.ident not in self._threads and thread is not threading.current_thread():
                found.append(f"thread {thread.name!r}")
        return found

    def _new_files(self) -> list[str]:
        return [name for fd, name in sorted(_open_files().items()) if self._files.get(fd) != name]


class Session:
    """What must not outlive a whole run. Processes are known by a mark in their environment, also when orphaned."""

    def __init__(self) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        os.environ[name] = value
        self._mounts = _mounts()
        self._loops = _loops()
        self._shared = _entries("/dev/shm")

    def left(self, base: str, *, processes: bool) -> list[str]:
        """Returns what is left, and kills the processes among it. ``base`` is the folder of the run's files."""
        found = self._processes() if processes else []
        ours = os.path.realpath(base).encode() + b"/"
        found += [f"mount {name.decode()}" for name in _mounts() - self._mounts if name.startswith(ours)]
        found += [f"loop device on {name.decode()}" for name in _loops() - self._loops if name.startswith(ours)]
        if os.environ.get("CI"):  # elsewhere other programs of the machine may have made theirs meanwhile
            found += [f"shared memory {name}" for name in _entries("/dev/shm") - self._shared]
        return found

    def _processes(self) -> list[str]:
        end = time.monotonic() + GRACE
        while (marked := _marked(self._mark.encode())) and time.monotonic() < end:
            time.sleep(0.05)
        found = [f"process {pid} ({_command(pid)})" for pid in marked]
        for pid in marked:
            _kill(pid)
        return found


SESSION = pytest.StashKey[Session]()
FROM_WORKERS = pytest.StashKey[list[str]]()


def _children() -> set[int]:
    """Returns the living child processes of all our threads."""
    found: set[int] = set()
    for task in _entries("/proc/self/task"):
        text = _read(f"/proc/self/task/{task}/children")
        found.update(int(word) for word in text.split())
    return {pid for pid in found if _state(pid) not in (b"Z", b"")}


def _marked(mark: bytes) -> list[int]:
    """Returns the processes that inherited our mark. Our own environment, as /proc shows it, is older than the mark."""
    mine = {os.getpid(), os.getppid()}
    found = []
    for entry in _entries("/proc"):
        if entry.isdigit() and int(entry) not in mine and mark in _read(f"/proc/{entry}/environ").split(b"\0"):
            pid = int(entry)
            if _state(pid) not in (b"Z", b"") and not _is_helper(pid):
                found.append(pid)
    return found


def _open_files() -> dict[int, str]:
    """Returns the descriptors of files below the temporary folder, sockets and devices: what tests open."""
    ours = os.path.realpath(tempfile.gettempdir()) + "/"
    found = {}
    for entry in _entries("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the listing's own descriptor
        if name.startswith((ours, "socket:", "/dev/loop", "/dev/fuse", "/memfd:")):
            found[int(entry)] = name
    return found


def _mounts() -> set[bytes]:
    return {line.split()[1] for line in _read("/proc/self/mounts").splitlines()}


def _loops() -> set[bytes]:
    names = (_read(f"/sys/block/{name}/loop/backing_file").strip() for name in _entries("/sys/block"))
    return {name for name in names if name}


def _entries(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _state(pid: int) -> bytes:
    """Returns the letter of a process's state; empty when there is none."""
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1]


def _command(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode("utf-8", "replace").strip()[:200]


def _is_helper(pid: int) -> bool:
    command = _read(f"/proc/{pid}/cmdline")
    return any(helper in command for helper in _HELPERS)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # gone, or an orphan that is not ours to wait for
