"""``create`` beside ``qemu-img create``: what is announced, what is made, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

CREATIONS = [
    "-f raw x 1M",
    "-f raw x 1000",
    "-f raw -o preallocation=falloc x 64k",
    "-f raw -o preallocation=full x 64k",
    "-f raw -o nocow=off x 64k",
    "x 1.5M",
    "-f raw x 0",
    "-f raw -o size=1M x",
    "-f raw file:x 4k",
    "-f qcow2 x 10M",
    "-f qcow2 x 1000",
    "-f qcow2 x 0",
    "-f qcow2 -o cluster_size=4k,lazy_refcounts=on x 10M",
    "-f qcow2 -o cluster_size=2M x 10M",
    "-f qcow2 -o cluster_size=128k -o lazy_refcounts=on,cluster_size=8k x 1M",
    "-f qcow2 -o compat=0.10 x 1M",
    "-f qcow2 -o compat=1.1,refcount_bits=1 x 1M",
    "-f qcow2 -o compat=v3 x 1M",
    "-f qcow2 -o compression_type=zstd x 1M",
    "-f qcow2 -o preallocation=metadata x 1M",
    "-f qcow2 -o preallocation=off x 1M",
    "-f qcow2 -o lazy_refcounts x 1M",
    "-f qcow2 x -o size=2M",
    "-f qcow2 -b base.qcow2 -F qcow2 x",
    "-f qcow2 -b base.qcow2 -F qcow2 x 20M",
    "-f qcow2 -b base.raw -F raw x",
    "-f qcow2 -o backing_file=base.raw,backing_fmt=raw x",
    "-f qcow2 -o backing_file=with,,comma.raw -F raw x",
    "-f qcow2 -o backing_file=gone -b base.raw -F raw x",
    "-f qcow2 -u -b gone -F qcow2 x 1M",
    "-q -f qcow2 x 1M",
]


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    make(
        tmp_path,
        "qemu-img create -q -f qcow2 base.qcow2 5M",
        "truncate -s 3M base.raw",
        "truncate -s 1k with,comma.raw",
    )
    return tmp_path


@pytest.mark.parametrize("words", CREATIONS)
def test_creations(words: str, bases: Path) -> None:
    theirs = qemu_img("create", *words.split(), cwd=bases)
    assert theirs.code == 0
    expected = qemu_img("info", "x", cwd=bases).out.splitlines()
    size = (bases / "x").stat().st_size
    (bases / "x").unlink()
    ours = diskwright("create", *words.split(), cwd=bases)
    assert ours == theirs
    made = qemu_img("info", "x", cwd=bases).out.splitlines()
    # How much of the disk an empty image takes is each program's own affair.
    assert [line for line in made if "disk size" not in line] == [line for line in expected if "disk size" not in line]
    if "raw" in words.split()[:2] or "preallocation" in words:
        assert (bases / "x").stat().st_size == size
    if "qcow2" in words.split()[:3] and "gone" not in words:
        assert qemu_img("check", "x", cwd=bases).code == 0


REFUSALS = [
    "",
    "x",
    "-f raw x",
    "-f bogus x 1M",
    "-f raw -b base.raw x 1M",
    "-f raw -b base.raw -F raw x 1M",
    "-f raw -F raw x 1M",
    "-f qcow2 -o bogus=1 x 1M",
    "-f raw -o bogus=1 x 1M",
    "-f qcow2 -o size=1M x 2M",
    "-f qcow2 -o ,size=1M x",
    "-f qcow2 -o size=1M, x",
    "-f qcow2 -b base.qcow2 -F qcow2 base.qcow2 1M",
    "-f qcow2 -u -b gone -F qcow2 x",
    "-f qcow2 -u -b gone x 1M",
    "-f qcow2 foo:bar 1M",
    "x 1M y",
    "--bogus x 1M",
    "-f",
]


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words: str, bases: Path) -> None:
    before = {path.name: path.read_bytes() for path in bases.iterdir()}
    ours = diskwright("create", *words.split(), cwd=bases)
    assert {path.name: path.read_bytes() for path in bases.iterdir()} == before
    theirs = qemu_img("create", *words.split(), cwd=bases)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert ours.code == 1
    assert ours.err.replace(" create --help", " --help") == theirs.err


# The same verdict in other words, or told before the creation is announced.
REWORDED = [
    "-f qcow2 -b ./x -F qcow2 x 1M",
    "-f qcow2 -o lazy_refcounts=maybe x 1M",
    "-f qcow2 -b base.qcow2 x",
    "-f qcow2 -b gone -F qcow2 x",
    "-f qcow2 -b base.raw -F qcow2 x",
    "-f qcow2 -b base.raw -F bogus x",
    "-f qcow2 -F qcow2 x 1M",
    "-f qcow2 -o cluster_size=3 x 1M",
    "-f qcow2 -o cluster_size=256 x 1M",
    "-f qcow2 -o cluster_size=4M x 1M",
    "-f qcow2 -o cluster_size=abc x 1M",
    "-f qcow2 -o compat=9 x 1M",
    "-f qcow2 -o preallocation=bogus x 1M",
    "-f raw -o preallocation=metadata x 1M",
    "-f qcow2 -o refcount_bits=5 x 1M",
    "-f qcow2 -o compat=0.10,refcount_bits=8 x 1M",
    "-f qcow2 -o compat=0.10,lazy_refcounts=on x 1M",
    "-f qcow2 -o compression_type=bogus x 1M",
    "-f qcow2 x 1X",
    "-f qcow2 x 1MB",
    "-f qcow2 x 7E",
    "-f raw x 9E",
    "-f raw x 100000000000000000000",
    "-f raw -- x -1",
    "-f qcow2 no/where 1M",
    "-f raw . 1M",
]


@pytest.mark.parametrize("words", REWORDED)
def test_refusals_in_other_words(words: str, bases: Path) -> None:
    before = {path.name: path.read_bytes() for path in bases.iterdir()}
    ours = diskwright("create", *words.split(), cwd=bases)
    assert {path.name: path.read_bytes() for path in bases.iterdir()} == before
    theirs = qemu_img("create", *words.split(), cwd=bases)
    assert ours.code == theirs.code == 1
    assert ours.err.startswith("PROGRAM: ")
    assert ours.err.count("\n") == 1 or ours.err.splitlines()[1:] == theirs.err.splitlines()[1:]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_image_in_use_keeps_its_contents(format: str, bases: Path) -> None:
    before = (bases / "base.qcow2").read_bytes()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "base.qcow2"], cwd=bases, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None and user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        assert b"5 MiB" in user.stdout.readline()
        ours = diskwright("create", "-f", format, "base.qcow2", "1M", cwd=bases)
        theirs = qemu_img("create", "-f", format, "base.qcow2", "1M", cwd=bases)
        assert (ours.code, ours.out) == (theirs.code, theirs.out)
        assert ours.code == 1 and 'Failed to get "write" lock' in ours.err
        assert (bases / "base.qcow2").read_bytes() == before
        same("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay", cwd=bases)
        user.stdin.close()


@pytest.mark.parametrize(
    "words", ["-f qcow2 -o help", "-f qcow2 -o ?", "-f qcow2 -o size=1M,help x", "-f raw -o help x"]
)
def test_option_help_names_the_options(words: str, tmp_path: Path) -> None:
    theirs = qemu_img("create", *words.split(), cwd=tmp_path)
    ours = diskwright("create", *words.split(), cwd=tmp_path)
    assert ours.code == theirs.code == 0
    assert ours.err == ""
    names = [{line.split("=")[0] for line in done.out.splitlines() if "=<" in line} for done in (theirs, ours)]
    missing = {name.strip() for name in names[0] - names[1] if "encrypt" not in name}
    assert missing <= {"extent_size_hint", "data_file", "data_file_raw", "extended_l2"}
    assert "  size" in names[1]
    assert not (tmp_path / "x").exists()


def test_backing_name_is_stored_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    make(tmp_path, "qemu-img create -q -f qcow2 base 5M")
    same("create", "-f", "qcow2", "-b", "../base", "-F", "qcow2", "sub/over", cwd=tmp_path)
    shown = qemu_img("info", "sub/over", cwd=tmp_path).out
    assert "backing file: ../base (actual path: sub/../base)" in shown
    assert "virtual size: 5 MiB" in shown
