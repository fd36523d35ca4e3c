"""The copy engine: whatever the source's map, the target ends up with its bytes, and only what must be is written."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.core.driver import FilePlace
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node, StorageNode
from diskwright.engine.clock import Clocks
from diskwright.engine.convert import Conversion, CopyFailed
from diskwright.engine.copy import Copier, ReadFailed, WriteFailed, chunks, data_plan, run_plan
from diskwright.engine.rate import RateLimit
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, UNALLOCATED, ZERO, Extent
from diskwright.units import KiB, MiB
from tests.core.ram import Ram
from tests.core.tablemap import TableMap
from tests.jobs.faulty import Fault, Faulty

B = 4096


def never(offset: int, length: int, error: Exception) -> None:
    raise AssertionError(f"{offset} {length}") from error


def ram(size: int, name: str = "ram") -> tuple[StorageNode, Faulty]:
    storage = Faulty(size, name)
    return StorageNode(name, storage, True), storage


def table(draw: st.DataObject, blocks: int, name: str) -> FormatNode:
    """A format whose runs are data (some of it zeros), zeros or nothing."""
    file = Ram(blocks * B, name)
    runs, at = [], 0
    while at < blocks:
        length = draw.draw(st.integers(1, min(6, blocks - at)))
        kind = draw.draw(st.sampled_from([DATA, DATA, ZERO, UNALLOCATED]))
        if kind == DATA:
            for block in range(at, at + length):
                if draw.draw(st.integers(0, 3)):
                    file.data[block * B + draw.draw(st.integers(0, B - 1))] = 1 + block % 255
        runs.append(Extent(at * B, length * B, kind, at * B if kind == DATA else -1))
        at += length
    return FormatNode(name, TableMap(StorageNode(name + ".file", file, True), blocks * B, runs), True)


@given(draw=st.data())
def test_conversion_of_any_map(draw: st.DataObject) -> None:
    graph = Graph()
    sources: list[Node] = []
    backed = draw.draw(st.booleans())
    for i in range(1 if backed else draw.draw(st.integers(1, 3))):
        node = table(draw, draw.draw(st.integers(1, 24)), f"source{i}")
        if draw.draw(st.booleans()) or backed:
            node.backing = table(draw, draw.draw(st.integers(1, 24)), f"backing{i}")
        sources.append(node)
    size = sum(node.size for node in sources)
    target, storage = ram(size + draw.draw(st.sampled_from([0, B])))
    base = None
    new = draw.draw(st.booleans())
    if backed:
        # The target has the same backing file, so it reads as that does where nothing has been copied.
        base, new = sources[0].backing, False
        assert base is not None
        storage.data[: min(base.size, size)] = base.pread(0, min(base.size, size))
    elif not new:
        storage.data[:] = b"\xaa" * len(storage.data)
    target_cluster = draw.draw(st.sampled_from([1, B, 4 * B]))
    type(target).cluster_size = property(lambda self: target_cluster)  # type: ignore[assignment,method-assign]
    try:
        job = Conversion(
            target, graph.leases, size, target_is_zero=new,
            sparse=draw.draw(st.sampled_from([0, 512, B, 2 * B])), workers=draw.draw(st.sampled_from([1, 3])),
        )  # fmt: skip
        start = 0
        for node in sources:
            job.copy(node, start, base=base)
            start += node.size
    finally:
        del type(target).cluster_size
    assert bytes(storage.data[:size]) == b"".join(node.pread(0, node.size) for node in sources)
    assert job.progress() == (size, size)
    if not new and not backed:
        assert bytes(storage.data[size:]) == b"\xaa" * (len(storage.data) - size)


def test_zeros_in_data_are_left_out_of_a_new_target_and_written_to_an_old_one() -> None:
    for new in (True, False):
        source, from_ = ram(64 * B)
        source.readv = from_.readv  # type: ignore[method-assign]
        from_.extent_at = lambda offset, length: Extent(offset, length, DATA, offset)  # type: ignore[method-assign]
        from_.data[5 * B] = from_.data[40 * B] = 1
        target, to = ram(64 * B)
        if not new:
            to.data[:] = b"\xaa" * len(to.data)
        job = Conversion(target, Graph().leases, 64 * B, target_is_zero=new, workers=1)
        job.copy(source, 0)
        assert to.data == from_.data
        assert to.calls[0] == ("writev", [(5 * B, B)])
        zeros = [call[1:] for call in to.calls if call[0] == "zero"]
        assert zeros == ([] if new else [(0, 5 * B), (6 * B, 34 * B), (41 * B, 23 * B)])


def test_zeros_shorter_than_asked_for_are_data() -> None:
    source, from_ = ram(64 * B)
    from_.extent_at = lambda offset, length: Extent(offset, length, DATA, offset)  # type: ignore[method-assign]
    from_.data[0] = from_.data[12 * B] = 1
    target, to = ram(64 * B)
    Conversion(target, Graph().leases, 64 * B, target_is_zero=True, sparse=8 * B, workers=1).copy(source, 0)
    assert to.calls == [("writev", [(0, 8 * B), (8 * B, 8 * B)])] or to.calls == [("writev", [(0, 16 * B)])]


def test_short_ranges_are_moved_together() -> None:
    source, from_ = ram(256 * B)
    from_.data[:] = b"x" * len(from_.data)
    target, to = ram(256 * B)
    copied: list[tuple[int, int]] = []
    run_plan(
        Copier(source, target, Graph().leases, sparse=0),
        iter([(i * 2 * B, B) for i in range(128)]),
        workers=1,
        done=lambda offset, length: copied.append((offset, length)),
        failed=never,
    )
    writes = [call for call in to.calls if call[0] == "writev"]
    assert len(copied) == 128
    assert len(writes) == 128  # Faulty hands segments on one by one
    assert bytes(to.data) == (b"x" * B + bytes(B)) * 128


def test_ranges_longer_than_the_buffer() -> None:
    source, from_ = ram(100 * B + 17)
    from_.data[:] = bytes(i * 7 % 251 for i in range(len(from_.data)))
    target, to = ram(100 * B + 17)
    run_plan(
        Copier(source, target, Graph().leases),
        iter([(0, len(from_.data))]),
        failed=never,
        chunk=8 * B,
    )
    assert to.data == from_.data
    assert max(n for call in to.calls for _, n in call[1]) == 8 * B


def test_in_order() -> None:
    """Reads take times that differ; the target is written from begin to end all the same."""
    source, from_ = ram(64 * B)
    from_.data[:] = b"x" * len(from_.data)
    from_.after = lambda what, offset, length: time.sleep((offset // B * 7 % 5) / 2000)
    target, to = ram(64 * B)
    run_plan(
        Copier(source, target, Graph().leases),
        chunks(0, 64 * B, B),
        workers=8,
        failed=never,
        chunk=B,
        in_order=True,
    )
    assert [call[1][0][0] for call in to.calls] == [i * B for i in range(64)]


def test_in_order_goes_on_past_what_failed() -> None:
    source, from_ = ram(32 * B)
    from_.data[:] = b"x" * len(from_.data)
    from_.hook = Fault("read", offset=3 * B, end=4 * B, times=None)
    target, to = ram(32 * B)
    lost: list[int] = []
    run_plan(
        Copier(source, target, Graph().leases),
        chunks(0, 32 * B, B),
        workers=4,
        failed=lambda offset, length, error: lost.append(offset),
        chunk=B,
        in_order=True,
    )
    assert lost == [3 * B]
    assert [call[1][0][0] for call in to.calls] == [i * B for i in range(32) if i != 3]


@pytest.mark.parametrize("side", ["read", "write"])
def test_of_a_batch_just_the_range_that_fails_is_told(side: str) -> None:
    source, from_ = ram(64 * B)
    from_.data[:] = b"x" * len(from_.data)
    target, to = ram(64 * B)
    (from_ if side == "read" else to).hook = Fault(side, offset=20 * B, end=21 * B, times=None)
    told: list[tuple[int, int, type[Exception], int | None]] = []
    copied: list[int] = []

    def failed(offset: int, length: int, error: Exception) -> None:
        cause = error.__cause__
        assert isinstance(cause, OSError)
        told.append((offset, length, type(error), cause.errno))

    run_plan(
        Copier(source, target, Graph().leases),
        iter([(i * 4 * B, B) for i in range(16)]),
        workers=1,
        done=lambda offset, length: copied.append(offset),
        failed=failed,
    )
    assert told == [(20 * B, B, ReadFailed if side == "read" else WriteFailed, errno.EIO)]
    assert sorted(copied) == [i * 4 * B for i in range(16) if i != 5]


def test_an_error_of_the_image_is_a_failed_read() -> None:
    source, _ = ram(B)

    def corrupt(offset: int, length: int) -> Extent:
        raise CorruptImage("x", "L2 entry", 1, 0)

    source.extent_at = corrupt  # type: ignore[method-assign]
    target, _ = ram(B)
    told: list[type[Exception]] = []
    run_plan(
        Copier(source, target, Graph().leases), iter([(0, B)]),
        failed=lambda offset, length, error: told.append(type(error)),
    )  # fmt: skip
    assert told == [ReadFailed]


def test_what_failed_raises_ends_the_run() -> None:
    source, from_ = ram(64 * B)
    from_.data[:] = b"x" * len(from_.data)
    from_.hook = Fault("read", offset=8 * B, times=None)
    target, _ = ram(64 * B)
    job = Conversion(target, Graph().leases, 64 * B, target_is_zero=True, workers=4)
    with pytest.raises(CopyFailed, match="read failed at byte 0") as caught:
        job.copy(source, 0)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.operation == "read"


def test_a_plan_that_raises_ends_the_run() -> None:
    source, _ = ram(4 * B)
    target, _ = ram(4 * B)

    def plan() -> Iterator[tuple[int, int]]:
        yield 0, B
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_plan(Copier(source, target, Graph().leases), plan(), failed=never)


def test_stop_ends_the_run_with_nothing_in_flight() -> None:
    source, from_ = ram(64 * B)
    from_.data[:] = b"x" * len(from_.data)
    target, _ = ram(64 * B)
    copied: list[int] = []
    run_plan(
        Copier(source, target, Graph().leases),
        chunks(0, 64 * B, B),
        workers=3,
        stop=lambda: len(copied) >= 10,
        done=lambda offset, length: copied.append(offset),
        failed=never,
        chunk=B,
    )
    assert 10 <= len(copied) <= 13


def test_every_batch_holds_a_lease_and_leaves_it() -> None:
    graph = Graph()
    source, from_ = ram(16 * B)
    held: list[int] = []
    from_.data[:] = b"x" * len(from_.data)
    from_.hook = lambda what, offset, length: held.append(len(graph.leases._held))
    target, _ = ram(16 * B)
    run_plan(Copier(source, target, graph.leases), chunks(0, 16 * B, B), workers=1, failed=never)
    assert held
    assert set(held) == {1}
    assert not graph.leases._held


def test_with_a_gate_a_drain_waits_and_holds() -> None:
    graph = Graph()
    source, from_ = ram(64 * B)
    graph.adopt(source)
    from_.data[:] = b"x" * len(from_.data)
    target, _ = ram(64 * B)
    disk = graph.disk(source)
    inside, go = threading.Event(), threading.Event()

    def hook(what: str, offset: int, length: int) -> None:
        inside.set()
        assert go.wait(30)

    from_.hook = hook
    copied: list[int] = []
    runner = threading.Thread(
        target=run_plan,
        args=(Copier(source, target, graph.leases, gate=disk), chunks(0, 64 * B, B)),
        kwargs={"workers": 2, "failed": never, "chunk": B, "done": lambda o, n: copied.append(o)},
    )
    runner.start()
    assert inside.wait(30)
    disk.start_drain()
    drained = threading.Event()
    threading.Thread(target=lambda: (disk.await_drained(), drained.set())).start()
    assert not drained.wait(0.05)
    go.set()
    assert drained.wait(30)
    count = len(copied)
    time.sleep(0.05)
    assert len(copied) == count < 64
    disk.end_drain()
    runner.join(30)
    assert len(copied) == 64
    graph.close()


def test_only_bytes_that_were_moved_are_charged() -> None:
    source, from_ = ram(64 * B)
    from_.data[B] = 1
    target, _ = ram(64 * B)
    rate = RateLimit(1 << 40)
    charged: list[int] = []
    rate.charge = charged.append  # type: ignore[method-assign]
    copier = Copier(source, target, Graph().leases, target_zero=True)
    run_plan(copier, iter([(0, 64 * B)]), rate=rate, workers=1, failed=never)
    assert charged == [B]


def test_clocks_tell_where_the_time_went() -> None:
    source, from_ = ram(64 * B)
    from_.data[:] = b"x" * len(from_.data)
    target, _ = ram(64 * B)
    clocks = Clocks()
    copier = Copier(source, target, Graph().leases)
    run_plan(copier, chunks(0, 64 * B, B), workers=1, failed=never, clocks=clocks, chunk=B)
    totals = clocks.totals()
    assert totals["read"][1] == totals["write"][1] == 64


# -- in the kernel -----------------------------------------------------------------------------------


class Kernel(Faulty):
    """Copies "in the kernel" from another Ram; ``will`` counts down to refusal."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.places: dict[int, Faulty] = {}
        self.will: int | None = None
        self.error = errno.ENOTSUP
        self.moved = 0

    def copy_from(self, offset: int, source: FilePlace) -> None:
        if self.will is not None:
            if self.will == 0:
                # Half of it has been written by then, with whatever.
                self.data[offset : offset + source.length // 2] = b"?" * (source.length // 2)
                raise OSError(self.error, "will not")
            self.will -= 1
        origin = self.places[source.fd].data
        self.data[offset : offset + source.length] = origin[source.offset : source.offset + source.length]
        self.moved += source.length


def kernel_pair(size: int) -> tuple[StorageNode, Faulty, StorageNode, Kernel]:
    source, from_ = ram(size)
    from_.data[:] = bytes(i % 251 for i in range(size))
    # It can be placed in pieces of 3 blocks only, as a fragmented image can.
    from_.place = lambda offset, length: FilePlace(7, offset, min(length, 3 * B))  # type: ignore[method-assign]
    to = Kernel(size)
    to.places[7] = from_
    return source, from_, StorageNode("kernel", to, True), to


def test_what_need_not_be_looked_at_is_moved_by_the_kernel() -> None:
    source, from_, target, to = kernel_pair(20 * B)
    run_plan(Copier(source, target, Graph().leases, sparse=0), iter([(B, 19 * B)]), failed=never)
    assert to.moved == 19 * B
    assert bytes(to.data) == bytes(B) + bytes(from_.data[B:])
    source, from_, target, to = kernel_pair(20 * B)
    run_plan(Copier(source, target, Graph().leases, sparse=B), iter([(B, 19 * B)]), failed=never)
    assert to.moved == 0
    assert bytes(to.data) == bytes(B) + bytes(from_.data[B:])


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("will", [0, 1, 3])
def test_what_the_kernel_will_not_move_is_read_and_written(will: int, number: int) -> None:
    source, from_, target, to = kernel_pair(40 * B)
    to.will, to.error = will, number
    moved: list[int] = []
    rate = RateLimit()
    rate.charge = moved.append  # type: ignore[method-assign]
    copier = Copier(source, target, Graph().leases, sparse=0)
    run_plan(copier, chunks(0, 40 * B, 10 * B), rate=rate, workers=1, failed=never)
    assert to.data == from_.data
    assert sum(moved) == 40 * B
    assert to.moved == will * 3 * B


def test_a_failure_in_the_kernel_is_laid_at_the_right_door() -> None:
    for side in ("read", "write"):
        source, from_, target, to = kernel_pair(4 * B)
        to.will, to.error = 0, errno.EIO
        (from_ if side == "read" else to).hook = Fault(side, times=None)
        told: list[type[Exception]] = []
        run_plan(
            Copier(source, target, Graph().leases, sparse=0), iter([(0, 4 * B)]),
            failed=lambda offset, length, error, told=told: told.append(type(error)),  # type: ignore[misc]
        )  # fmt: skip
        assert told == [ReadFailed if side == "read" else WriteFailed]


# -- plans -------------------------------------------------------------------------------------------


@given(draw=st.data())
def test_plans_cover_what_must_be_copied_once(draw: st.DataObject) -> None:
    node = table(draw, draw.draw(st.integers(1, 30)), "source")
    base = None
    if draw.draw(st.booleans()):
        base = node.backing = table(draw, draw.draw(st.integers(1, 30)), "base")
    zeros, chunk = draw.draw(st.booleans()), draw.draw(st.sampled_from([B, 4 * B]))
    unit = draw.draw(st.sampled_from([1, 2 * B, 8 * B]))
    plan = list(data_plan(node, Graph().leases, node.size, zeros=zeros, chunk=chunk, base=base, unit=unit))
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(plan))
    covered = {at for offset, length in plan for at in range(offset, offset + length, B)}
    for offset in range(0, node.size, B):
        run = node.extent_at(offset, B)
        if run.kind == DATA:
            assert offset in covered
        if run.kind == UNALLOCATED and base is not None:
            assert offset not in covered
        if run.kind == ZERO and zeros:
            assert offset in covered
    if unit == 1 and base is None and not zeros:
        assert all(node.extent_at(offset, B).kind == DATA for offset in covered)
    assert all(n <= chunk or not any(node.pread(o, n)) for o, n in plan)


def test_files_and_images(tmp_path: Path) -> None:
    """Real drivers, both ways, with a source that has holes, zeros within data and an odd end."""
    from diskwright.core.create import create_image

    size = 5 * MiB + 512
    raw, qcow2, back = (str(tmp_path / name) for name in ("a.raw", "b.qcow2", "c.raw"))
    with open(raw, "wb") as file:
        file.truncate(size)
        file.seek(70 * KiB)
        file.write(b"\1" * MiB + bytes(MiB) + b"\2" * (300 * KiB))
        file.seek(size - 3)
        file.write(b"end")
    graph = Graph()

    def convert(source: str, kind: str, target: str, target_kind: str, **options: Any) -> Node:
        create_image(target, target_kind, {"size": size})
        source_node = graph.open(source, driver=kind)
        target_node = graph.open(target, driver=target_kind, writable=True)
        job = Conversion(target_node, graph.leases, size, target_is_zero=True, **options)
        job.copy(source_node, 0)
        target_node.flush()
        graph.release(source_node)
        return target_node

    for sparse in (4 * KiB, 0):
        image = convert(raw, "raw", qcow2, "qcow2", sparse=sparse)
        stored = image.extents(0, size).total(DATA)
        # 17 and 5 clusters hold the first data and the second, 15 the zeros between, which are looked for or not;
        # of the last cluster the disk has a sector only.
        assert stored == (22 + (0 if sparse else 15)) * 64 * KiB + 512
        graph.release(image)
        copy = convert(qcow2, "qcow2", back, "raw", sparse=sparse)
        graph.release(copy)
        with open(raw, "rb") as one, open(back, "rb") as other:
            assert one.read() == other.read()
    graph.close()
