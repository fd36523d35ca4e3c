"""``measure`` beside ``qemu-img measure``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

SIZES = ["0", "1000", "1M", "65537", "1G", "13G", "1T", "64T"]
OPTIONS = [
    "cluster_size=512", "cluster_size=4k", "cluster_size=2M", "refcount_bits=1", "refcount_bits=64", "compat=0.10",
    "cluster_size=4k,refcount_bits=64", "preallocation=metadata", "preallocation=falloc",
    "preallocation=full", "lazy_refcounts=on", "compression_type=zstd", "backing_file=gone,backing_fmt=raw",
    "size=7G", "compat=0.10,lazy_refcounts=on",
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_empty_images(size: str, tmp_path: Path) -> None:
    for words in (["-O", "raw"], *(["-O", "qcow2", "-o", option] for option in OPTIONS)):
        theirs = qemu_img("measure", "--output=json", "--size", size, *words, cwd=tmp_path)
        ours = diskwright("measure", "--output=json", "--size", size, *words, cwd=tmp_path)
        assert (ours.code, ours.out, ours.err) == (theirs.code, theirs.out, theirs.err), words


@pytest.mark.parametrize("name", [n for n in images.NAMES if n not in images.DAMAGED])
def test_every_image(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    for words in ([], ["-O", "qcow2"], ["-O", "qcow2", "-o", "cluster_size=4k"], ["-O", "qcow2", "-o", "compat=0.10"]):
        same("measure", *words, "image", cwd=tmp_path)
    same("measure", "-O", "qcow2", "--output=json", "image", cwd=tmp_path)


def test_bitmaps(tmp_path: Path) -> None:
    make(
        tmp_path,
        "qemu-img create -q -f qcow2 image 20G",
        "qemu-img bitmap --add image one",
        "qemu-img bitmap --add -g 512 image a-name-of-another-length",
    )
    for cluster_size in ("512", "4k", "64k", "2M"):
        found = same("measure", "--output=json", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", "image",
                     cwd=tmp_path)  # fmt: skip
        assert json.loads(found.out)["bitmaps"] > 20 << 30 >> 12
    same("measure", "-O", "qcow2", "-o", "compat=0.10", "image", cwd=tmp_path)
    same("measure", "-O", "raw", "image", cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "", "a b", "--size 1G image", "-f qcow2 --size 1G", "--image-opts --size 1G", "-l x --size 1G",
        "-U --size 1G", "-O bogus --size 1G", "-O file --size 1G", "-O qcow2 -o bogus=1 --size 1G",
        "-O raw -o cluster_size=1 --size 1G", "-O qcow2 -o help --size 1G", "-O qcow2 -o cluster_size=333 --size 1G",
        "-O qcow2 -o refcount_bits=7 --size 1G", "-O qcow2 -o compat=0.10,refcount_bits=1 --size 1G",
        "-O qcow2 -o cluster_size=512 --size 1T", "--output=bogus --size 1G", "missing", "-f bogus image",
        "-O bogus missing", "-o ,a=1 --size 1G", "-O qcow2 -o backing_file=other image", "-f raw -O qcow2 image",
        "--image-opts -O qcow2 driver=qcow2,file.filename=image", "-O raw -o preallocation=full --size 1G",
    ],
)  # fmt: skip
def test_ways_to_say_it(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    same("measure", *words.split(), cwd=tmp_path)


@pytest.mark.parametrize("words", ["--size xx", "--size -5", "--size 9E -O qcow2", "-O qcow2 -o compat=9 --size 1G",
                                   "-O qcow2 -o preallocation=x --size 1G"])  # fmt: skip
def test_wrong_values(words: str, tmp_path: Path) -> None:
    same("measure", *words.split(), cwd=tmp_path, err=False)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_what_is_measured_is_what_is_made(cluster_size: int, tmp_path: Path) -> None:
    """Not an estimate: an image filled in order has exactly this length."""
    make(tmp_path, "qemu-img create -q -f raw source 9M", "qemu-io -f raw -c write~0~9M source")
    options = ["-O", "qcow2", "-o", f"cluster_size={cluster_size}"]
    wanted = json.loads(diskwright("measure", "--output=json", *options, "-f", "raw", "source", cwd=tmp_path).out)
    assert diskwright("convert", "-f", "raw", *options, "source", "image", cwd=tmp_path).code == 0
    length = (tmp_path / "image").stat().st_size
    assert wanted["required"] == wanted["fully-allocated"]
    assert wanted["required"] * 0.98 <= length <= wanted["required"] + 2 * cluster_size
