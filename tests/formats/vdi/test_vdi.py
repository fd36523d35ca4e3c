"""vdi beyond the conformance suite."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.core.driver import CheckReport
from diskwright.errors import DiskwrightError
from diskwright.formats.vdi.header import DISCARDED, plan
from tests.cli.run import diskwright as ours
from tests.cli.run import qemu_img, same
from tests.crash.recording import RecordedFile
from tests.crash.workload import Workload
from tests.formats.campaign import Campaign

MiB = 1 << 20


class TestDynamic(Campaign):
    format_name = "vdi"
    structures = ((64, 12), (0x154, 0x188 - 0x154), (512, 32))

    def opener(self, files: Mapping[str, RecordedFile], writable: bool) -> Any:
        """The header counts blocks before the table names them, so after a crash it may count too many."""
        image = super().opener(files, writable)
        check = image.format.check

        def judged(repair: str) -> CheckReport:
            report = check(repair)
            found = re.fullmatch(
                r"ERROR: allocated blocks mismatch, is (\d+), should be (\d+)", "\n".join(report.messages)
            )
            if found is not None and int(found[1]) < int(found[2]):
                report.corruptions = 0
            return report

        image.format.check = judged
        return image


class TestStatic(TestDynamic):
    create_options = {"static": True}
    qemu_options = "static=on"
    crash_actions = "wwwwwzff"


def small_blocks(size: int, block: int = 4096) -> bytes:
    """An image with blocks of another size than the usual one, and so with another table."""
    header = plan(size, static=False)
    header.block_size, header.blocks_in_image = block, -(-size // block)
    header.offset_data = 512 + -(-4 * header.blocks_in_image // 512) * 512
    return header.encode().ljust(512, b"\0") + b"\xff" * (header.offset_data - 512)


class TestSmallBlocks(TestDynamic):
    """QEMU reads no such image."""

    crash_size = 2 * MiB

    def created(self, size: int | None = None, **options: object) -> bytes:
        return small_blocks(size or self.size)

    def test_both_read_what_the_other_wrote(self) -> None:  # type: ignore[override]
        return

    @pytest.mark.parametrize("seed", range(3))
    def test_growing_past_the_room_for_the_table(self, seed: int) -> None:
        chance = random.Random(seed)
        with Workload(small_blocks(256 << 10), opener=self.opener) as work:
            work.play(chance, 25)
            work.resize(9 * MiB)
            work.play(chance, 10)
            work.resize(work.disk.size + 4096)
            work.play(chance, 10)
        work.verify(chance, most=60, each=2)


def test_growing_past_the_room_is_read_by_qemu(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(TestDynamic().created(127 * MiB))
    data = random.Random(1).randbytes(3 * MiB)
    with diskwright.open(str(image), format="vdi", writable=True) as disk:
        disk.pwrite(MiB // 2, data)
    done = ours("resize", "-f", "vdi", "image", "300G", cwd=tmp_path)
    assert (done.code, done.out) == (0, "Image resized.\n")
    (tmp_path / "raw").write_bytes(bytes(MiB // 2) + data)
    with open(tmp_path / "raw", "ab") as file:
        file.truncate(300 << 30)
    assert qemu_img("compare", "-f", "vdi", "-F", "raw", "image", "raw", cwd=tmp_path).code == 0
    assert qemu_img("check", "-f", "vdi", "image", cwd=tmp_path).code == 0
    with diskwright.open(str(image), format="vdi") as disk:
        assert (disk.size, disk.pread(MiB // 2, len(data))) == (300 << 30, data)


def test_a_disk_is_not_made_smaller(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(TestDynamic().created())
    done = ours("resize", "--shrink", "-f", "vdi", "image", "1M", cwd=tmp_path)
    assert done.code == 1 and "cannot be made smaller" in done.err


# -- damage ----------------------------------------------------------------------------------------


def three_blocks() -> bytearray:
    """Blocks 0, 3 and 4 of 6, in this order in the file."""
    campaign = TestDynamic()
    image = campaign.opener(recording := campaign.recorded(), True)
    for block in (0, 3, 4):
        image.disk.pwrite(block * MiB, bytes([block + 1]) * 512)
    image.node.flush()
    image.close()
    return bytearray(recording["file"].data)


DAMAGE = {
    "a number too large": {512: 9},
    "two numbers alike": {512 + 4: 1},
    "the count too large": {388: 5},
    "the count too small": {388: 1},
    "all of it": {512: 77, 512 + 4: 2, 388: 0},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_check_finds_what_qemu_finds(case: str, tmp_path: Path) -> None:
    data = three_blocks()
    for at, value in DAMAGE[case].items():
        struct.pack_into("<I", data, at, value)
    (tmp_path / "image").write_bytes(data)
    same("check", "-f", "vdi", "image", cwd=tmp_path)
    same("check", "-f", "vdi", "--output=json", "image", cwd=tmp_path)
    assert ours("check", "-f", "vdi", "-r", "all", "image", cwd=tmp_path).code == 0
    same("check", "-f", "vdi", "image", cwd=tmp_path)
    with diskwright.open(str(tmp_path / "image"), format="vdi", writable=True) as disk:
        assert disk.pread(3 * MiB, 512) == b"\4" * 512
        if case == "two numbers alike":  # the second got a copy, and writes to it do not reach the first
            assert disk.pread(MiB, 512) == b"\4" * 512
            disk.pwrite(MiB, b"new")
            assert disk.pread(3 * MiB, 3) == b"\4\4\4"


def test_an_image_whose_blocks_overlap_is_only_read(tmp_path: Path) -> None:
    data = three_blocks()
    struct.pack_into("<I", data, 512 + 4, 1)
    (tmp_path / "image").write_bytes(data)
    with diskwright.open(str(tmp_path / "image"), format="vdi", writable=True) as disk:
        assert disk.pread(MiB, 512) == b"\4" * 512
        with pytest.raises(DiskwrightError, match="two blocks share the place"):
            disk.pwrite(0, b"x")


def test_a_discarded_block_reads_as_zeros(tmp_path: Path) -> None:
    data = three_blocks()
    struct.pack_into("<I", data, 512 + 8, DISCARDED)
    (tmp_path / "image").write_bytes(data)
    same("map", "-f", "vdi", "--output=json", "image", cwd=tmp_path)
    with diskwright.open(str(tmp_path / "image"), format="vdi") as disk:
        assert disk.pread(2 * MiB, MiB) == bytes(MiB)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (68, 0x00020000, "version 2.0"),
        (76, 4, "differencing image"),
        (76, 9, "unknown type 9"),
        (0x154, 513, "offset_bmap"),
        (0x158, 0, "offset_data"),
        (0x168, 4096, "sectors of 4096"),
        (0x174, 1, "disk_size"),
        (0x178, 3 << 20, "not a power of two"),
        (0x17C, 16, "16 bytes of other data"),
        (0x180, 0x30000000, "at most"),
        (0x184, 7, "blocks_allocated"),
    ],
)
def test_a_bad_header_is_refused_by_the_field(at: int, value: int, text: str, tmp_path: Path) -> None:
    data = three_blocks()
    struct.pack_into("<I", data, at, value)
    (tmp_path / "image").write_bytes(data)
    done = ours("info", "-f", "vdi", "image", cwd=tmp_path)
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("words", ["1000", "0", "5M", "-o static=on 3M", "1G"])
def test_create_and_info_like_qemu(words: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    *options, size = words.split()
    first = ours("create", "-f", "vdi", *options, "image", size, cwd=tmp_path / "a")
    second = qemu_img("create", "-f", "vdi", *options, "image", size, cwd=tmp_path / "b")
    assert (first.code, first.out, first.err) == (second.code, second.out, second.err)
    here, there = ((tmp_path / folder / "image").read_bytes() for folder in "ab")
    # All but the text at the beginning and the random identities.
    assert (here[64:0x188], here[0x1A8:]) == (there[64:0x188], there[0x1A8:])
    for folder in "ab":
        same("info", "image", cwd=tmp_path / folder)
        same("map", "--output=json", "image", cwd=tmp_path / folder)
