"""dmg: images made here, and by fs-explorer."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest

import diskwright
from diskwright.formats.dmg.codecs import adc
from tests.cli.run import diskwright as ours
from tests.formats.dmg import images as dmg
from tests.formats.dmg.images import Chunk
from tests.formats.reading import Reading

SIMPLE = (dmg.ZERO, dmg.RAW, dmg.ZLIB, dmg.IGNORE, dmg.ZLIB)
EVERY = (dmg.ZERO, dmg.ADC, dmg.RAW, dmg.ZLIB, dmg.BZIP2, dmg.XZ, dmg.IGNORE)


@cache
def example(kinds: tuple[int, ...], fork: bool, lead: bytes) -> bytes:
    chunks = [dmg.chunk(kind, data) for kind, data in dmg.disk_of(kinds)]
    return dmg.image([chunks[:7], chunks[7:]], fork=fork, lead=lead)


class TestPlist(Reading):
    format_name = "dmg"
    qemu_says_more = True
    checked_here = True
    kinds: ClassVar[tuple[int, ...]] = SIMPLE
    fork: ClassVar[bool] = False
    lead: ClassVar[bytes] = b""

    @property
    def structures(self) -> tuple[tuple[int, int], ...]:  # type: ignore[override]
        """The trailer, and all of the list."""
        data = self.image()
        at = struct.unpack_from(">QQ", data, len(data) - 512 + (40 if self.fork else 216))
        end = len(data) - 512
        return ((end, 64), (end + 216, 16), (end + 488, 12), at)

    def disk(self) -> bytes:
        return b"".join(data for _, data in dmg.disk_of(self.kinds))

    def image(self) -> bytes:
        return example(self.kinds, self.fork, self.lead)


class TestResourceFork(TestPlist):
    fork = True


class TestDataForkElsewhere(TestPlist):
    lead = b"something else" * 99


class TestEveryKind(TestPlist):
    kinds = EVERY
    fork = True
    qemu_reads = False


def test_lzfse(tmp_path: Path) -> None:
    """Without a library the rest of the disk can be read, and the message says what to install."""
    data = random.Random(3).randbytes(512) * 40
    parts = [dmg.chunk(dmg.LZFSE, data), dmg.chunk(dmg.RAW, data)]
    (tmp_path / "image.dmg").write_bytes(dmg.image([parts]))
    with diskwright.open(str(tmp_path / "image.dmg")) as disk:
        assert disk.pread(len(data), len(data)) == data
        if library("lzfse"):
            assert disk.pread(0, len(data)) == data
        else:
            with pytest.raises(diskwright.DiskwrightError, match="pip install lzfse"):
                disk.pread(0, 1)


def library(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.skipif(not library("lzfse"), reason="needs lzfse")
def test_lzfse_of_its_library(tmp_path: Path) -> None:
    import lzfse

    chance = random.Random(4)
    data = b"".join(chance.choices([chance.randbytes(5) for _ in range(99)], k=400000))[: 3000 * 512]
    small = b"abcdefgh" * 64
    parts = [Chunk(dmg.LZFSE, len(piece) // 512, lzfse.compress(piece)) for piece in (data, small)]
    (tmp_path / "image.dmg").write_bytes(dmg.image([parts]))
    with diskwright.open(str(tmp_path / "image.dmg")) as disk:
        assert disk.pread(0, disk.size) == data + small


FORMATS = ("UDRO", "UDZO", "UDBZ", "ULFO", "ULMO")


@pytest.mark.skipif(not library("fs_explorer"), reason="needs fs-explorer")
@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_of_another_writer(kind: str, tmp_path: Path) -> None:
    if kind == "ULFO" and not library("lzfse"):
        pytest.skip("needs lzfse")
    marked = random.Random(kind).randbytes(700000)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "file").write_bytes(marked)
    words = ["-m", "fs_explorer", "create", "dmg", "--fs", "exfat", "--format", kind, "image.dmg", "files"]
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    with diskwright.open(str(tmp_path / "image.dmg")) as disk:
        data = disk.pread(0, disk.size)
    assert marked in data and data[510:512] == b"\x55\xaa"
    if kind in ("UDRO", "UDZO", "UDBZ") and shutil.which("dmg2img"):
        words = ["dmg2img", "-s", "image.dmg", "other"]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert (tmp_path / "other").read_bytes() == data


# -- ADC --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        ("83 61626364", b"abcd"),
        ("80 61 3c 00", b"a" + b"a" * 18),
        ("81 6162 45 0001", b"ab" + b"ababababa"),
        ("82 616263 00 02 80 64", b"abcabcd"),
    ],
)
def test_adc_by_hand(stream: str, data: bytes) -> None:
    assert adc(memoryview(bytes.fromhex(stream)), len(data)) == data


@pytest.mark.parametrize("stream", ["00 00", "80 61 00 01", "85 61", "80 61 40", "80 61 40 00"])
def test_adc_that_cannot_be(stream: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        adc(memoryview(bytes.fromhex(stream)), 100)


# -- damage -----------------------------------------------------------------------------------------


def refused(tmp_path: Path, data: bytes, text: str, *words: str) -> None:
    (tmp_path / "image").write_bytes(data)
    done = ours(*(words or ("info",)), "-f", "dmg", "image", *(("copy",) if words else ()), cwd=tmp_path)
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 0, "'koly'"),
        (60, 3, "segment"),
        (220, 0xFFFFFFF0, "property list"),
        (228, 1 << 27, "at most 83886080"),
        (228, 0, "neither"),
        (228, 100, "damaged"),
        (492, 1 << 30, "sectors; less than"),
    ],
)
def test_a_bad_trailer_is_refused_by_the_field(at: int, value: int, text: str, tmp_path: Path) -> None:
    data = bytearray(TestPlist().image())
    struct.pack_into(">I", data, len(data) - 512 + at, value)
    refused(tmp_path, bytes(data), text)


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (Chunk(dmg.ZLIB, 1 << 20, b"x" * 100), "at most 67108864"),
        (Chunk(dmg.RAW, 2, bytes(512)), "it should have 1024"),
        (Chunk(dmg.ZERO, 1 << 60), "no disk is that large"),
    ],
)
def test_a_bad_chunk_is_refused(chunk: Chunk, text: str, tmp_path: Path) -> None:
    refused(tmp_path, dmg.image([[chunk]], sectors=2), text)


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (Chunk(dmg.ZLIB, 4, zlib.compress(bytes(1024))), "it decodes to 1024 bytes"),
        (Chunk(dmg.ZLIB, 4, zlib.compress(bytes(100 << 20))), "it decodes to more"),
        (Chunk(dmg.ZLIB, 4, zlib.compress(bytes(2048))[:-2]), "does not decode"),
        (dmg.chunk(dmg.BZIP2, bytes(2048))._replace(sectors=2), "it decodes to more"),
        (dmg.chunk(dmg.XZ, bytes(2048))._replace(sectors=2), "it decodes to more"),
        (dmg.chunk(dmg.ADC, bytes(2048))._replace(sectors=2), "it decodes to more"),
        (Chunk(dmg.BZIP2, 4, b"BZh9 nothing"), "does not decode"),
        (Chunk(dmg.XZ, 4, b"nothing"), "does not decode"),
        (Chunk(0x80000011, 4, b"nothing"), "unknown type 0x80000011"),
    ],
)
def test_a_bad_stream_is_an_error(chunk: Chunk, text: str, tmp_path: Path) -> None:
    refused(tmp_path, dmg.image([[chunk]], sectors=2), text, "convert", "-O", "raw")


def test_chunks_that_overlap_are_refused(tmp_path: Path) -> None:
    data = dmg.image([[Chunk(dmg.ZERO, 4), Chunk(dmg.ZERO, 4)]], fork=True)
    at = data.index(b"mish") + 204 + 2 * 40  # behind the comment
    data = data[: at + 8] + struct.pack(">Q", 3) + data[at + 16 :]
    refused(tmp_path, data, "another has its place too")


def test_what_nothing_describes_is_no_zeros(tmp_path: Path) -> None:
    data = dmg.image([[Chunk(dmg.ZERO, 4)]], sectors=5)
    refused(tmp_path, data, "nothing describes offset 0x800", "convert", "-O", "raw")


def test_more_elements_than_there_may_be(tmp_path: Path) -> None:
    listed = b'<?xml version="1.0"?><plist><array>' + b"<true/>" * 1_000_001 + b"</array></plist>"
    trailer = bytearray(b"koly".ljust(512, b"\0"))
    struct.pack_into(">QQ", trailer, 216, 0, len(listed))
    refused(tmp_path, listed + trailer, "more than 500000 elements")


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    listed = b'<?xml version="1.0"?><!DOCTYPE p [<!ENTITY a "aaaa">]><plist><string>&a;</string></plist>'
    trailer = bytearray(b"koly".ljust(512, b"\0"))
    struct.pack_into(">QQ", trailer, 216, 0, len(listed))
    refused(tmp_path, listed + trailer, "property list is damaged")


def test_an_encrypted_image_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, b"encrcdsa" + bytes(5000), "is encrypted")
