"""``dd`` beside ``qemu-img dd``: what it says, and the bytes that arrive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    data = b"".join(bytes([65 + i % 57]) * 997 for i in range(300)) + bytes(300_000)
    (tmp_path / "a").write_bytes(data + b"end" + bytes(400_001 - 3))
    make(tmp_path, "qemu-img convert -f raw -O qcow2 a q")
    return tmp_path


def both(words: list[str], place: Path, format: str) -> None:
    theirs = qemu_img("dd", "-O", format, *words, "of=theirs", cwd=place)
    ours = diskwright("dd", "-O", format, *words, "of=ours", cwd=place)
    assert (ours.code, ours.out, ours.err) == (theirs.code, theirs.out, theirs.err) == (0, "", theirs.err)
    info = [qemu_img("info", "-f", format, name, cwd=place).out.splitlines()[2] for name in ("ours", "theirs")]
    assert info[0] == info[1] and "virtual size" in info[0]
    if format == "raw":
        assert (place / "ours").read_bytes() == (place / "theirs").read_bytes()
    else:
        make(place, "qemu-img check -q ours")
        make(place, f"qemu-img compare -q -f {format} -F {format} ours theirs")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "words",
    [
        "if=a", "if=a bs=100 count=3", "if=a bs=1000 skip=3", "if=a bs=1000 skip=3000", "if=a bs=1M count=1",
        "if=a bs=64k", "if=a count=0", "if=a bs=1k count=1.5k", "if=a bs=512 count=3k", "if=q if=a", "-f qcow2 if=q",
        "if=q bs=700 skip=2", "if=a bs=999999 skip=1", "-U if=a bs=3k", "--image-opts if=driver=raw,file.filename=a",
        "-f qcow2 if=q bs=65536 skip=5", "if=a bs=2147483647", "if=a bs=1 skip=999000",
    ],
)  # fmt: skip
def test_copies(words: str, format: str, place: Path) -> None:
    if "if=a" in words and "image-opts" not in words:
        words = "-f raw " + words
    both(words.split(), place, format)


@pytest.mark.parametrize(("skip", "count"), [(1, 2), (3, 2), (0, 7), (10, 100), (700, 5), (1000, 10), (2000, 1)])
def test_count_counts_from_where_skip_ends(skip: int, count: int, place: Path) -> None:
    """As the manual says and dd does. (qemu-img 7.2 counts from the beginning, and so copies too little.)"""
    done = diskwright("dd", "-f", "raw", "if=a", "of=o", "bs=1000", f"skip={skip}", f"count={count}", cwd=place)
    data = (place / "a").read_bytes()
    data += bytes(-len(data) % 512)
    wanted = data[skip * 1000 : (skip + count) * 1000]
    assert done.code == 0 and bool(done.err) == (skip * 1000 > len(data))
    assert (place / "o").read_bytes() == wanted + bytes(-len(wanted) % 512)


@pytest.mark.parametrize(
    "words",
    [
        "", "if=a", "of=a", "if=a of=o bs=0", "if=a of=o bs=3G", "if=a of=o bs=2G", "if=a of=o foo=1", "if=a of=o foo",
        "if=a of=o seek=3", "if=a of=o if", "if=missing of=o", "if=a of=/missing/o", "-f bogus if=a of=o",
        "-O bogus if=a of=o", "--image-opts -f raw if=driver=raw,file.filename=a of=o",
        "-n if=a of=o", "-x",
    ],
)  # fmt: skip
def test_ways_to_say_it(words: str, place: Path) -> None:
    theirs = qemu_img("dd", *words.split(), cwd=place)
    ours = diskwright("dd", *words.split(), cwd=place)
    assert (ours.code, ours.out, ours.err.replace(" dd --help", " --help")) == (theirs.code, theirs.out, theirs.err)


@pytest.mark.parametrize("words", ["bs=xx", "count=xx", "skip=xx", "count=-1", "bs="])
def test_wrong_numbers(words: str, place: Path) -> None:
    theirs = same("dd", "if=a", "of=o", words, cwd=place, err=False)
    assert theirs.code == 1


def test_the_source_is_not_overwritten(place: Path) -> None:
    before = (place / "a").read_bytes()
    assert diskwright("dd", "-f", "raw", "if=a", "of=a", cwd=place).code == 1
    assert (place / "a").read_bytes() == before
