"""``compact``: what it prints, what it refuses, and what it leaves when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diskwright as library
from diskwright.errors import ImageLocked
from tests.cli.run import diskwright, environment, make, needs_qemu, qemu_img

pytestmark = needs_qemu


def fragmented(directory: Path, clusters: int = 16) -> None:
    """An image of which every other cluster is free."""
    make(
        directory,
        f"qemu-img create -q -f qcow2 image {clusters * 64}k",
        f"qemu-io -c write~-P~5~0~{clusters * 64}k image",
    )
    discards = [word for at in range(0, clusters, 2) for word in ("-c", f"discard~{at * 64}k~64k")]
    make(directory, "qemu-io -d unmap " + " ".join(discards) + " image")
    assert qemu_img("convert", "-O", "raw", "image", "content", cwd=directory).code == 0


def test_report(tmp_path: Path) -> None:
    fragmented(tmp_path)
    before = (tmp_path / "image").stat().st_size
    found = diskwright("compact", "-p", "--json", "image", cwd=tmp_path)
    assert found.code == 0 and not found.err
    head, _, text = found.out.partition("\n")
    assert head.startswith("    (0.00/100%)\r") and head.endswith("(100.00/100%)\r")
    report = json.loads(text)
    after = (tmp_path / "image").stat().st_size
    assert (report["bytes-before"], report["bytes-after"], report["complete"]) == (before, after, True)
    # Header, refcount table and block, L1 and L2 table, and 8 clusters of data.
    assert after == 13 << 16
    assert qemu_img("compare", "image", "content", cwd=tmp_path).code == 0
    assert qemu_img("check", "image", cwd=tmp_path).code == 0
    again = diskwright("compact", "image", cwd=tmp_path)
    assert again.out.splitlines()[1] == "0 clusters moved, 0 clusters of zeros given up"


def test_zeros(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f qcow2 image 1M", "qemu-io -c write~-P~0~0~1M image")
    assert diskwright("compact", "-q", "image", cwd=tmp_path).out == ""
    assert (tmp_path / "image").stat().st_size == 21 << 16
    assert "16 clusters of zeros" in diskwright("compact", "-z", "image", cwd=tmp_path).out
    assert (tmp_path / "image").stat().st_size == 5 << 16


def test_refusals(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f raw raw 1M", "qemu-img create -q -f qcow2 image 1M")
    found = diskwright("compact", "-f", "raw", "raw", cwd=tmp_path)
    assert found.code == 1 and found.err.startswith("PROGRAM: Could not compact 'raw': ")
    assert diskwright("compact", cwd=tmp_path).code == 1
    assert diskwright("compact", "gone", cwd=tmp_path).err.startswith("PROGRAM: Could not open 'gone': ")


def test_nobody_else_may_have_it_open(tmp_path: Path) -> None:
    fragmented(tmp_path)
    image = tmp_path / "image"
    before = image.read_bytes()
    with library.open(image):
        found = diskwright("compact", "image", cwd=tmp_path)
        assert found.code == 1 and "lock" in found.err and found.err.startswith("PROGRAM: Could not open 'image': ")
        with pytest.raises(ImageLocked):
            library.compact(image)
    assert image.read_bytes() == before


def test_from_a_program(tmp_path: Path) -> None:
    fragmented(tmp_path)
    told: list[tuple[int, int]] = []
    report = library.compact(tmp_path / "image", progress=lambda done, total: told.append((done, total)))
    assert report.complete and report.after == 13 << 16 == (tmp_path / "image").stat().st_size
    assert told and told[-1][0] == told[-1][1]
    assert qemu_img("compare", "image", "content", cwd=tmp_path).code == 0


def test_killed_again_and_again(tmp_path: Path) -> None:
    fragmented(tmp_path, 2000)
    image = tmp_path / "image"
    # Two clusters a batch, so that there is time to be killed.
    program = (
        "import sys; from diskwright.formats.qcow2 import compact; compact.BATCH_MOST = 2; "
        "from diskwright.cli.main import main; sys.exit(main(['compact', '-q', 'image']))"
    )
    killed = 0
    while True:
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment())
        started = image.stat().st_mtime_ns
        while process.poll() is None and image.stat().st_mtime_ns == started:
            time.sleep(0.002)
        if killed < 4 and process.poll() is None:
            time.sleep(0.03)
            os.kill(process.pid, signal.SIGKILL)
        code = process.wait(timeout=60)
        assert qemu_img("check", "image", cwd=tmp_path).code in (0, 3), "nothing worse than a leak"
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        killed += 1
    assert killed == 4
    assert qemu_img("check", "image", cwd=tmp_path).code == 0
    assert image.stat().st_size == 1005 << 16
    assert qemu_img("compare", "image", "content", cwd=tmp_path).code == 0
