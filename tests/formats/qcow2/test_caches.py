"""What an open image may keep in memory, and how long."""

from __future__ import annotations

import gc
import os
import random
import struct
import time
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import OptionError
from diskwright.formats.qcow2.caches import budgets
from diskwright.formats.qcow2.layout import CACHE_BYTES, COPIED
from diskwright.formats.qcow2.options import Qcow2Options
from tests.formats.qcow2.support import Image, Tape, created, header_of

MiB = 1 << 20


@pytest.mark.parametrize(
    ("options", "readonly", "writable"),
    [
        ({}, (CACHE_BYTES, 0, 0), (16 * MiB, 8 * MiB, 8 * MiB)),
        ({"cache_size": 12 * MiB}, (12 * MiB, 0, 0), (6 * MiB, 3 * MiB, 3 * MiB)),
        ({"l2_cache_size": 3 * MiB}, (3 * MiB, 0, 0), (2 * MiB, MiB, 8 * MiB)),
        ({"cache_size": 5 * MiB, "l2_cache_size": 3 * MiB}, (3 * MiB, 0, 0), (2 * MiB, MiB, 2 * MiB)),
        ({"cache_size": 5 * MiB, "refcount_cache_size": 2 * MiB}, (5 * MiB, 0, 0), (2 * MiB, MiB, 2 * MiB)),
        ({"l2_cache_size": 3 * MiB, "refcount_cache_size": MiB}, (3 * MiB, 0, 0), (2 * MiB, MiB, MiB)),
    ],
)
def test_how_memory_is_shared_out(
    options: dict[str, int], readonly: tuple[int, ...], writable: tuple[int, ...]
) -> None:
    given = Qcow2Options(**options)
    assert budgets(given, writable=False) == readonly
    assert budgets(given, writable=True) == writable
    assert sum(writable) <= sum(options.values()) + (0 if options else CACHE_BYTES) + 8 * MiB


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache_size": 3, "l2_cache_size": 1, "refcount_cache_size": 1}, "may not be set at the same time"),
        ({"cache_size": 1, "l2_cache_size": 2}, "l2-cache-size may not exceed cache-size"),
        ({"cache_size": 1, "refcount_cache_size": 2}, "refcount-cache-size may not exceed cache-size"),
        ({"l2_cache_entry_size": 1000}, "between 512 and the cluster size"),
        ({"l2_cache_entry_size": 131072}, "between 512 and the cluster size"),
        ({"cache_clean_interval": -1}, "Cache clean interval"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Image(Tape(created(size=MiB)), **options)


def sparse(path: Path, size: int) -> None:
    """An image all of whose L2 tables are there, as holes of the file: nothing mapped, much to read."""
    data = bytearray(created(size=size))
    header = header_of(bytes(data))
    first = 1 << 20
    table = struct.pack(f">{header.l1_size}Q", *((first + i) << 16 | COPIED for i in range(header.l1_size)))
    end = header.l1_table_offset + len(table)
    data.extend(bytes(max(0, end - len(data))))
    data[header.l1_table_offset : end] = table
    path.write_bytes(data)
    os.truncate(path, (first + header.l1_size) << 16)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_random_reads_of_eight_terabytes_stay_within_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "image"
    sparse(path, 8 << 40)
    chance = random.Random(1)
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "l2-cache-size": str(2 * MiB)}
    with diskwright.open(spec) as disk:
        for _ in range(100):
            disk.pread(chance.randrange(8 << 31) * 512, 512)
        before = resident()
        tables = set()
        for _ in range(3000):
            offset = chance.randrange(8 << 31) * 512
            tables.add(offset >> 29)
            disk.pread(offset, 512)
        grown = resident() - before
        l2 = disk.node.format.mapping.l2  # type: ignore[attr-defined]
        assert len(tables) * 65536 > 100 * MiB, "so much was read"
        assert (len(l2.young) + len(l2._old)) * l2.slice_bytes <= 2 * MiB
        assert grown < 8 * MiB, "the limit, and what an allocator may keep"


def test_what_is_not_used_is_given_up() -> None:
    tape = Tape(created(size=8 * MiB, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, b"x" * 200_000)
        image.disk.flush()
        l2, writer = image.format.mapping.l2, image.format.writer
        assert writer is not None and l2.peek(0) is not None and l2.peek(5) is not None
        image.format.clean_caches()
        assert image.disk.pread(0, 512) == b"x" * 512
        image.format.clean_caches()
        assert l2.peek(0) is not None, "used meanwhile"
        assert l2.peek(5) is None, "not used meanwhile"
        image.disk.pwrite(100_000, b"changed")
        image.format.clean_caches()
        image.format.clean_caches()
        image.disk.flush()
        assert image.disk.pread(100_000, 7) == b"changed"
    with Image(Tape(bytes(tape.data)), writable=False) as image:
        assert image.disk.pread(100_000, 7) == b"changed"


@pytest.mark.parametrize("writable", [False, True])
def test_they_are_given_up_by_themselves(writable: bool) -> None:
    with Image(Tape(created(size=8 * MiB)), writable=writable, cache_clean_interval=1) as image:
        l2 = image.format.mapping.l2
        if writable:
            image.disk.pwrite(0, b"x")
            image.disk.flush()
            assert l2.peek(0) is not None
        deadline = time.monotonic() + 60
        while l2.peek(0) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert l2.peek(0) is None
