"""``info`` beside ``qemu-img info``: text, JSON and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

OPENABLE = (*images.NAMES, "dirty", "corrupt-bit", "refcount-too-low", "unaligned-data", "data-beyond-end")


@pytest.mark.parametrize("name", OPENABLE)
def test_every_image_both_ways(name: str, tmp_path: Path) -> None:
    format = images.build(name, tmp_path)
    same("info", "image", cwd=tmp_path)
    same("info", "-f", format, "--output=json", "image", cwd=tmp_path)


@pytest.mark.parametrize(
    "name",
    ["qcow2-full", "qcow2-deep", "qcow2-short-backing", "qcow2-on-raw", "qcow2-backing-gone",
     "qcow2-backing-elsewhere", "qcow2-backing-of-any-format"],
)  # fmt: skip
def test_backing_chain(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    same("info", "--backing-chain", "image", cwd=tmp_path)
    same("info", "--backing-chain", "--output=json", "image", cwd=tmp_path)


def test_path_of_the_backing_file_is_seen_from_where_the_program_runs(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    images.build("qcow2-backing-elsewhere", tmp_path / "inner")
    same("info", "inner/image", cwd=tmp_path)
    same("info", "--output=json", "inner/image", cwd=tmp_path)
    same("info", "--backing-chain", "--output=json", "inner/image", cwd=tmp_path)
    same("info", "--output=json", str(tmp_path / "inner" / "image"), cwd=tmp_path)


def test_backing_chain_that_comes_back(tmp_path: Path) -> None:
    make(
        tmp_path,
        "qemu-img create -q -f qcow2 -u -b b -F qcow2 a 1M",
        "qemu-img create -q -f qcow2 -u -b a -F qcow2 b 1M",
    )
    same("info", "a", cwd=tmp_path)
    theirs = qemu_img("info", "--backing-chain", "a", cwd=tmp_path)
    ours = diskwright("info", "--backing-chain", "a", cwd=tmp_path)
    assert ours.code == theirs.code == 1
    assert ours.out == theirs.out == ""
    assert "infinite loop" in ours.err and "infinite loop" in theirs.err


@pytest.mark.parametrize(
    "name",
    ["unknown-feature", "bad-cluster-bits", "bad-version", "l1-too-small", "backing-name-too-long", "refcount-order",
     "header-length"],
)  # fmt: skip
def test_damaged_headers(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    theirs = qemu_img("info", "-f", "qcow2", "image", cwd=tmp_path)
    ours = diskwright("info", "-f", "qcow2", "image", cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out) == (1, "")
    assert ours.err.startswith("PROGRAM: Could not open 'image': ") and ours.err.count("\n") == 1


def test_a_later_version_is_not_taken_for_a_raw_disk(tmp_path: Path) -> None:
    images.build("bad-version", tmp_path)
    assert qemu_img("info", "image", cwd=tmp_path).code == 1
    assert diskwright("info", "image", cwd=tmp_path).code == 1


@pytest.mark.parametrize(
    "words",
    [
        "info missing",
        "info image image",
        "info -f bogus image",
        "info -f raw image",
        "info --output=xml image",
        "info --output json image",
        "info --image-opts driver=qcow2,file.filename=image",
        "info --image-opts driver=qcow2,file.driver=file,file.filename=image",
        "info --image-opts -f qcow2 driver=qcow2,file.filename=image",
        "info --image-opts image",
        'info json:{"driver":"qcow2","file":{"driver":"file","filename":"image"}}',
        "info -U image",
        "info --force-share image",
        "info image -f qcow2 --output=json",
        "info --backing image --out json",
        "info file:image",
        "info /dev/null/x",
        "info --bogus image",
        "info image --output",
    ],
)
def test_ways_to_say_it(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    (tmp_path / "raw").write_bytes(bytes(4096))
    theirs = qemu_img(*words.split(), cwd=tmp_path)
    ours = diskwright(*words.split(), cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    # The hint of a wrong command line names the subcommand here.
    assert ours.err.replace(" info --help", " --help") == theirs.err


def test_names_that_need_escaping(tmp_path: Path) -> None:
    for name in ('q"uote.raw', "back\\slash.raw", "tab\tline\nfeed.raw", "é€😀.raw", "del\x7f.raw", "sp ace,comma.raw"):
        (tmp_path / name).write_bytes(bytes(1024))
        same("info", "-f", "raw", "--output=json", f"./{name}", cwd=tmp_path)
        same("info", "-f", "raw", f"./{name}", cwd=tmp_path)


def test_an_image_in_use_is_refused_unless_shared(tmp_path: Path) -> None:
    import subprocess

    images.build("qcow2-full", tmp_path)
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "image"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None and user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        assert b"512 KiB" in user.stdout.readline()
        ours = diskwright("info", "image", cwd=tmp_path)
        theirs = qemu_img("info", "image", cwd=tmp_path)
        assert ours.code == theirs.code == 1
        assert ours.err == theirs.err
        same("info", "-U", "image", cwd=tmp_path)
        user.stdin.close()


def test_closed_gate_stops_at_the_first_reference(tmp_path: Path) -> None:
    images.build("qcow2-overlay", tmp_path)
    assert diskwright("info", "--gate", "closed", "image", cwd=tmp_path).code == 0
    done = diskwright("info", "--gate", "closed", "--backing-chain", "image", cwd=tmp_path)
    assert done.code == 1 and "references are not followed" in done.err and done.err.count("\n") == 1
