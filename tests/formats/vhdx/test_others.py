"""VHDX images made here, read by programs that share nothing with us."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diskwright
from tests.formats.qcow2.support import qemu

MiB = 1 << 20
SIZE = 8 * MiB

KINDS: dict[str, dict[str, object]] = {
    "small blocks": {"block_size": MiB},
    "usual": {},
    "fixed": {"subformat": "fixed", "block_size": 2 * MiB},
    "undefined": {"block_state_zero": False, "block_size": MiB, "log_size": 2 * MiB},
    "large sectors": {"logical_sector_size": 4096, "physical_sector_size": 4096, "block_size": MiB},
}


def needs(name: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(name.partition(".")[0]) is not None
    return pytest.mark.skipif(not found, reason=f"needs {name}")


def scattered(path: Path, seed: int) -> bytes:
    """Writes here and there; returns what the disk reads as."""
    chance = random.Random(seed)
    with diskwright.open(str(path), writable=True) as disk:
        for _ in range(8):
            disk.pwrite(chance.randrange(SIZE - 4096), chance.randbytes(4096))
        disk.pwrite(6 * MiB, chance.randbytes(MiB))
        disk.zero(4 * MiB + 512, 70000)
        return bytes(disk.pread(0, SIZE))


def made(path: Path, kind: str, seed: int = 1) -> bytes:
    diskwright.create(str(path), format="vhdx", size=SIZE, **KINDS[kind])
    return scattered(path, seed)


def opened_by_libvhdi(path: Path) -> Any:
    import pyvhdi

    file = pyvhdi.file()
    file.open(str(path))
    return file


@needs("pyvhdi")
@pytest.mark.parametrize("kind", KINDS)
def test_libvhdi_reads_ours(kind: str, tmp_path: Path) -> None:
    data = made(tmp_path / "image.vhdx", kind)
    file = opened_by_libvhdi(tmp_path / "image.vhdx")
    assert file.read_buffer_at_offset(file.get_media_size(), 0) == data
    file.close()


@needs("pyvhdi")
@pytest.mark.parametrize("kind", ["small blocks", "large sectors"])
def test_libvhdi_reads_a_child(kind: str, tmp_path: Path) -> None:
    made(tmp_path / "parent.vhdx", kind)
    child = tmp_path / "child.avhdx"
    diskwright.create(str(child), format="vhdx", backing_file="parent.vhdx", backing_fmt="vhdx")
    data = scattered(child, 2)
    parent, file = opened_by_libvhdi(tmp_path / "parent.vhdx"), opened_by_libvhdi(child)
    assert file.get_parent_identifier() == parent.get_identifier()
    file.set_parent(parent)
    assert file.read_buffer_at_offset(file.get_media_size(), 0) == data
    file.close()
    parent.close()


def read_by_dissect(path: Path) -> bytes:
    from dissect.hypervisor.disk.vhdx import VHDX

    return bytes(VHDX(path).read(SIZE))


def read_by_fs_explorer(path: Path) -> bytes:
    """By its parts: from outside it shows file systems, not disks."""
    from fs_explorer import Source
    from fs_explorer.containers.vhdx import VHDXDriver
    from fs_explorer.tree import ProbeHint

    with Source(str(path)) as source:
        raw = source._phys
        disk = VHDXDriver.open(raw, source.ctx, ProbeHint.make(raw, path.name))
        return bytes(disk.device().read_at(0, SIZE))


READERS = [
    pytest.param(read_by_dissect, id="dissect", marks=needs("dissect")),
    pytest.param(read_by_fs_explorer, id="fs-explorer", marks=needs("fs_explorer")),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_others_read_ours(kind: str, read: Callable[[Path], bytes], tmp_path: Path) -> None:
    data = made(tmp_path / "image.vhdx", kind)
    assert read(tmp_path / "image.vhdx") == data


@pytest.mark.parametrize("read", READERS)
def test_others_read_a_child(read: Callable[[Path], bytes], tmp_path: Path) -> None:
    """Blocks as large as the parent's: dissect 3.21 goes astray where a run crosses the parent's blocks."""
    made(tmp_path / "parent.vhdx", "small blocks")
    child = tmp_path / "child.avhdx"
    diskwright.create(str(child), format="vhdx", backing_file="parent.vhdx", backing_fmt="vhdx", block_size=MiB)
    data = scattered(child, 2)
    assert read(child) == data


@pytest.mark.parametrize("read", [read_by_fs_explorer])
@needs("fs_explorer")
def test_a_log_we_left_behind_is_replayed_by_others(read: Callable[[Path], bytes], tmp_path: Path) -> None:
    image = tmp_path / "image.vhdx"
    diskwright.create(str(image), format="vhdx", size=SIZE, block_size=MiB)
    with diskwright.open(str(image), writable=True) as disk:
        disk.pwrite(0, b"first")
        disk.flush()
        disk.pwrite(3 * MiB, b"second")
        disk.flush()
        data, left = bytes(disk.pread(0, SIZE)), bytearray(image.read_bytes())
    left[2 * MiB + 24 : 2 * MiB + 32] = bytes(8)  # as if the table had not been written any more
    image.write_bytes(left)
    assert read(image) == data
    qemu("qemu-img", "check", "-r", "all", str(image))
    with diskwright.open(str(image)) as disk:
        assert disk.pread(0, SIZE) == data
