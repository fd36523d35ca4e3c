"""``amend`` beside ``qemu-img amend``: what it says, and the image that is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

FILL = "qemu-io -c write~-P~1~0~1M -c write~-P~2~8M~256k -c write~-z~2M~1M -c write~-z~64k~64k image"


def create(options: str = "", size: str = "10M") -> list[str]:
    return [f"qemu-img create -q -f qcow2 {options} image {size}", FILL]


KINDS = {
    "plain": create(),
    "v2": [create("-o compat=0.10")[0], FILL.replace("-z~", "")],
    "wide": create("-o refcount_bits=64"),
    "narrow": create("-o refcount_bits=1"),
    "small": create("-o cluster_size=512", "9M"),
    "lazy": create("-o lazy_refcounts=on"),
    "zstd": create("-o compression_type=zstd"),
    "snapshot": [create()[0], "qemu-io -c write~-P~1~0~1M image", "qemu-img snapshot -c one image"],
    "grown after a snapshot": [
        create()[0], "qemu-io -c write~-P~1~0~1M image", "qemu-img snapshot -c one image",
        "qemu-img resize -q image 20M",
    ],
    "overlay": ["qemu-img create -q -f raw base 10M", "qemu-io -f raw -c write~-P~9~0~10M base",
                *create("-b base -F raw")],
    "v2 overlay": ["qemu-img create -q -f raw base 10M", "qemu-io -f raw -c write~-P~9~0~10M base",
                   create("-o compat=0.10 -b base -F raw")[0], "qemu-io -c write~-P~3~1M~128k image"],
    "long name": [f"qemu-img create -q -f raw {'b' * 200} 10M", *create(f"-b ./././././././{'b' * 200} -F raw")],
    "metadata": create("-o preallocation=metadata"),
}  # fmt: skip

CHANGES = [
    "compat=0.10", "compat=1.1", "refcount_bits=1", "refcount_bits=64",
    "lazy_refcounts=on", "lazy_refcounts=off", "compat=0.10,refcount_bits=16",
    "size=20M", "size=5M,lazy_refcounts=on", "compat=v2,lazy_refcounts=on", "compat=v3,lazy_refcounts=on,size=3M",
]  # fmt: skip


FEW = ("compat=0.10,refcount_bits=16", "compat=1.1,refcount_bits=8", "size=5M,lazy_refcounts=on")
MATRIX = [(kind, change) for kind in KINDS for change in (CHANGES if kind in ("plain", "v2") else FEW)]


@pytest.mark.parametrize(("kind", "change"), MATRIX)
def test_changes(kind: str, change: str, tmp_path: Path) -> None:
    make(tmp_path, *KINDS[kind], "cp --sparse=always image theirs")
    theirs = qemu_img("amend", "-o", change, "theirs", cwd=tmp_path)
    ours = diskwright("amend", "-o", change, "image", cwd=tmp_path)
    assert (ours.code, ours.out, ours.err) == (theirs.code, theirs.out, theirs.err)
    make(tmp_path, "qemu-img check -q image", "qemu-img compare -q -f qcow2 -F qcow2 image theirs")
    for words in (["info", "--output=json"], ["map", "--output=json"]):
        left, right = (qemu_img(*words, name, cwd=tmp_path).out for name in ("image", "theirs"))
        assert _comparable(left) == _comparable(right)


def _comparable(text: str) -> object:
    """Facts that do not depend on where in the file things are."""
    import json

    found = json.loads(text)
    if isinstance(found, list):
        return [{key: value for key, value in row.items() if key != "offset"} for row in _joined(found)]
    return {key: value for key, value in found.items() if key not in ("filename", "actual-size")}


def _joined(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    joined: list[dict[str, object]] = []
    for row in rows:
        row.pop("offset", None)
        if joined and {**joined[-1], "start": 0, "length": 0} == {**row, "start": 0, "length": 0}:
            joined[-1]["length"] += row["length"]  # type: ignore[operator]
        else:
            joined.append(row)
    return joined


@pytest.mark.parametrize("kind", ["v2", "overlay", "long name", "v2 overlay"])
def test_the_header_is_what_qemu_img_makes_of_it(kind: str, tmp_path: Path) -> None:
    make(tmp_path, *KINDS[kind], "cp image theirs")
    change = "compat=1.1" if kind.startswith("v2") else "compat=0.10"
    qemu_img("amend", "-o", change, "theirs", cwd=tmp_path)
    assert diskwright("amend", "-o", change, "image", cwd=tmp_path).code == 0
    ours, theirs = ((tmp_path / name).read_bytes()[:65536] for name in ("image", "theirs"))
    if kind != "long name":  # where the name has to lie elsewhere, so that one write changes the header
        assert ours == theirs
    assert ours[72:112] == theirs[72:112]


@pytest.mark.parametrize(
    "words",
    [
        "image", "-o compat=1.1", "-o compat=1.1 image image", "-o compat=9 image", "-o foo=1 image",
        "-o cluster_size=4k image", "-o preallocation=off image", "-o compression_type=zstd image",
        "-o data_file=x image", "-o data_file_raw=on image", "-o data_file_raw=off image", "-o backing_file=b image",
        "-o backing_file= image", "-o backing_fmt=raw image", "-o refcount_bits=7 image", "-o refcount_bits=128 image",
        "-f raw -o help", "-f raw -o size=1M image", "-f bogus -o size=1M image", "-o compat=1.1 missing",
        "-q -p -o compat=1.1 image", "--force -o compat=1.1 image", "-t bogus -o compat=1.1 image",
        "--image-opts -o compat=0.10 driver=qcow2,file.filename=image", "-o ,compat=1.1 image",
        "-o lazy_refcounts image",
        "-o compat=0.10,compat=1.1 image", "-o compat=0.10 -o lazy_refcounts=off image",
        "-o size=10M image",
    ],
)  # fmt: skip
def test_ways_to_say_it(words: str, tmp_path: Path) -> None:
    make(tmp_path, *KINDS["plain"])
    theirs = qemu_img("amend", *words.split(), cwd=tmp_path)
    (tmp_path / "image").unlink()
    make(tmp_path, *KINDS["plain"])
    ours = diskwright("amend", *words.split(), cwd=tmp_path)
    assert (ours.code, ours.out, ours.err.replace(" amend --help", " --help")) == (theirs.code, theirs.out, theirs.err)


@pytest.mark.parametrize("words", ["-o lazy_refcounts=bla image", "-o refcount_bits=x image", "-o size=x image"])
def test_wrong_values(words: str, tmp_path: Path) -> None:
    make(tmp_path, *KINDS["plain"])
    same("amend", *words.split(), cwd=tmp_path, err=False)


def test_help_lists_what_can_be_changed(tmp_path: Path) -> None:
    make(tmp_path, *KINDS["plain"])
    theirs = qemu_img("amend", "-o", "help", "image", cwd=tmp_path).out.splitlines()
    for words in (["-f", "qcow2", "-o", "help"], ["-o", "help", "image"]):
        ours = diskwright("amend", *words, cwd=tmp_path).out.splitlines()
        assert ours[0] == theirs[0]
        names = [line.split("=")[0] for line in theirs[1:] if not line.startswith("  encrypt.")]
        assert [line.split("=")[0] for line in ours[1:] if not line.startswith("  encrypt.")] == names


def test_progress(tmp_path: Path) -> None:
    make(tmp_path, *KINDS["plain"])
    out = diskwright("amend", "-p", "-o", "refcount_bits=8", "image", cwd=tmp_path).out
    assert out.startswith("    (0.00/100%)\r") and out.endswith("    (100.00/100%)\r\n")


def test_compressed_zstd_cannot_become_version_2(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"ab" * 100_000)
    make(tmp_path, "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd raw image")
    done = same("amend", "-o", "compat=0.10", "image", cwd=tmp_path)
    assert done.code == 1


def test_bitmaps_are_not_lost(tmp_path: Path) -> None:
    """qemu-img drops them, and leaks their space."""
    make(tmp_path, *KINDS["plain"], "qemu-img bitmap --add image b")
    done = diskwright("amend", "-o", "compat=0.10", "image", cwd=tmp_path)
    assert done.code == 1 and "bitmaps" in done.err
    make(tmp_path, "qemu-img bitmap --disable image b", "qemu-img check -q image")
