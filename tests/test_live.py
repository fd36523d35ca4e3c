"""Jobs on a disk in use, by the functions a program calls."""

from __future__ import annotations

from pathlib import Path

import pytest

import diskwright
from diskwright.jobs.job import Cancelled
from diskwright.units import KiB, MiB

WAIT = 60


def make(folder: Path) -> tuple[list[str], bytes]:
    """Three images over each other, and what the topmost reads as."""
    names = [str(folder / f"{i}.qcow2") for i in range(3)]
    model = bytearray(2 * MiB)
    for i, name in enumerate(names):
        backing = {"backing_file": names[i - 1], "backing_fmt": "qcow2"} if i else {}
        diskwright.create(name, "qcow2", 2 * MiB, **backing)
        with diskwright.open(name, writable=True) as disk:
            for at in range(i * 64 * KiB, 2 * MiB, 192 * KiB):
                data = bytes([i + 1]) * 100 * KiB
                data = data[: 2 * MiB - at]
                disk.pwrite(at, data)
                model[at : at + len(data)] = data
    return names, bytes(model)


def contents(name: str) -> bytes:
    with diskwright.open(name) as disk:
        return disk.pread(0, disk.size)


def test_commit_a_disk_in_use(tmp_path: Path) -> None:
    names, model = make(tmp_path)
    told: list[tuple[int, int]] = []
    with diskwright.open(names[2], writable=True) as disk:
        diskwright.commit(disk, progress=lambda done, length: told.append((done, length)))
        assert disk.pread(0, disk.size) == model
        disk.pwrite(0, b"on")
    assert contents(names[0]) == b"on" + model[2:]
    assert told[-1][0] == told[-1][1] > 0


def test_commit_an_image_in_the_middle(tmp_path: Path) -> None:
    names, model = make(tmp_path)
    with diskwright.open(names[2], writable=True) as disk:
        job = diskwright.live_commit(disk, top=names[1])
        disk.pwrite(5, b"meanwhile")
        job.result(WAIT)
        Path(names[1]).unlink()
    assert contents(names[2]) == model[:5] + b"meanwhile" + model[14:]


@pytest.mark.parametrize("base", [None, 0])
def test_stream(tmp_path: Path, base: int | None) -> None:
    names, model = make(tmp_path)
    with diskwright.open(names[2], writable=True) as disk:
        job = diskwright.stream(disk, None if base is None else names[base])
        disk.pwrite(5, b"meanwhile")
        job.result(WAIT)
    for name in names[:2] if base is None else names[1:2]:
        Path(name).unlink()
    assert contents(names[2]) == model[:5] + b"meanwhile" + model[14:]


@pytest.mark.parametrize("compress", [False, True])
def test_backup(tmp_path: Path, compress: bool) -> None:
    names, model = make(tmp_path)
    target = tmp_path / "target.qcow2"
    with diskwright.open(names[2], writable=True) as disk:
        job = diskwright.backup(disk, target, compress=compress)
        disk.pwrite(5, b"afterwards")
        job.result(WAIT)
        assert contents(str(target)) == model  # it is closed, so others can have it
        again = diskwright.backup(disk, tmp_path / "raw.img", format="raw", speed=1)
        again.cancel()
        with pytest.raises(Cancelled):
            again.result(WAIT)
        with pytest.raises(diskwright.DiskwrightError):
            diskwright.backup(disk, names[2], existing=True)
        assert disk.pread(5, 10) == b"afterwards"
