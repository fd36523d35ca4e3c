"""vmdk: check, repair from the redundant directory, growing, and measuring."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.core.create import create_image
from diskwright.errors import CorruptImage, UnsupportedFeature
from tests.formats.qcow2.support import qemu
from tests.formats.vmdk.support import descriptor

SIZE = 100 << 20
GRAIN = 65536


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path, chance = tmp_path / "a.vmdk", random.Random(6)
    qemu("qemu-img", "create", "-q", "-f", "vmdk", str(path), str(SIZE))
    with diskwright.open(str(path), writable=True) as disk:
        for at in (0, 5, 6, 600, 1300):
            disk.pwrite(at * GRAIN, chance.randbytes(2 * GRAIN))
    return path


class _Raw:
    """A sparse image's bytes, and where its tables are."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, bytearray(path.read_bytes())
        self.rgd, self.gd = (place * 512 for place in struct.unpack_from("<QQ", self.data, 48))

    def get(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.data, at)[0])

    def set(self, at: int, value: int) -> None:
        struct.pack_into("<I", self.data, at, value)

    def entry(self, grain: int, *, redundant: bool = False) -> int:
        """Where the grain's entry is."""
        return self.get((self.rgd if redundant else self.gd) + grain // 512 * 4) * 512 + grain % 512 * 4

    def save(self) -> None:
        self.path.write_bytes(self.data)


def _beyond(raw: _Raw) -> None:
    raw.set(raw.entry(5), 0x7FFFFF)


def _in_metadata(raw: _Raw) -> None:
    raw.set(raw.entry(6), 30)


def _twice(raw: _Raw) -> None:
    raw.set(raw.entry(600), raw.get(raw.entry(0)))


def _table_lost(raw: _Raw) -> None:
    raw.set(raw.gd + 4, 0x7FFFFF)


def _table_twice(raw: _Raw) -> None:
    raw.set(raw.gd + 8, raw.get(raw.gd))


def _redundant_table_lost(raw: _Raw) -> None:
    raw.set(raw.rgd, 1 << 30)


def _directory_lost(raw: _Raw) -> None:
    struct.pack_into("<Q", raw.data, 56, 1 << 40)


DAMAGES = [
    (_beyond, "cluster offset for sector 640 points after EOF"),
    (_in_metadata, "cluster offset for sector 768 points to metadata"),
    (_twice, "has the place of another one"),
    (_table_lost, "the grain table for sector 65536 is not where it should be"),
    (_table_twice, "the grain table for sector 131072 is not where it should be"),
    (_redundant_table_lost, "the redundant grain table for sector 0 is not where it should be"),
    (_directory_lost, "the grain directory is not in the file"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGES, ids=[each.__name__ for each, _ in DAMAGES])
def test_what_the_redundant_directory_knows_is_mended(
    damage: Callable[[_Raw], None], text: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = image.with_name("sound.vmdk")
    sound.write_bytes(image.read_bytes())
    raw = _Raw(image)
    damage(raw)
    raw.save()
    assert main(["check", str(image)]) == 2
    out, err = capsys.readouterr()
    assert "1 errors were found" in out and text in err
    assert image.read_bytes() == raw.data
    assert main(["check", "-r", "all", str(image)]) == 0
    out, err = capsys.readouterr()
    assert "1 corruptions" in out and f"Repairing {text}" in err.replace("sector 0 has", "has").replace(
        "sector 76800 has", "has"
    )
    assert main(["check", str(image)]) == 0
    assert diskwright.compare(str(sound), str(image)) is None
    qemu("qemu-img", "check", "-f", "vmdk", str(image))
    qemu("qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", str(sound), str(image))
    with diskwright.open(str(image), writable=True) as disk:
        disk.pwrite(900 * GRAIN, b"still works")
    again = _Raw(image)
    assert all(
        again.get(again.entry(grain)) == again.get(again.entry(grain, redundant=True)) for grain in range(SIZE // GRAIN)
    )


def test_the_words_are_qemu_imgs(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = _Raw(image)
    _beyond(raw)
    raw.save()
    assert main(["check", str(image)]) == 2
    theirs = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True, check=False).stderr
    assert theirs.splitlines()[0] == capsys.readouterr().err.splitlines()[0]


def test_what_both_directories_have_wrong(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = _Raw(image)
    raw.set(raw.entry(5, redundant=True), 0x7FFFFF)
    raw.set(raw.entry(5), 0x7FFFFF)
    raw.set(raw.gd + 4, 0x7FFFFF)
    raw.set(raw.rgd + 4, 0x7FFFFF)
    raw.save()
    assert main(["check", "-r", "all", str(image)]) == 2
    assert "Repairing cluster offset for sector 640" in capsys.readouterr().err
    with diskwright.open(str(image)) as disk:
        assert disk.pread(5 * GRAIN, GRAIN) == bytes(GRAIN)
        with pytest.raises(CorruptImage):
            disk.pread(600 * GRAIN, 512)


def test_a_damaged_stream_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = tmp_path / "raw", tmp_path / "a.vmdk"
    source.write_bytes(random.Random(2).randbytes(4 * GRAIN))
    assert main(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", str(source), str(path)]) == 0
    assert main(["check", str(path)]) == 0
    raw = bytearray(path.read_bytes())
    raw[128 * 512] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    assert main(["check", "-r", "all", str(path)]) == 2
    assert "compressed grain of sector 0 has a wrong marker" in capsys.readouterr().err


# -- growing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
@pytest.mark.parametrize("new", [SIZE + 512, SIZE + (1 << 20), 300 << 20])
def test_a_disk_grows(kind: str, new: int, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    odd = SIZE - 512
    qemu("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={kind}", str(path), str(odd))
    with diskwright.open(str(path), writable=True) as disk:
        disk.pwrite(odd - 1000, b"x" * 1000)
        disk.pwrite(3 << 20, b"y" * 1000)
    assert main(["resize", "-q", "-f", "vmdk", str(path), str(new)]) == 0
    expected = bytearray(4 << 20)
    expected[3 << 20 : (3 << 20) + 1000] = b"y" * 1000
    with diskwright.open(str(path), writable=True) as disk:
        assert disk.size == new and disk.pread(0, 4 << 20) == expected
        assert disk.pread(odd - 1000, 3000) == (b"x" * 1000).ljust(min(3000, new - odd + 1000), b"\0")
        disk.pwrite(new - 512, b"z" * 512)
        assert disk.pread(new - 512, 512) == b"z" * 512
    words = [
        "-c",
        f"read -P 120 {odd - 1000} 1000",
        "-c",
        f"read -P 122 {new - 512} 512",
        "-c",
        f"read -P 0 {odd} {new - odd - 512}",
    ]
    done = qemu("qemu-io", "-f", "vmdk", *words, str(path))
    assert "Pattern" not in str(done)
    qemu("qemu-img", "check", "-f", "vmdk", str(path))
    assert main(["check", str(path)]) == 0
    cylinders = new // (16 * 63 * 512)
    assert f'cylinders = "{cylinders}"'.encode() in path.read_bytes()


def test_growing_does_not_uncover_a_longer_parent(tmp_path: Path) -> None:
    base, path = tmp_path / "base.vmdk", tmp_path / "a.vmdk"
    qemu("qemu-img", "create", "-q", "-f", "vmdk", str(base), "40M")
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 1 0 40M", str(base))
    for options in ({}, {"zeroed_grain": True}, {"subformat": "twoGbMaxExtentSparse"}):
        create_image(
            str(path), "vmdk", {"size": (10 << 20) + 512, "backing_file": str(base), "backing_fmt": "vmdk", **options}
        )
        assert main(["resize", "-q", "-f", "vmdk", str(path), "45M"]) == 0
        with diskwright.open(str(path)) as disk:
            data = disk.pread(0, 45 << 20)
        assert data == (b"\1" * ((10 << 20) + 512)).ljust(45 << 20, b"\0")


def test_what_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create_image(str(path), "vmdk", {"size": 1 << 20, "subformat": "streamOptimized"})
    assert main(["resize", "-q", "-f", "vmdk", str(path), "2M"]) == 1
    create_image(str(path), "vmdk", {"size": 3 << 30, "subformat": "twoGbMaxExtentSparse"})
    before = path.read_bytes()
    assert main(["resize", "-q", "-f", "vmdk", str(path), "5G"]) == 1
    assert main(["resize", "-q", "--shrink", "-f", "vmdk", str(path), "1G"]) == 1
    assert path.read_bytes() == before
    (tmp_path / "flat").write_bytes(bytes(2048))
    path = descriptor(tmp_path / "b.vmdk", 'RW 2 FLAT "flat" 0')
    with diskwright.open(str(path), writable=True) as disk, pytest.raises(UnsupportedFeature, match="goes on behind"):
        disk.node.resize(4096)


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]
)
def test_measure_tells_how_long_the_files_become(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "raw"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(5 << 20)
        file.write(random.Random(1).randbytes(4 << 20))
    words = ["-O", "vmdk", "-o", f"subformat={kind}", str(source)]
    assert main(["measure", *words]) == 0
    told = capsys.readouterr().out.split()
    (tmp_path / "out").mkdir()
    assert main(["convert", *words, str(tmp_path / "out" / "a.vmdk")]) == 0
    length = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    required = int(told[told.index("size:") + 1])
    assert length <= required <= length + (140 << 10)
