"""``convert -c`` beside ``qemu-img convert -c``: the same bytes and kinds of clusters, the same refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]


def disk(size: int) -> bytes:
    chance = random.Random(size)
    parts = []
    while sum(map(len, parts)) < size:
        length = chance.choice((512, 4096, 30000, 200000))
        word = chance.randbytes(5)
        parts.append(chance.choice((bytes(length), chance.randbytes(length), (word * length)[:length])))
    return b"".join(parts)[:size]


def check(name: str, cwd: Path) -> dict[str, object]:
    done = qemu_img("check", "--output=json", name, cwd=cwd)
    assert done.code == 0, done
    found: dict[str, object] = json.loads(done.out)
    return {key: found.get(key, 0) for key in ("allocated-clusters", "total-clusters", "compressed-clusters")}


def info(name: str, cwd: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(qemu_img("info", "--output=json", name, cwd=cwd).out)
    return {key: value for key, value in found.items() if key not in ("actual-size", "filename")}


def space(name: str, cwd: Path) -> int:
    return (cwd / name).stat().st_size


@pytest.mark.parametrize("size", [1 << 20, (3 << 20) + 512, 100])
@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "2M"])
def test_both_ways(cluster: str, method: str, size: int, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(disk(size))
    words = f"convert -c -f raw -O qcow2 -o cluster_size={cluster},compression_type={method} raw"
    theirs = qemu_img(*words.split(), "theirs", cwd=tmp_path)
    ours = diskwright(*words.split(), "ours", cwd=tmp_path)
    assert ours == theirs and ours.code == 0
    assert check("ours", tmp_path) == check("theirs", tmp_path)
    assert info("ours", tmp_path) == info("theirs", tmp_path)
    assert qemu_img("compare", "-f", "raw", "-F", "qcow2", "raw", "ours", cwd=tmp_path).code == 0
    assert diskwright("compare", "ours", "theirs", cwd=tmp_path).code == 0
    for program in (qemu_img, diskwright):
        assert program("convert", "-O", "raw", "ours", "back", cwd=tmp_path).code == 0
        assert (tmp_path / "back").read_bytes() == disk(size).ljust(-(-size // 512) * 512, b"\0")
        assert program("convert", "-O", "raw", "theirs", "back", cwd=tmp_path).code == 0
        assert (tmp_path / "back").read_bytes() == disk(size).ljust(-(-size // 512) * 512, b"\0")


@pytest.mark.parametrize(
    "words",
    [
        "-c -O qcow2 raw",
        "-c -W -m 1 -O qcow2 raw",
        "-c -m 16 -O qcow2 raw",
        "-c -S 0 -O qcow2 raw",
        "-c -S 64k -O qcow2 raw",
        "-c -O qcow2 -o preallocation=off raw",
        "-c -O qcow2 -o compat=0.10 raw",
        "-c -O qcow2 -o refcount_bits=1 raw",
        "-c -O qcow2 raw raw raw",
        "-c -O qcow2 compressed",
        "-c -t none -T none -O qcow2 raw",
        "-c -r 1G -q -O qcow2 raw",
    ],
)
def test_ways_to_compress(words: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(disk(2_000_384))
    make(tmp_path, "qemu-img convert -c -f raw -O qcow2 raw compressed")
    theirs = qemu_img("convert", *words.split(), "theirs", cwd=tmp_path)
    ours = diskwright("convert", *words.split(), "ours", cwd=tmp_path)
    assert ours == theirs and ours.code == 0
    assert check("ours", tmp_path) == check("theirs", tmp_path)
    assert info("ours", tmp_path) == info("theirs", tmp_path)
    assert qemu_img("compare", "ours", "theirs", cwd=tmp_path).code == 0
    if words == "-c -O qcow2 raw":
        assert diskwright("convert", *words.split(), "again", cwd=tmp_path).code == 0
        assert (tmp_path / "again").read_bytes() == (tmp_path / "ours").read_bytes()


def test_over_a_backing_file(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(disk(2 << 20))
    make(
        tmp_path,
        "qemu-img convert -f raw -O qcow2 raw base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 -o cluster_size=4k image 2100k",
        "qemu-io -c write~-P~7~100k~200k -c write~-z~500k~70k -c write~-P~1~2090k~8k image",
    )
    words = ("convert", "-c", "-O", "qcow2", "-B", "base", "-F", "qcow2", "image")
    assert qemu_img(*words, "theirs", cwd=tmp_path).code == 0
    assert diskwright(*words, "ours", cwd=tmp_path).code == 0
    for name in ("ours", "theirs"):
        assert qemu_img("compare", "image", name, cwd=tmp_path).code == 0
    assert check("ours", tmp_path)["compressed-clusters"]
    assert space("ours", tmp_path) < 1 << 20


@pytest.mark.parametrize("level", ["4", "6", "9"])
def test_levels(level: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes((Path(__file__).read_bytes() * 200)[: 1 << 20])
    make(tmp_path, "qemu-img convert -c -f raw -O qcow2 raw theirs")
    assert diskwright("convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "quick", cwd=tmp_path).code == 0
    words = ("convert", "-c", "--compression-level", level, "-f", "raw", "-O", "qcow2", "raw", "ours")
    assert diskwright(*words, cwd=tmp_path).code == 0
    assert qemu_img("compare", "ours", "raw", cwd=tmp_path).code == 0
    assert space("ours", tmp_path) < space("quick", tmp_path)
    if level == "6":
        assert abs(space("ours", tmp_path) - space("theirs", tmp_path)) <= 512


def test_over_what_is_there(tmp_path: Path) -> None:
    """``-n``: qemu-img cannot overwrite a cluster with a compressed one, nor end within one; this can."""
    (tmp_path / "raw").write_bytes(disk((1 << 20) + 512))
    make(tmp_path, "qemu-img create -q -f qcow2 ours 4M", "qemu-io -c write~-P~9~0~4M ours")
    for _ in range(2):
        assert diskwright("convert", "-c", "-n", "-f", "raw", "-O", "qcow2", "raw", "ours", cwd=tmp_path).code == 0
        assert check("ours", tmp_path)["compressed-clusters"]
    assert diskwright("convert", "-O", "raw", "ours", "back", cwd=tmp_path).code == 0
    assert (tmp_path / "back").read_bytes() == disk((1 << 20) + 512) + b"\x09" * ((3 << 20) - 512)


@pytest.mark.parametrize(
    "words",
    [
        "-c raw out",
        "-c -O raw raw out",
        "-c -C -O qcow2 raw out",
        "-c -C -S 0 -O raw raw out",
        "-c -n raw out",
        "-c -n -O raw raw out",
        "-c -O raw missing out",
        "-c -O nope raw out",
        "-c -O file raw out",
        "-c -O raw -o preallocation=full raw out",
        "-c -O qcow2 -o preallocation=metadata raw out",
        "-c -O qcow2 -o preallocation=bogus raw out",
        "-c -O qcow2 -o encryption=on raw out",
        "-c -O qcow2 -o encrypt.format=luks raw out",
        "-c --target-is-zero -O qcow2 raw out",
        "-c -n --target-image-opts raw driver=raw,file.filename=out",
    ],
)
def test_refusals(words: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 4096)
    (tmp_path / "out").write_bytes(b"kept" * 2048)
    done = same("convert", *words.split(), cwd=tmp_path)
    assert done.code == 1
    assert (tmp_path / "out").read_bytes() == b"kept" * 2048


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-O qcow2 --compression-level 3", "--compression-level requires use of -c flag"),
        ("-c -O qcow2 --compression-level 0", "Invalid compression level '0'"),
        ("-c -O qcow2 --compression-level x", "Invalid compression level 'x'"),
        ("-c -O qcow2 --compression-level 20", "Invalid compression level '20'"),
        ("-c -O qcow2 --compression-level 12", "1 to 9 with zlib"),
    ],
)
def test_levels_that_are_refused(words: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 4096)
    done = diskwright("convert", *words.split(), "raw", "out", cwd=tmp_path)
    assert done.code == 1 and text in done.err
    assert not (tmp_path / "out").exists()
