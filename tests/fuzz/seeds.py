"""Sound qcow2 images with a bit of everything, made by QEMU, for mutations to begin with."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.formats.qcow2.support import qemu

DATA_FILE = "data.raw"
"""The name by which seeds with an external data file refer to it, beside the image."""


class Kind(NamedTuple):
    """``options`` are qemu-img's for creation; ``size`` in KiB."""

    options: str
    size: int = 4096
    squeezed: bool = False
    snapshots: bool = False
    bitmaps: bool = False


KINDS = {
    "64k": Kind("cluster_size=64k"),
    "64k compressed": Kind("cluster_size=64k", squeezed=True),
    "4k zstd with snapshots": Kind("cluster_size=4k,compression_type=zstd", squeezed=True, snapshots=True),
    "512 compressed": Kind("cluster_size=512", 300, squeezed=True),
    "4k refcounts of a bit": Kind("cluster_size=4k,refcount_bits=1"),
    "4k refcounts of 2 bits with snapshots": Kind("cluster_size=4k,refcount_bits=2", snapshots=True),
    "4k refcounts of 64 bits with snapshots": Kind("cluster_size=4k,refcount_bits=64", snapshots=True),
    "64k version 2 with snapshots": Kind("cluster_size=64k,compat=0.10", snapshots=True),
    "4k with bitmaps": Kind("cluster_size=4k", bitmaps=True),
    "4k with snapshots and bitmaps": Kind("cluster_size=4k", snapshots=True, bitmaps=True),
    "64k subclusters with snapshots": Kind("cluster_size=64k,extended_l2=on", snapshots=True),
    "16k subclusters compressed": Kind("cluster_size=16k,extended_l2=on", 1024, squeezed=True),
    "64k data file": Kind(f"cluster_size=64k,data_file={DATA_FILE}"),
    "16k subclusters with data file": Kind(f"cluster_size=16k,extended_l2=on,data_file={DATA_FILE}", 1024),
}


class Seed(NamedTuple):
    image: bytes
    beside: bytes
    """The external data file; empty when there is none."""

    def store(self, folder: Path, name: str = "image") -> Path:
        path = folder / name
        path.write_bytes(self.image)
        if self.beside:
            (folder / DATA_FILE).write_bytes(self.beside)
        return path


@cache
def seed(name: str, folder: Path) -> Seed:
    """The image; ``folder`` is somewhere to make it."""
    kind = KINDS[name]
    place = folder / f"{abs(hash(name)):x}"
    place.mkdir()
    size = kind.size << 10
    raw, path = place / "source", place / "image"
    chance = random.Random(5)
    source = bytearray(size)
    for i in range(20):
        length = chance.randrange(1, min(70000, size // 4))
        at = chance.randrange(size - length)
        source[at : at + length] = chance.randbytes(length) if i % 2 else (b"abc" * 25000)[:length]
    raw.write_bytes(source)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", kind.options, path, size, folder=place)
    convert = ["qemu-img", "convert", "-n", *(["-c"] if kind.squeezed else []), "-O", "qcow2"]
    qemu(*convert, raw, path, folder=place)

    def write(*commands: str) -> None:
        qemu("qemu-io", *(word for command in commands for word in ("-c", command)), path, folder=place)

    write("write -P 3 0 64k")
    if "0.10" not in kind.options:
        write("write -z 64k 64k", "write -z -u 200k 8k")
    if kind.bitmaps:
        qemu("qemu-img", "bitmap", "--add", path, "one", folder=place)
        write("write -P 9 100k 100k")
        qemu("qemu-img", "bitmap", "--add", "-g", "4096", path, "two", folder=place)
    if kind.snapshots:
        qemu("qemu-img", "snapshot", "-c", "one", path, folder=place)
        write("write -P 3 0 200k")
        qemu("qemu-img", "snapshot", "-c", "two", path, folder=place)
        write("write -P 4 100k 60k")
    data = place / DATA_FILE
    return Seed(path.read_bytes(), data.read_bytes() if data.exists() else b"")
