"""bochs: images made here, and by bximage."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import diskwright
from tests.cli.run import diskwright as ours
from tests.formats.reading import SECTOR, Reading

EXTENT = 64 << 10
EXTENTS = 24


def contents() -> dict[int, bytes]:
    """Sectors by number: runs within extents, over their ends, single ones; some extents have none."""
    chance, found = random.Random("bochs"), {}
    for first, count in ((0, 3), (100, 200), (500, 1), (502, 1), (700, 128), (24 * 128 - 1, 1), (1500, 9), (1400, 30)):
        for sector in range(first, first + count):
            found[sector] = chance.randbytes(SECTOR)
    return found


def redolog(version: int, sectors: dict[int, bytes], *, bitmap: int = 16) -> bytes:
    """A growing redolog; its extents lie in the file in another order than on the disk."""
    per = EXTENT // SECTOR
    used = sorted({sector // per for sector in sectors}, key=lambda extent: (extent * 7) % EXTENTS)
    header = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
    header += struct.pack("<IIIII", version, 512, EXTENTS, bitmap, EXTENT)
    header += struct.pack("<Q", EXTENTS * EXTENT) if version == 0x10000 else struct.pack("<IQ", 0, EXTENTS * EXTENT)
    catalog = [used.index(extent) if extent in used else 0xFFFFFFFF for extent in range(EXTENTS)]
    parts = [header.ljust(512, b"\0"), struct.pack(f"<{EXTENTS}I", *catalog)]
    for extent in used:
        bits, data = bytearray(-(-bitmap // SECTOR) * SECTOR), bytearray(b"\xee" * EXTENT)
        for sector in range(per):
            if extent * per + sector in sectors:
                bits[sector // 8] |= 1 << sector % 8
                data[sector * SECTOR : (sector + 1) * SECTOR] = sectors[extent * per + sector]
        parts += [bytes(bits), bytes(data)]
    return b"".join(parts)


class TestVersion2(Reading):
    format_name = "bochs"
    structures = ((64, 40), (512, 96), (608, 16))
    version = 0x20000

    def disk(self) -> bytes:
        data = bytearray(EXTENT * EXTENTS)
        for sector, piece in contents().items():
            data[sector * SECTOR : (sector + 1) * SECTOR] = piece
        return bytes(data)

    def image(self) -> bytes:
        return redolog(self.version, contents())


class TestVersion1(TestVersion2):
    version = 0x10000


def test_holes_are_told(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(redolog(0x20000, {3: b"x" * 512, 4: b"y" * 512}))
    done = ours("map", "--output=json", "image", cwd=tmp_path)
    assert '"start": 1536, "length": 1024, "depth": 0, "present": true, "zero": false, "data": true' in done.out
    assert done.out.count("start") == 3


@pytest.mark.skipif(shutil.which("bximage") is None, reason="needs bximage")
def test_an_image_of_bximage(tmp_path: Path) -> None:
    """It makes empty ones, which are filled from a flat one by its own conversion."""
    chance = random.Random(4)
    data = bytearray(10321920)  # 20 cylinders of 16 heads and 63 sectors
    for at in (0, 1 << 20, 5 << 20, 10321920 - 512):
        data[at : at + 512] = chance.randbytes(512)
    (tmp_path / "flat").write_bytes(data)
    words = ["bximage", "-q", "-func=convert", "-imgmode=growing", "flat", "grown"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    with diskwright.open(str(tmp_path / "grown"), format="bochs") as disk:
        assert disk.pread(0, disk.size) == bytes(data)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 0x41414141, "magic"),
        (32, 0x41414141, "not 'Redolog Growing'"),
        (64, 0x30000, "version 3.0"),
        (68, 4, "header size"),
        (72, 1 << 24, "at most 1048576"),
        (72, 1 << 19, "the catalog ends at"),
        (76, 1, "bitmap size"),
        (80, 1000, "power of two"),
        (80, 1 << 30, "at most 8388608"),
        (88, 1 << 31, "cannot hold it"),
    ],
)
def test_a_bad_header_is_refused_by_the_field(at: int, value: int, text: str, tmp_path: Path) -> None:
    data = bytearray(redolog(0x20000, contents()))
    struct.pack_into("<I", data, at, value)
    (tmp_path / "image").write_bytes(data)
    done = ours("info", "-f", "bochs", "image", cwd=tmp_path)
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1


def test_an_extent_beyond_the_end_is_an_error(tmp_path: Path) -> None:
    data = bytearray(redolog(0x20000, contents()))
    struct.pack_into("<I", data, 512, 5000)
    (tmp_path / "image").write_bytes(data)
    for words in (["map"], ["convert", "-O", "raw"]):
        done = ours(*words, "-f", "bochs", "image", *(["copy"] if words[0] == "convert" else []), cwd=tmp_path)
        assert done.code == 1 and "catalog entry 0" in done.err


def test_sectors_beyond_the_end_are_no_zeros(tmp_path: Path) -> None:
    data = redolog(0x20000, {3: b"x" * 512, 127: b"y" * 512})
    (tmp_path / "image").write_bytes(data[:-512])
    done = ours("convert", "-f", "bochs", "-O", "raw", "image", "copy", cwd=tmp_path)
    assert done.code == 1 and "sectors from guest offset 0xfe00 on" in done.err
    with diskwright.open(str(tmp_path / "image"), format="bochs") as disk:
        assert disk.pread(3 * 512, 512) == b"x" * 512
        with pytest.raises(diskwright.DiskwrightError, match="sectors from guest offset 0xfe00"):
            disk.pread(127 * 512, 512)
