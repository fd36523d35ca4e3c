"""parallels beyond the conformance suite."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.core.driver import CheckReport
from diskwright.errors import DiskwrightError, ImageError
from diskwright.formats.parallels.header import OLD_MAGIC, Header, plan
from tests.cli.run import diskwright as ours
from tests.cli.run import qemu_img, same
from tests.crash.recording import RecordedFile
from tests.formats.campaign import Campaign

MiB = 1 << 20


class TestParallels(Campaign):
    format_name = "parallels"
    structures = ((0, 64), (64, 24))
    in_use = struct.pack("<I", 0x746F6E59)

    def opener(self, files: Mapping[str, RecordedFile], writable: bool) -> Any:
        """After a crash the image is marked as in use: that is what a repair takes away first."""
        file = files["file"]
        marked = file.data[44:48] == self.in_use
        if marked and writable:
            file.data[44:48] = bytes(4)
        image = super().opener(files, writable)
        check = image.format.check

        def judged(repair: str) -> CheckReport:
            report = check(repair)
            if "ERROR image was not closed correctly" in report.messages:
                report.corruptions -= 1
            return report

        image.format.check = judged
        return image


class TestSmallClusters(TestParallels):
    create_options = {"cluster-size": 1536}
    qemu_options = "cluster_size=1536"
    crash_size = 1 * MiB


def old_image(size: int, cluster: int) -> bytes:
    """The elder kind, whose table names sectors, and with clusters that are not a power of two."""
    header = plan(size, cluster)
    header = Header(**{**vars(header), "magic": OLD_MAGIC, "data_off": 0})
    length = 64 + 4 * header.bat_entries
    return header.encode().ljust(length + -length % 512, b"\0")


class TestOld(TestParallels):
    qemu_options = None
    crash_size = 2 * MiB

    def created(self, size: int | None = None, **options: object) -> bytes:
        return old_image(size or self.size, 63 * 512)


def filled() -> bytearray:
    campaign = TestParallels()
    image = campaign.opener(files := campaign.recorded(), True)
    for block in (0, 3, 4):
        image.disk.pwrite(block * MiB, bytes([block + 1]) * 512)
    image.node.flush()
    image.close()
    return bytearray(files["file"].data)


DAMAGE: dict[str, dict[int, int]] = {
    "nothing": {},
    "outside": {64: 240},
    "in use": {44: 0x746F6E59},
    "both": {64 + 12: 9, 44: 0x746F6E59},
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("tail", [0, 3 * MiB])
def test_check_finds_and_mends_what_qemu_does(case: str, tail: int, tmp_path: Path) -> None:
    data = filled()
    for at, value in DAMAGE[case].items():
        struct.pack_into("<I", data, at, value)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "image").write_bytes(data + bytes(tail))
    same("check", "-f", "parallels", "image", cwd=tmp_path / "a")
    same("check", "--output=json", "image", cwd=tmp_path / "a")
    words = ("check", "-f", "parallels", "-r", "all", "image")
    here, there = ours(*words, cwd=tmp_path / "a"), qemu_img(*words, cwd=tmp_path / "b")
    assert (here.code, here.out, here.err) == (there.code, there.out, there.err)
    # QEMU makes the file as long as the cluster beyond its end would need.
    left, right = ((tmp_path / folder / "image").read_bytes().rstrip(b"\0") for folder in "ab")
    assert left == right


def test_clusters_in_one_place_are_parted(tmp_path: Path) -> None:
    data = filled()
    struct.pack_into("<I", data, 64 + 4, 2)
    image = tmp_path / "image"
    image.write_bytes(data)
    with diskwright.open(str(image), format="parallels", writable=True) as disk:
        assert disk.pread(MiB, 512) == b"\4" * 512
        with pytest.raises(DiskwrightError, match="two blocks share the place"):
            disk.pwrite(0, b"x")
    done = ours("check", "image", cwd=tmp_path)
    assert (done.code, done.err) == (2, "ERROR cluster 3 has the place of another one\n")
    assert ours("check", "-r", "all", "image", cwd=tmp_path).code == 0
    with diskwright.open(str(image), format="parallels", writable=True) as disk:
        disk.pwrite(MiB, b"new")
        assert disk.pread(3 * MiB, 512) == b"\4" * 512
    assert qemu_img("check", "image", cwd=tmp_path).code == 0


def test_an_image_in_use_is_not_written_to(tmp_path: Path) -> None:
    data = filled()
    struct.pack_into("<I", data, 44, 0x746F6E59)
    image = tmp_path / "image"
    image.write_bytes(data)
    with pytest.raises(ImageError, match="Image was not closed correctly; cannot be opened read/write"):
        diskwright.open(str(image), format="parallels", writable=True)
    with diskwright.open(str(image), format="parallels") as disk:
        assert disk.pread(0, 512) == b"\1" * 512


def test_the_mark_is_there_only_while_something_changes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(filled())
    with diskwright.open(str(image), format="parallels", writable=True) as disk:
        assert image.read_bytes()[44:48] == bytes(4)
        disk.pwrite(0, b"x")
        assert image.read_bytes()[44:48] == b"Ynot"
    assert image.read_bytes()[44:48] == bytes(4)


def test_an_image_with_an_extension_is_only_read(tmp_path: Path) -> None:
    data = filled()
    struct.pack_into("<Q", data, 56, 4096)
    image = tmp_path / "image"
    image.write_bytes(data)
    with pytest.raises(DiskwrightError, match="has an extension"):
        diskwright.open(str(image), format="parallels", writable=True)
    with diskwright.open(str(image), format="parallels") as disk:
        assert disk.pread(0, 512) == b"\1" * 512


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 7, "Image not in Parallels format"),
        (16, 3, "Image not in Parallels format"),
        (28, 0, "tracks"),
        (28, 0x70000000, "tracks"),
        (32, 0x70000000, "at most"),
        (32, 0x00100000, "bat_entries"),
        (40, 1, "nb_sectors"),
    ],
)
def test_a_bad_header_is_refused_by_the_field(at: int, value: int, text: str, tmp_path: Path) -> None:
    data = filled()
    struct.pack_into("<I", data, at, value)
    (tmp_path / "image").write_bytes(data)
    done = ours("info", "-f", "parallels", "image", cwd=tmp_path)
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("words", ["1000", "5M", "-o cluster_size=64k 3M", "-o cluster_size=1536 1M", "100T"])
def test_create_and_info_like_qemu(words: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    *options, size = words.split()
    first = ours("create", "-f", "parallels", *options, "image", size, cwd=tmp_path / "a")
    second = qemu_img("create", "-f", "parallels", *options, "image", size, cwd=tmp_path / "b")
    assert (first.code, first.out, first.err) == (second.code, second.out, second.err)
    assert (tmp_path / "a" / "image").read_bytes() == (tmp_path / "b" / "image").read_bytes()
    same("info", "image", cwd=tmp_path / "b", err=False)
    if size != "100T":
        same("map", "--output=json", "image", cwd=tmp_path / "b")
