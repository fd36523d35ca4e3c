"""Both ways with QEMU: what one writes the other reads, and finds sound."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.core.disk import Disk
from diskwright.core.gate import DirectoryGate
from diskwright.core.graph import Graph
from diskwright.core.node import format_of
from diskwright.core.permissions import READER, WRITER
from tests.formats.qcow2.support import our_check, qemu, qemu_check

CLUSTERS = (512, 4096, 65536, 2 << 20)
SIZE = 5 << 20


def open_disk(path: Path, *, writable: bool = True) -> Disk:
    graph = Graph(DirectoryGate())
    node = graph.open({"driver": "qcow2", "file.filename": str(path)}, writable=writable)
    return graph.disk(node, WRITER if writable else READER, owns_graph=True)


def same(raw: Path, path: Path, model: bytes) -> None:
    """QEMU reads ``model`` from the image, finds it sound, and counts what we count."""
    raw.write_bytes(model)
    qemu("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, path)
    numbers = qemu_check(path)
    assert (numbers["corruptions"], numbers["leaks"], numbers["check-errors"]) == (0, 0, 0)
    disk = open_disk(path, writable=False)
    assert disk.pread(0, disk.size) == model
    assert our_check(format_of(disk.node).check("off")) == numbers
    disk.close()


def scribble(disk: Disk, model: bytearray, chance: random.Random, steps: int) -> None:
    cluster = disk.node.cluster_size
    for _ in range(steps):
        offset = chance.randrange(len(model))
        length = min(len(model) - offset, chance.choice((1, 511, 4096, cluster, 2 * cluster + 7, 100_000)))
        action = chance.random()
        if action < 0.6:
            data = chance.randbytes(length)
            disk.pwrite(offset, data)
            model[offset : offset + length] = data
        elif action < 0.8:
            disk.zero(offset, length, unmap=chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif action < 0.9:
            disk.trim(offset, length)
            model[offset : offset + length] = disk.pread(offset, length)
        else:
            disk.flush()


def scribble_with_qemu(path: Path, model: bytearray, chance: random.Random, steps: int, *, zeros: bool) -> None:
    commands = []
    for _ in range(steps):
        offset = chance.randrange(len(model) // 512) * 512
        length = min(len(model) - offset, chance.randrange(1, 200) * 512)
        if zeros and chance.random() < 0.3:
            commands += ["-c", f"write -z {chance.choice(('-u', ''))} {offset} {length}"]
            model[offset : offset + length] = bytes(length)
        else:
            byte = chance.randrange(256)
            commands += ["-c", f"write -P {byte} {offset} {length}"]
            model[offset : offset + length] = bytes([byte]) * length
    qemu("qemu-io", "-f", "qcow2", *commands, path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", CLUSTERS)
def test_turns(tmp_path: Path, cluster_size: int, compat: str) -> None:
    """Both write to one image, in turns."""
    chance = random.Random(f"{cluster_size} {compat}")
    path, raw, model = tmp_path / "image.qcow2", tmp_path / "raw", bytearray(SIZE)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size},compat={compat}", path, SIZE)
    for _ in range(3):
        scribble_with_qemu(path, model, chance, 10, zeros=True)
        disk = open_disk(path)
        assert disk.pread(0, SIZE) == model
        scribble(disk, model, chance, 25)
        disk.close()
        same(raw, path, bytes(model))


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_compressed_images_are_written_to(tmp_path: Path, cluster_size: int, method: str) -> None:
    chance = random.Random(f"{cluster_size} {method}")
    path, raw = tmp_path / "image.qcow2", tmp_path / "raw"
    model = bytearray(b"".join(chance.randbytes(50) * 1000 for _ in range(100)))
    model.extend(bytes(-len(model) % 512))
    raw.write_bytes(model)
    options = f"cluster_size={cluster_size},compression_type={method}"
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    disk = open_disk(path)
    scribble(disk, model, chance, 60)
    disk.close()
    same(raw, path, bytes(model))


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_a_chain(tmp_path: Path, cluster_size: int, compat: str) -> None:
    """Three images of different sizes on each other; the topmost is written by both."""
    chance = random.Random(cluster_size)
    base, middle, top, raw = (tmp_path / name for name in ("base.raw", "middle.qcow2", "top.qcow2", "raw"))
    model = bytearray(chance.randbytes(3 << 20))
    base.write_bytes(model)
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    qemu(*create, "-o", f"cluster_size={cluster_size}", "-b", "base.raw", "-F", "raw", middle, 4 << 20)
    model.extend(bytes(1 << 20))
    scribble_with_qemu(middle, model, chance, 8, zeros=True)
    qemu(*create, "-o", f"compat={compat},cluster_size=4096", "-b", "middle.qcow2", "-F", "qcow2", top, SIZE)
    model.extend(bytes(1 << 20))
    disk = open_disk(top)
    scribble(disk, model, chance, 40)
    disk.close()
    same(raw, top, bytes(model))
    scribble_with_qemu(top, model, chance, 10, zeros=compat == "1.1")
    same(raw, top, bytes(model))


def test_snapshots_of_qemu_stay_as_they_were(tmp_path: Path) -> None:
    chance = random.Random(1)
    path, raw, model = tmp_path / "image.qcow2", tmp_path / "raw", bytearray(SIZE)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, SIZE)
    kept: dict[str, bytes] = {}
    for name in ("one", "two", "three"):
        scribble_with_qemu(path, model, chance, 10, zeros=True)
        disk = open_disk(path)
        scribble(disk, model, chance, 20)
        disk.close()
        kept[name] = bytes(model)
        qemu("qemu-img", "snapshot", "-c", name, path)
    disk = open_disk(path)
    scribble(disk, model, chance, 60)
    disk.close()
    same(raw, path, bytes(model))
    for name in ("two", "one", "three"):
        qemu("qemu-img", "snapshot", "-a", name, path)
        same(raw, path, kept[name])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
def test_every_width_of_refcounts(tmp_path: Path, bits: int) -> None:
    chance = random.Random(bits)
    path, raw, model = tmp_path / "image.qcow2", tmp_path / "raw", bytearray(SIZE)
    options = f"cluster_size=512,refcount_bits={bits}"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    disk = open_disk(path)
    scribble(disk, model, chance, 80)
    disk.close()
    same(raw, path, bytes(model))
    scribble_with_qemu(path, model, chance, 5, zeros=True)
    disk = open_disk(path)
    scribble(disk, model, chance, 20)
    disk.close()
    same(raw, path, bytes(model))


def test_the_refcount_table_grows(tmp_path: Path) -> None:
    """With clusters of 512 bytes it moves several times on the way to 40 MiB."""
    path, raw = tmp_path / "image.qcow2", tmp_path / "raw"
    size = 40 << 20
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, size)
    disk = open_disk(path)
    model = bytearray(random.Random(1).randbytes(size))
    for offset in range(0, size, 1 << 20):
        disk.pwrite(offset, model[offset : offset + (1 << 20)])
    disk.close()
    same(raw, path, bytes(model))
    scribble_with_qemu(path, model, random.Random(2), 5, zeros=True)
    same(raw, path, bytes(model))
