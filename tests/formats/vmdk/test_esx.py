"""vmdk: the sparse extents of ESX servers: COWD and seSparse."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

import diskwright
from diskwright.errors import CorruptImage, DiskwrightError, LimitExceeded, UnsupportedFeature
from tests.crash.recording import RecordedFile, Recording
from tests.formats.campaign import Campaign
from tests.formats.qcow2.support import qemu
from tests.formats.vmdk.readers import by_dissect
from tests.formats.vmdk.support import TEXT, cowd, descriptor, sesparse


class TestCowd(Campaign):
    """Grains of a sector each, as ESX makes them."""

    format_name = "vmdk"
    qemu_options = None
    grain: ClassVar[int] = 1
    size = crash_size = 3 << 20
    structures = ((0, 300),)

    def created_files(self, size: int | None = None) -> dict[str, bytes]:
        sectors = (size or self.size) // 512
        text = TEXT.format(kind="vmfsSparse", lines=f'RW {sectors} VMFSSPARSE "disk-delta.vmdk"')
        return {"file": text.encode(), "extents.0": cowd(sectors, self.grain, {})}

    def created(self, size: int | None = None, **options: object) -> bytes:
        return self.created_files(size)["file"]

    def recorded(self) -> Mapping[str, RecordedFile]:
        return Recording(**self.created_files(self.crash_size)).files

    def make(self, path: Path, *, by_qemu: bool, size: int | None = None) -> Path:
        files = self.created_files(size)
        path.write_bytes(files["file"])
        (path.parent / "disk-delta.vmdk").write_bytes(files["extents.0"])
        return path


class TestCowdLargeGrains(TestCowd):
    grain = 16


@pytest.mark.parametrize("grain", [1, 8, 16])
def test_an_esx_sparse_extent(grain: int, tmp_path: Path) -> None:
    chance = random.Random(grain)
    grains = {number: chance.randbytes(grain * 512) for number in (0, 1, 7, 4095, 4096, 9000)}
    sectors = 10240 * grain
    (tmp_path / "a-delta.vmdk").write_bytes(cowd(sectors, grain, grains))
    path = descriptor(tmp_path / "a.vmdk", f'RW {sectors} VMFSSPARSE "a-delta.vmdk"', kind="vmfsSparse")
    with diskwright.open(str(path), writable=True) as disk:
        assert disk.size == sectors * 512
        for number, data in grains.items():
            assert disk.pread(number * grain * 512, len(data)) == data
        disk.pwrite(20 * grain * 512 + 100, b"written here")
    raw = (tmp_path / "a-delta.vmdk").read_bytes()
    assert struct.unpack_from("<I", raw, 28)[0] * 512 >= len(raw)
    qemu("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "raw"))
    assert diskwright.compare(str(path), str(tmp_path / "raw"), right_format="raw") is None
    assert b"written here" in (tmp_path / "raw").read_bytes()
    if find_spec("dissect"):
        assert by_dissect(path) == (tmp_path / "raw").read_bytes()


@pytest.mark.parametrize(
    ("at", "form", "value", "error"),
    [
        (0, "4s", b"XXXX", CorruptImage),
        (4, "I", 2, UnsupportedFeature),
        (12, "I", 0xFFFFFFFF, CorruptImage),
        (12, "I", 1, CorruptImage),
        (16, "I", 0, CorruptImage),
        (16, "I", 3, CorruptImage),
        (20, "I", 0, CorruptImage),
        (20, "I", 0xFFFFFFFF, CorruptImage),
        (24, "I", 0, CorruptImage),
        (24, "I", 0xFFFFFFFF, LimitExceeded),
    ],
)
def test_a_damaged_header_of_an_esx_sparse_extent(
    at: int, form: str, value: object, error: type[Exception], tmp_path: Path
) -> None:
    raw = bytearray(cowd(20000, 1, {}))
    struct.pack_into(f"<{form}", raw, at, value)
    (tmp_path / "a-delta.vmdk").write_bytes(raw)
    with pytest.raises(error):
        diskwright.open(str(descriptor(tmp_path / "a.vmdk", 'RW 20000 VMFSSPARSE "a-delta.vmdk"', kind="vmfsSparse")))


SE: dict[int, bytes | str] = {
    0: b"a" * 4096, 1: "zero", 2: "unmapped", 5: b"b" * 4096, 4100: b"c" * 4096, 9999: b"d" * 4096
}  # fmt: skip


def _se(tmp_path: Path, raw: bytes, sectors: int = 80000) -> Path:
    (tmp_path / "a-sesparse.vmdk").write_bytes(raw)
    return descriptor(tmp_path / "a.vmdk", f'RW {sectors} SESPARSE "a-sesparse.vmdk"', kind="seSparse")


def test_an_sesparse_extent(tmp_path: Path) -> None:
    path = _se(tmp_path, sesparse(80000, SE))
    expected = bytearray(80000 * 512)
    for number, data in SE.items():
        expected[number * 4096 : number * 4096 + 4096] = data if isinstance(data, bytes) else bytes(4096)
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, disk.size) == expected
    qemu("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "raw"))
    assert (tmp_path / "raw").read_bytes() == expected
    if find_spec("dissect"):
        assert by_dissect(path)[: len(expected)] == expected
    with pytest.raises(UnsupportedFeature, match="No write support for seSparse"):
        diskwright.open(str(path), writable=True)


def test_many_grains_of_an_sesparse_extent(tmp_path: Path) -> None:
    """So many that the number of a grain does not fit into 12 bits."""
    chance = random.Random(3)
    raw = sesparse(80000, {number: chance.randbytes(4096) for number in range(5000)})
    path = _se(tmp_path, raw)
    with diskwright.open(str(path)) as disk:
        data = disk.pread(0, 5000 * 4096)
    assert raw.endswith(data)
    qemu("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "raw"))
    assert (tmp_path / "raw").read_bytes()[: len(data)] == data


def test_a_journal_is_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="journal"):
        diskwright.open(str(_se(tmp_path, sesparse(80000, SE, replay=1))))


@pytest.mark.parametrize("word", [0, 1, 2, 3, 4, 5, 10, 16, 17, 18, 24])
@pytest.mark.parametrize("value", [0, 1 << 62, (1 << 64) - 1])
def test_a_damaged_header_of_an_sesparse_extent(word: int, value: int, tmp_path: Path) -> None:
    raw = bytearray(sesparse(80000, SE))
    before = struct.unpack_from("<Q", raw, 8 * word)[0]
    struct.pack_into("<Q", raw, 8 * word, value)
    path = _se(tmp_path, bytes(raw))
    if value in (before, 0) and word in (5, 16, 18, 24):
        return  # a place that is merely wrong
    with pytest.raises(DiskwrightError):
        diskwright.open(str(path))


@pytest.mark.parametrize("entry", [4 << 60, (1 << 64) - 1, 3 << 60 | 0xFFFFFFFFFFFF, 3 << 60 | 1])
def test_a_damaged_entry_of_an_sesparse_extent(entry: int, tmp_path: Path) -> None:
    raw = bytearray(sesparse(80000, SE))
    struct.pack_into("<Q", raw, 512 * 512 + 8 * 3, entry)
    with diskwright.open(str(_se(tmp_path, bytes(raw)))) as disk:
        with pytest.raises(CorruptImage):
            disk.pread(3 * 4096, 10)
        with pytest.raises(CorruptImage):
            disk.node.extents(0, disk.size)
