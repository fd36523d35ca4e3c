"""``diskwright io`` beside ``qemu-io``: what it prints, how it exits and what the image then holds."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import io_commands
from tests.cli.run import Result, diskwright, environment, make, needs_qemu, needs_same_texts

pytestmark = [needs_qemu, needs_same_texts]

TIMEOUT = 60

SCALE = max(1, int(float(os.environ.get("DISKWRIGHT_FUZZ") or 1)))

IMAGES = {
    "raw": ["qemu-img create -q -f raw image 1M", "qemu-io -f raw -c write~-P~0x41~0~1M image"],
    "raw-odd": ["qemu-img create -q -f raw image 1000448", "qemu-io -f raw -c write~-P~0x41~0~900k image",
                "truncate -s 1000001 image"],
    "qcow2": ["qemu-img create -q -f qcow2 image 1M", "qemu-io -f qcow2 -c write~64k~128k -c write~-z~512k~64k image"],
    "qcow2-v2": ["qemu-img create -q -f qcow2 -o compat=0.10 image 1M",
                 "qemu-io -f qcow2 -c write~64k~128k image"],
    "qcow2-subclusters": ["qemu-img create -q -f qcow2 -o extended_l2=on image 1M",
                          "qemu-io -f qcow2 -c write~64k~128k -c write~-z~512k~64k image"],
    "qcow2-overlay": ["qemu-img create -q -f raw base 1M", "qemu-io -f raw -c write~-P~0x41~0~1M base",
                      "qemu-img create -q -f qcow2 -b base -F raw image 2M", "qemu-io -f qcow2 -c write~64k~64k image"],
}  # fmt: skip

CHANGING = ("write", "w ", "discard", "d ", "truncate", "t ", "aio_write")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of image in a folder of its own, with what it needs."""
    folders = {}
    for name, commands in IMAGES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name], *commands)
        (folders[name] / "pattern").write_bytes(b"abc")
    return folders


@pytest.fixture
def places(images: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of an image's folder."""
    source = images[request.param]
    for name in ("theirs", "ours"):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "theirs", tmp_path / "ours"


def qemu_io(words: list[str], cwd: Path, stdin: str | None = None) -> Result:
    return external(["qemu-io", *words], "qemu-io", cwd, stdin)


def separately(words: list[str], cwd: Path, stdin: str | None = None) -> Result:
    return external([sys.executable, "-m", "diskwright.cli.main", "io", *words], "diskwright", cwd, stdin)


def external(command: list[str], program: str, cwd: Path, stdin: str | None) -> Result:
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, input=(stdin or "").encode(), timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    return normal(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), program)


def normal(result: Result, program: str) -> Result:
    """Without what differs from one run to the next, and with the program's name and its help made one."""
    out = re.sub(r"^(\S+ \w+, 1 ops; )(00\.\d\d sec|\d+:\d\d:\d\d\.\d\d) \((0|\d+\.\d+|\d+) (bytes|[KMGTPE]iB)/sec and "
                 r"\d+\.\d{4} ops/sec\)$", r"\1TIME", result.out, flags=re.M)  # fmt: skip
    out = re.sub(r"^(\d+,1),\d+:\d\d:\d\d\.\d\d,\d+\.\d{3},\d+\.\d{3}$", r"\1,TIME", out, flags=re.M)
    out = out.replace(f"{program}> ", "PROGRAM> ")
    if "Usage: " in out:
        out = out[: out.index("Usage: ")] + "HELP"
    if "\n\nUse 'help commandname'" not in out and " -- " in out and "\n\n" in out:
        out = out[: out.index("\n\n")] + "\nEXPLANATION"
    err = result.err.replace(f"{program}: ", "PROGRAM: ").replace("PROGRAM: PROGRAM: ", "PROGRAM: ")
    return Result(result.code, out, err)


def in_process(words: list[str], cwd: Path) -> Result:
    result = diskwright("io", *words, cwd=cwd)
    return normal(Result(result.code, result.out, result.err), "PROGRAM")


def words_of(image: str, line: str) -> list[str]:
    commands = line.split("@")
    options = shlex.split(commands.pop(0)[1:]) if line.startswith("%") else []
    return ["-f", image.partition("-")[0], *options, *(word for each in commands for word in ("-c", each)), "image"]


def same_contents(theirs: Path, ours: Path, format: str, *, strictly: bool = True) -> None:
    """``strictly``: with the same clusters allocated."""
    if format == "raw":
        assert (ours / "image").read_bytes() == (theirs / "image").read_bytes()
    else:
        flags = "-s -f qcow2 -F qcow2" if strictly else "-f qcow2 -F qcow2"
        make(ours, "qemu-img check -q -f qcow2 image", f"qemu-img compare -q {flags} {theirs}/image image")


CASES = [pytest.param(image, image, line, id=f"{image}: {line}") for image, line in io_commands.cases()]


@pytest.mark.parametrize(("places", "image", "line"), CASES, indirect=["places"])
def test_commands(places: tuple[Path, Path], image: str, line: str) -> None:
    theirs, ours = places
    words = words_of(image, line)
    assert in_process(words, ours) == qemu_io(words, theirs)
    if any(word in line for word in CHANGING):
        same_contents(theirs, ours, image.partition("-")[0])


@pytest.mark.parametrize("places", ["raw"], indirect=True)
@pytest.mark.parametrize("line", io_commands.whole())
def test_command_lines(places: tuple[Path, Path], line: str) -> None:
    theirs, ours = places
    words = shlex.split(line.replace("\0", "\n").replace('"', '\\"'))
    assert separately(words, ours) == qemu_io(words, theirs)
    same_contents(theirs, ours, "raw")


@pytest.mark.parametrize("places", ["raw"], indirect=True)
@pytest.mark.parametrize("script", io_commands.SCRIPTS)
def test_scripts(places: tuple[Path, Path], script: str) -> None:
    theirs, ours = places
    words = ["-f", "raw", "image"]
    assert separately(words, ours, script) == qemu_io(words, theirs, script)
    same_contents(theirs, ours, "raw")


# -- at random ---------------------------------------------------------------------------------------


def random_line(chance: random.Random, size: int, *, backed: bool) -> str:
    """A command on a disk of ``size`` bytes, or a little beyond its end. Not what the two are known to do differently:
    discards where a backing file shows; and how much zeros allocate is their own affair."""

    def place(unit: int, most: int) -> tuple[int, int]:
        offset = chance.randrange(size // unit + 2) * unit
        return offset, chance.randrange(1, most // unit + 1) * unit

    unit = chance.choice((1, 512, 4096, 65536))
    offset, length = place(unit, unit * chance.choice((1, 3, 20)))
    byte, quiet = chance.randrange(4), chance.choice(("", "", "q", "C"))
    flag = f" -{quiet}" if quiet else ""
    parts = " ".join(str(max(1, length // n)) for n in (2, 3, 5)[: chance.randrange(1, 4)])
    kind = chance.choice("rrrvwwwwzuxafbti")
    return {
        "r": f"read{flag} -P {byte} {offset} {length}",
        "v": f"read -v {offset} {min(length, 64)}",
        "w": f"write{flag} -P {byte} {offset} {length}",
        "z": f"write -z{quiet} {offset} {length}",
        "u": f"write -zu {offset} {length}",
        "x": f"writev{flag} -P {byte} {offset} {parts}",
        "a": f"aio_write{flag} -P {byte} {offset} {parts}@aio_flush",
        "f": f"aio_read{flag} {offset} {parts}@aio_flush",
        "b": f"readv {offset} {parts}",
        "t": f"truncate {max(512, size + chance.randrange(-3, 4) * 65536)}",
        "i": "flush" if backed else f"discard{flag} {offset} {length}",
    }[kind]


@pytest.mark.parametrize(
    ("places", "image", "seed"),
    [(image, image, seed) for image in IMAGES if image != "raw-odd" for seed in range(2 * SCALE)],
    indirect=["places"],
)
def test_anything(places: tuple[Path, Path], image: str, seed: int) -> None:
    theirs, ours = places
    chance = random.Random(f"{image} {seed}")
    size = (2 if image == "qcow2-overlay" else 1) << 20
    lines = [random_line(chance, size, backed=image == "qcow2-overlay") for _ in range(40)]
    words = words_of(image, "@".join(lines))
    mine, its = in_process(words, ours), qemu_io(words, theirs)
    assert mine == its, lines
    same_contents(theirs, ours, image.partition("-")[0], strictly=False)


# -- where the two differ, and are meant to ----------------------------------------------------------


@pytest.mark.parametrize("places", ["qcow2-v2"], indirect=True)
@pytest.mark.parametrize("line", io_commands.NOT_VERSION_2)
def test_zeros_in_version_2(places: tuple[Path, Path], line: str) -> None:
    theirs, ours = places
    words = words_of("qcow2", line)
    assert in_process(words, ours).code == 0
    qemu_io([word.replace("-zn", "-z") for word in words], theirs)
    make(ours, "qemu-img check -q image", f"qemu-img compare -q image {theirs}/image")


@pytest.mark.parametrize("places", ["raw"], indirect=True)
def test_a_guessed_format(places: tuple[Path, Path]) -> None:
    """A guessed raw disk is not made to look like another format; both say that it was guessed."""
    theirs, ours = places
    (ours / "magic").write_bytes(b"QFI\xfb\0\0\0\3")
    for words, failed in ((["-c", "write -s magic 0 8"], True), (["-c", "write 64k 64k", "-c", "read 0 1M"], False)):
        done = diskwright("io", *words, "image", cwd=ours)
        assert done.code == failed and "guessed raw" in done.err
    assert "guessed raw" in qemu_io(["-c", "length", "image"], theirs).err
    assert (ours / "image").read_bytes()[:8] == b"A" * 8


@pytest.mark.parametrize("places", ["raw"], indirect=True)
def test_another_format_than_stated(places: tuple[Path, Path]) -> None:
    theirs, ours = places
    words = ["-f", "qcow2", "-c", "length", "image"]
    mine, its = in_process(words, ours), qemu_io(words, theirs)
    assert (mine.code, mine.out) == (its.code, its.out) == (1, "")
    assert "can't open device image: " in mine.err and "can't open device image: " in its.err


@pytest.mark.parametrize("places", ["qcow2"], indirect=True)
def test_compressed_over_what_is_there(places: tuple[Path, Path]) -> None:
    """qemu-io refuses that."""
    words = words_of("qcow2", "write -c -P 5 64k 64k@read -P 5 64k 64k@read -P 0xcd 128k 64k")
    assert in_process(words, places[1]).code == 0
    make(places[1], "qemu-img check -q image", "qemu-io -r -c read~-P~5~64k~64k image")


@pytest.mark.parametrize("places", ["qcow2"], indirect=True)
def test_waiting_where_nothing_can_be_suspended(places: tuple[Path, Path]) -> None:
    """qemu-io waits for ever."""
    done = in_process(words_of("qcow2", "wait_break A"), places[1])
    assert done == Result(1, "Could not wait for request: Operation not supported\n", "")
