"""``commit`` beside ``qemu-img commit``: texts, exit codes, and what the images are afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.chains import THREE, alike, both, twice
from tests.cli.run import diskwright, needs_qemu, needs_same_texts, qemu_img

pytestmark = [needs_qemu, needs_same_texts]


@pytest.mark.parametrize(
    "arguments",
    [(), ("-d",), ("-q",), ("-b", "mid"), ("-b", "./mid"), ("-f", "qcow2", "-t", "none"), ("-r", "100M"),
     ("-b", "base"), ("-b", "./base"), ("-d", "-b", "base")],
)  # fmt: skip
def test_images_are_the_same_afterwards(arguments: tuple[str, ...], tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE)
    before = qemu_img("convert", "-O", "raw", "top", "content", cwd=where[0])
    assert before.code == 0
    both(where, "commit", *arguments, "top")
    alike(where, "top", maps="base" not in arguments)
    base = "base" if any("base" in word for word in arguments) else "mid"
    # Where zeros lie beyond the end of an image between, qemu-img writes them as such to the base; we see that they
    # are zeros there already.
    alike(where, base, maps=base == "mid")
    for name in ("top", base):
        assert qemu_img("compare", name, "content", cwd=where[0]).code == 0
    if base == "mid" and "-d" not in arguments and "-b" not in arguments:
        assert (where[0] / "top").stat().st_size == (where[1] / "top").stat().st_size


def test_absolute_name_of_the_base(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE)
    ours = diskwright("commit", "-b", str(where[0] / "base"), "top", cwd=where[0])
    theirs = qemu_img("commit", "-b", str(where[1] / "base"), "top", cwd=where[1])
    assert ours == theirs and ours.code == 0
    alike(where, "top", "base", maps=False)


RAW_BASE = (
    "qemu-img create -q -f raw base 1M",
    "qemu-io -f raw -c write~-P~1~0~1M base",
    "qemu-img create -q -f qcow2 -b base -F raw top 3M",
    "qemu-io -f qcow2 -c write~-P~3~128k~128k -c write~-P~4~2500k~128k -c write~-z~0~64k top",
)


def test_raw_base_that_is_smaller(tmp_path: Path) -> None:
    where = twice(tmp_path, *RAW_BASE)
    both(where, "commit", "top")
    alike(where, "top", "base", maps=False)  # we leave smaller holes in a raw file, too


def test_base_that_is_larger(tmp_path: Path) -> None:
    where = twice(
        tmp_path,
        "qemu-img create -q -f qcow2 base 3M",
        "qemu-io -c write~-P~1~0~3M base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 top 1M",
        "qemu-io -c write~-P~2~100k~500k top",
    )
    both(where, "commit", "top")
    alike(where, "top", "base")


@pytest.mark.parametrize("options", ["", "compat=0.10,", "lazy_refcounts=on,"])
@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_cluster_sizes_that_differ(options: str, cluster: str, tmp_path: Path) -> None:
    where = twice(
        tmp_path,
        "qemu-img create -q -f qcow2 -o cluster_size=16k base 5M",
        "qemu-io -c write~-P~1~0~100k -c write~-P~1~3M~33k base",
        f"qemu-img create -q -f qcow2 -o {options}cluster_size={cluster} -b base -F qcow2 top",
        "qemu-io -c write~-P~2~100k~500k -c write~-P~2~3100k~1k top",
    )
    both(where, "commit", "top")
    alike(where, "base", maps=False)
    alike(where, "top", maps=False)


def test_snapshots_of_the_image_stay(tmp_path: Path) -> None:
    where = twice(
        tmp_path,
        *RAW_BASE,
        "qemu-img snapshot -c one top",
        "qemu-io -f qcow2 -c write~-P~7~512k~64k top",
    )
    both(where, "commit", "top")
    alike(where, "base", maps=False)
    for directory in where:
        assert qemu_img("check", "top", cwd=directory).code == 0
        assert qemu_img("map", "--output=json", "top", cwd=directory).out.count('"depth": 0') == 0
        assert qemu_img("snapshot", "-a", "one", "top", cwd=directory).code == 0
    assert qemu_img("compare", str(where[0] / "top"), str(where[1] / "top"), cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("gone",),
        ("base",),
        ("-f", "raw", "base"),
        ("-t", "bogus", "top"),
        ("-b", "nonesuch", "top"),
        ("-b", "top", "top"),
        ("top", "mid"),
        ("--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=top"),
    ],
)
def test_refusals(arguments: tuple[str, ...], tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE)
    before = {path.name: path.read_bytes() for path in where[0].iterdir()}
    usage = not arguments or "mid" in arguments  # then the second line points to the command's own help
    assert both(where, "commit", *arguments, err=not usage).code == 1
    assert {path.name: path.read_bytes() for path in where[0].iterdir()} == before


def test_backing_file_is_gone(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE)
    for directory in where:
        (directory / "mid").unlink()
    assert both(where, "commit", "top").code == 1


def test_bad_rate(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE)
    ours = diskwright("commit", "-r", "bogus", "top", cwd=where[0])
    assert (ours.code, ours.out) == (1, "") and "rate limit" in ours.err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to make a file immutable")
def test_base_that_cannot_be_written(tmp_path: Path) -> None:
    import subprocess

    where = twice(tmp_path, *THREE)
    files = [str(directory / "mid") for directory in where]
    if subprocess.run(["chattr", "+i", *files], capture_output=True, check=False).returncode:
        pytest.skip("the file system knows no immutable files")
    try:
        assert both(where, "commit", "top").code == 1
    finally:
        subprocess.run(["chattr", "-i", *files], check=True)


def test_progress_comes_first(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE)
    ours = diskwright("commit", "-p", "top", cwd=where[0])
    assert ours.code == 0
    assert ours.out.startswith("    (0.00/100%)\r") and ours.out.endswith("(100.00/100%)\r\nImage committed.\n")
