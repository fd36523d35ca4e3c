"""``resize`` beside ``qemu-img resize``: what it says, and the image that is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

QCOW2 = ["qemu-img create -q -f qcow2 image 10M", "qemu-io -c write~-P~1~0~3M -c write~-P~2~9M~1M image"]
KINDS = {
    "qcow2": QCOW2,
    "raw": ["qemu-img create -q -f raw image 10M", "qemu-io -f raw -c write~-P~1~0~3M -c write~-P~2~9M~1M image"],
    "v2": ["qemu-img create -q -f qcow2 -o compat=0.10 image 10M", QCOW2[1]],
    "v2 snapshot": ["qemu-img create -q -f qcow2 -o compat=0.10 image 10M", "qemu-img snapshot -c one image"],
    "snapshot": [*QCOW2, "qemu-img snapshot -c one image"],
    "overlay": [
        "qemu-img create -q -f raw base 30M", "qemu-io -f raw -c write~-P~7~0~30M base",
        "qemu-img create -q -f qcow2 -b base -F raw image 10M", "qemu-io -c write~-P~1~64k~1M image",
    ],
}  # fmt: skip


def both(words: list[str], tmp_path: Path, kind: str) -> None:
    """Runs both on copies of one image; then the maps of what they left, and the guest's bytes, must be equal."""
    make(tmp_path, *KINDS[kind])
    make(tmp_path, "cp --sparse=always image theirs")
    format = "raw" if kind == "raw" else "qcow2"
    theirs = qemu_img("resize", *[w.replace("image", "theirs") for w in words], cwd=tmp_path)
    ours = diskwright("resize", *words, cwd=tmp_path)
    err = theirs.err.replace("theirs", "image")
    assert (ours.code, ours.out, ours.err.replace(" resize --help", " --help")) == (theirs.code, theirs.out, err)
    make(tmp_path, f"qemu-img compare -q -f {format} -F {format} image theirs")
    if format == "qcow2":
        make(tmp_path, "qemu-img check -q image")
    maps = [qemu_img("map", "--output=json", "-f", format, name, cwd=tmp_path).out for name in ("image", "theirs")]
    if "--preallocation" not in " ".join(words):
        assert [_facts(one) for one in maps[:1]] == [_facts(one) for one in maps[1:]]


def _facts(text: str) -> list[object]:
    import json

    return [(row["start"], row["length"], row["depth"], row["present"], row["zero"], row["data"])
            for row in json.loads(text)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", ["image 20M", "image 11M", "image +1M", "image -1M", "--shrink image -5M",
                                   "--shrink image 1536k", "-q image +0", "image 1T"])  # fmt: skip
def test_sizes(words: str, kind: str, tmp_path: Path) -> None:
    if kind == "raw":
        words = "-f raw " + words.replace("1T", "1G")
    if kind == "overlay":
        words = words.replace("1T", "30M")  # beyond the backing file qemu-img writes zeros too, where nothing shows
    both(words.split(), tmp_path, kind)


@pytest.mark.parametrize("kind", ["qcow2", "raw", "overlay"])
@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full", "bogus"])
@pytest.mark.parametrize("size", ["20M", "10M", "5M"])
def test_preallocation(kind: str, mode: str, size: str, tmp_path: Path) -> None:
    both(["-f", "raw" if kind == "raw" else "qcow2", f"--preallocation={mode}", "image", size], tmp_path, kind)


@pytest.mark.parametrize(
    "words",
    [
        "", "image", "20M", "image 20M 30M", "-f bogus image 20M", "missing 20M", "image 0", "--shrink image 0",
        "--shrink image -500M", "image 33333333", "-- image -1M", "--shrink -- image -1M", "image -- -1M",
        "--image-opts driver=qcow2,file.filename=image 50M",
        "--image-opts -f qcow2 driver=qcow2,file.filename=image 5M",
        "-p image 20M", "--shrink --preallocation=full image 1M", "--image-opts driver=file,filename=image 50M",
        "--image-opts driver=raw,size=64k,file.driver=file,file.filename=image 1M", "image 1.5G",
    ],
)  # fmt: skip
def test_ways_to_say_it(words: str, tmp_path: Path) -> None:
    make(tmp_path, *QCOW2)
    theirs = qemu_img("resize", *words.split(), cwd=tmp_path)
    (tmp_path / "image").unlink()
    make(tmp_path, *QCOW2)
    ours = diskwright("resize", *words.split(), cwd=tmp_path)
    assert (ours.code, ours.out, ours.err.replace(" resize --help", " --help")) == (theirs.code, theirs.out, theirs.err)


@pytest.mark.parametrize("words", ["image xx", "image +xx", "image +", "missing xx", "image 10000000000000000000000",
                                   "image 9E", "image 3E", "image +5x"])  # fmt: skip
def test_wrong_sizes(words: str, tmp_path: Path) -> None:
    make(tmp_path, *QCOW2)
    same("resize", *words.split(), cwd=tmp_path, err=False)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_growing_an_overlay_does_not_uncover_its_backing_image(compat: str, tmp_path: Path) -> None:
    """In version 2, where qemu-img gives up, the zeros are written."""
    (tmp_path / "base").write_bytes(b"secret" * 200000)
    make(tmp_path, f"qemu-img create -q -f qcow2 -o compat={compat} -b base -F raw image 100352")
    assert diskwright("resize", "image", "2M", cwd=tmp_path).code == 0
    make(tmp_path, "qemu-img check -q image", "qemu-img convert -f qcow2 -O raw image flat")
    assert (tmp_path / "flat").read_bytes() == (b"secret" * 200000)[:100352] + bytes((2 << 20) - 100352)


def test_a_guessed_raw_image_is_resized_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 1024)
    done = diskwright("resize", "image", "2048", cwd=tmp_path)
    assert (done.code, done.out) == (0, "Image resized.\n")
    assert done.err.startswith("WARNING: Image format was not specified for 'image' and probing guessed raw.\n")
    assert (tmp_path / "image").read_bytes() == b"x" * 1024 + bytes(1024)
