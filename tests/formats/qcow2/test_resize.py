"""Resizing: what is new reads as zeros, what is cut off is given back, and QEMU agrees."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.errors import LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, UNALLOCATED
from tests.formats.qcow2.support import Image, Tape, checked, contents, created, header_of, poked, qemu

K = 4096


def test_growing_needs_no_new_table_at_first_and_one_later() -> None:
    tape = Tape(created(size=K, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * K)
        place = image.format.mapping.l1_offset
        image.node.resize(2 * K)
        assert image.format.mapping.l1_offset == place, "the L1 table had room"
        image.node.resize(16 << 20)
        assert image.format.mapping.l1_offset != place
        image.disk.pwrite((16 << 20) - 512, b"b" * 512)
        assert image.disk.size == 16 << 20
    data = bytes(tape.data)
    assert contents(data) == b"a" * K + bytes((16 << 20) - K - 512) + b"b" * 512
    assert (checked(data).corruptions, checked(data).leaks) == (0, 0)


@pytest.mark.parametrize("kind", ["data", "ready", "nothing"])
def test_the_rest_of_the_last_cluster_is_zeroed_when_it_comes_into_sight(kind: str) -> None:
    tape = Tape(created(size=2 * K, cluster_size=K))
    with Image(tape) as image:
        image.disk.pwrite(0, b"x" * 2 * K)
        image.node.resize(K + 512)
        if kind == "ready":
            image.format.zero(K, 512, unmap=False)
        if kind == "nothing":
            image.format.discard(K, 512)
        image.node.resize(4 * K)
        visible = b"x" * 512 if kind == "data" else bytes(512)
        assert image.disk.pread(K, 3 * K) == visible + bytes(3 * K - 512)


@pytest.mark.parametrize("kind", ["shared", "compressed"])
def test_a_last_cluster_that_is_not_ours_alone_is_copied(kind: str, tmp_path: Path) -> None:
    path, raw = tmp_path / "image", tmp_path / "raw"
    raw.write_bytes(b"x" * 2 * K)
    squeezed = ["-c"] if kind == "compressed" else []
    qemu("qemu-img", "convert", *squeezed, "-O", "qcow2", "-o", f"cluster_size={K}", raw, path)
    tape = Tape(poked(path.read_bytes(), 24, K + 512))  # the disk ends within its last cluster
    if kind == "shared":
        path.write_bytes(bytes(tape.data))
        qemu("qemu-img", "snapshot", "-c", "one", path)
        tape = Tape(path.read_bytes())
    with Image(tape) as image:
        image.node.resize(3 * K)
        assert image.disk.pread(0, 3 * K) == b"x" * (K + 512) + bytes(2 * K - 512)
    assert (checked(bytes(tape.data)).corruptions, checked(bytes(tape.data)).leaks) == (0, 0)


def test_what_a_crash_left_beyond_the_end_does_not_come_back() -> None:
    tape = Tape(created(size=1 << 20, cluster_size=K))
    with Image(tape) as image:
        image.disk.pwrite(0, b"old" * 300000)
    tape = Tape(poked(bytes(tape.data), 24, 10 * K))
    with Image(tape) as image:
        image.node.resize(1 << 20)
        assert image.disk.pread(10 * K, (1 << 20) - 10 * K) == bytes((1 << 20) - 10 * K)
    assert (checked(bytes(tape.data)).corruptions, checked(bytes(tape.data)).leaks) == (0, 0)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_shrinking_gives_clusters_and_tables_back(compat: str) -> None:
    tape = Tape(created(size=4 << 20, cluster_size=512, compat=compat))
    model = random.Random(1).randbytes(4 << 20)
    with Image(tape) as image:
        image.disk.pwrite(0, model)
        full = len(tape.data)
        image.node.resize(100_000)
        assert image.disk.pread(0, 100_000) == model[:100_000]
        assert len(tape.data) < full // 10
        image.disk.pwrite(0, model[:50_000])
    data = bytes(tape.data)
    report = checked(data)
    assert (report.corruptions, report.leaks, report.allocated_clusters) == (0, 0, 196)
    assert contents(data) == model[:100_000]


def test_to_nothing_and_back() -> None:
    tape = Tape(created(size=1 << 20, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, b"x" * (1 << 20))
        image.node.resize(0)
        assert image.disk.size == 0
        image.node.resize(1 << 20)
        assert image.disk.pread(0, 1 << 20) == bytes(1 << 20)
        image.disk.pwrite(1000, b"again")
    assert (checked(bytes(tape.data)).corruptions, checked(bytes(tape.data)).leaks) == (0, 0)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("start", [0, 5 * K + 512])
def test_growing_with_preallocation(mode: str, start: int) -> None:
    tape = Tape(created(size=start, cluster_size=K))
    with Image(tape) as image:
        if start:
            image.disk.pwrite(0, b"a" * start)
        image.node.resize(1 << 20, preallocation=mode)
        assert image.format.extents(0, 1 << 20).total(DATA) == 1 << 20
        assert image.disk.pread(0, 1 << 20) == b"a" * start + bytes((1 << 20) - start)
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0)
    assert report.image_end_offset == len(tape.data)


def test_limits() -> None:
    with Image(Tape(created(size=1 << 20, cluster_size=512))) as image:
        with pytest.raises(LimitExceeded, match="at most 137438953472 bytes"):
            image.node.resize((128 << 30) + 512)
        with pytest.raises(UnsupportedFeature, match="Preallocation"):
            image.node.resize(512, preallocation="full")
        assert image.disk.size == 1 << 20


def test_version_2_with_snapshots_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(created(size=1 << 20, compat="0.10"))
    qemu("qemu-img", "snapshot", "-c", "one", path)
    with (
        Image(Tape(path.read_bytes())) as image,
        pytest.raises(UnsupportedFeature, match="v2 image which has snapshots"),
    ):
        image.node.resize(2 << 20)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_qemu_reads_what_was_resized(cluster_size: int, tmp_path: Path) -> None:
    chance, tape = random.Random(cluster_size), Tape(created(size=300_032, cluster_size=cluster_size))
    model, path, raw = bytearray(300_032), tmp_path / "image", tmp_path / "raw"
    with Image(tape) as image:
        for _ in range(25):
            size = chance.randrange(1, 4000) * 512
            image.node.resize(size)
            del model[size:]
            model.extend(bytes(size - len(model)))
            for _ in range(3):
                offset = chance.randrange(size)
                data = chance.randbytes(min(size - offset, chance.randrange(1, 30000)))
                image.disk.pwrite(offset, data)
                model[offset : offset + len(data)] = data
    path.write_bytes(bytes(tape.data))
    raw.write_bytes(model)
    qemu("qemu-img", "check", path)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, path)


def test_the_header_has_the_new_size_only_when_all_is_ready() -> None:
    tape = Tape(created(size=1 << 20, cluster_size=512))
    with Image(tape) as image:
        tape.changes.clear()
        image.node.resize(8 << 20)
        changes = [(change[0], change[1], len(change[2])) for change in tape.changes]
        table = changes.index(("write", 36, 12))
        assert changes[table - 1][0] == changes[table + 1][0] == "flush"
        assert changes[-3:] == [("flush", 0, 0), ("write", 24, 8), ("flush", 0, 0)]
        assert image.format.extent_at(1 << 20, 1 << 20).kind == UNALLOCATED
    assert header_of(bytes(tape.data)).size == 8 << 20
