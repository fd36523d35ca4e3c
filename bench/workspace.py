"""The folder a run works in, the room it needs, and the machine it runs on."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

REPOSITORY: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

DIRTY_LIMIT: Final = 1 << 30
"""Bytes of unwritten pages above which a turn first waits for the disk: Linux starts to write on its own from a tenth
of the memory on, and slows writers down from a sixth; whoever had the turn then would look slow."""


class NoRoom(Exception):
    """The folder's file system is too small for the images."""


@contextmanager
def workspace(parent: str | None) -> Iterator[str]:
    """A new folder, removed with all that is in it at the end, also after SIGTERM and Ctrl-C."""
    old = signal.signal(signal.SIGTERM, _terminate)
    folder = tempfile.mkdtemp(prefix="diskwright-bench-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, old)


@contextmanager
def subfolder(folder: str, name: str) -> Iterator[str]:
    """A folder inside, removed when its part of the run is over, so that parts do not add up."""
    path = os.path.join(folder, name)
    os.mkdir(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def require_room(folder: str, size: int) -> None:
    """Raises NoRoom unless ``size`` bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise NoRoom(f"{folder} has {free >> 20} MiB free and this needs {size >> 20}; choose another with --dir")


def dirty_bytes() -> int:
    """Bytes of the page cache that still have to be written, on the whole machine. 0 where it cannot be told."""
    found = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith(("Dirty:", "Writeback:")):
                    found += int(line.split()[1]) << 10
    except OSError:
        pass
    return found


def settle(*paths: str) -> None:
    """Writes these files' dirty pages to the disk when the machine has more of them than DIRTY_LIMIT."""
    if dirty_bytes() > DIRTY_LIMIT:
        for path in paths:
            flush(path)


def flush(path: str) -> None:
    """Writes a file's dirty pages to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def machine(folder: str) -> dict[str, str]:
    """What a reader must know to place the figures."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} CPUs visible",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file system": _file_system(folder),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "qemu-img": _version("qemu-img", "--version"),
        "nbdkit": _version("nbdkit", "--version"),
        "load average": load_average(),
    }


def load_average() -> str:
    """Runnable processes over the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def busy_before() -> bool:
    """True when others kept more than a fifth of the CPUs busy in the last minute: figures will wander."""
    return os.getloadavg()[0] > 0.2 * (os.cpu_count() or 1)


def diskwright_command(*arguments: str) -> list[str]:
    """The command line that runs the diskwright of this tree, after use_this_tree."""
    return [sys.executable, "-m", "diskwright", *arguments]


def use_this_tree(folder: str) -> None:
    """Lets every program we start import a compiled copy of this tree's package.

    It is what an installed package is: not compiled anew at every start, and the same from the first turn to the last,
    whatever is edited meanwhile. Python's other settings in the environment are dropped: they are ours, not a user's.
    """
    place = os.path.join(folder, "package")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(os.path.join(REPOSITORY, "src", "diskwright"), os.path.join(place, "diskwright"), ignore=ignored)
    subprocess.run([sys.executable, "-m", "compileall", "-q", place], stdin=subprocess.DEVNULL, check=False)
    for name in [name for name in os.environ if name.startswith("PYTHON") and name != "PYTHONHOME"]:
        del os.environ[name]
    os.environ["PYTHONPATH"] = place
    os.environ.pop("DISKWRIGHT_TRACEBACK", None)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _file_system(folder: str) -> str:
    """Type of the file system of the longest mount point above ``folder``."""
    real = os.path.realpath(folder)
    found, name = "", "unknown"
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
            for line in file:
                _, point, kind = line.split()[:3]
                inside = real == point or real.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(found):
                    found, name = point, kind
    except OSError:
        pass
    return name


def _version(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return "not installed"
    return (done.stdout or done.stderr).partition("\n")[0].strip()
