"""``compare`` beside ``qemu-img compare``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

READABLE = tuple(name for name in images.NAMES if name != "qcow2-backing-gone")


@pytest.mark.parametrize("name", READABLE)
def test_every_image_with_a_raw_copy_of_it(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    make(tmp_path, "qemu-img convert -O raw image copy")
    same("compare", "image", "copy", cwd=tmp_path)
    same("compare", "copy", "image", cwd=tmp_path)
    same("compare", "-s", "image", "image", cwd=tmp_path)
    size = (tmp_path / "copy").stat().st_size
    if size:
        with open(tmp_path / "copy", "r+b") as file:
            file.seek(size * 3 // 4)
            byte = file.read(1)
            file.seek(size * 3 // 4)
            file.write(bytes([byte[0] ^ 0x55]))
        assert same("compare", "image", "copy", cwd=tmp_path).code == 1
        assert same("compare", "-q", "copy", "image", cwd=tmp_path).out == ""


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """``a`` and the longer ``b`` and ``c``, alike up to the end of ``a``; ``c`` has a byte set beyond it."""
    make(
        tmp_path,
        "qemu-img create -q -f raw a 1M",
        "qemu-io -f raw -c write~64k~64k a",
        "cp a b",
        "truncate -s 2M b",
        "cp b c",
        "qemu-io -f raw -c write~-P~7~1536k~512 c",
        "qemu-img convert -O qcow2 a a.qcow2",
        "qemu-img create -q -f raw empty 0",
        "qemu-img create -q -f qcow2 new.qcow2 1M",
        "qemu-img create -q -f qcow2 zeroed.qcow2 1M",
        "qemu-io -f qcow2 -c write~-z~0~1M zeroed.qcow2",
        "qemu-img create -q -f qcow2 written.qcow2 1M",
        "qemu-io -f qcow2 -c write~-P~0~64k~64k written.qcow2",
    )
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "a b", "b a", "a c", "c a", "b c", "empty a", "empty b", "empty new.qcow2", "a a.qcow2", "a.qcow2 b",
        "-s a b", "-s a a", "-s a a.qcow2", "-s empty b", "-s new.qcow2 zeroed.qcow2", "-s new.qcow2 written.qcow2",
        "-s b c", "new.qcow2 zeroed.qcow2", "new.qcow2 written.qcow2", "-q a b", "-q a c", "-q -s a b", "-U a b",
        "-f raw -F raw a b", "-f raw -F qcow2 a a.qcow2", "-F qcow2 a a.qcow2", "-f raw a.qcow2 a.qcow2",
        "-T none a b", "-T writeback a a.qcow2",
        "--image-opts driver=raw,file.filename=a driver=qcow2,file.filename=a.qcow2",
        "--image-opts -f raw driver=raw,file.filename=a driver=raw,file.filename=b",
        "a", "a b c", "a missing", "missing a", "-f bogus a b", "-T bogus a b", "--bogus a b",
    ],
)  # fmt: skip
def test_ways_to_say_it(words: str, pair: Path) -> None:
    theirs = qemu_img("compare", *words.split(), cwd=pair)
    ours = diskwright("compare", *words.split(), cwd=pair)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert ours.err.replace(" compare --help", " --help") == theirs.err


@pytest.mark.parametrize("offset", [0, 511, 512, 70000, 1048575, 2097151, 2097152, 2999999])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_first_difference_is_found_where_it_is(offset: int, sparse: bool, tmp_path: Path) -> None:
    contents = bytearray(3000000) if sparse else bytearray((index * 7) & 0xFF for index in range(3000000))
    (tmp_path / "a").write_bytes(b"")
    make(tmp_path, "truncate -s 3000000 a")
    if not sparse:
        (tmp_path / "a").write_bytes(contents)
    shutil.copyfile(tmp_path / "a", tmp_path / "b")
    with open(tmp_path / "b", "r+b") as file:
        for place in {offset, min(offset + 4096, 2999999), 2999999}:
            file.seek(place)
            file.write(bytes([contents[place] ^ 0xFF]))
    done = same("compare", "-f", "raw", "-F", "raw", "a", "b", cwd=tmp_path)
    assert done.out == f"Content mismatch at offset {offset // 512 * 512}!\n"


@pytest.mark.parametrize("lengths", [(3000000, 5000000), (3000000, 4000000), (1001, 1024), (1000, 1001), (512, 70001)])
def test_files_that_end_within_a_sector(lengths: tuple[int, int], tmp_path: Path) -> None:
    for name, length in zip("ab", lengths, strict=True):
        (tmp_path / name).write_bytes(b"x" * length)
    same("compare", "-f", "raw", "-F", "raw", "a", "b", cwd=tmp_path)
    same("compare", "-f", "raw", "-F", "raw", "b", "a", cwd=tmp_path)
    make(tmp_path, f"truncate -s {lengths[0]} b", f"truncate -s {lengths[1]} b")
    same("compare", "-f", "raw", "-F", "raw", "a", "b", cwd=tmp_path)


def test_damage_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    images.build("unaligned-data", tmp_path)
    make(tmp_path, "truncate -s 512k raw")
    for names in (("image", "raw"), ("raw", "image")):
        theirs = qemu_img("compare", *names, cwd=tmp_path)
        ours = diskwright("compare", *names, cwd=tmp_path)
        # What qemu-img compares before it meets the damage differs, so its verdict may be reached sooner.
        assert theirs.code in (1, 3)
        assert ours.code in (3, theirs.code)


def test_progress(pair: Path) -> None:
    ours = diskwright("compare", "-p", "a", "b", cwd=pair)
    assert re.fullmatch(
        r"(    \(\d+\.\d\d/100%\)\r)+Warning: Image size mismatch!\nImages are identical.\n\n", ours.out
    )
    ours = diskwright("compare", "--progress=json", "a", "c", cwd=pair)
    assert ours.out == qemu_img("compare", "a", "c", cwd=pair).out
    assert '"phase": "compare"' in ours.err
