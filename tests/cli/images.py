"""Images for the differential tests: how each is made with QEMU's own tools, in an empty directory."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.cli.run import make

# Commands' words are split at spaces; a tilde in a word stands for a space (see ``run.make``).
_COMMANDS: dict[str, list[str]] = {
    "raw-sparse": [
        "qemu-img create -q -f raw image 1M",
        "qemu-io -f raw -c write~64k~64k -c write~512k~4k image",
    ],
    "raw-full": ["qemu-img create -q -f raw image 256k", "qemu-io -f raw -c write~0~256k image"],
    "raw-holes": ["truncate -s 3M image"],
    "raw-empty": ["truncate -s 0 image"],
    "raw-odd": ["truncate -s 1001 image"],
    "raw-odd-full": ["qemu-img create -q -f raw image 70144", "qemu-io -f raw -c write~0~70144 image",
                     "truncate -s 70001 image"],
    "qcow2-new": ["qemu-img create -q -f qcow2 image 10M"],
    "qcow2-zero-size": ["qemu-img create -q -f qcow2 image 0"],
    "qcow2-odd-size": ["qemu-img create -q -f qcow2 image 100001", "qemu-io -f qcow2 -c write~64k~34k image"],
    "qcow2-data": [
        "qemu-img create -q -f qcow2 image 1M",
        "qemu-io -f qcow2 -c write~64k~128k -c write~512k~64k -c write~-z~768k~64k -c discard~64k~64k image",
    ],
    "qcow2-full": ["qemu-img create -q -f qcow2 image 512k", "qemu-io -f qcow2 -c write~0~512k image"],
    "qcow2-scattered": [
        "qemu-img create -q -f qcow2 image 1M",
        "qemu-io -f qcow2 -c write~512k~64k -c write~0~64k -c write~256k~64k -c write~64k~64k image",
    ],
    "qcow2-4k-clusters": [
        "qemu-img create -q -f qcow2 -o cluster_size=4k image 300k",
        "qemu-io -f qcow2 -c write~8k~20k -c write~200k~4k image",
    ],
    "qcow2-2M-clusters": [
        "qemu-img create -q -f qcow2 -o cluster_size=2M image 9M",
        "qemu-io -f qcow2 -c write~2M~4M image",
    ],
    "qcow2-v2": [
        "qemu-img create -q -f qcow2 -o compat=0.10 image 1M",
        "qemu-io -f qcow2 -c write~64k~64k image",
    ],
    "qcow2-subclusters": [
        "qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k image 1M",
        "qemu-io -f qcow2 -c write~132k~8k -c write~512k~128k -c write~-z~520k~4k image",
    ],
    "qcow2-compressed": [
        "qemu-img create -q -f raw source 1M",
        "qemu-io -f raw -c write~64k~64k -c write~512k~4k source",
        "qemu-img convert -c -f raw -O qcow2 source image",
    ],
    "qcow2-zstd": [
        "qemu-img create -q -f raw source 1M",
        "qemu-io -f raw -c write~64k~64k -c write~512k~4k source",
        "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd source image",
    ],
    "qcow2-lazy": ["qemu-img create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=1 image 1M"],
    "qcow2-metadata": [
        "qemu-img create -q -f qcow2 -o preallocation=metadata image 4M",
        "qemu-io -f qcow2 -c write~1M~256k image",
    ],
    "qcow2-falloc": ["qemu-img create -q -f qcow2 -o preallocation=falloc image 1M"],
    "qcow2-on-metadata": [
        "qemu-img create -q -f qcow2 -o preallocation=metadata base 4M",
        "qemu-io -f qcow2 -c write~1M~256k base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 image",
        "qemu-io -f qcow2 -c write~2M~64k image",
    ],
    "qcow2-overlay": [
        "qemu-img create -q -f qcow2 base 1M",
        "qemu-io -f qcow2 -c write~64k~128k -c write~768k~64k base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 image",
        "qemu-io -f qcow2 -c write~64k~64k -c write~-z~768k~64k image",
    ],
    "qcow2-short-backing": [
        "qemu-img create -q -f qcow2 base 1M",
        "qemu-io -f qcow2 -c write~64k~128k -c write~-z~960k~64k base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 image 3M",
        "qemu-io -f qcow2 -c write~0~64k -c write~2M~64k image",
    ],
    "qcow2-long-backing": [
        "qemu-img create -q -f qcow2 base 2M",
        "qemu-io -f qcow2 -c write~0~2M base",
        "qemu-img create -q -f qcow2 -b base -F qcow2 image 1M",
    ],
    "qcow2-on-raw": [
        "qemu-img create -q -f raw base 1M",
        "qemu-io -f raw -c write~64k~64k base",
        "qemu-img create -q -f qcow2 -b base -F raw image 2M",
        "qemu-io -f qcow2 -c write~256k~64k image",
    ],
    "qcow2-deep": [
        "qemu-img create -q -f qcow2 bottom 1M",
        "qemu-io -f qcow2 -c write~0~256k bottom",
        "qemu-img create -q -f qcow2 -b bottom -F qcow2 middle 2M",
        "qemu-io -f qcow2 -c write~64k~64k -c write~1536k~64k middle",
        "qemu-img create -q -f qcow2 -b middle -F qcow2 image 3M",
        "qemu-io -f qcow2 -c write~128k~64k image",
    ],
    "qcow2-backing-elsewhere": [
        "mkdir sub",
        "qemu-img create -q -f qcow2 sub/base 1M",
        "qemu-io -f qcow2 -c write~64k~64k sub/base",
        "qemu-img create -q -f qcow2 -b sub/base -F qcow2 image",
    ],
    "qcow2-backing-gone": ["qemu-img create -q -u -f qcow2 -b gone -F qcow2 image 1M"],
    "qcow2-data-file": [
        "qemu-img create -q -f qcow2 -o data_file=data image 1M",
        "qemu-io -f qcow2 -c write~64k~64k image",
    ],
    "qcow2-raw-data-file": [
        "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on image 1M",
        "qemu-io -f qcow2 -c write~64k~64k image",
    ],
}  # fmt: skip


def _patched(base: str, *patches: tuple[str, int, int]) -> Callable[[Path], None]:
    """Image ``base`` with big-endian values (format, offset, value) written into it."""

    def build(directory: Path) -> None:
        make(directory, *_COMMANDS[base])
        path = directory / "image"
        data = bytearray(path.read_bytes())
        for layout, offset, value in patches:
            struct.pack_into(f">{layout}", data, offset, value)
        path.write_bytes(data)

    return build


# In a new image of QEMU's with 64 KiB clusters: header, refcount table, refcount block, L1 table, L2 table.
_REFCOUNT_TABLE, _REFCOUNT_BLOCK, _L1, _L2, _DATA = (n << 16 for n in (1, 2, 3, 4, 5))
_COPIED = 1 << 63


def _with_leak_at_end(directory: Path) -> None:
    make(directory, *_COMMANDS["qcow2-full"])
    path = directory / "image"
    data = bytearray(path.read_bytes())
    struct.pack_into(">H", data, _REFCOUNT_BLOCK + 2 * (len(data) >> 16), 1)
    path.write_bytes(data + bytes(1 << 16))


DAMAGED: dict[str, Callable[[Path], None]] = {
    "leak-at-end": _with_leak_at_end,
    "leak-inside": _patched("qcow2-data", ("Q", _L2 + 8 * 8, 0)),
    "refcount-too-low": _patched("qcow2-full", ("H", _REFCOUNT_BLOCK + 2 * 5, 0)),
    "refcount-too-high": _patched("qcow2-full", ("H", _REFCOUNT_BLOCK + 2 * 6, 3)),
    "both": _patched("qcow2-full", ("H", _REFCOUNT_BLOCK + 2 * 5, 0), ("H", _REFCOUNT_BLOCK + 2 * 6, 2)),
    "unaligned-data": _patched("qcow2-full", ("Q", _L2 + 8, _COPIED | (_DATA + 0x200))),
    "data-beyond-end": _patched("qcow2-full", ("Q", _L2 + 8, _COPIED | 0x10000000)),
    "shared-cluster": _patched("qcow2-full", ("Q", _L2 + 8, _COPIED | _DATA)),
    "not-copied": _patched("qcow2-full", ("Q", _L2 + 8, _DATA + 0x10000)),
    "unaligned-l2": _patched("qcow2-full", ("Q", _L1, _COPIED | 0x200)),
    "dirty": _patched("qcow2-data", ("Q", 72, 1)),
    "corrupt-bit": _patched("qcow2-data", ("Q", 72, 2)),
    "unknown-feature": _patched("qcow2-data", ("Q", 72, 1 << 40)),
    "bad-cluster-bits": _patched("qcow2-data", ("I", 20, 40)),
    "bad-version": _patched("qcow2-data", ("I", 4, 9)),
    "l1-beyond-end": _patched("qcow2-data", ("Q", 40, 1 << 50)),
    "l1-too-small": _patched("qcow2-data", ("I", 36, 0)),
    "backing-name-too-long": _patched("qcow2-overlay", ("I", 16, 1024)),
    "refcount-order": _patched("qcow2-data", ("I", 96, 7)),
    "header-length": _patched("qcow2-data", ("I", 100, 72)),
}


def _without_backing_format(directory: Path) -> None:
    """An overlay whose header does not say its backing file's format: the extension gets an unknown type."""
    make(directory, *_COMMANDS["qcow2-overlay"])
    path = directory / "image"
    data = path.read_bytes()
    assert data.count(_BACKING_FORMAT) == 1
    path.write_bytes(data.replace(_BACKING_FORMAT, b"\x12\x34\x56\x78"))


_BACKING_FORMAT = bytes.fromhex("e2792aca")
OTHERS: dict[str, Callable[[Path], None]] = {"qcow2-backing-of-any-format": _without_backing_format}
NAMES = (*_COMMANDS, *OTHERS)
RAW_NAMES = tuple(name for name in NAMES if name.startswith("raw"))


def build(name: str, directory: Path) -> str:
    """Makes the image ``name``; returns its format."""
    if name in DAMAGED or name in OTHERS:
        (DAMAGED | OTHERS)[name](directory)
        return "qcow2"
    make(directory, *_COMMANDS[name])
    return name.partition("-")[0]
