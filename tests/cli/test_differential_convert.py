"""``convert`` beside ``qemu-img convert``: the same bytes, the same kind of image, the same refusals."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import diskwright, environment, make, needs_qemu, needs_same_texts, qemu_img, separately

pytestmark = [needs_qemu, needs_same_texts]

READABLE = tuple(name for name in images.NAMES if name != "qcow2-backing-gone")


def info_without_space(name: str, cwd: Path) -> dict[str, object]:
    """What qemu-img tells of an image, apart from how much of the disk it takes and what it is called."""
    found: dict[str, object] = json.loads(qemu_img("info", "--output=json", name, cwd=cwd).out)
    return {key: value for key, value in found.items() if key not in ("actual-size", "filename")}


def allocated(name: str, cwd: Path) -> object:
    return json.loads(qemu_img("check", "--output=json", name, cwd=cwd).out).get("allocated-clusters", 0)


def assert_alike(ours: str, theirs: str, cwd: Path) -> None:
    """Two images made from one source by the two programs: same contents, same facts, nothing wrong with ours."""
    assert qemu_img("compare", ours, theirs, cwd=cwd).code == 0
    assert info_without_space(ours, cwd) == info_without_space(theirs, cwd)
    if info_without_space(theirs, cwd)["format"] == "qcow2":
        assert qemu_img("check", ours, cwd=cwd).code == 0
        assert allocated(ours, cwd) == allocated(theirs, cwd)


@pytest.mark.parametrize("name", READABLE)
def test_every_image_to_raw_and_qcow2(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    for words in ("-O raw", "-O qcow2", "-O qcow2 -o cluster_size=4k,compat=0.10"):
        theirs = qemu_img("convert", *words.split(), "image", "theirs", cwd=tmp_path)
        ours = diskwright("convert", *words.split(), "image", "ours", cwd=tmp_path)
        assert ours == theirs and ours.code == 0
        assert_alike("ours", "theirs", tmp_path)
        if words == "-O raw":
            assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "-S 512 -O qcow2 image",
        "-S 64k -O qcow2 image",
        "-S 4k -O raw image",
        "-O qcow2 image image image",
        "image image",
        "-f qcow2 -O qcow2 image",
        "-O qcow2 -o size=3M image",
        "-O qcow2 -o preallocation=metadata image",
        "-O raw -o preallocation=full image",
        "-t none -T none -O qcow2 image",
        "-t unsafe -T writethrough -O raw image",
        "-t writethrough -O qcow2 image",
        "-m 1 -W -O qcow2 image",
        "-m 16 -q -O qcow2 image",
        "-r 100M -O qcow2 image",
        "-U -O qcow2 image",
        "-C -O raw image",
        "--image-opts -O qcow2 driver=qcow2,file.filename=image",
        "-O file image",
    ],
)
def test_ways_to_convert(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    theirs = qemu_img("convert", *words.split(), "theirs", cwd=tmp_path)
    ours = diskwright("convert", *words.split(), "ours", cwd=tmp_path)
    assert ours == theirs and ours.code == 0
    assert_alike("ours", "theirs", tmp_path)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_nothing_is_left_out_with_sparse_size_zero(format: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    assert diskwright("convert", "-S", "0", "-O", format, "image", "ours", cwd=tmp_path).code == 0
    assert qemu_img("compare", "image", "ours", cwd=tmp_path).code == 0
    assert (tmp_path / "ours").stat().st_blocks * 512 >= 1 << 20
    if format == "qcow2":
        assert allocated("ours", tmp_path) == 16


def test_runs_of_zeros_in_data_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 65536 + bytes(262144) + b"y" * 65536)
    assert diskwright("convert", "-f", "raw", "image", "ours", cwd=tmp_path).code == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "image").read_bytes()
    assert (tmp_path / "ours").stat().st_blocks * 512 <= 131072 + 16384


def test_the_rest_of_the_last_sector_is_zeroed_in_an_existing_target(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"abc")
    for name, program in (("ours", diskwright), ("theirs", qemu_img)):
        (tmp_path / name).write_bytes(b"x" * 4096)
        assert program("convert", "-n", "-f", "raw", "-O", "raw", "image", name, cwd=tmp_path).code == 0
    assert (
        (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes() == b"abc".ljust(512, b"\0") + b"x" * 3584
    )


# -- backing files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qcow2-overlay", "qcow2-short-backing", "qcow2-long-backing", "qcow2-on-raw"])
def test_overlay_onto_the_same_backing_file(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    base_format = "raw" if name == "qcow2-on-raw" else "qcow2"
    words = ("convert", "-O", "qcow2", "-B", "base", "-F", base_format, "image")
    assert qemu_img(*words, "theirs", cwd=tmp_path).code == 0
    assert diskwright(*words, "ours", cwd=tmp_path).code == 0
    assert_alike("ours", "theirs", tmp_path)
    assert qemu_img("compare", "image", "ours", cwd=tmp_path).code == 0
    # What the backing file has is not copied into the overlay.
    bottom = json.loads(qemu_img("map", "--output=json", "ours", cwd=tmp_path).out)
    source = json.loads(qemu_img("map", "--output=json", "image", cwd=tmp_path).out)
    data = [sum(row["length"] for row in rows if row["data"] and not row["depth"]) for rows in (bottom, source)]
    assert data[0] == data[1]


def test_zeros_beyond_the_sources_short_backing_file_hide_a_longer_one(tmp_path: Path) -> None:
    images.build("qcow2-short-backing", tmp_path)
    make(tmp_path, "cp base longer", "qemu-img resize -q -f qcow2 longer 3M", "qemu-io -f qcow2 -c write~1M~2M longer")
    words = ("convert", "-O", "qcow2", "-B", "longer", "-F", "qcow2", "image")
    assert diskwright(*words, "ours", cwd=tmp_path).code == 0
    assert qemu_img("compare", "image", "ours", cwd=tmp_path).code == 0


def test_source_without_backing_file_hides_the_targets(tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, "qemu-img create -q -f qcow2 base 1M", "qemu-io -f qcow2 -c write~0~1M base")
    done = diskwright("convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", "image", "ours", cwd=tmp_path)
    assert done.code == 0
    assert qemu_img("compare", "image", "ours", cwd=tmp_path).code == 0


# -- existing targets ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_existing_target_is_overwritten_with_zeros_too(format: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, f"qemu-img create -q -f {format} ours 1M", f"qemu-io -f {format} -c write~0~1M ours")
    done = diskwright("convert", "-n", "-O", format, "image", "ours", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert qemu_img("compare", "-F", format, "image", "ours", cwd=tmp_path).code == 0


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_lies_behind_the_copy_stays_as_it_was(format: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, f"qemu-img create -q -f {format} ours 3M", f"qemu-io -f {format} -c write~-P~9~0~3M ours")
    shutil.copyfile(tmp_path / "ours", tmp_path / "theirs")
    assert diskwright("convert", "-n", "-O", format, "image", "ours", cwd=tmp_path).code == 0
    assert qemu_img("convert", "-n", "-O", format, "image", "theirs", cwd=tmp_path).code == 0
    assert qemu_img("compare", "-f", format, "-F", format, "ours", "theirs", cwd=tmp_path).code == 0


def test_target_is_zero_is_believed(tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, "qemu-img create -q -f raw ours 1M", "qemu-io -f raw -c write~-P~9~896k~64k ours")
    assert diskwright("convert", "-n", "--target-is-zero", "image", "ours", cwd=tmp_path).code == 0
    data = (tmp_path / "ours").read_bytes()
    assert data[896 << 10 : 960 << 10] == b"\x09" * 65536  # a user who says so and is wrong keeps what was there
    assert diskwright("convert", "-n", "image", "ours", cwd=tmp_path).code == 0
    assert qemu_img("compare", "image", "ours", cwd=tmp_path).code == 0


def test_target_given_as_options(tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, "qemu-img create -q -f raw ours 2M")
    target = "driver=raw,offset=65536,file.driver=file,file.filename=ours"
    done = diskwright("convert", "-n", "--target-image-opts", "image", target, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    make(tmp_path, "dd if=ours of=window bs=64k skip=1 count=16 status=none")
    assert qemu_img("compare", "-F", "raw", "image", "window", cwd=tmp_path).code == 0


# -- refusals ------------------------------------------------------------------------------------

REFUSALS = [
    "",
    "image",
    "missing out",
    "-f bogus image out",
    "-O bogus image out",
    "-O bogus missing out",
    "-O qcow2 -o bogus=1 image out",
    "-O qcow2 -o ,size=1 image out",
    "image no/where",
    "-O qcow2 image no/where",
    "image .",
    "-n image missing",
    "-n image small",
    "-n -O bogus image small.raw",
    "-n -o size=1M image out",
    "-n -O qcow2 image small",
    "-F qcow2 image out",
    "-B base.qcow2 -F qcow2 image out",
    "-O qcow2 -B base.qcow2 -F qcow2 image image out",
    "-m 0 image out",
    "-m 17 image out",
    "-m x image out",
    "-S 100 image out",
    "-S 17M image out",
    "-T bogus image out",
    "-t bogus image out",
    "-C -S 4k image out",
    "--target-is-zero image out",
    "--target-image-opts image driver=raw,file.filename=out",
    "-n --target-image-opts -O raw image driver=raw,file.filename=small",
    "--image-opts -f raw driver=raw,file.filename=image out",
    "--bogus image out",
]


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(
        tmp_path,
        "qemu-img create -q -f qcow2 small 64k",
        "truncate -s 64k small.raw",
        "qemu-img create -q -f qcow2 base.qcow2 1M",
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ours = diskwright("convert", *words.split(), cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    theirs = qemu_img("convert", *words.split(), cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert ours.code == 1
    assert ours.err.replace(" convert --help", " --help") == theirs.err


REWORDED = [
    "-n -O qcow2 image small.raw",
    "-O qcow2 -F qcow2 image out",
    "-S x image out",
    "-r x image out",
    "-O qcow2 -o cluster_size=3 image out",
    "-O qcow2 -o cluster_size=x image out",
    "-O qcow2 -B base.qcow2 image out",
    "-O qcow2 -B missing -F qcow2 image out",
    "-n --target-is-zero -O qcow2 -B base.qcow2 -F qcow2 image overlay",
    "image image",
    "base.qcow2 base.qcow2",
    "-l snapshot image out",
    "-c image out",
]


@pytest.mark.parametrize("words", REWORDED)
def test_refusals_in_other_words(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, "qemu-img create -q -f qcow2 base.qcow2 1M", "truncate -s 64k small.raw")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ours = diskwright("convert", *words.split(), cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert ours.code == 1
    assert ours.err.startswith("PROGRAM: ")
    if "missing" not in words:  # where the second line says what the missing file is for
        theirs = qemu_img("convert", *words.split(), cwd=tmp_path)
        assert ours.err.count("\n") == 1 or ours.err.splitlines()[1:] == theirs.err.splitlines()[1:]
        (tmp_path / "out").unlink(missing_ok=True)


@pytest.mark.parametrize("how", [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c"], ["-O", "qcow2", "-c", "-W"]])
def test_salvage_of_a_damaged_image(how: list[str], tmp_path: Path) -> None:
    """A compressed cluster that cannot be decoded: zeros, warnings, and success, as with the other program."""
    make(tmp_path, "qemu-img create -q -f raw plain 1000k", "qemu-io -f raw -c write~-P~7~0~1000k plain",
         "qemu-img convert -c -O qcow2 plain image")  # fmt: skip
    with open(tmp_path / "image", "r+b") as file:
        file.seek(0x28)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        (l2,) = struct.unpack(">Q", file.read(8))
        for damaged in (3, 15):  # one in the midst, and the last, which is short
            file.seek((l2 & 0x00FFFFFFFFFFFE00) + 8 * damaged)
            (entry,) = struct.unpack(">Q", file.read(8))
            file.seek(entry & (1 << 54) - 1)
            file.write(b"\xff" * 20)
    refused = diskwright("convert", *how, "image", "out", cwd=tmp_path)
    assert refused.code == 1 and "error while reading" in refused.err
    ours = diskwright("convert", "--salvage", *how, "image", "ours", cwd=tmp_path)
    theirs = qemu_img("convert", "--salvage", *how, "image", "theirs", cwd=tmp_path)
    assert ours.code == theirs.code == 0, (ours, theirs)
    assert "warning: error while reading offset 196608:" in ours.err
    make(tmp_path, f"qemu-img compare -f {how[1]} -F {how[1]} ours theirs",
         f"qemu-io -f {how[1]} -r -c read~-P~7~0~196608 -c read~-P~0~196608~65536 ours")  # fmt: skip
    if "qcow2" in how:
        make(tmp_path, "qemu-img check -q ours")


# -- failures under way --------------------------------------------------------------------------


def test_damage_under_way_is_no_success(tmp_path: Path) -> None:
    images.build("unaligned-data", tmp_path)
    done = diskwright("convert", "-O", "qcow2", "image", "out", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert "0x50200" in done.err and done.err.count("\n") == 1


def test_full_medium_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * (4 << 20))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))

    done = separately("convert", "-f", "raw", "-O", "qcow2", "image", "out", cwd=tmp_path, preexec_fn=limit)
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(
        r"PROGRAM: error while writing at byte \d+: (out: )?File too large; 'out' is incomplete\n", done.err
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_that_the_target_is_incomplete(number: int, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * (3 << 20))
    command = [sys.executable, "-m", "diskwright", "convert", "--progress=json", "-r", "1M", "-f", "raw"]
    with subprocess.Popen(
        [*command, "-O", "qcow2", "image", "out"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None and process.stdout is not None
        while json.loads(process.stderr.readline())["offset"] == 0:
            pass
        process.send_signal(number)
        rest = process.stderr.read().splitlines()
        assert process.wait(30) == 128 + number
        assert rest[-1] == "diskwright: interrupted; 'out' is incomplete"
        assert process.stdout.read() == ""
    # What is there was closed in good order.
    assert qemu_img("check", "out", cwd=tmp_path).code == 0


def test_target_in_use_is_left_alone(tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    make(tmp_path, "qemu-img create -q -f qcow2 used 1M", "qemu-io -f qcow2 -c write~0~1M used")
    before = (tmp_path / "used").read_bytes()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "used"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdin is not None and user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        assert b"1 MiB" in user.stdout.readline()
        for words in (("-O", "qcow2"), ("-O", "raw"), ("-n", "-O", "qcow2")):
            ours = diskwright("convert", *words, "image", "used", cwd=tmp_path)
            assert ours.code == 1 and 'Failed to get "write" lock' in ours.err
        assert (tmp_path / "used").read_bytes() == before
        ours = diskwright("convert", "used", "out", cwd=tmp_path)
        assert ours.code == 1 and 'Failed to get shared "write" lock' in ours.err
        assert not (tmp_path / "out").exists()
        user.stdin.close()


def test_progress(tmp_path: Path) -> None:
    images.build("qcow2-full", tmp_path)
    done = diskwright("convert", "-p", "image", "out", cwd=tmp_path)
    assert re.fullmatch(r"    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\r\n", done.out)
    assert done.err == ""
    done = diskwright("convert", "-p", "-q", "image", "out", cwd=tmp_path)
    assert (done.out, done.err) == ("", "")
    done = diskwright("convert", "--progress=json", "image", "out", cwd=tmp_path)
    rows = [json.loads(line) for line in done.err.splitlines()]
    assert done.out == ""
    assert rows[0]["offset"] == 0 and rows[-1]["offset"] == rows[-1]["length"] == 524288


def test_option_help(tmp_path: Path) -> None:
    done = diskwright("convert", "-O", "qcow2", "-o", "help", cwd=tmp_path)
    assert done.code == 0 and "  cluster_size=<size>" in done.out


def test_closed_gate_keeps_backing_files_shut(tmp_path: Path) -> None:
    images.build("qcow2-overlay", tmp_path)
    done = diskwright("convert", "--gate", "closed", "image", "out", cwd=tmp_path)
    assert done.code == 1 and "references are not followed" in done.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "elsewhere").mkdir()
    make(tmp_path, "qemu-img create -q -f qcow2 -b ../base -F qcow2 elsewhere/over")
    done = diskwright("convert", "--gate", "directory", "elsewhere/over", "out", cwd=tmp_path)
    assert done.code == 1 and "not a file in the image's own directory" in done.err
    assert diskwright("convert", "--gate", "directory", "image", "out", cwd=tmp_path).code == 0
