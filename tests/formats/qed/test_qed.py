"""qed beyond the conformance suite."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import DiskwrightError
from tests.cli.run import diskwright as ours
from tests.cli.run import make, qemu_img, same
from tests.crash.workload import Workload
from tests.formats.campaign import Campaign

MiB = 1 << 20


class TestQed(Campaign):
    format_name = "qed"
    structures = ((0, 64), (65536, 24))


class TestSmallest(TestQed):
    create_options = {"cluster-size": 4096, "table-size": 2}
    qemu_options = "cluster_size=4096,table_size=2"
    structures = ((0, 64), (4096, 24), (12288, 4096))
    crash_size = 4 * MiB

    @pytest.mark.parametrize("seed", range(2))
    def test_growing(self, seed: int) -> None:
        chance = random.Random(seed)
        with Workload(self.created(300 << 10), opener=self.opener) as work:
            work.play(chance, 20, actions="wwwwzzdfg")
        work.verify(chance, most=40, each=2)


def filled() -> tuple[bytearray, int]:
    """Clusters 0, 3 and 4 with something in them, and where the first L2 table lies."""
    campaign = TestQed()
    image = campaign.opener(files := campaign.recorded(), True)
    for cluster in (0, 3, 4):
        image.disk.pwrite(cluster << 16, bytes([cluster + 1]) * 512)
    image.node.flush()
    image.close()
    data = bytearray(files["file"].data)
    return data, struct.unpack_from("<Q", data, 65536)[0]


def test_a_sound_image_with_leaks_like_qemu(tmp_path: Path) -> None:
    data, _ = filled()
    (tmp_path / "image").write_bytes(data)
    same("check", "image", cwd=tmp_path)
    (tmp_path / "image").write_bytes(data + bytes(200000))
    same("check", "image", cwd=tmp_path)
    same("check", "--output=json", "image", cwd=tmp_path)
    assert ours("check", "-r", "leaks", "image", cwd=tmp_path).code == 0
    assert (tmp_path / "image").read_bytes() == data


DAMAGE = {
    "an L2 entry not aligned": (0, 0x12345),
    "an L2 entry beyond the end": (0, 1 << 40),
    "an L2 entry in the header": (8, 0x8000),
    "an L2 entry of all ones": (0, (1 << 64) - 1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_clusters_that_cannot_be(case: str, tmp_path: Path) -> None:
    data, table = filled()
    at, value = DAMAGE[case]
    struct.pack_into("<Q", data, table + at, value)
    (tmp_path / "image").write_bytes(data)
    assert ours("check", "image", cwd=tmp_path).code == qemu_img("check", "image", cwd=tmp_path).code == 2
    # The cluster that nobody names any more is only given back where it is the last.
    assert ours("check", "-r", "all", "image", cwd=tmp_path).code == (0 if at else 3)
    same("check", "image", cwd=tmp_path)
    with diskwright.open(str(tmp_path / "image"), format="qed", writable=True) as disk:
        assert disk.pread(3 << 16, 512) == b"\4" * 512
        disk.pwrite(0, b"x")


def test_clusters_in_one_place_are_parted(tmp_path: Path) -> None:
    data, table = filled()
    data[table + 8 : table + 16] = data[table + 24 : table + 32]
    (tmp_path / "image").write_bytes(data)
    with diskwright.open(str(tmp_path / "image"), format="qed", writable=True) as disk:
        assert disk.pread(1 << 16, 512) == b"\4" * 512
        with pytest.raises(DiskwrightError, match="share the place"):
            disk.pwrite(0, b"x")
    assert ours("check", "image", cwd=tmp_path).code == qemu_img("check", "image", cwd=tmp_path).code == 2
    assert ours("check", "-r", "all", "image", cwd=tmp_path).code == 0
    same("check", "image", cwd=tmp_path)
    with diskwright.open(str(tmp_path / "image"), format="qed", writable=True) as disk:
        disk.pwrite(1 << 16, b"new")
        assert disk.pread(3 << 16, 512) == b"\4" * 512


def test_a_table_that_cannot_be(tmp_path: Path) -> None:
    data, _ = filled()
    struct.pack_into("<Q", data, 65536, 1 << 30)
    (tmp_path / "image").write_bytes(data)
    done = ours("convert", "-O", "raw", "image", "out", cwd=tmp_path)
    assert done.code == 1 and "the file ends at" in done.err
    assert ours("check", "image", cwd=tmp_path).code == qemu_img("check", "image", cwd=tmp_path).code == 2
    assert ours("check", "-r", "all", "image", cwd=tmp_path).code == 0
    assert qemu_img("check", "image", cwd=tmp_path).code == 0


def test_an_image_that_needs_a_check_gets_it(tmp_path: Path) -> None:
    data, table = filled()
    data[16] |= 2
    struct.pack_into("<Q", data, table + 8, 1 << 40)
    image = tmp_path / "image"
    image.write_bytes(data)
    assert '"dirty-flag": true' in ours("info", "--output=json", "image", cwd=tmp_path).out
    with diskwright.open(str(image), format="qed", writable=True) as disk:
        assert disk.pread(1 << 16, 512) == bytes(512)
        assert not image.read_bytes()[16] & 2
        disk.pwrite(0, b"x")
        assert image.read_bytes()[16] & 2
    assert not image.read_bytes()[16] & 2


def test_backing_files(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f qed base 1M", "qemu-io -f qed -c write~-P~7~0~1M base")
    for words in (("-F", "qed"), ("-F", "raw")):
        for name, run in (("a", ours), ("b", qemu_img)):
            assert run("create", "-q", "-f", "qed", "-b", "base", *words, name, cwd=tmp_path).code == 0
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        same("info", "a", cwd=tmp_path)
        same("info", "--output=json", "--backing-chain", "a", cwd=tmp_path)
    make(tmp_path, "qemu-img create -q -f qed -b base -F qed top", "qemu-io -f qed -c write~-z~64k~64k top")
    same("map", "--output=json", "top", cwd=tmp_path)
    with diskwright.open(str(tmp_path / "top"), format="qed", writable=True) as disk:
        assert disk.pread(1 << 16, 3) == b"\0\0\0" and disk.pread(0, 3) == b"\7\7\7"
        disk.pwrite(200000, b"new")
        disk.zero(0, 65536)
    expected = bytearray(b"\7" * MiB)
    expected[: 2 << 16] = bytes(2 << 16)
    expected[200000:200003] = b"new"
    (tmp_path / "raw").write_bytes(expected)
    same("compare", "top", "raw", "-f", "qed", "-F", "raw", cwd=tmp_path)
    assert ours("rebase", "-f", "qed", "-b", "", "top", cwd=tmp_path).code == 0
    same("compare", "top", "raw", "-f", "qed", "-F", "raw", cwd=tmp_path)
    same("check", "top", cwd=tmp_path)
    assert ours("rebase", "-u", "-f", "qed", "-b", "base", "-F", "qed", "top", cwd=tmp_path).code == 0
    assert ours("commit", "-f", "qed", "top", cwd=tmp_path).code == 0
    same("compare", "base", "raw", "-f", "qed", "-F", "raw", cwd=tmp_path)
    same("check", "base", cwd=tmp_path)


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 7, "Image not in QED format"),
        (4, 1000, "cluster_size"),
        (4, 1 << 30, "cluster_size"),
        (8, 3, "table_size"),
        (8, 32, "table_size"),
        (16, 0x70, "Unsupported QED features: 70"),
        (40, 512, "l1_table_offset"),
        (44, 1, "l1_table_offset"),
        (52, 1 << 30, "image_size"),
        (48, 511, "image_size"),
    ],
)
def test_a_bad_header_is_refused_by_the_field(at: int, value: int, text: str, tmp_path: Path) -> None:
    data, _ = filled()
    struct.pack_into("<I", data, at, value)
    (tmp_path / "image").write_bytes(data)
    done = ours("info", "-f", "qed", "image", cwd=tmp_path)
    assert done.code == 1 and text in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "1000", "5M", "-o cluster_size=4k,table_size=2 3M", "-o cluster_size=1000 1M", "-o table_size=3 1M",
        "-o cluster_size=4k,table_size=1 1T", "100T",
    ],
)  # fmt: skip
def test_create_and_info_like_qemu(words: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    *options, size = words.split()
    first = ours("create", "-f", "qed", *options, "image", size, cwd=tmp_path / "a")
    second = qemu_img("create", "-f", "qed", *options, "image", size, cwd=tmp_path / "b")
    assert (first.code, first.out, first.err) == (second.code, second.out, second.err)
    if first.code == 0:
        assert (tmp_path / "a" / "image").read_bytes() == (tmp_path / "b" / "image").read_bytes()
        same("info", "image", cwd=tmp_path / "b")
        same("check", "image", cwd=tmp_path / "b")
        same("map", "--output=json", "image", cwd=tmp_path / "b")


def test_resize_like_qemu(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f qed image 5M")
    for words in (("20M",), ("--shrink", "5M"), ("1E",)):
        first, second = ours("resize", "image", *words, cwd=tmp_path), qemu_img("resize", "image", *words, cwd=tmp_path)
        assert (first.code, first.out) == (second.code, second.out)
    same("info", "image", cwd=tmp_path)
