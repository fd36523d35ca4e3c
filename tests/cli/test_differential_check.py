"""``check`` beside ``qemu-img check``: what is found, how it is summed up, the exit codes, and repairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import Result, diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

SOUND = tuple(name for name in images.NAMES if name != "qcow2-backing-gone" and name not in images.UNCHECKED)
STRICTER = ("l1-beyond-end",)
"""Damage qemu-img opens an image with, and sees no data; here it is an error whatever is done with the image."""
UNOPENABLE = ("unknown-feature", "bad-cluster-bits", "bad-version", "l1-too-small", "backing-name-too-long",
              "refcount-order", "header-length")  # fmt: skip
DAMAGED = tuple(name for name in images.DAMAGED if name not in UNOPENABLE and name not in STRICTER)


@pytest.mark.parametrize("name", SOUND)
def test_sound_images(name: str, tmp_path: Path) -> None:
    format = images.build(name, tmp_path)
    same("check", "image", cwd=tmp_path)
    same("check", "-f", format, "--output=json", "image", cwd=tmp_path)
    same("check", "-q", "image", cwd=tmp_path)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_found_and_summed_up(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    theirs = qemu_img("check", "image", cwd=tmp_path)
    ours = diskwright("check", "image", cwd=tmp_path)
    assert ours.code == theirs.code, (ours, theirs)
    if name in _COUNTED_ALIKE:
        assert ours.out == theirs.out
        same("check", "--output=json", "image", cwd=tmp_path, err=False)
    assert bool(ours.err) == bool(theirs.err), (ours, theirs)
    assert diskwright("check", "-q", "image", cwd=tmp_path) == Result(ours.code, "", ours.err)


# Where one error leads to others, how many there are is a matter of how one counts.
_COUNTED_ALIKE = ("leak-at-end", "leak-inside", "refcount-too-low", "refcount-too-high", "both", "not-copied",
                  "dirty", "corrupt-bit")  # fmt: skip


@pytest.mark.parametrize("name", UNOPENABLE)
def test_images_that_cannot_be_opened(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    assert qemu_img("check", "-f", "qcow2", "image", cwd=tmp_path).code == 1
    ours = diskwright("check", "-f", "qcow2", "image", cwd=tmp_path)
    assert (ours.code, ours.out) == (1, "")
    assert ours.err.startswith("PROGRAM: Could not open 'image': ") and ours.err.count("\n") == 1


@pytest.mark.parametrize("name", STRICTER)
def test_damage_that_hides_everything_keeps_the_image_from_being_opened(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    for command in ("check", "map", "info"):
        ours = diskwright(command, "image", cwd=tmp_path)
        assert (ours.code, ours.out) == (1, "")
        assert "l1_table_offset" in ours.err and ours.err.count("\n") == 1


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize(
    "name", ["leak-at-end", "leak-inside", "refcount-too-high", "not-copied", "dirty", "qcow2-full"]
)
def test_repairs(name: str, repair: str, tmp_path: Path) -> None:
    if (name, repair) == ("not-copied", "leaks"):
        pytest.skip("a wrong flag is no leak; qemu-img mends it all the same")
    images.build(name, tmp_path)
    shutil.copyfile(tmp_path / "image", tmp_path / "theirs")
    theirs = qemu_img("check", "-r", repair, "theirs", cwd=tmp_path)
    ours = diskwright("check", "-r", repair, "image", cwd=tmp_path)
    assert ours.code == theirs.code, (ours, theirs)
    # What was mended is what qemu-img finds nothing more to say of, and the guest's bytes are what they were.
    again = qemu_img("check", "--output=json", "image", cwd=tmp_path)
    assert again.code == theirs.code
    assert json.loads(again.out).get("leaks", 0) == 0
    make(tmp_path, "qemu-img compare -f qcow2 -F qcow2 image theirs")


@pytest.mark.parametrize("name", ["leak-inside", "leak-at-end"])
def test_repairs_are_told_alike(name: str, tmp_path: Path) -> None:
    for words in (("-r", "leaks"), ("-r", "all", "--output=json"), ("-q", "--repair=leaks")):
        images.build(name, tmp_path)
        theirs = qemu_img("check", *words, "image", cwd=tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()
        images.build(name, tmp_path)
        ours = diskwright("check", *words, "image", cwd=tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()
        if not words[-1].startswith("--output"):
            theirs_end, ours_end = (done.out.split("Image end")[0] for done in (theirs, ours))
            assert (ours.code, ours_end) == (theirs.code, theirs_end)
        else:
            theirs_end, ours_end = ({**json.loads(done.out), "image-end-offset": 0} for done in (theirs, ours))
            assert list(ours_end.items()) == list(theirs_end.items())


@pytest.mark.parametrize(
    "words",
    [
        "check missing",
        "check image image",
        "check -f raw image",
        "check -f raw --output=json image",
        "check -T bogus image",
        "check -T none image",
        "check --output=bogus image",
        "check -U image",
        "check -U -r all image",
        "check -r bogus image",
        "check --image-opts driver=qcow2,file.filename=image",
        "check",
    ],
)
def test_ways_to_say_it(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    theirs = qemu_img(*words.split(), cwd=tmp_path)
    ours = diskwright(*words.split(), cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert ours.err.replace(" check --help", " --help") == theirs.err


def test_missing_backing_file(tmp_path: Path) -> None:
    images.build("qcow2-backing-gone", tmp_path)
    same("check", "image", cwd=tmp_path)


@pytest.mark.parametrize("name", images.UNCHECKED)
def test_features_that_check_does_not_know_yet_are_named(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    before = (tmp_path / "image").read_bytes()
    for words in ((), ("-r", "all")):
        ours = diskwright("check", *words, "image", cwd=tmp_path)
        assert (ours.code, ours.out) == (1, "")
        assert images.UNCHECKED[name] in ours.err and ours.err.count("\n") == 1
    assert (tmp_path / "image").read_bytes() == before
