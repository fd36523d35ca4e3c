"""Converting into compressed clusters: the same bytes whatever the sources' maps and edges, the same image again."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.core.driver import Segments
from diskwright.core.lookup import ABSENT
from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.engine.compress import CompressedConversion, whole_units
from diskwright.engine.convert import CopyFailed
from diskwright.extents import DATA, SPECIAL, ZERO
from tests.core.ram import Ram
from tests.formats.qcow2.support import Image, Tape, checked, contents, created
from tests.formats.qcow2.test_compressed_writing import piece
from tests.jobs.faulty import Faulty

B = 4096


class Whole(Ram):
    """A source of given bytes, all of which it calls data."""

    def __init__(self, data: bytes) -> None:
        super().__init__(len(data), "source")
        self.data[:] = data


def source(data: bytes) -> StorageNode:
    return StorageNode("source", Whole(data), False)


def disk(seed: int, clusters: int, size: int = B) -> bytes:
    chance = random.Random(seed)
    return b"".join(chance.choice((bytes(size), piece(chance, size))) for _ in range(clusters))


def converted(sources: list[Node], *, target: Tape | None = None, zero: bool = True, **options: Any) -> bytes:
    total = sum(-(-node.size // 512) * 512 for node in sources)
    tape = target or Tape(created(size=total, cluster_size=B))
    with Image(tape) as image:
        work = CompressedConversion(image.node, image.graph.leases, total, target_is_zero=zero, **options)
        start = 0
        for node in sources:
            work.copy(node, start)
            start += -(-node.size // 512) * 512
        assert work.progress()[0] >= total - 511
        image.node.flush()
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    return bytes(tape.data)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from((DATA, ZERO, ABSENT))), min_size=1, max_size=12), st.data()
)
def test_whole_units(pieces: list[tuple[int, int]], draw: st.DataObject) -> None:
    unit, origin = draw.draw(st.sampled_from((1, 4, 16))), draw.draw(st.integers(0, 50))
    runs, kinds, at = [], [], origin
    for length, kind in pieces:
        runs.append((at, length, kind))
        kinds += [kind] * length
        at += length
    found = whole_units(runs, unit)
    expected = []
    for start in range(0, len(kinds), unit):
        inside = set(kinds[start : start + unit])
        expected += [inside.pop() if len(inside) == 1 else DATA] * len(kinds[start : start + unit])
    assert [kind for _, length, kind in found for _ in range(length)] == expected
    assert all(a[0] + a[1] == b[0] for a, b in pairwise(found))
    assert found[0][0] == origin and all(length > 0 for _, length, _ in found)


def test_the_image_is_the_same_whoever_is_quickest() -> None:
    data = disk(1, 3000)
    images = {converted([source(data)], workers=workers) for workers in (1, 2, 5, 5, 16)}
    assert len(images) == 1
    assert contents(images.pop()) == data


def test_out_of_order_holds_the_same() -> None:
    data = disk(2, 3000)
    assert contents(converted([source(data)], workers=4, in_order=False)) == data


@pytest.mark.parametrize("seed", range(12))
def test_sources_that_end_within_a_cluster(seed: int) -> None:
    chance = random.Random(seed)
    parts = [
        disk(seed, chance.randrange(0, 4)) + piece(chance, chance.choice((0, 1, 512, 700, 4095)))
        for _ in range(chance.randrange(1, 7))
    ]
    parts = [part for part in parts if part] or [b"x"]
    expected = b"".join(part + bytes(-len(part) % 512) for part in parts)
    assert contents(converted([source(part) for part in parts])) == expected


@pytest.mark.parametrize("zero", [False, True])
def test_into_an_existing_larger_image(zero: bool) -> None:
    """What is behind the copy stays, and what the copy has as zeros becomes zeros."""
    data = disk(3, 20) + b"tail" * 300
    length = -(-len(data) // 512) * 512
    tape = Tape(created(size=40 * B, cluster_size=B))
    old = b"\0" if zero else b"\7"
    with Image(tape) as image:
        image.disk.pwrite(0, old * (40 * B))
    after = contents(converted([source(data)], target=tape, zero=zero))
    assert after == data + bytes(length - len(data)) + old * (40 * B - length)


def test_without_sparse_zeros_are_compressed_too() -> None:
    data = bytes(20 * B) + b"x" * B
    node = StorageNode("hole", Ram(len(data), "hole"), False)
    node.storage.data[:] = data  # type: ignore[attr-defined]
    for options, expected in (({"sparse": 0}, 21), ({}, 1)):
        with Image(Tape(converted([node], **options)), writable=False) as image:
            kinds = image.format.extents(0, image.format.size).kind.tolist()
            assert kinds.count(SPECIAL) == expected


@pytest.mark.parametrize("shorter", [0, 5 * B + 700])
@pytest.mark.parametrize("seed", range(6))
def test_only_what_the_base_has_not(seed: int, shorter: int) -> None:
    """An overlay with clusters of 512 bytes becomes one with clusters of 4 KiB over the same base."""
    chance = random.Random(seed)
    size = 20 * B + 1024
    below = disk(seed, 21)[: size - shorter]
    base = source(below)
    overlay = Tape(created(size=size, cluster_size=512, backing_file="base"))
    target = Tape(created(size=size, cluster_size=B, backing_file="base"))
    under = source(below)
    with Image(overlay, backing=base) as image, Image(target, backing=under) as other:
        image.graph.adopt(base)
        other.graph.adopt(under)
        for _ in range(12):
            at, length = chance.randrange(size // 512) * 512, chance.randrange(1, 9) * 512
            length = min(length, size - at)
            if chance.random() < 0.6:
                image.disk.pwrite(at, chance.randbytes(length))
            else:
                image.disk.zero(at, length)
        expected = image.disk.pread(0, size)
        work = CompressedConversion(other.node, image.graph.leases, size, target_is_zero=False)
        work.copy(image.node, 0, base=base)
        assert other.disk.pread(0, size) == expected
        for at in range(0, min(size, len(below)) // B * B, B):
            if set(image.format.extents(at, B).kind.tolist()) == {ABSENT}:
                assert other.format.extent_at(at, B).kind == ABSENT, "only the base has it"
    assert not checked(bytes(target.data)).corruptions


@pytest.mark.parametrize("where", ["body", "edge"])
def test_a_source_that_cannot_be_read(where: str) -> None:
    storage = Faulty(10 * B + 512, "source")
    storage.data[:] = b"x" * len(storage.data)
    bad = 10 * B if where == "edge" else 5 * B

    def hook(operation: str, offset: int, length: int) -> None:
        if operation == "read" and offset <= bad < offset + length:
            raise OSError(errno.EIO, "bad")

    storage.hook = hook
    with pytest.raises(CopyFailed) as failure:
        converted([StorageNode("source", storage, False)])
    assert failure.value.operation == "read"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_target_that_fails_in_the_middle(code: int) -> None:
    """The conversion says so; the image is sound, and can be written to again."""

    class Full(Tape):
        room = 200 * B

        def writev(self, segments: Segments) -> None:
            for offset, buffer in segments:
                if offset + len(buffer) > self.room:
                    short = max(0, self.room - offset) // 512 * 512
                    super().writev([(offset, buffer[:short])])  # as much as there is room for
                    raise OSError(code, "no more")
                super().writev([(offset, buffer)])

    data = disk(4, 3000)
    tape = Full(created(size=len(data), cluster_size=B))
    with Image(tape) as image:
        work = CompressedConversion(image.node, image.graph.leases, len(data), target_is_zero=True, workers=4)
        with pytest.raises(CopyFailed) as failure:
            work.copy(source(data), 0)
        assert failure.value.operation == "write" and isinstance(failure.value.__cause__, OSError)
        tape.room = 1 << 40
        image.node.write_compressed([(0, memoryview(data)[: 100 * B])])
        assert image.disk.pread(0, 100 * B) == data[: 100 * B]
        work.copy(source(data), 0)
        assert image.disk.pread(0, len(data)) == data
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    assert contents(bytes(tape.data)) == data


def test_stopping_leaves_the_edge_alone() -> None:
    tape = Tape(created(size=10 * B, cluster_size=B))
    with Image(tape) as image:
        work = CompressedConversion(image.node, image.graph.leases, 10 * B, target_is_zero=True, stop=lambda: True)
        work.copy(source(b"x" * (10 * B)), 0)
        assert image.disk.pread(0, 10 * B) == bytes(10 * B)


def test_large_clusters_and_a_low_rate(tmp_path: Path) -> None:
    data = disk(5, 4, 2 << 20)
    tape = Tape(created(size=len(data), cluster_size=2 << 20))
    assert contents(converted([source(data)], target=tape, speed=1 << 30)) == data


def test_a_graph_of_files(tmp_path: Path) -> None:
    """Through real files, and the library's front door."""
    import diskwright

    data = disk(6, 200)
    (tmp_path / "raw").write_bytes(data)
    for level in (True, 1, 6):
        diskwright.convert(tmp_path / "raw", tmp_path / "z.qcow2", source_format="raw", compress=level)
        with diskwright.open(tmp_path / "z.qcow2") as opened:
            assert opened.pread(0, len(data)) == data
            assert isinstance(opened.node, FormatNode)
            assert SPECIAL in opened.node.extents(0, len(data)).kind.tolist()
    with pytest.raises(OSError, match="Compression not supported"):
        diskwright.convert(tmp_path / "raw", tmp_path / "no.raw", source_format="raw", compress=True)
    assert not (tmp_path / "no.raw").exists()
