"""A writer is killed at some moment: what it had flushed is there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diskwright
from tests.formats.qcow2.support import LONG, qemu

MiB = 1 << 20
SIZE = 64 * MiB

WRITER = """
import random, sys
import diskwright
chance = random.Random(int(sys.argv[2]))
with diskwright.open(sys.argv[1], writable=True) as disk:
    for turn in range(100000):
        at = chance.randrange(disk.size // 4096) * 4096
        disk.pwrite(at, turn.to_bytes(4, "little") * 1024)
        if turn % 3 == 2:
            disk.flush()
            print(turn, flush=True)
"""


@pytest.mark.parametrize("child", [False, True], ids=["dynamic", "differencing"])
@pytest.mark.parametrize("seed", range(10 if LONG else 2))
def test_what_a_killed_writer_had_flushed_is_there(seed: int, child: bool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    if child:
        diskwright.create(str(tmp_path / "parent"), format="vhdx", size=SIZE, block_size=MiB)
        diskwright.create(str(image), format="vhdx", backing_file="parent", backing_fmt="vhdx", block_size=2 * MiB)
    else:
        diskwright.create(str(image), format="vhdx", size=SIZE, block_size=MiB)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(image), str(seed)], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(5 + seed * 3)]
    time.sleep(random.Random(seed).random() / 50)
    writer.kill()
    lines += writer.stdout.readlines()
    writer.wait()
    writer.stdout.close()
    flushed = int([line for line in lines if line.endswith("\n")][-1])
    chance, wanted = random.Random(seed), {}
    later: set[int] = set()
    for turn in range(flushed + 10):
        at = chance.randrange(SIZE // 4096) * 4096
        if turn <= flushed:
            wanted[at] = turn
        else:
            later.add(at)
    before = image.read_bytes()
    with diskwright.open(str(image)) as disk:
        for at, turn in wanted.items():
            assert at in later or disk.pread(at, 4096) == turn.to_bytes(4, "little") * 1024
    assert image.read_bytes() == before
    if not child:
        qemu("qemu-img", "check", "-r", "all", str(image))
    with diskwright.open(str(image), writable=True) as disk:
        for at, turn in wanted.items():
            assert at in later or disk.pread(at, 4096) == turn.to_bytes(4, "little") * 1024
