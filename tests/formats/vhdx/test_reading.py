"""Reading VHDX images that QEMU made."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import diskwright
from tests.cli.run import qemu_img, same
from tests.formats.qcow2.support import qemu

MiB = 1 << 20


def made_by_qemu(path: Path, size: int, options: str = "block_size=1M", *writes: tuple[int, int, int]) -> Path:
    qemu("qemu-img", "create", "-q", "-f", "vhdx", "-o", options, str(path), str(size))
    words = [word for byte, at, length in writes for word in ("-c", f"write -P {byte} {at} {length}")]
    if words:
        qemu("qemu-io", "-f", "vhdx", *words, str(path))
    return path


@pytest.mark.parametrize(
    "options",
    ["block_size=1M", "block_size=8M", "subformat=fixed", "block_size=256M", "block_state_zero=off,log_size=3M"],
)
def test_what_qemu_wrote(options: str, tmp_path: Path) -> None:
    path = made_by_qemu(
        tmp_path / "image", 40 * MiB, options, (1, 0, 5 * MiB), (2, 7 * MiB + 512, MiB), (3, 39 * MiB, MiB)
    )
    qemu("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "raw"))
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, disk.size) == (tmp_path / "raw").read_bytes()
    same("info", "image", cwd=tmp_path)
    same("info", "--output=json", "image", cwd=tmp_path)


def test_a_table_with_entries_of_the_sector_bitmap_between(tmp_path: Path) -> None:
    """4 GiB of blocks, then such an entry."""
    writes = [(block % 250 + 1, block * MiB, 512) for block in (0, 4095, 4096, 4097, 8191, 8192, 9000)]
    path = made_by_qemu(tmp_path / "image", 9001 * MiB, "block_size=1M", *writes)
    with diskwright.open(str(path)) as disk:
        for byte, at, length in writes:
            assert disk.pread(at, length) == bytes([byte]) * length
            assert disk.pread(at + length, 512) == bytes(512)
    same("compare", "image", "image", cwd=tmp_path)


@pytest.mark.parametrize(("state", "readable"), [(1, True), (3, True), (4, False), (5, False), (7, False)])
def test_states_of_blocks(state: int, readable: bool, tmp_path: Path) -> None:
    path = made_by_qemu(tmp_path / "image", 4 * MiB, "block_size=1M", (1, 0, MiB))
    with path.open("r+b") as file:
        file.seek(2 * MiB + 8)
        file.write(struct.pack("<Q", state | 8 << 20))
    with diskwright.open(str(path)) as disk:
        if readable:
            assert disk.pread(MiB, MiB) == bytes(MiB)
        else:
            with pytest.raises(diskwright.DiskwrightError, match="no block can lie there"):
                disk.pread(MiB, 512)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = made_by_qemu(tmp_path / "image", 4 * MiB, "block_size=1M", (1, 0, 2 * MiB))
    with path.open("r+b") as file:
        file.truncate(9 * MiB)
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, MiB) == b"\1" * MiB
        with pytest.raises(diskwright.DiskwrightError, match="truncated"):
            disk.pread(MiB, 1)
    assert qemu_img("info", "image", cwd=tmp_path).err
