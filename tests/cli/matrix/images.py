"""The images the command lines are about: one of every kind, all small, made by QEMU's own programs."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.cli.run import make

WRITE: Final = "-c write~-P~1~0~100k -c write~-P~2~512k~128k -c write~-z~256k~64k"

SECRET: Final = "secret,id=s0,data=open~sesame"
_ENCRYPT: Final = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"

RECIPES: Final[dict[str, tuple[str, ...]]] = {
    "raw": ("qemu-img create -q -f raw raw 1M", f"qemu-io -f raw {WRITE} raw"),
    "empty": ("qemu-img create -q -f raw empty 0",),
    "q3": ("qemu-img create -q -f qcow2 q3 1M", f"qemu-io -f qcow2 {WRITE} q3"),
    "q2": ("qemu-img create -q -f qcow2 -o compat=0.10 q2 1M", "qemu-io -f qcow2 -c write~-P~1~0~100k q2"),
    "qext": (
        "qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k qext 1M",
        f"qemu-io -f qcow2 {WRITE} -c discard~516k~8k qext",
    ),
    "q512": ("qemu-img create -q -f qcow2 -o cluster_size=512 q512 1M", f"qemu-io -f qcow2 {WRITE} q512"),
    "qz": ("qemu-img convert -c -f raw -O qcow2 raw qz",),
    "qzstd": ("qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd raw qzstd",),
    "q1bit": (
        "qemu-img create -q -f qcow2 -o refcount_bits=1,lazy_refcounts=on q1bit 1M",
        "qemu-io -f qcow2 -c write~-P~1~0~100k q1bit",
    ),
    "qpre": ("qemu-img create -q -f qcow2 -o preallocation=metadata qpre 1M",),
    "q4": ("qemu-img create -q -f qcow2 q4 4M", "qemu-io -f qcow2 -c write~-P~1~0~100k q4"),
    "over": ("qemu-img create -q -f qcow2 -b q3 -F qcow2 over", "qemu-io -f qcow2 -c write~-P~5~64k~64k over"),
    "over2": ("qemu-img create -q -f qcow2 -b over -F qcow2 over2 2M", "qemu-io -f qcow2 -c write~-z~0~64k over2"),
    "overraw": ("qemu-img create -q -f qcow2 -b raw -F raw overraw", "qemu-io -f qcow2 -c write~-P~6~0~4k overraw"),
    "orphan": ("qemu-img create -q -u -f qcow2 -b gone -F qcow2 orphan 1M",),
    "unsaid": ("qemu-img create -q -u -f qcow2 -o compat=0.10 -b gone -F raw unsaid 1M",),
    "snap": (
        "qemu-img create -q -f qcow2 snap 1M",
        "qemu-io -f qcow2 -c write~-P~1~0~64k snap",
        "qemu-img snapshot -c one snap",
        "qemu-io -f qcow2 -c write~-P~2~0~64k snap",
        "qemu-img snapshot -c two snap",
    ),
    "bm": (
        "qemu-img create -q -f qcow2 bm 1M",
        "qemu-img bitmap --add bm b0",
        "qemu-img bitmap --add --disable -g 32k bm b1",
        "qemu-io -f qcow2 -c write~-P~1~0~100k bm",
    ),
    "outside": (
        "qemu-img create -q -f qcow2 -o data_file=outside.data,data_file_raw=on outside 1M",
        "qemu-io -f qcow2 -c write~-P~1~0~100k outside",
    ),
    "luks": (
        f"qemu-img create -q -f luks --object {SECRET} -o key-secret=s0,iter-time=10 luks 1M",
        f"qemu-io --object {SECRET} --image-opts -c write~-P~1~0~64k driver=luks,key-secret=s0,file.filename=luks",
    ),
    "qluks": (f"qemu-img create -q -f qcow2 --object {SECRET} -o {_ENCRYPT} qluks 1M",),
    "vdi": ("qemu-img create -q -f vdi vdi 3M", "qemu-io -f vdi -c write~-P~1~0~100k -c write~-z~1M~1M vdi"),
    "locked": ("qemu-img create -q -f qcow2 locked 1M",),
}
"""By name; later ones may need earlier ones."""

NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "over": ("q3",),
    "over2": ("over", "q3"),
    "overraw": ("raw",),
    "outside": ("outside.data",),
}
"""What an image is not complete without."""

DAMAGED: Final = (
    "odd", "short", "text", "header-cut", "version-9", "bits-60", "size-huge", "l1-far", "features", "leak",
    "corrupt-l2", "corrupt-refcount", "dirty", "marked", "header-length", "luks-cut", "luks-version",
)  # fmt: skip

SOUND: Final = tuple(name for name in RECIPES if name != "locked")

OTHERS: Final = ("missing", "directory", "dangling", "link", "missing/x", "raw/x")
"""Names that are no images of their own."""


def prepare(directory: Path) -> None:
    """Makes all of them in ``directory``."""
    for recipe in RECIPES.values():
        for command in recipe:
            _made(directory, command)
    _damage(directory)
    (directory / "directory").mkdir()
    os.symlink("nowhere", directory / "dangling")
    os.symlink("q3", directory / "link")


def _made(directory: Path, command: str) -> None:
    for _ in range(10):  # while other processes come and go, qemu-img cannot always measure how fast it derives a key
        try:
            return make(directory, command)
        except AssertionError as error:
            if "accurate CPU usage" not in str(error):
                raise
    raise AssertionError(f"{command} never came to an end")


def _damage(directory: Path) -> None:
    q3 = (directory / "q3").read_bytes()

    def changed(name: str, *changes: tuple[int, str, int], base: bytes = q3) -> None:
        image = bytearray(base)
        for offset, form, value in changes:
            struct.pack_into(f">{form}", image, offset, value)
        (directory / name).write_bytes(image)

    (directory / "odd").write_bytes(b"\1" * 70001)
    (directory / "short").write_bytes(b"QFI\xfb")
    (directory / "text").write_bytes(b"not an image\n")
    (directory / "header-cut").write_bytes(q3[:80])
    changed("version-9", (4, "I", 9))
    changed("bits-60", (20, "I", 60))
    changed("size-huge", (24, "Q", 1 << 62))
    changed("l1-far", (40, "Q", 1 << 40))
    changed("features", (72, "Q", 1 << 40))
    changed("header-length", (100, "I", 40))
    changed("dirty", (72, "Q", 1))
    changed("marked", (72, "Q", 2))
    (directory / "leak").write_bytes(q3 + bytes(65536))
    refcounts = struct.unpack_from(">Q", q3, struct.unpack_from(">Q", q3, 48)[0])[0]
    changed("leak", (refcounts + 2 * (len(q3) // 65536), "H", 1), base=q3 + bytes(65536))
    changed("corrupt-refcount", (refcounts + 2 * 5, "H", 0))
    l2 = struct.unpack_from(">Q", q3, struct.unpack_from(">Q", q3, 40)[0])[0] & ((1 << 56) - 512)
    changed("corrupt-l2", (l2, "Q", (1 << 63) | 0x123400))
    make(
        directory,
        "qemu-img create -q -u -f qcow2 -b itself -F qcow2 names-itself 1M",
        "qemu-img rebase -u -b names-itself -F qcow2 names-itself",
    )
    luks = (directory / "luks").read_bytes()
    (directory / "luks-cut").write_bytes(luks[:4096])
    changed("luks-version", (6, "H", 7), base=luks)


@contextlib.contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """While this lasts, another program has ``locked`` open for writing."""
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(directory / "locked")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        while b"1 MiB" not in (line := holder.stdout.readline()):  # it answers when the image is open
            assert line, "qemu-io did not open the image"
        yield
    finally:
        holder.communicate(timeout=60)
