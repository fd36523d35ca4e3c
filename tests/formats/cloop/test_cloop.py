"""cloop: images made here, and by create_compressed_fs."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

import diskwright
from diskwright.formats.cloop import MAGIC
from tests.cli.run import diskwright as ours
from tests.formats.reading import Reading

BLOCK = 64 << 10
TABLE = 136


def contents(blocks: int = 20) -> bytes:
    chance = random.Random("cloop")
    kinds = (lambda: bytes(BLOCK), lambda: chance.randbytes(BLOCK), lambda: chance.randbytes(64) * (BLOCK // 64))
    return b"".join(kinds[number % 3]() for number in range(blocks))


def packed(data: bytes, block: int = BLOCK) -> bytes:
    streams = [zlib.compress(data[at : at + block]) for at in range(0, len(data), block)]
    offsets = [TABLE + 8 * (len(streams) + 1)]
    for stream in streams:
        offsets.append(offsets[-1] + len(stream))
    header = MAGIC.ljust(128, b"\0") + struct.pack(">II", block, len(streams))
    return header + struct.pack(f">{len(offsets)}Q", *offsets) + b"".join(streams)


class TestCloop(Reading):
    format_name = "cloop"
    structures = ((128, 8), (136, 168), (304, 64))

    def disk(self) -> bytes:
        return contents()

    def image(self) -> bytes:
        return packed(contents())


class TestLargeOddBlocks(TestCloop):
    def image(self) -> bytes:
        return packed(contents(), 5 * BLOCK)


@pytest.mark.skipif(shutil.which("create_compressed_fs") is None, reason="needs cloop-utils")
def test_an_image_of_its_own_tool(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(contents())
    words = ["create_compressed_fs", "-B", "65536", "raw", "image"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    with diskwright.open(str(tmp_path / "image")) as disk:
        assert disk.pread(0, disk.size) == contents()


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (128, 0, "block size"),
        (128, 1000, "multiple of 512"),
        (128, 1 << 27, "at most 67108864"),
        (132, 1 << 28, "at most 4194304"),
        (132, 1 << 20, "the table ends at"),
        (TABLE + 12, 1, "offset of block 1"),
        (TABLE + 8, 1 << 31, "offset of block 1"),
        (TABLE + 8 * 20, 7, "block 19"),
    ],
)
def test_a_bad_table_is_refused_by_the_field(at: int, value: int, text: str, tmp_path: Path) -> None:
    data = bytearray(packed(contents()))
    struct.pack_into(">I", data, at, value)
    (tmp_path / "image").write_bytes(data)
    done = ours("info", "-f", "cloop", "image", cwd=tmp_path)
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("blocks", [0.5, 2.0, 400.0], ids=["too little", "too much", "a bomb"])
def test_a_stream_of_another_length_is_an_error(blocks: float, tmp_path: Path) -> None:
    stream = zlib.compress(bytes(int(BLOCK * blocks)))
    start = TABLE + 16
    header = MAGIC.ljust(128, b"\0") + struct.pack(">IIQQ", BLOCK, 1, start, start + len(stream))
    (tmp_path / "image").write_bytes(header + stream)
    done = ours("convert", "-f", "cloop", "-O", "raw", "image", "copy", cwd=tmp_path)
    assert done.code == 1 and "stored chunk of guest offset 0x0" in done.err and "it decodes to" in done.err


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    data = bytearray(packed(bytes(BLOCK)))
    data[-1] ^= 1
    (tmp_path / "image").write_bytes(data)
    done = ours("convert", "-f", "cloop", "-O", "raw", "image", "copy", cwd=tmp_path)
    assert done.code == 1 and "does not decode" in done.err
