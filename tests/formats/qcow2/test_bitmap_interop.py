"""Both ways with QEMU: a bitmap that one keeps, the other finds as it was, and goes on with."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from diskwright.core import bitmaps
from diskwright.core.bitmap import DirtyBitmap
from tests.formats.qcow2.support import LONG, qemu, qemu_check
from tests.formats.qcow2.test_interop import open_disk
from tests.peers import find

SIZE = 3 << 20


def of_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    """``(offset, length)`` of what QEMU serves as dirty."""
    command = [find("nbdinfo"), "--json", f"--map=qemu:dirty-bitmap:{name}", "--"]
    command += ["[", find("qemu-nbd"), "-r", "-f", "qcow2", "-B", name, str(path), "]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return joined([(row["offset"], row["length"]) for row in json.loads(done.stdout) if row["type"] & 1])


def of_ours(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    runs = []
    for offsets, lengths in bitmap.run_windows(0, bitmap.size):
        runs += list(zip(offsets.tolist(), lengths.tolist(), strict=True))
    return joined(runs)


def joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for offset, length in runs:
        if result and sum(result[-1]) == offset:
            result[-1] = result[-1][0], result[-1][1] + length
        else:
            result.append((offset, length))
    return result


def some_ranges(chance: random.Random, count: int) -> list[tuple[int, int]]:
    ranges = []
    for _ in range(count):
        offset = chance.randrange(SIZE // 512) * 512
        ranges.append((offset, min(SIZE - offset, chance.choice((512, 4096, 70 << 10)))))
    return ranges


def compared(path: Path) -> None:
    """Whatever bitmaps are in the image, both say the same of each, and of the image that it is sound."""
    numbers = qemu_check(path)
    assert (numbers["corruptions"], numbers["leaks"], numbers["check-errors"]) == (0, 0, 0)
    disk = open_disk(path, writable=False)
    found = [(str(each.name), of_ours(each)) for each in bitmaps.named(disk.node)]
    disk.close()
    assert found == [(name, of_qemu(path, name)) for name, _ in found]


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("seed", range(10 if LONG else 1))
def test_taking_turns(cluster_size: int, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{cluster_size} {seed}")
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, SIZE)
    model: dict[str, tuple[int, set[int]]] = {}
    for turn in range(4):
        ranges = some_ranges(chance, 6)
        granularity = 512 << chance.randrange(9)
        if turn % 2:
            qemu("qemu-img", "bitmap", "--add", "-g", granularity, path, f"b{turn}")
            qemu("qemu-io", *(f"-cwrite {offset} {length}" for offset, length in ranges), path)
        else:
            disk = open_disk(path)
            bitmaps.add(disk.node, f"b{turn}", granularity, persistent=True)
            for offset, length in ranges:
                disk.pwrite(offset, b"x" * length)
            disk.close()
        model[f"b{turn}"] = granularity, set()
        for granularity, granules in model.values():
            for offset, length in ranges:
                granules.update(range(offset // granularity, (offset + length - 1) // granularity + 1))
        compared(path)
    for name, (granularity, granules) in model.items():
        expected = joined([(at * granularity, min(granularity, SIZE - at * granularity)) for at in sorted(granules)])
        assert of_qemu(path, name) == expected
    qemu("qemu-img", "bitmap", "--remove", path, "b0")
    disk = open_disk(path)
    bitmaps.remove(disk.node, "b1")
    bitmaps.merge(disk.node, "b2", [(disk.node, "b3")])
    disk.close()
    compared(path)


def test_after_changes_of_size(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    disk = open_disk(path)
    bitmaps.add(disk.node, "all", 512, persistent=True).set_all()
    disk.node.resize(SIZE + (100 << 10))
    disk.close()
    assert of_qemu(path, "all") == [(0, SIZE)]
    disk = open_disk(path)
    disk.node.resize(100 << 10)
    disk.close()
    assert of_qemu(path, "all") == [(0, 100 << 10)]
    qemu("qemu-img", "resize", path, SIZE)
    compared(path)


def test_whole_clusters_of_ones(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, 10 << 20)
    disk = open_disk(path)
    bitmaps.add(disk.node, "ones", 512, persistent=True).mark(0, 9 << 20)
    disk.close()
    compared(path)
    assert of_qemu(path, "ones") == [(0, 9 << 20)]


def test_what_qemu_left_in_use_is_inconsistent(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "b")
    command = [find("qemu-io"), "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", str(path)]
    subprocess.run(command, capture_output=True, timeout=60, check=False)
    disk = open_disk(path)
    assert bitmaps.find(disk.node, "b").inconsistent
    disk.pwrite(0, b"x")
    disk.close()
    disk = open_disk(path)
    assert bitmaps.find(disk.node, "b").inconsistent
    bitmaps.remove(disk.node, "b")
    disk.close()
    compared(path)


def test_what_we_left_in_use_is_inconsistent_for_qemu(tmp_path: Path) -> None:
    path, copy = tmp_path / "image.qcow2", tmp_path / "copy.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "auto")
    qemu("qemu-img", "bitmap", "--add", "--disable", path, "off")
    disk = open_disk(path)
    disk.pwrite(0, b"x")
    disk.flush()
    copy.write_bytes(path.read_bytes())  # what a crash would leave
    disk.close()
    told = json.loads(qemu("qemu-img", "info", "--output=json", copy))["format-specific"]["data"]["bitmaps"]
    assert {row["name"]: row["flags"] for row in told} == {"auto": ["in-use", "auto"], "off": []}
    qemu("qemu-img", "bitmap", "--remove", copy, "auto")
    compared(copy)
    compared(path)
    assert of_qemu(path, "auto") == [(0, 65536)]


def test_snapshots_and_bitmaps_in_one_image(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "b")
    qemu("qemu-io", "-c", "write 0 1M", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    disk = open_disk(path)
    disk.pwrite(2 << 20, b"x" * 65536)
    disk.close()
    compared(path)
    assert of_qemu(path, "b") == [(0, 1 << 20), (2 << 20, 65536)]
    qemu("qemu-img", "snapshot", "-d", "one", path)
    compared(path)
