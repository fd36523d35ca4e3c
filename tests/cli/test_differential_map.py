"""``map`` beside ``qemu-img map``."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.cli import images
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]


@pytest.mark.parametrize("name", images.NAMES)
def test_every_image(name: str, tmp_path: Path) -> None:
    format = images.build(name, tmp_path)
    same("map", "--output=json", "image", cwd=tmp_path)
    same("map", "-f", format, "image", cwd=tmp_path)
    same("map", "-f", "raw", "image", cwd=tmp_path)


@pytest.mark.parametrize("name", ["unaligned-data", "unaligned-l2"])
def test_maps_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    images.build(name, tmp_path)
    for output in ("human", "json"):
        theirs = qemu_img("map", f"--output={output}", "image", cwd=tmp_path)
        ours = diskwright("map", f"--output={output}", "image", cwd=tmp_path)
        assert ours.code == theirs.code == 1
        assert ours.err.startswith("PROGRAM: Could not read file metadata: ") and ours.err.count("\n") == 1


def test_map_says_what_qemu_says_of_data_beyond_the_end(tmp_path: Path) -> None:
    images.build("data-beyond-end", tmp_path)
    theirs = qemu_img("map", "--output=json", "image", cwd=tmp_path)
    ours = diskwright("map", "--output=json", "image", cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)


@pytest.mark.parametrize("seed", range(4))
def test_scattered_clusters_some_of_them_holes_of_the_file(seed: int, tmp_path: Path) -> None:
    """Clusters taken in advance, at random places; some are written to, wholly or in part; and two layers above."""
    chance = random.Random(seed)
    make(tmp_path, "qemu-img create -q -f qcow2 -o preallocation=metadata,cluster_size=16k base 20M")
    shuffle(tmp_path / "base", chance)
    written = [chance.randrange(20 << 8) << 12 for _ in range(60)]
    make(tmp_path, f"qemu-io {' '.join(f'-c~write~{offset}~{chance.choice((4, 16))}k' for offset in written)} base")
    for name, below, size in (("middle", "base", 30), ("image", "middle", 40)):
        make(tmp_path, f"qemu-img create -q -f qcow2 -F qcow2 -b {below} {name} {size}M")
        words = (
            f"-c~{chance.choice(('write', 'write~-z'))}~{chance.randrange(size * 16) << 16}~64k" for _ in range(60)
        )
        make(tmp_path, f"qemu-io {' '.join(words)} {name}")
    for name in ("base", "middle", "image"):
        for output in ("json", "human"):
            same("map", f"--output={output}", name, cwd=tmp_path)
            same("map", f"--output={output}", "-s", "3333k", "-l", "11M", name, cwd=tmp_path)


def shuffle(path: Path, chance: random.Random) -> None:
    """Puts an image's clusters into another order. Its L1 table has one entry."""
    with path.open("r+b") as file:
        head = file.read(104)
        size = 1 << struct.unpack_from(">I", head, 20)[0]
        file.seek(struct.unpack_from(">Q", head, 40)[0])
        place = struct.unpack(">Q", file.read(8))[0] & ~(1 << 63)
        file.seek(place)
        entries = [entry for entry in struct.unpack(f">{size // 8}Q", file.read(size)) if entry]
        chance.shuffle(entries)
        file.seek(place)
        file.write(struct.pack(f">{len(entries)}Q", *entries))


@pytest.mark.parametrize(
    "words",
    [
        "map -s 64k image",
        "map --start-offset=100000 image",
        "map --start-offset=100000 --max-length=70000 image",
        "map --start-offset=100000 --max-length=7M image",
        "map --start-offset=5M image",
        "map --start-offset=1M image",
        "map -l 5000 image",
        "map --max-length=0 image",
        "map missing",
        "map image image",
        "map --output=bogus image",
        "map --image-opts driver=qcow2,file.filename=image",
        "map --image-opts driver=raw,offset=65536,file.driver=file,file.filename=image",
    ],
)
@pytest.mark.parametrize("output", ["human", "json"])
def test_ways_to_say_it(words: str, output: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    more = [] if "--output" in words else [f"--output={output}"]
    theirs = qemu_img(*words.split(), *more, cwd=tmp_path)
    ours = diskwright(*words.split(), *more, cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out)
    assert ours.err.replace(" map --help", " --help") == theirs.err


@pytest.mark.parametrize("words", ["map --start-offset=xx image", "map --max-length=-1 image", "map -s 9E image"])
def test_wrong_sizes(words: str, tmp_path: Path) -> None:
    images.build("qcow2-data", tmp_path)
    theirs = qemu_img(*words.split(), cwd=tmp_path)
    ours = diskwright(*words.split(), cwd=tmp_path)
    assert (ours.code, ours.out) == (theirs.code, theirs.out) == (1, "")
    assert ours.err.split(".")[0] == theirs.err.split(".")[0]
