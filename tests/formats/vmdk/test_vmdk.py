"""vmdk beyond the conformance suite."""

from __future__ import annotations

import struct
from pathlib import Path

import diskwright
from tests.formats.campaign import Campaign


class TestSparse(Campaign):
    format_name = "vmdk"
    structures = ((0, 80), (512, 400), (21 * 512, 64))


class TestZeroedGrains(TestSparse):
    create_options = {"zeroed_grain": True}
    qemu_options = "zeroed_grain=on"


def test_both_directories_name_the_same(tmp_path: Path) -> None:
    path = TestSparse().make(tmp_path / "image", by_qemu=True, size=100 << 20)
    cid = path.read_bytes()[512:1024]
    with diskwright.open(str(path), format="vmdk", writable=True) as disk:
        disk.pwrite(40 << 20, b"x" * 100000)
    raw = path.read_bytes()
    tables = []
    for at in (48, 56):
        (directory,) = struct.unpack_from("<Q", raw, at)
        starts = struct.unpack_from("<4I", raw, directory * 512)
        tables.append([raw[start * 512 : start * 512 + 2048] for start in starts])
    assert tables[0] == tables[1] and any(map(any, tables[0]))
    assert raw[512:1024] != cid
