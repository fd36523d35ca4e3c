"""``bitmap`` and ``convert --bitmaps`` beside qemu-img's: texts, exit codes, and what is in the images afterwards."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.run import Result, diskwright, make, needs_same_texts, qemu_img, same

pytestmark = needs_same_texts


def prepare(directory: Path) -> None:
    """An image with bitmaps of three kinds, one left in use by a crash, and others beside them."""
    make(
        directory,
        "qemu-img create -q -f qcow2 image 10M",
        "qemu-img bitmap --add image on",
        "qemu-img bitmap --add --disable -g 32k image off",
        "qemu-io -f qcow2 -c write~1M~100k image",
        "qemu-img create -q -f qcow2 other 10M",
        "qemu-img bitmap --add -g 4k other theirs",
        "qemu-io -f qcow2 -c write~3M~10k -c discard~5M~64k other",
        "qemu-img create -q -f qcow2 larger 20M",
        "qemu-img bitmap --add larger large",
        "qemu-img create -q -f qcow2 -o compat=0.10 old 1M",
        "qemu-img create -q -f raw plain.raw 1M",
        "qemu-img create -q -f qcow2 broken 10M",
        "qemu-img bitmap --add broken b0",
        "qemu-img bitmap --add --disable broken b1",
    )
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", "broken"],
        cwd=directory,
        capture_output=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bitmaps")
    prepare(directory)
    return directory


@pytest.fixture
def two(prepared: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with the same images: one for each program."""
    for name in ("ours", "theirs"):
        shutil.copytree(prepared, tmp_path / name)
    return tmp_path / "ours", tmp_path / "theirs"


def both(two: tuple[Path, Path], *words: str) -> Result:
    """Runs both programs, each in its directory; equal in all they say. Nodes have names of their own."""
    results = [program(*words, cwd=at) for program, at in zip((diskwright, qemu_img), two, strict=True)]
    ours, theirs = (Result(r.code, r.out, _plain(r.err)) for r in results)
    assert ours == theirs
    return ours


def _plain(text: str) -> str:
    """Nodes have names of their own, and our hint at the help text names the command."""
    return re.sub(r"#block\d+", "NODE", text).replace("'PROGRAM bitmap --help'", "'PROGRAM --help'")


def dirty_map(path: Path, name: str) -> str:
    """QEMU serves the bitmap, and libnbd's program asks for it."""
    command = ["nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--"]
    command += ["[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, str(path), "]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def alike(two: tuple[Path, Path], image: str) -> None:
    """Both programs' images tell of the same bitmaps, and QEMU finds ours sound."""
    for output in ("human", "json"):
        texts = {qemu_img("info", "--output", output, image, cwd=at).out for at in two}
        texts = {re.sub(r'(disk size: .*|"actual-size": \d+)', "", text) for text in texts}
        assert len(texts) == 1
        same("info", "--output", output, image, cwd=two[0])
    sound = qemu_img("check", image, cwd=two[0])
    assert sound.code == 0, sound.out + sound.err
    shown = qemu_img("info", image, cwd=two[0]).out
    if "in-use" not in shown:
        for name in re.findall(r"            name: (\S+)", shown):
            assert dirty_map(two[0] / image, name) == dirty_map(two[1] / image, name)


DONE = [
    "--add image new",
    "--add -g 4k image new",
    "--add -g 2G image new",
    "--add -g 0 image new",
    "--add --disable image new",
    "--add --merge on image new",
    "--add -g 4k --merge on image new",
    "--add -g 1M --merge on --merge off image new",
    "--add --merge on --clear --disable --enable image new",
    "--add --remove image new",
    "--merge theirs -b other image on",
    "--merge theirs -b other -F qcow2 image off",
    "--add -g 16k --merge theirs -b other -F qcow2 image new",
    "--remove image on",
    "--remove image off",
    "--clear image on",
    "--clear --enable image off",
    "--disable image on",
    "--enable --disable image on",
    "--merge off image on",
    "--merge on image off",
    "--merge on image on",
    "-f qcow2 --clear image on",
    "--image-opts --clear driver=qcow2,file.filename=image on",
    "--clear image on --disable",
]


@pytest.mark.parametrize("words", DONE)
def test_what_is_done(words: str, two: tuple[Path, Path]) -> None:
    assert both(two, "bitmap", *words.split()).code == 0
    alike(two, "image")


REFUSED = [
    "",
    "image on",
    "--add",
    "--add image",
    "--add image a b",
    "--add image on",
    "--add --add image new",
    "--add missing b",
    "--add -g 64k --remove image on",
    "--clear -g 64k image on",
    "--clear -g foo image on",
    "--add -g 100 image new",
    "--add -g 768 image new",
    "--add -F qcow2 image new",
    "--add -b other image new",
    "--add --image-opts -f qcow2 driver=qcow2,file.filename=image new",
    "--add old b",
    "--remove old b",
    "--add -f raw plain.raw b",
    "--remove -f raw plain.raw b",
    "--remove image gone",
    "--clear image gone",
    "--enable image gone",
    "--disable image gone",
    "--merge on image gone",
    "--merge gone image on",
    "--merge large -b larger image on",
    "--merge theirs -b missing image on",
    "--merge theirs -b plain.raw -F raw image on",
    "--clear broken b0",
    "--enable broken b0",
    "--disable broken b1",
    "--add broken b0",
    "--merge b0 broken b1",
    "--merge b0 -b broken image on",
    "--clear --merge gone image on",
    "--merge",
    "--bogus image on",
]


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words: str, two: tuple[Path, Path]) -> None:
    assert both(two, "bitmap", *words.split()).code == 1
    alike(two, "image")
    alike(two, "broken")


@pytest.mark.parametrize("name", ["", "x" * 1024, "x" * 1023, "ümläut"])
def test_names(name: str, two: tuple[Path, Path]) -> None:
    both(two, "bitmap", "--add", "image", name)
    alike(two, "image") if len(name) < 1000 else None


def test_inconsistent_bitmaps_can_be_removed(two: tuple[Path, Path]) -> None:
    both(two, "bitmap", "--remove", "broken", "b0")
    alike(two, "broken")
    both(two, "bitmap", "--remove", "broken", "b1")
    alike(two, "broken")


CONVERTED = [
    "--bitmaps -O qcow2 image out",
    "--bitmaps -O qcow2 -o cluster_size=4k image out",
    "--bitmaps --skip-broken-bitmaps -O qcow2 image out",
    "--bitmaps --skip-broken-bitmaps -O qcow2 broken out",
]


@pytest.mark.parametrize("words", CONVERTED)
def test_converted_with_bitmaps(words: str, two: tuple[Path, Path]) -> None:
    assert both(two, "convert", *words.split()).code == 0
    alike(two, "out")


def test_converted_into_an_image_that_exists(two: tuple[Path, Path]) -> None:
    for at in two:
        make(at, "qemu-img create -q -f qcow2 out 10M", "qemu-img bitmap --add out mine")
    assert both(two, "convert", "--bitmaps", "-n", "-O", "qcow2", "image", "out").code == 0
    shown = qemu_img("info", "out", cwd=two[0]).out
    assert re.findall(r"name: (\S+)", shown) == ["mine", "on", "off"]
    for name in ("on", "off"):
        assert dirty_map(two[0] / "out", name) == dirty_map(two[1] / "out", name)
    assert qemu_img("check", "out", cwd=two[0]).code == 0


NOT_CONVERTED = [
    "--bitmaps -O raw image out",
    "--bitmaps -O qcow2 -o compat=0.10 image out",
    "--bitmaps -f raw -O qcow2 plain.raw out",
    "--bitmaps -O qcow2 old out",
    "--bitmaps -O qcow2 image other out",
    "--skip-broken-bitmaps -O qcow2 image out",
    "--bitmaps -O qcow2 broken out",
    "--bitmaps -n -O qcow2 image larger",
]


@pytest.mark.parametrize("words", NOT_CONVERTED)
def test_not_converted_with_bitmaps(words: str, two: tuple[Path, Path]) -> None:
    assert both(two, "convert", *words.split()).code == 1


def test_a_name_that_the_target_has(two: tuple[Path, Path]) -> None:
    for at in two:
        make(at, "qemu-img create -q -f qcow2 out 10M", "qemu-img bitmap --add out on")
    assert both(two, "convert", "--bitmaps", "-n", "-O", "qcow2", "image", "out").code == 1
