"""A machine's state that is not yet kept with a snapshot: written and read behind the disk's end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.core import snapshots
from diskwright.core.bitmap import DirtyBitmap
from diskwright.errors import LimitExceeded
from tests.cli.run import make, needs_qemu
from tests.crash.workload import Workload
from tests.formats.qcow2.support import Image, Tape, created

CLUSTER = 4096


def read(image: Image, offset: int, length: int) -> bytes:
    into = memoryview(bytearray(length))
    snapshots.read_vm_state(image.node, offset, into)
    return bytes(into)


@pytest.fixture
def qcow2() -> Iterator[Image]:
    with Image(Tape(created(size=1 << 20, cluster_size=CLUSTER))) as image:
        yield image


def test_it_is_no_part_of_the_disk(qcow2: Image) -> None:
    bitmap = DirtyBitmap(qcow2.disk.size, 65536)
    qcow2.node.add_bitmap(bitmap)
    before = qcow2.disk.pread(0, qcow2.disk.size)
    data = random.Random(1).randbytes(50_000)
    snapshots.write_vm_state(qcow2.node, 1000, memoryview(data))
    assert read(qcow2, 0, 60_000) == bytes(1000) + data + bytes(9000)
    assert qcow2.disk.pread(0, qcow2.disk.size) == before and not bitmap.count
    qcow2.node.flush()
    report = qcow2.format.check("off")
    assert not report.corruptions and not report.leaks


def test_a_limit(qcow2: Image) -> None:
    with pytest.raises(LimitExceeded):
        snapshots.write_vm_state(qcow2.node, 1 << 60, memoryview(b"x"))
    assert read(qcow2, 1 << 60, 10) == bytes(10)


@pytest.mark.parametrize("seed", range(2))
def test_crashes(seed: int) -> None:
    """At any moment the disk is what it was; once flushed, so is the state."""
    chance = random.Random(seed)
    state = chance.randbytes(7000)
    with Workload(created(size=1 << 20, cluster_size=512)) as work:
        work.play(chance, 5)
        snapshots.write_vm_state(work.image.node, 300, memoryview(state))
        work.play(chance, 5)
        snapshots.write_vm_state(work.image.node, 100_000, memoryview(state))
        work.play(chance, 5)

    def judge(position: int, files: dict[str, bytes], finished: bool) -> None:
        if finished:
            image = work._open(files, writable=False)
            try:
                assert read(image, 300, 7000) == read(image, 100_000, 7000) == state
            finally:
                image.close()

    work.verify(chance, most=60, reopen=1000, also=[judge])


@needs_qemu
@pytest.mark.parametrize(
    "options",
    ["cluster_size=65536", "compat=0.10", "extended_l2=on", "cluster_size=512", "refcount_bits=1"],
)
def test_with_qemu_io(options: str, tmp_path: Path) -> None:
    """What one of the two writes the other reads, also when a snapshot shares the tables."""
    from diskwright.cli.main import main

    path = str(tmp_path / "image")
    make(tmp_path, f"qemu-img create -q -f qcow2 -o {options} image 1M")
    assert main(["io", "-f", "qcow2", "-c", "write -qb -P 7 1k 300k", "-c", "write -q 0 64k", path]) == 0
    make(tmp_path, "qemu-img check -q image", "qemu-io -c read~-qb~-P~7~1k~300k -c write~-qb~-P~9~2M~8k image")
    make(tmp_path, "qemu-io -c read~-qb~-P~0~0~1k image")
    again = ["read -qb -P 9 2M 8k", "read -qb -P 7 1k 300k", "read -qb -P 0 301k 1k"]
    assert main(["io", "-f", "qcow2", *(word for each in again for word in ("-c", each)), path]) == 0
    if "refcount_bits" not in options:  # no room in one bit for what a snapshot shares
        make(tmp_path, "qemu-img snapshot -c one image")
    assert main(["io", "-f", "qcow2", "-c", "write -qb -P 5 0 8k", "-c", "read -qb -P 7 8k 200k", path]) == 0
    make(tmp_path, "qemu-img check -q image", "qemu-io -c read~-qb~-P~5~0~8k image")
