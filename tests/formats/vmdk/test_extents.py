"""vmdk: disks of several extents, in files of their own."""

from __future__ import annotations

import random
import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

import diskwright
from diskwright.core import options as opts
from diskwright.core.create import create_image
from diskwright.core.driver import Part
from diskwright.core.gate import DirectoryGate, OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import StorageNode
from diskwright.errors import CorruptImage, LimitExceeded, UnsafeReference, UnsupportedFeature
from diskwright.formats.vmdk.driver import Vmdk
from tests.crash.recording import RecordedFile, Recording
from tests.crash.workload import Workload
from tests.formats.campaign import Campaign
from tests.formats.qcow2.support import LONG, qemu
from tests.formats.vmdk.support import descriptor
from tests.formats.vmdk.test_vmdk import TestSparse as _TestSparse

KINDS = ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
STEP = 1 << 20


class _Files(Campaign):
    format_name = "vmdk"
    kind: ClassVar[str]
    crash_actions = "wwwwwwzzff"

    @pytest.fixture(autouse=True)
    def short_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("diskwright.formats.vmdk.create.SPLIT", STEP)

    def make(self, path: Path, *, by_qemu: bool, size: int | None = None) -> Path:
        if by_qemu:
            return super().make(path, by_qemu=True, size=size)
        create_image(str(path), "vmdk", {"size": size or self.size, **self.create_options})
        return path

    def created_files(self, size: int | None = None) -> dict[str, bytes]:
        typed = opts.parse(Vmdk.create_options, {"size": size or self.size, **self.create_options}, owner="test")
        parts: tuple[Part, ...] = Vmdk.create_parts(typed, "file")
        recording = Recording(file=b"", **{part.role: b"" for part in parts})
        nodes: Mapping[str, StorageNode] = {
            name: StorageNode(name, file, True) for name, file in recording.files.items()
        }
        Vmdk.create_from(nodes["file"], typed, {part.role: nodes[part.role] for part in parts})
        return recording.contents()

    def created(self, size: int | None = None, **options: object) -> bytes:
        return self.created_files(size)["file"]

    def recorded(self) -> Mapping[str, RecordedFile]:
        return Recording(**self.created_files(self.crash_size)).files

    structures = ((0, 300),)


class TestSplitSparse(_Files):
    create_options = {"subformat": "twoGbMaxExtentSparse"}
    qemu_options = "subformat=twoGbMaxExtentSparse"


class TestSplitFlat(_Files):
    create_options = {"subformat": "twoGbMaxExtentFlat"}
    qemu_options = "subformat=twoGbMaxExtentFlat"


class TestFlat(_Files):
    create_options = {"subformat": "monolithicFlat"}
    qemu_options = "subformat=monolithicFlat"


@pytest.mark.parametrize("kind", ("monolithicSparse", *KINDS))
@pytest.mark.parametrize(
    "more", ["", "adapter_type=lsilogic,compat6=on", "hwversion=11,toolsversion=1234,adapter_type=legacyESX"]
)
def test_a_new_image_is_what_qemu_img_makes(kind: str, more: str, tmp_path: Path) -> None:
    words = f"subformat={kind}" + (f",{more}" if more else "")
    for place in ("ours", "theirs"):
        (tmp_path / place).mkdir()
    qemu("qemu-img", "create", "-q", "-f", "vmdk", "-o", words, str(tmp_path / "theirs" / "a.vmdk"), "5G")
    options = {**opts.split_pairs(words), "size": 5 << 30}
    create_image(str(tmp_path / "ours" / "a.vmdk"), "vmdk", options)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        ours, theirs = (tmp_path / place / name for place in ("ours", "theirs"))
        if "-f" in name:
            assert ours.stat().st_size == theirs.stat().st_size
            continue
        one, two = (re.sub(rb"\nCID=[0-9a-f]+", b"\nCID=", path.read_bytes()) for path in (ours, theirs))
        assert one.rstrip(b"\0") == two.rstrip(b"\0")
        assert name == "a.vmdk" or ours.stat().st_size == theirs.stat().st_size


def test_extents_of_all_kinds_make_one_disk(tmp_path: Path) -> None:
    qemu(
        "qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", str(tmp_path / "s.vmdk"), "1M"
    )
    (tmp_path / "flat").write_bytes(bytes(512) + b"f" * 1024)
    path = descriptor(
        tmp_path / "disk.vmdk", 'RW 2 FLAT "flat" 1', "RW 3 ZERO", 'RW 2047 SPARSE "s-s001.vmdk"', 'RW 1 VMFS "flat"',
        kind="custom",
    )  # fmt: skip
    with diskwright.open(str(path), writable=True) as disk:
        assert disk.size == (2 + 3 + 2047 + 1) * 512
        assert disk.pread(0, 2560) == b"f" * 1024 + bytes(1536)
        disk.pwrite(1000, b"x" * 24)
        disk.pwrite(2560 + 2000, b"y" * 3000)
        disk.pwrite(disk.size - 512, b"z" * 512)
        with pytest.raises(OSError, match="zeros"):
            disk.pwrite(1024, b"1")
    with diskwright.open(str(path)) as disk:
        assert disk.pread(990, 40) == b"f" * 10 + b"x" * 24 + bytes(6)
        assert disk.pread(4500, 3100) == bytes(60) + b"y" * 3000 + bytes(40)
    assert (tmp_path / "flat").read_bytes() == b"z" * 512 + b"f" * 1000 + b"x" * 24


def test_the_file_names_go_through_the_gate(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(1024))
    (tmp_path / "in").mkdir()
    for name in ("../secret", str(tmp_path / "secret"), "file:../secret", "nbd:localhost:1"):
        path = descriptor(tmp_path / "in" / "a.vmdk", f'RW 2 FLAT "{name}" 0')
        with pytest.raises(UnsafeReference):
            Graph(DirectoryGate()).open(str(path))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeReference):
        Graph(DirectoryGate()).open(str(descriptor(tmp_path / "in" / "a.vmdk", 'RW 2 FLAT "link" 0')))
    graph = Graph(OpenGate())
    assert graph.open(str(descriptor(tmp_path / "in" / "a.vmdk", 'RW 2 FLAT "../secret" 0'))).size == 1024
    graph.close()


@pytest.mark.parametrize(
    ("lines", "error", "text"),
    [
        (['RW 2 FLAT "flat"'], CorruptImage, "Invalid extent line"),
        (['RW 2 FLAT "flat" -1'], CorruptImage, "Invalid extent line"),
        (["RW 2 FLAT flat 0"], CorruptImage, "Invalid extent line"),
        (["RW 2"], CorruptImage, "Invalid extent line"),
        (['RW 9 FLAT "flat" 0'], CorruptImage, "length of the file"),
        (['RW 2 FLAT "flat" 9223372036854775807'], CorruptImage, "larger than any disk"),
        (['RW 9223372036854775807 FLAT "flat" 0'], CorruptImage, "larger than any disk"),
        (['RW 2 VMFSRDM "flat"'], UnsupportedFeature, "raw device mapping"),
        (['RW 2 WHATEVER "flat"'], UnsupportedFeature, "WHATEVER"),
        (['NOACCESS 2 FLAT "flat" 0'], UnsupportedFeature, "NOACCESS"),
        (['RW 2 SPARSE "a.vmdk"'], CorruptImage, "something else"),
        (['RW 2 SPARSE "flat"'], CorruptImage, "magicNumber"),
        (["RW 1 ZERO"] * 5000, LimitExceeded, "extents"),
    ],
)
def test_what_cannot_be_is_refused(lines: list[str], error: type[Exception], text: str, tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(bytes(1024))
    path = descriptor(tmp_path / "a.vmdk", *lines)
    with pytest.raises(error, match=text):
        diskwright.open(str(path))


def test_an_extent_that_is_read_only_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"r" * 1024)
    path = descriptor(tmp_path / "a.vmdk", 'RDONLY 2 FLAT "flat" 0')
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, 1024) == b"r" * 1024
    with pytest.raises(UnsupportedFeature, match="RDONLY"):
        diskwright.open(str(path), writable=True)


def test_overlapping_extents_are_only_read(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(b"0" * 512 + b"1" * 512)
    path = descriptor(tmp_path / "a.vmdk", 'RW 2 FLAT "flat" 0', 'RW 1 FLAT "flat" 1')
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, 1536) == b"0" * 512 + b"1" * 1024
    with pytest.raises(CorruptImage, match="overlap"):
        diskwright.open(str(path), writable=True)


def test_a_single_extent_says_what_it_is(tmp_path: Path) -> None:
    create_image(str(tmp_path / "a.vmdk"), "vmdk", {"size": STEP, "subformat": "twoGbMaxExtentSparse"})
    with pytest.raises(UnsupportedFeature, match="one extent of a disk"):
        diskwright.open(str(tmp_path / "a-s001.vmdk"))


def test_the_first_write_and_no_other_changes_the_cid(tmp_path: Path) -> None:
    for kind in KINDS:
        path = tmp_path / f"{kind}.vmdk"
        qemu("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={kind}", str(path), "1M")
        before = path.read_bytes()
        with diskwright.open(str(path), writable=True) as disk:
            disk.pread(0, 1000)
        assert path.read_bytes() == before
        with diskwright.open(str(path), writable=True) as disk:
            disk.pwrite(0, b"x")
            after = path.read_bytes()
            disk.pwrite(70000, b"x")
        assert path.read_bytes() == after != before
        assert re.sub(rb"\nCID=\w+", b"", after) == re.sub(rb"\nCID=\w+", b"", before)
        done = subprocess.run(
            ["qemu-io", "-r", "-f", "vmdk", "-c", "read -P 120 0 1", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Pattern" not in done.stdout


def test_extents_cannot_have_tables_without_limit(tmp_path: Path) -> None:
    """Each of them alone would be accepted; the files are nearly all holes."""
    sectors = ((1 << 20) + 1) * 512 * 128
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 30)
            file.write(
                struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", 1, 1, sectors, 128, 0, 0, 512, 0, 128, 128, 0, b"\n \r\n", 0)
            )
    diskwright.open(str(descriptor(tmp_path / "one.vmdk", f'RW {sectors} SPARSE "a"'))).close()
    path = descriptor(tmp_path / "two.vmdk", f'RW {sectors} SPARSE "a"', f'RW {sectors} SPARSE "b"')
    with pytest.raises(LimitExceeded, match="together"):
        diskwright.open(str(path))


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (4, "I", 4), (4, "I", 0),
        (8, "I", 1 << 5), (12, "Q", 1 << 60), (20, "Q", 0), (20, "Q", 100), (20, "Q", 1 << 40),
        (28, "Q", 1 << 50), (36, "Q", 1 << 50), (44, "I", 0), (44, "I", 1024), (48, "Q", 1 << 50), (56, "Q", 0),
        (56, "Q", 1), (56, "Q", (1 << 64) - 1), (64, "Q", 1 << 50), (73, "I", 0),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be(at: int, form: str, value: int, tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    create_image(str(path), "vmdk", {"size": 10 << 20})
    raw = bytearray(path.read_bytes())
    struct.pack_into(f"<{form}", raw, at, value)
    path.write_bytes(raw)
    with pytest.raises((CorruptImage, LimitExceeded, UnsupportedFeature)):
        diskwright.open(str(path))


@pytest.mark.parametrize("campaign", [_TestSparse, TestSplitSparse, TestFlat, TestSplitFlat])
def test_a_crash_while_growing(campaign: type[Campaign], monkeypatch: pytest.MonkeyPatch) -> None:
    """Past what the tables are for: they cover 32 MiB each."""
    monkeypatch.setattr("diskwright.formats.vmdk.create.SPLIT", 31 << 20)
    monkeypatch.setattr("diskwright.formats.vmdk.resize.SPLIT", 64 << 20)
    chance, kind = random.Random(campaign.__name__), campaign()
    files = kind.created_files((31 << 20) + 512 * 5 if campaign in (_TestSparse, TestFlat) else 31 << 20)
    with Workload(files.pop("file"), opener=kind.opener, **files) as work:
        work.write(0, chance.randbytes(70_656))
        work.write(work.disk.size - 3072, chance.randbytes(3072))
        work.resize(work.disk.size + 1024)
        work.write(work.disk.size - 1024, chance.randbytes(1024))
        work.resize(33 << 20)
        work.write((32 << 20) + 102_400, chance.randbytes(70_656))
    work.verify(chance, most=0 if LONG else 7, each=1)


@pytest.mark.parametrize(
    "line",
    [
        "parentFileNameHint=x" + " " * 1_000_000 + "y",
        "CID=" + "\t" * 1_000_000 + "y",
        "RW 1 FLAT " + " " * 1_000_000,
        "RW 1 " + "F" * 1_000_000,
        'RW 1 FLAT "' + "x" * 1_000_000,
        "ddb.geometry.cylinders" + " " * 1_000_000,
    ],
    ids=lambda line: line[:12],
)
def test_long_lines_take_no_time(line: str, tmp_path: Path) -> None:
    path = descriptor(tmp_path / "a.vmdk", line)
    with pytest.raises((CorruptImage, UnsupportedFeature)), diskwright.open(str(path)) as disk:
        raise UnsupportedFeature(f"{disk.size}")  # it is harmless
