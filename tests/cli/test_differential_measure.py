"""``measure`` beside ``qemu-img measure``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, qemu_img_with_keys, same

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


SECRET = ("--object", "secret,id=s0,data=passphrase")
SEALED = "-O qcow2 -o encrypt.format=luks"
KEYED = f"{SEALED},encrypt.key-secret=s0"


@pytest.mark.parametrize(
    "words",
    [
        "-O luks -o key-secret=s0 --size 0", "-O luks -o key-secret=s0 --size 1000",
        "-O luks -o key-secret=s0 --size 3G",
        "-O luks -o key-secret=s0,cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha512 --size 1M",
        "-O luks --size 1M", "-O luks -o key-secret=nope --size 1M", "-O luks -o key-secret=s0,bogus=1 --size 1M",
        "-O luks -o key-secret=s0,preallocation=full --output=json --size 1M",
        f"{KEYED} --size 0", f"{KEYED} --size 1000", f"{KEYED},cluster_size=4k,refcount_bits=1 --size 3G",
        f"{KEYED},cluster_size=2M --size 1M", f"{KEYED},preallocation=full --output=json --size 1M",
        f"{KEYED},encrypt.cipher-alg=aes-128 --size 1M", f"{SEALED} --size 1M",
        f"{SEALED},encrypt.key-secret=nope --size 1M", "-O qcow2 -o encryption=on --size 1M",
        "-O qcow2 -o encrypt.format=aes,encrypt.key-secret=s0 --size 1M",
    ],
)  # fmt: skip
def test_new_encrypted_images(words: str, tmp_path: Path) -> None:
    theirs = qemu_img_with_keys("measure", *SECRET, *words.split(), cwd=tmp_path)
    ours = diskwright("measure", *SECRET, *words.split(), cwd=tmp_path)
    assert (ours.code, ours.out, ours.err) == (theirs.code, theirs.out, theirs.err)


def test_copies_of_and_to_encrypted_images(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f raw plain 5M", "qemu-io -f raw -c write~1M~1M plain",
         "qemu-img create -q -f qcow2 more 5M", "qemu-io -c write~1M~1M more", "qemu-img snapshot -c one more",
         "qemu-io -c write~2M~2M more", "qemu-img bitmap --add more b")  # fmt: skip
    for format, options in (
        ("luks", "key-secret=s0,iter-time=1"),
        ("qcow2", "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1"),
    ):
        made = diskwright("create", "-q", *SECRET, "-f", format, "-o", options, f"{format}.sealed", "3M", cwd=tmp_path)
        assert made.code == 0, made
    for target in ("-O raw", "-O qcow2", "-O luks -o key-secret=s0", KEYED):
        for source in (
            "-f raw plain", "-f qcow2 more", "-l one more", "-l nope more", "qcow2.sealed",
            "--image-opts driver=luks,file.filename=luks.sealed,key-secret=s0",
            "--image-opts driver=qcow2,file.filename=qcow2.sealed,encrypt.key-secret=s0",
        ):  # fmt: skip
            words = [*target.split(), *source.split()]
            theirs = qemu_img_with_keys("measure", *SECRET, *words, cwd=tmp_path)
            ours = diskwright("measure", *SECRET, *words, cwd=tmp_path)
            assert (ours.code, ours.out, ours.err) == (theirs.code, theirs.out, theirs.err), words


def test_what_is_measured_for_encryption_is_what_is_made(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f raw plain 5M", "qemu-io -f raw -c write~1M~1M plain")
    for target in ("-O luks -o key-secret=s0", KEYED):
        told = diskwright("measure", *SECRET, "--output=json", *target.split(), "-f", "raw", "plain", cwd=tmp_path)
        made = f"{target},{'encrypt.' if 'encrypt' in target else ''}iter-time=1".split()
        assert diskwright("convert", *SECRET, *made, "-f", "raw", "plain", "copy", cwd=tmp_path).code == 0
        wanted, length = json.loads(told.out)["required"], (tmp_path / "copy").stat().st_size
        assert wanted - 65536 <= length <= wanted
