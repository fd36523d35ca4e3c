"""dmg: images made and written here, read by everybody there is; checksums; crashes."""

from __future__ import annotations

import bz2
import lzma
import os
import plistlib
import random
import shutil
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

import diskwright
from diskwright.formats.dmg import layout
from diskwright.formats.dmg.checksums import joined, of_zeros
from diskwright.formats.dmg.packing import KINDS, MAX_UNIT, unit_of
from diskwright.formats.dmg.tables import MAX_WRITTEN
from tests.cli.run import diskwright as ours
from tests.crash.workload import Workload
from tests.formats.campaign import Campaign
from tests.formats.dmg.test_dmg import library
from tests.formats.qcow2.support import LONG

KIND_NAMES = tuple(KINDS)
SIZE = 7 * 1024 * 1024 + 3 * 512


def content(seed: int = 1, size: int = SIZE) -> bytes:
    """Some that packs well, some that does not, and some zeros; it ends within a chunk."""
    chance = random.Random(seed)
    words = [chance.randbytes(6) for _ in range(60)]
    text = b"".join(chance.choices(words, k=size // 12))
    return (text + bytes(3 << 20) + chance.randbytes(600_000) + text).ljust(size, b"\0")[:size]


def needs(kind: str) -> None:
    if kind == "ULFO" and not library("lzfse"):
        pytest.skip("needs lzfse")


@pytest.fixture(params=KIND_NAMES)
def kind(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


@pytest.fixture
def made(kind: str, tmp_path: Path) -> Path:
    """A copy of ``content()``."""
    needs(kind)
    (tmp_path / "raw").write_bytes(content())
    path = tmp_path / "image.dmg"
    diskwright.convert(tmp_path / "raw", path, format="dmg", options={"subformat": kind})
    return path


class Koly:
    """The parts of an image, found by another reading of the format than the driver's."""

    def __init__(self, data: bytes) -> None:
        self.data, self.end = data, data[-512:]
        assert self.end[:4] == b"koly"
        self.fork = data[: self.number(32)]
        listed = data[self.number(216) :][: self.number(224)]
        (self.block,) = plistlib.loads(listed)["resource-fork"]["blkx"]
        self.table = self.block["Data"]
        (count,) = struct.unpack_from(">I", self.table, 200)
        self.rows = [struct.unpack_from(">IIQQQQ", self.table, 204 + 40 * at) for at in range(count)]

    def number(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.end, at)[0])

    def disk(self) -> bytes:
        unpack = {1: bytes, 0x80000005: zlib.decompress, 0x80000006: bz2.decompress, 0x80000008: lzma.decompress}
        out = bytearray()
        for kind, _, sector, sectors, place, stored in self.rows[1:-1]:
            assert len(out) == sector * 512
            raw = self.data[place : place + stored]
            if kind == 0x80000007:
                import lzfse

                out += lzfse.decompress(raw)
            else:
                out += unpack[kind](raw) if kind else bytes(sectors * 512)
            assert len(out) == (sector + sectors) * 512
        return bytes(out)


def test_every_field_and_checksum(made: Path, kind: str) -> None:
    found = Koly(made.read_bytes())
    disk, master = zlib.crc32(content()), zlib.crc32(struct.pack(">I", zlib.crc32(content())))
    assert found.disk() == content()
    assert struct.unpack_from(">III", found.table, 64) == (2, 32, disk)
    assert struct.unpack_from(">III", found.end, 80) == (2, 32, zlib.crc32(found.fork))
    assert struct.unpack_from(">III", found.end, 352) == (2, 32, master)
    assert struct.unpack_from(">4sIII", found.end) == (b"koly", 4, 512, 1)
    assert found.number(492) == SIZE // 512 and found.number(24) == 0
    used = {row[0] for row in found.rows}
    assert used >= {0x7FFFFFFE, 0xFFFFFFFF, 0, 1 if kind == "UDRO" else KINDS[kind].method}
    # Nothing is left between the chunks, nor between them and the list.
    assert sum(row[5] for row in found.rows[1:-1]) == len(found.fork) <= found.number(216) < len(found.fork) + 512


def test_it_is_read_here(made: Path) -> None:
    with diskwright.open(str(made)) as disk:
        assert disk.pread(0, disk.size) == content()
    done = ours("check", made.name, cwd=made.parent)
    assert done.code == 0 and done.out == "No errors were found on the image.\n"
    assert "file format: dmg\n" in ours("info", made.name, cwd=made.parent).out


@pytest.mark.skipif(not library("fs_explorer"), reason="needs fs-explorer")
def test_it_is_read_by_fs_explorer(made: Path) -> None:
    code = (
        "import sys; from fs_explorer.containers.udif import UDIFImage, find_koly;"
        "from fs_explorer.io.cache import Cache; from fs_explorer.io.source import FileRA;"
        "from fs_explorer.io.stats import Stats; from fs_explorer.tree import Context; file = FileRA(sys.argv[1]);"
        "device = UDIFImage(file, Context(Cache(), Stats()), find_koly(file)).device();"
        "sys.stdout.buffer.write(device.read_at(0, device.size))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made)], capture_output=True, timeout=60, check=False)
    assert done.stdout == content(), done.stderr.decode()


SEVEN_ZIP = shutil.which("7zz")


@pytest.mark.skipif(SEVEN_ZIP is None, reason="needs 7zz")
def test_it_is_read_and_its_checksums_are_verified_by_7zip(made: Path) -> None:
    assert SEVEN_ZIP is not None
    done = subprocess.run([SEVEN_ZIP, "t", str(made)], capture_output=True, timeout=60, check=True)
    assert b"Everything is Ok" in done.stdout
    done = subprocess.run([SEVEN_ZIP, "e", "-so", str(made)], capture_output=True, timeout=60, check=True)
    assert done.stdout == content()


@pytest.mark.skipif(not library("pymodi"), reason="needs libmodi-python")
@pytest.mark.parametrize("kind", ["UDZO", "ULFO", "UDRO"], indirect=False)
def test_it_is_read_by_libmodi(kind: str, made: Path) -> None:
    import pymodi

    handle = pymodi.handle()
    handle.open(str(made))
    assert handle.get_media_size() == SIZE and handle.read_buffer(SIZE) == content()
    handle.close()


@pytest.mark.skipif(shutil.which("dmg2img") is None, reason="needs dmg2img")
@pytest.mark.parametrize("kind", ["UDZO", "UDBZ", "UDRO"], indirect=False)
def test_it_is_read_by_dmg2img(kind: str, made: Path, tmp_path: Path) -> None:
    subprocess.run(["dmg2img", "-s", str(made), "other"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "other").read_bytes() == content()


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
@pytest.mark.parametrize("kind", ["UDZO", "UDRO"], indirect=False)
def test_it_is_read_by_qemu(kind: str, made: Path, tmp_path: Path) -> None:
    words = ["qemu-img", "compare", "-f", "dmg", "-F", "raw", str(made), str(tmp_path / "raw")]
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def test_the_same_source_gives_the_same_image_but_for_its_id(kind: str, made: Path, tmp_path: Path) -> None:
    diskwright.convert(tmp_path / "raw", tmp_path / "again.dmg", format="dmg", options={"subformat": kind})
    one, other = made.read_bytes(), (tmp_path / "again.dmg").read_bytes()
    assert one[:-512] == other[:-512] and one[-512:-448] == other[-512:-448] and one[-432:] == other[-432:]


def test_levels(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(content(size=2 << 20))
    sizes = {}
    for level in (1, 9):
        diskwright.convert(tmp_path / "raw", tmp_path / "a.dmg", format="dmg", compress=level)
        sizes[level] = (tmp_path / "a.dmg").stat().st_size
        assert Koly((tmp_path / "a.dmg").read_bytes()).disk() == content(size=2 << 20)
    assert sizes[9] < sizes[1]


def test_without_its_library_no_lzfse_image_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzfse", None)
    monkeypatch.setitem(sys.modules, "liblzfse", None)
    (tmp_path / "a.dmg").write_bytes(b"precious")
    with pytest.raises(diskwright.DiskwrightError, match="pip install lzfse"):
        diskwright.create(tmp_path / "a.dmg", "dmg", SIZE, subformat="ULFO")
    assert (tmp_path / "a.dmg").read_bytes() == b"precious"


# -- writing by pieces --------------------------------------------------------------------------------


class TestWriting(Campaign):
    format_name = "dmg"
    qemu_options = None
    qemu_writes = False
    qemu_checks = False
    size: ClassVar[int] = 2 << 20
    crash_size: ClassVar[int] = 2 << 20
    structures = ((0, 700), (1024, 512))


class TestWritingPlain(TestWriting):
    create_options: ClassVar[dict[str, object]] = {"subformat": "UDRO"}


@pytest.mark.parametrize("kind", ["UDZO", "UDRO"], indirect=False)
@pytest.mark.parametrize("seed", range(10 if LONG else 2))
def test_a_crash_while_a_finished_image_is_written_again(made: Path, seed: int) -> None:
    """Its checksums, and those of its chunks, stay right until others take their place; packed chunks among them."""
    chance = random.Random(seed)
    with Workload(made.read_bytes(), opener=TestWriting().opener) as work:
        unit = work.image.format.cluster_size
        for _ in range(5):
            work.play(chance, 2, actions="wwz")
            at = chance.randrange(SIZE // unit) * unit
            packed = memoryview(chance.randbytes(16) * (unit // 16))
            work.changing(partial(work.image.node.write_compressed, [(at, packed)]))
            if chance.random() < 0.4:
                work.flush()
    work.verify(chance, most=0 if LONG else 8, each=1)


def test_a_new_image_reads_as_zeros(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.dmg"
    diskwright.create(path, "dmg", SIZE, subformat=kind)
    assert path.stat().st_size < 8192 and Koly(path.read_bytes()).disk() == bytes(SIZE)
    with diskwright.open(str(path)) as disk:
        assert disk.size == SIZE and disk.pread(0, SIZE) == bytes(SIZE)
    assert ours("check", "a.dmg", cwd=tmp_path).code == 0


def test_written_again_and_in_pieces(made: Path, kind: str) -> None:
    """Over packed chunks, with whole ones packed in between; closed and opened again."""
    model, chance = bytearray(content()), random.Random(4)
    for _ in range(3):
        with diskwright.open(str(made), writable=True) as disk:
            unit = disk.node.cluster_size
            for _ in range(8):
                offset = chance.randrange(SIZE)
                data = chance.randbytes(min(SIZE - offset, chance.choice([1, 512, 70000])))
                disk.pwrite(offset, data)
                model[offset : offset + len(data)] = data
                at = chance.randrange(SIZE // unit + 1) * unit
                packed = bytes([chance.randrange(256)]) * min(unit, SIZE - at)
                if packed:
                    disk.node.write_compressed([(at, memoryview(packed))])
                    model[at : at + len(packed)] = packed
            disk.zero(unit, unit)
            model[unit : 2 * unit] = bytes(unit)
            disk.flush()
            assert disk.pread(0, SIZE) == model
        assert Koly(made.read_bytes()).disk() == model
        assert ours("check", made.name, cwd=made.parent).code == 0


def test_images_of_others_are_not_written_to(tmp_path: Path) -> None:
    from tests.formats.dmg import images

    (tmp_path / "a.dmg").write_bytes(images.image([[images.chunk(images.ZLIB, bytes(4096))]]))
    with pytest.raises(diskwright.DiskwrightError, match="Image is read-only"):
        diskwright.open(str(tmp_path / "a.dmg"), writable=True)


@pytest.mark.parametrize("place", [0, 1], ids=["on another chunk", "on the list"])
def test_chunks_that_share_their_place_are_not_written_to(place: int, tmp_path: Path) -> None:
    size, unit = 1 << 20, KINDS["UDRO"].unit
    starts = [0, 0 if place == 0 else unit]
    rows = [(1, at * unit // 512, unit // 512, start, unit) for at, start in enumerate(starts)]
    rows.append((0, 2 * unit // 512, (size - 2 * unit) // 512, 0, 0))
    listed = layout.property_list(layout.table(size, unit, rows, b"UDRO", None)).ljust(unit, b" ")
    body = bytes(unit) + (bytes(unit) if place == 0 else b"") + listed
    at = len(body) - unit
    (tmp_path / "a.dmg").write_bytes(body + layout.trailer(size, at, at, unit, None))
    with diskwright.open(str(tmp_path / "a.dmg")) as disk:
        assert disk.size == size
    with pytest.raises(diskwright.DiskwrightError, match="Image is read-only"):
        diskwright.open(str(tmp_path / "a.dmg"), writable=True)


# -- checksums ----------------------------------------------------------------------------------------


def test_checksums_are_put_together() -> None:
    chance = random.Random(5)
    for _ in range(60):
        one, other = (chance.randbytes(chance.choice([0, 1, 511, 70000])) for _ in range(2))
        assert joined(zlib.crc32(one), zlib.crc32(other), len(other)) == zlib.crc32(one + other)
        assert of_zeros(len(one)) == zlib.crc32(bytes(len(one)))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("fork", "The data fork has the checksum"),
        ("table", "The table of chunks 0 has the checksum"),
        ("master", "The trailer has the checksum"),
    ],
)
def test_a_wrong_checksum_is_told(where: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.dmg"
    (tmp_path / "raw").write_bytes(content(size=1 << 20))
    diskwright.convert(tmp_path / "raw", path, format="dmg", options={"subformat": "UDRO"})
    data = bytearray(path.read_bytes())
    if where == "table":
        data[1000] ^= 1  # of a chunk that is as it is
    else:
        data[len(data) - 512 + {"fork": 88, "master": 360}[where]] ^= 1
    path.write_bytes(data)
    done = ours("check", "a.dmg", cwd=tmp_path)
    assert done.code == 2 and message in done.out + done.err


def test_a_chunk_that_does_not_decode_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.dmg"
    (tmp_path / "raw").write_bytes(b"ab" * (1 << 19))
    diskwright.convert(tmp_path / "raw", path, format="dmg")
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\xff" * 20)
    done = ours("check", "a.dmg", cwd=tmp_path)
    assert done.code == 2 and "does not decode" in done.out + done.err


# -- limits -------------------------------------------------------------------------------------------


def test_chunks_grow_with_the_disk_and_there_is_an_end() -> None:
    kind = KINDS["UDZO"]
    assert unit_of(kind, 1 << 30) == kind.unit and unit_of(kind, MAX_WRITTEN * kind.unit + 1) == 2 * kind.unit
    assert unit_of(kind, MAX_WRITTEN * MAX_UNIT) == MAX_UNIT
    with pytest.raises(diskwright.DiskwrightError, match="too large for dmg"):
        unit_of(kind, MAX_WRITTEN * MAX_UNIT + 512)


def test_the_room_for_lists_is_enough() -> None:
    for count in (0, 1, 100, 3000):
        rows = [(0x80000008, (1 << 53) + at, 1 << 30, (1 << 60) + at, 1 << 26) for at in range(count)]
        listed = layout.property_list(layout.table(count * 512, 512, rows, b"ULMO", layout.Checksums(1, 2)))
        assert len(listed) <= layout.longest_list(count)


def test_measured(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(1 << 20))
    os.truncate(tmp_path / "raw", 4 << 20)
    done = ours("measure", "-O", "dmg", "raw", cwd=tmp_path)
    required = int(done.out.split("\n")[0].split(": ")[1])
    diskwright.convert(tmp_path / "raw", tmp_path / "a.dmg", format="dmg")
    assert (1 << 20) < (tmp_path / "a.dmg").stat().st_size <= required < 3 << 20
