"""Reservations, zeros, discards: what becomes of clusters, when they are used again, and the order of writes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from diskwright.errors import CorruptImage, ImageError
from diskwright.extents import DATA, UNALLOCATED, ZERO, Extent
from diskwright.formats.qcow2.layout import COPIED, OFFSET_MASK
from tests.formats.qcow2.support import (
    Image,
    Tape,
    checked,
    contents,
    created,
    l1_of,
    l2_entry,
    l2_entry_place,
    poked,
    qemu,
)

K = 4096
SIZE = 4 << 20
NEW = created(size=SIZE, cluster_size=K)


def kinds(changes: list[tuple[str, int, bytes]]) -> str:
    """The changes as letters: w for writes (one for each batch between flushes), f for flushes."""
    letters = "".join(change[0][0] for change in changes)
    while "ww" in letters:
        letters = letters.replace("ww", "w")
    return letters


def allocated(data: bytes) -> int:
    return int(checked(data).allocated_clusters)


# -- order -------------------------------------------------------------------------------------------------


def test_a_flush_of_a_clean_image_is_one_flush() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"x")
        image.disk.flush()
        tape.changes.clear()
        image.disk.flush()
        assert kinds(tape.changes) == "f"
        image.disk.pwrite(10, b"in place")
        tape.changes.clear()
        image.disk.flush()
        assert kinds(tape.changes) == "f"


def test_a_new_table_is_durable_before_anything_names_it() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"x")
        tape.changes.clear()
        image.disk.flush()
        # refcounts, flush (data too), L2 table, flush, L1 table, flush
        assert kinds(tape.changes) == "wfwfwf"
        refcounts, table, l1 = (change for change in tape.changes if change[0] == "write")
        assert refcounts[1] == 2 * K and l1[1] == 3 * K and table[1] >= 4 * K
        image.disk.pwrite(K, b"x")
        tape.changes.clear()
        image.disk.flush()
        assert kinds(tape.changes) == "wfwf"


def test_flushes_at_once_are_one_flush() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        writer = image.format.writer
        assert writer is not None
        with writer.flush_lock:
            threads = [threading.Thread(target=image.format.flush) for _ in range(5)]
            for thread in threads:
                thread.start()
            time.sleep(0.05)  # all of them have come; which matters only for how much is saved
        for thread in threads:
            thread.join()
        flushes = kinds(tape.changes).count("f")
        assert 1 <= flushes <= 5
        assert writer._begun == writer._completed


# -- places ------------------------------------------------------------------------------------------------


def test_a_reservation_covers_a_run_with_its_edges() -> None:
    with Image(Tape(NEW)) as image:
        placed = image.format.reserve(K + 100, 3 * K)
        (run,), (head, tail) = placed.extents, placed.fills
        assert (run.offset, run.length, run.kind) == (K + 100, 3 * K, DATA)
        assert head == Extent(K, 100, DATA, run.file_offset - 100)
        assert tail == Extent(4 * K + 100, K - 100, DATA, run.file_offset + 3 * K)
        assert placed.zeroed
        assert image.format.extent_at(K, K).kind == UNALLOCATED, "nothing is on the map yet"
        assert image.format.in_place(K, K) == -1
        placed.publish()
        assert image.format.extent_at(K, 4 * K) == Extent(K, 4 * K, DATA, run.file_offset - 100)
        assert image.format.in_place(K, 4 * K) == run.file_offset - 100


def test_an_aborted_reservation_changes_nothing_and_its_place_is_used_again() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"first")
        placed = image.format.reserve(K, K)
        place = placed.extents[0].file_offset
        tape.writev([(place, memoryview(b"half written"))])
        placed.abort()
        assert image.format.extent_at(K, K).kind == UNALLOCATED
        again = image.format.reserve(2 * K, 100)
        assert again.extents[0].file_offset == place
        assert not again.zeroed, "something has been written there"
        again.abort()
        image.disk.pwrite(2 * K, b"y")
        assert image.disk.pread(2 * K, K) == b"y" + bytes(K - 1)
    assert (checked(bytes(tape.data)).corruptions, checked(bytes(tape.data)).leaks) == (0, 0)


def test_an_abort_after_a_failed_write() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"kept")
        image.disk.flush()
        tape.fail = 0
        with pytest.raises(OSError, match="torn"):
            image.disk.pwrite(8 * K, b"lost")
        tape.fail = -1
        assert image.disk.pread(8 * K, 4) == bytes(4)
        image.disk.pwrite(8 * K, b"now")
    data = bytes(tape.data)
    assert contents(data)[:4] == b"kept" and contents(data)[8 * K : 8 * K + 3] == b"now"
    assert (checked(data).corruptions, checked(data).leaks) == (0, 0)


@pytest.mark.parametrize("step", range(8))
def test_a_failed_flush_can_be_made_again(step: int) -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"one" * K)
        image.disk.pwrite(3 << 20, b"two")
        tape.fail = step
        try:
            image.disk.flush()
        except OSError:
            # What did reach the file by now is as sound as after a crash.
            report = checked(bytes(tape.data))
            assert not report.corruptions, report.messages
        tape.fail = -1
        image.disk.zero(K, K, unmap=True)
        image.disk.flush()
        data = bytes(tape.data)
    assert contents(data)[:K] == (b"one" * K)[:K] and contents(data)[K : 2 * K] == bytes(K)
    assert contents(data)[3 << 20 :][:3] == b"two"
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages


def test_freed_clusters_come_back_only_when_durable_and_unread() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        disk = image.disk
        disk.pwrite(0, b"a" * K)
        disk.flush()
        old = image.format.extent_at(0, K).file_offset
        reader = disk.begin()  # it may have looked up where cluster 0 lies
        disk.trim(0, K)
        assert image.format.reserve(K, K).extents[0].file_offset != old, "not durable, and being read"
        disk.flush()
        placed = image.format.reserve(2 * K, K)
        assert placed.extents[0].file_offset != old, "still being read"
        assert tape.data[old : old + 1] == b"a", "nor may the space be given back"
        disk.end(reader)
        placed.publish()
        disk.flush()
        assert tape.data[old : old + K] == bytes(K), "now it was"
        assert image.format.reserve(3 * K, K).extents[0].file_offset == old


def test_a_discard_alone_does_not_free_before_the_next_flush() -> None:
    with Image(Tape(NEW)) as image:
        image.disk.pwrite(0, b"a" * K)
        image.disk.flush()
        old = image.format.extent_at(0, K).file_offset
        image.disk.trim(0, K)
        assert image.format.reserve(K, K).extents[0].file_offset != old


def test_what_is_given_up_during_a_flush_waits_for_the_next() -> None:
    """The flush under way took the tables as they were before."""

    class Interrupted(Tape):
        meanwhile = staticmethod(lambda: None)

        def flush(self) -> None:
            super().flush()
            action, self.meanwhile = self.meanwhile, lambda: None
            action()

    tape = Interrupted(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * K)
        image.disk.flush()
        old = image.format.extent_at(0, K).file_offset
        image.disk.pwrite(K, b"b" * K)
        tape.meanwhile = lambda: image.format.discard(0, K)
        image.format.flush()
        assert image.format.extent_at(0, K).kind == ZERO
        assert l2_entry(bytes(tape.data), 0) & OFFSET_MASK == old, "in the file it is still there"
        placed = image.format.reserve(2 * K, K)
        assert placed.extents[0].file_offset != old
        placed.publish()
        image.format.flush()
        assert image.format.reserve(3 * K, K).extents[0].file_offset == old


def test_overlapping_reservations_wait_for_each_other() -> None:
    with Image(Tape(NEW)) as image:
        first = image.format.reserve(K, 2 * K)
        order: list[str] = []

        def second() -> None:
            placed = image.format.reserve(2 * K + 5, K)
            order.append("second")
            assert image.format.extent_at(2 * K, K).kind == DATA
            placed.publish()

        def zero() -> None:
            image.format.zero(K, K, unmap=True)
            order.append("zero")

        threads = [threading.Thread(target=second), threading.Thread(target=zero)]
        for thread in threads:
            thread.start()
        elsewhere = image.format.reserve(8 * K, K)  # does not wait
        elsewhere.abort()
        time.sleep(0.05)
        assert not order
        order.append("first")
        first.publish()
        for thread in threads:
            thread.join(10)
        assert order[0] == "first" and sorted(order) == ["first", "second", "zero"]
        assert image.format.extent_at(K, K).kind == ZERO


def test_a_reservation_stops_before_one_that_is_open() -> None:
    with Image(Tape(NEW)) as image:
        later = image.format.reserve(4 * K, K)
        placed = image.format.reserve(0, 8 * K)
        assert sum(run.length for run in placed.extents) == 4 * K
        placed.abort()
        later.abort()


# -- kinds of clusters that are overwritten --------------------------------------------------------------------


def test_ready_space_of_zero_clusters_is_used() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 3 * K)
        place = image.format.extent_at(0, K).file_offset
        image.disk.zero(0, 3 * K, unmap=False)
        assert image.format.extent_at(0, 3 * K) == Extent(0, 3 * K, ZERO, place)
        placed = image.format.reserve(K + 10, 10)
        assert placed.extents[0].file_offset == place + K + 10 and not placed.zeroed
        placed.abort()
        assert image.format.extent_at(0, 3 * K).kind == ZERO
        image.disk.pwrite(K + 10, b"b" * 10)
        assert image.disk.pread(0, 3 * K) == bytes(K + 10) + b"b" * 10 + bytes(2 * K - 20)
    assert allocated(bytes(tape.data)) == 3


def test_unmapped_zeros_give_their_space_back() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 3 * K)
        image.disk.zero(0, 3 * K, unmap=True)
        assert image.format.extent_at(0, 3 * K) == Extent(0, 3 * K, ZERO)
    assert allocated(bytes(tape.data)) == 0 and checked(bytes(tape.data)).leaks == 0


def test_zeros_cover_whole_clusters_and_the_cut_off_last_one() -> None:
    size = 10 * K + 512
    with Image(Tape(created(size=size, cluster_size=K))) as image:
        zero = image.format.zero
        assert zero(100, 200, unmap=True) == (100, 0)
        assert zero(100, 2 * K, unmap=True) == (K, K)
        assert zero(9 * K, K + 512, unmap=True) == (9 * K, K + 512)
        assert zero(10 * K, 512, unmap=True) == (10 * K, 512)
        assert zero(10 * K + 1, 511, unmap=True)[1] == 0


def test_version_2_cannot_say_zero() -> None:
    tape = Tape(created(size=SIZE, cluster_size=K, compat="0.10"))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 2 * K)
        assert image.format.zero(0, 2 * K, unmap=True)[1] == 0
        image.disk.zero(0, K)
        assert image.disk.pread(0, 2 * K) == bytes(K) + b"a" * K
        image.disk.trim(0, 2 * K)
        assert image.format.extent_at(0, 2 * K).kind == UNALLOCATED
    data = bytes(tape.data)
    assert l2_entry(data, 0) == 0 and checked(data).leaks == 0


def test_a_discard_in_version_2_never_shows_the_backing_file() -> None:
    tape = Tape(created(size=SIZE, cluster_size=K, compat="0.10", backing_file="base", backing_fmt="raw"))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * K)
        image.disk.trim(0, K)
        assert image.format.extent_at(0, K).kind == DATA


def test_a_discard_leaves_what_is_not_whole_and_what_is_not_there() -> None:
    with Image(Tape(NEW)) as image:
        image.disk.pwrite(0, b"a" * 3 * K)
        image.disk.trim(100, 2 * K)
        assert image.disk.pread(0, 3 * K) == b"a" * K + bytes(K) + b"a" * K
        image.disk.trim(1 << 20, 1 << 20)
        assert image.format.extent_at(1 << 20, 1 << 20).kind == UNALLOCATED
        assert l1_of(bytes(image.tape.data))[1] == 0


def test_shared_clusters_and_tables_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(NEW)
    qemu("qemu-io", "-c", f"write -P 1 0 {8 * K}", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    before = path.read_bytes()
    tape = Tape(before)
    with Image(tape) as image:
        assert image.format.in_place(0, K) == -1
        image.disk.pwrite(10, b"new")
        image.disk.flush()
        assert image.format.in_place(0, K) >= 0 and image.format.in_place(K, K) == -1
    data = bytes(tape.data)
    assert l1_of(data)[0] != l1_of(before)[0] and l1_of(data)[0] & COPIED
    assert l2_entry(data, 0) & OFFSET_MASK != l2_entry(before, 0) & OFFSET_MASK
    assert l2_entry(data, K) == l2_entry(before, K)
    path.write_bytes(data)
    assert (checked(data).corruptions, checked(data).leaks) == (0, 0)
    qemu("qemu-img", "check", path)
    qemu("qemu-img", "snapshot", "-a", "one", path)
    assert contents(path.read_bytes())[: 8 * K] == b"\1" * 8 * K


def test_all_of_a_shared_table_is_copied(tmp_path: Path) -> None:
    """Only the changed parts of a table are written back; a copy has changed as a whole."""
    path, far = tmp_path / "image", 400 << 20
    path.write_bytes(created(size=512 << 20))
    qemu("qemu-io", "-c", "write -P 1 0 64k", "-c", f"write -P 2 {far} 64k", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    tape = Tape(path.read_bytes())
    with Image(tape) as image:
        image.disk.pwrite(0, b"new")
    with Image(Tape(bytes(tape.data)), writable=False) as image:
        assert image.disk.pread(0, 4) == b"new\1" and image.disk.pread(far, 65536) == b"\2" * 65536
    assert (checked(bytes(tape.data)).corruptions, checked(bytes(tape.data)).leaks) == (0, 0)


def test_compressed_clusters_are_replaced_and_freed(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image"
    source = b"".join(bytes([i + 1]) * K for i in range(32))
    raw.write_bytes(source)
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"cluster_size={K}", raw, path)
    tape = Tape(path.read_bytes())
    with Image(tape) as image:
        image.disk.pwrite(5 * K + 7, b"in the middle")
        expected = bytearray(source)
        expected[5 * K + 7 : 5 * K + 20] = b"in the middle"
        assert image.disk.pread(0, len(source)) == expected
        image.disk.pwrite(0, source)
        assert image.disk.pread(0, len(source)) == source
    report = checked(bytes(tape.data))
    assert (report.corruptions, report.leaks, report.compressed_clusters, report.allocated_clusters) == (0, 0, 0, 32)


# -- metadata is not written over ----------------------------------------------------------------------------


def damaged(offset: int, entry: int) -> bytes:
    """An image with data in its first clusters, and one L2 entry changed."""
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 4 * K)
    return poked(bytes(tape.data), l2_entry_place(bytes(tape.data), offset), entry)


def marked(data: bytes) -> bytes:
    """The image with the corrupt bit set."""
    return poked(data, 72, 2)


@pytest.mark.parametrize("cluster", [1, 2, 3, 4])
def test_a_guest_cluster_that_lies_on_metadata_is_not_written(cluster: int) -> None:
    """Refcount table, refcount block, L1 table and L2 table, each with the refcount 1."""
    data = damaged(0, cluster * K | COPIED)
    tape = Tape(data)
    with Image(tape) as image:
        assert image.format.in_place(0, K) == -1
        with pytest.raises(CorruptImage, match=r"place of guest offset 0x0 is 0x[1-4]000: metadata"):
            image.disk.pwrite(0, b"!" * K)
        with pytest.raises(ImageError, match="was found corrupt"):
            image.disk.pwrite(K, b"fine")
    assert bytes(tape.data) == marked(data)
    with pytest.raises(ImageError, match="is marked corrupt"):
        Image(tape)
    with Image(tape, writable=False) as image:
        assert image.disk.pread(K, K) == b"a" * K


def test_a_cluster_counted_as_free_is_not_written() -> None:
    data = damaged(0, 100 * K | COPIED)
    with Image(Tape(data + bytes(200 * K))) as image:
        assert image.format.in_place(0, K) == -1
        with pytest.raises(CorruptImage, match="refcount of that host cluster is 0"):
            image.disk.pwrite(0, b"x")


def test_copied_without_a_refcount_of_one_is_not_believed() -> None:
    data = damaged(0, 0)
    place = l2_entry(data, K) & OFFSET_MASK
    shared = poked(data, l2_entry_place(data, 0), place | COPIED)  # two guest clusters in one host cluster
    shared = poked(shared, 2 * K + 2 * (place // K), 2, 2)
    with Image(Tape(shared)) as image:
        image.disk.pwrite(0, b"x" * K)
        assert image.disk.pread(K, K) == b"a" * K


def test_metadata_counted_as_free_is_not_allocated() -> None:
    for cluster in (0, 1, 2, 3):
        data = poked(NEW, 2 * K + 2 * cluster, 0, 2)
        tape = Tape(data)
        with Image(tape) as image, pytest.raises(CorruptImage, match="metadata lies there"):
            image.disk.pwrite(0, b"x")
        assert bytes(tape.data) == marked(data)


def test_a_table_named_twice_is_not_changed() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"a")
        image.disk.pwrite(3 << 20, b"b")
    data = bytes(tape.data)
    twice = poked(data, 3 * K + 8, l1_of(data)[0])
    with Image(Tape(twice)) as image, pytest.raises(CorruptImage, match="L1 entry 1"):
        image.disk.pwrite((2 << 20) + 2 * K, b"x")
    with Image(Tape(twice)) as image, pytest.raises(CorruptImage, match="L1 entry 0"):
        image.disk.zero(0, K)


def test_a_table_that_is_something_else_is_not_changed() -> None:
    for cluster in (1, 2, 3):
        data = poked(NEW, 3 * K, cluster * K | COPIED)
        for offset in (0, K, 300 * K):
            for attempt in (lambda disk, at: disk.pwrite(at, b"x"), lambda disk, at: disk.zero(at, K)):
                tape = Tape(data)
                with Image(tape) as image, pytest.raises(CorruptImage):
                    attempt(image.disk, offset)
                assert bytes(tape.data) == marked(data)
