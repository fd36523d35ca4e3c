"""Small file systems, loop devices and other programs, all gone again after each test."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diskwright.core import options as opts
from diskwright.core.driver import Storage
from diskwright.storage.file import FileOptions, FileStorage, HostDeviceStorage

Opener = Callable[..., FileStorage]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """``opened(path, writable=True, **options)``: a FileStorage that is closed after the test."""
    storages: list[Storage] = []

    def open_one(path: object, *, writable: bool = True, device: bool = False, **options: object) -> FileStorage:
        cls = HostDeviceStorage if device else FileStorage
        parsed: FileOptions = opts.parse(cls.options, {"filename": str(path), **options}, owner=cls.name)
        storage = cls.open(parsed, writable=writable)
        storages.append(storage)
        return storage

    yield open_one
    for storage in storages:
        storage.close()


def create(path: object, driver: type[Storage] = FileStorage, **options: object) -> None:
    driver.create(opts.parse(driver.create_options, {"filename": str(path), **options}, owner=driver.name))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where = tmp_path / "small"
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(where)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.fixture
def attach() -> Iterator[Callable[..., str]]:
    """``attach(file, *losetup_options)``: the name of a loop device over ``file``."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    devices: list[str] = []

    def attach_one(file: Path, *options: str) -> str:
        done = subprocess.run(
            ["losetup", "--find", "--show", *options, str(file)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no loop device: {done.stderr.strip()}")
        devices.append(done.stdout.strip())
        return devices[-1]

    yield attach_one
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def running() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``running(ready, *command)``: starts a program and waits until ``ready()``; ended after the test."""
    programs: list[subprocess.Popen[str]] = []

    def start(ready: Callable[[], bool], *command: str) -> subprocess.Popen[str]:
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        programs.append(program)
        until = time.monotonic() + 20
        while not ready():
            assert program.poll() is None, program.stderr and program.stderr.read()
            assert time.monotonic() < until, f"{command[0]} did not get ready"
            time.sleep(0.01)
        return program

    yield start
    for program in programs:
        program.terminate()
        try:
            program.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            program.kill()
            program.communicate(timeout=20)
            raise
