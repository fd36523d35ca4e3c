"""android-sparse: images made here, and by img2simg."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.formats.android_sparse import CRC32, DONT_CARE, FILL, MAGIC, RAW
from tests.cli.run import diskwright as ours
from tests.formats.reading import Reading

BLOCK = 4096
Row = tuple[int, int, bytes]
"""``(type, blocks, what follows the header)``"""


def rows(block: int = BLOCK) -> list[Row]:
    chance = random.Random("sparse")
    found: list[Row] = []
    for count in (3, 1, 20):
        found += [
            (RAW, count, chance.randbytes(count * block)),
            (FILL, count + 1, chance.randbytes(4)),
            (CRC32, 0, b"\1\2\3\4"),
            (DONT_CARE, 2 * count, b""),
            (FILL, 5, bytes(4)),
        ]
    return [*found, (FILL, 600, b"abcd"), (RAW, 1, chance.randbytes(block))]


def disk_of(found: list[Row], block: int = BLOCK) -> bytes:
    pieces = {RAW: bytes, FILL: lambda data: data * (block // 4), DONT_CARE: lambda data: bytes(block)}
    return b"".join(pieces[kind](data) * (1 if kind == RAW else count) for kind, count, data in found if count)


def image_of(found: list[Row], block: int = BLOCK, *, header: int = 28, step: int = 12) -> bytes:
    blocks = sum(count for _, count, _ in found)
    head = struct.pack("<4sHHHHIIII", MAGIC, 1, 0, header, step, block, blocks, len(found), 0).ljust(header, b"\0")
    parts = [
        struct.pack("<HHII", kind, 0, count, step + len(data)).ljust(step, b"\0") + data for kind, count, data in found
    ]
    return head + b"".join(parts)


class TestAndroidSparse(Reading):
    format_name = "android-sparse"
    qemu_reads = False
    structures = ((4, 24), (28, 12), (28 + 12 + 3 * BLOCK, 40))

    def disk(self) -> bytes:
        return disk_of(rows())

    def image(self) -> bytes:
        return image_of(rows())


class TestLongerHeaders(TestAndroidSparse):
    """Those of a later minor version, with more in them."""

    def image(self) -> bytes:
        return image_of(rows(), header=40, step=16)


class TestLargeBlocks(TestAndroidSparse):
    def disk(self) -> bytes:
        return disk_of(rows(3 << 19)[4:7], 3 << 19)

    def image(self) -> bytes:
        return image_of(rows(3 << 19)[4:7], 3 << 19)


@pytest.mark.skipif(shutil.which("img2simg") is None, reason="needs img2simg")
def test_an_image_of_its_own_tool(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(disk_of(rows()))
    subprocess.run(["img2simg", "raw", "image"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    with diskwright.open(str(tmp_path / "image")) as disk:
        assert disk.node.format.name == "android-sparse"  # type: ignore[attr-defined]
        assert disk.pread(0, disk.size) == disk_of(rows())


@pytest.mark.skipif(shutil.which("simg2img") is None, reason="needs simg2img")
def test_its_own_tool_reads_what_these_tests_make(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image_of([row for row in rows() if row[0] != CRC32]))
    subprocess.run(["simg2img", "image", "raw"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "raw").read_bytes() == disk_of(rows())


@pytest.mark.parametrize(
    ("at", "layout", "value", "text"),
    [
        (0, "<I", 7, "magic"),
        (4, "<H", 2, "version 2.0"),
        (8, "<H", 27, "file_hdr_sz"),
        (10, "<H", 11, "chunk_hdr_sz"),
        (12, "<I", 0, "blk_sz"),
        (12, "<I", 4098, "blk_sz"),
        (12, "<I", 1 << 28, "at most 67108864|to 67108864"),
        (12, "<I", 100, "multiples of 512"),
        (16, "<I", 3, "the disk has 3 blocks"),
        (20, "<I", 1 << 31, "total_chunks"),
        (28, "<H", 0xCAC9, "chunk_type of chunk 0"),
        (32, "<I", 4, "total_sz of chunk 0"),
        (32, "<I", 1 << 31, "chunk_sz of chunk 0"),
        (36, "<I", 0, "total_sz of chunk 0"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(at: int, layout: str, value: int, text: str, tmp_path: Path) -> None:
    data = bytearray(image_of(rows()))
    struct.pack_into(layout, data, at, value)
    (tmp_path / "image").write_bytes(data)
    done = ours("info", "-f", "android-sparse", "image", cwd=tmp_path)
    assert done.code == 1 and any(part in done.err for part in text.split("|")) and done.err.count("\n") == 1


def test_blocks_that_no_chunk_describes_are_no_zeros(tmp_path: Path) -> None:
    data = bytearray(image_of(rows()))
    struct.pack_into("<I", data, 16, 5000)
    (tmp_path / "image").write_bytes(data)
    done = ours("convert", "-f", "android-sparse", "-O", "raw", "image", "copy", cwd=tmp_path)
    assert done.code == 1 and "nothing describes offset" in done.err


def test_a_few_bytes_that_stand_for_very_much_take_little(tmp_path: Path) -> None:
    """4 TiB in 40 bytes would be too many pieces; a hole of 8 TiB is one."""
    (tmp_path / "fill").write_bytes(image_of([(FILL, (1 << 30) + (1 << 20), b"abcd")]))
    done = ours("info", "-f", "android-sparse", "fill", cwd=tmp_path)
    assert done.code == 1 and "more than 4194304 chunks" in done.err
    (tmp_path / "hole").write_bytes(image_of([(DONT_CARE, 1 << 31, b"")]))
    assert "8 TiB" in ours("info", "-f", "android-sparse", "hole", cwd=tmp_path).out
