"""vmdk: streamOptimized images, read and written in one pass."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.errors import CorruptImage, DiskwrightError, LimitExceeded, UnsupportedFeature
from tests.formats.campaign import Campaign
from tests.formats.qcow2.support import qemu
from tests.formats.vmdk.readers import READERS
from tests.formats.vmdk.support import strict

SIZE = 40 << 20
GRAIN = 65536
SMALL = 65536 + 3 * 66048 + 512 + 2048 + 1024 + 1536
"""Bytes of an image with three grains that do not get smaller."""


@cache
def _small() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder, "raw"), Path(folder, "a.vmdk")
        source.write_bytes(random.Random(9).randbytes(3 * GRAIN))
        _convert(source, path)
        return path.read_bytes()


@pytest.fixture(scope="module")
def content() -> bytes:
    chance = random.Random(8)
    disk = bytearray(SIZE)
    for _ in range(40):
        length = chance.choice([512, 5000, 65536, 400_000])
        at = chance.randrange(SIZE - length)
        text = (b"text %d " % at * length)[:length]
        disk[at : at + length] = chance.randbytes(length) if chance.random() < 0.4 else text
    return bytes(disk)


@pytest.fixture
def raw(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    return path


def _convert(source: Path, target: Path | str, *words: str) -> None:
    assert main(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", *words, str(source), str(target)]) == 0


@pytest.mark.parametrize(
    "words", [(), ("-c",), ("-c", "--compression-level", "9"), ("-m", "1"), ("-S", "0"), ("-c", "-W")]
)
def test_what_is_written_satisfies_strict_readers(
    words: tuple[str, ...], raw: Path, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.vmdk"
    _convert(raw, path, *words)
    grains = strict(path.read_bytes())
    assert ("-S" in words) == (len(grains) == SIZE // GRAIN)
    disk = bytearray(SIZE)
    for sector, data in grains.items():
        disk[sector * 512 : sector * 512 + GRAIN] = data
    assert bytes(disk) == content
    qemu("qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(raw), str(path))
    qemu("qemu-img", "check", "-f", "vmdk", str(path))
    with diskwright.open(str(path)) as image:
        assert image.pread(0, SIZE) == content
        for at in random.Random(1).sample(range(SIZE - 3000), 100):
            assert image.pread(at, 3000) == content[at : at + 3000]


def test_a_disk_that_is_not_whole_grains(tmp_path: Path) -> None:
    for size in (512, GRAIN - 512, GRAIN + 512, 32 * (1 << 20) + 1024):
        source, path = tmp_path / "raw", tmp_path / "a.vmdk"
        source.write_bytes(random.Random(size).randbytes(min(size, 5000)).rjust(size, b"\0"))
        _convert(source, path)
        strict(path.read_bytes())
        qemu("qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(source), str(path))
        with diskwright.open(str(path)) as disk:
            assert disk.pread(0, size + 1) == source.read_bytes()


def test_into_a_pipe_it_is_the_same(raw: Path, tmp_path: Path) -> None:
    fifo, path = tmp_path / "a.vmdk", tmp_path / "file" / "a.vmdk"
    path.parent.mkdir()
    os.mkfifo(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    _convert(raw, fifo)
    reader.join(30)
    _convert(raw, path)
    one, two = (re.sub(rb"CID=[0-9a-f]{8}", b"CID=", data, count=1) for data in (received[0], path.read_bytes()))
    assert one == two


def test_other_formats_do_not_go_into_a_pipe(raw: Path) -> None:
    words = ["convert", "-O", "qcow2", str(raw), "/dev/stdout"]
    code = f"import sys; from diskwright.cli.main import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode == 1 and not done.stdout and b"cannot be written into a pipe" in done.stderr


def test_images_of_qemu(raw: Path, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    qemu("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(path))
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, SIZE) == content
    with pytest.raises(UnsupportedFeature, match="written once"):
        diskwright.open(str(path), writable=True)


def test_an_empty_one_can_be_filled_once(raw: Path, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    assert main(["create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", str(path), str(SIZE)]) == 0
    assert strict(path.read_bytes()) == {}
    qemu("qemu-img", "check", "-f", "vmdk", str(path))
    with diskwright.open(str(path), writable=True) as disk:
        with pytest.raises(UnsupportedFeature, match="written once"):
            disk.pwrite(0, b"x" * GRAIN)
        disk.zero(0, SIZE)
        disk.trim(0, SIZE)
    assert main(["convert", "-n", "-O", "vmdk", str(raw), str(path)]) == 0
    strict(path.read_bytes())
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, SIZE) == content
    before = path.read_bytes()
    assert main(["convert", "-n", "-O", "vmdk", str(raw), str(path)]) == 1
    assert path.read_bytes() == before


def test_grains_are_written_in_order_and_flush_completes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    assert main(["create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", str(path), "200M"]) == 0
    data = {}
    with diskwright.open(str(path), writable=True) as disk:
        for at in (0, 3, 511, 512, 600, 1030, 1031, 3000):
            data[at] = random.Random(at).randbytes(GRAIN)
            disk.node.write_compressed([(at * GRAIN, memoryview(data[at]))])
            if at in (3, 600, 1030):
                disk.flush()
                assert strict(path.read_bytes()) == {number * 128: grain for number, grain in data.items()}
            assert all(disk.pread(number * GRAIN, GRAIN) == grain for number, grain in data.items())
        for at in (3000, 7):
            with pytest.raises(UnsupportedFeature):
                disk.node.write_compressed([(at * GRAIN, memoryview(data[0]))])
    assert strict(path.read_bytes()) == {number * 128: grain for number, grain in data.items()}


def test_a_failed_write_leaves_no_complete_image(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    assert main(["create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", str(path), str(SIZE)]) == 0
    with pytest.raises(DiskwrightError, match="cannot be completed"), diskwright.open(str(path), writable=True) as disk:
        file = disk.node.children()["file"]
        genuine = file._writev
        disk.node.write_compressed([(0, memoryview(random.Random(1).randbytes(GRAIN)))])

        def broken(segments: object) -> None:
            raise OSError(28, "made to fail")

        file._writev = broken  # type: ignore[method-assign]
        with pytest.raises(OSError, match="made to fail"):
            disk.node.write_compressed([(GRAIN, memoryview(random.Random(2).randbytes(GRAIN)))])
        file._writev = genuine  # type: ignore[method-assign]
        disk.flush()
    with pytest.raises(CorruptImage, match="footer"):
        diskwright.open(str(path))


# -- damage ----------------------------------------------------------------------------------------


def _damaged(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "text"),
    [
        (-1024, b"XXXX", "footer"),
        (-1536, bytes(16), "footer"),
        (-512, b"\1", "footer"),
        (-1024 + 56, struct.pack("<Q", 1 << 40), "gdOffset"),
        (128 * 512, struct.pack("<Q", 5), "its marker says sector 5"),
        (128 * 512 + 8, struct.pack("<I", 0), "0 bytes"),
        (128 * 512 + 8, struct.pack("<I", 1 << 31), "bytes"),
        (128 * 512 + 20, b"\xff" * 40, "does not decode"),
        (77, struct.pack("<H", 9), "the same as the header"),
    ],
)
def test_damage_is_told(at: int, data: bytes, text: str, tmp_path: Path) -> None:
    source, path = tmp_path / "raw", tmp_path / "a.vmdk"
    source.write_bytes(b"some text " * 100_000)
    _convert(source, path)
    _damaged(path, at, data)
    with pytest.raises(DiskwrightError, match=text), diskwright.open(str(path)) as disk:
        disk.pread(0, 1000)


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    source, path = tmp_path / "raw", tmp_path / "a.vmdk"
    source.write_bytes(random.Random(5).randbytes(GRAIN * 4))
    _convert(source, path)
    bomb = zlib.compress(bytes(60 << 20), 9)
    assert len(bomb) < GRAIN
    _damaged(path, 128 * 512, struct.pack("<QI", 0, len(bomb)) + bomb)
    with pytest.raises(CorruptImage, match="more than a grain"), diskwright.open(str(path)) as disk:
        disk.pread(0, 1000)


def test_huge_grains_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    assert main(["create", "-q", "-f", "vmdk", "-o", "subformat=streamOptimized", str(path), "1M"]) == 0
    for at in (20, path.stat().st_size - 1024 + 20):
        _damaged(path, at, struct.pack("<Q", 1 << 17))
    with pytest.raises(LimitExceeded):
        diskwright.open(str(path))


# -- other readers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "kind", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]
)
def test_others_read_what_is_written_here(read: Any, kind: str, raw: Path, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.vmdk"
    assert main(["convert", "-O", "vmdk", "-o", f"subformat={kind}", str(raw), str(path)]) == 0
    assert read(path) == content


class TestDamagedStream(Campaign):
    """Of the campaign only the damage: such images are written once."""

    format_name = "vmdk"
    structures = ((0, 80), (512, 300), (65536, 64), (SMALL - 1536, 1100), (SMALL - 1536 - 512 - 2048, 2560))
    test_both_read_what_the_other_wrote = None  # type: ignore[assignment]
    test_a_crash_costs_nothing_that_was_flushed = None  # type: ignore[assignment]

    def filled(self) -> bytes:
        return _small()


def test_the_structures_are_where_they_are_damaged() -> None:
    raw = _small()
    assert len(raw) == SMALL and raw[SMALL - 1024 :].startswith(b"KDMV")
