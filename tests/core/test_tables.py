"""SliceCache: what is kept, what is forgotten, what is written back, and many threads at once."""

from __future__ import annotations

import random
import struct
import threading
from array import array

import pytest

from diskwright.core.driver import Segments
from diskwright.core.node import StorageNode
from diskwright.core.tables import BLOCK, OVERHEAD, Generations, SliceCache
from diskwright.errors import CorruptImage
from tests.core.ram import Ram

ITEMS = 2048  # 16 KiB: four blocks of 4 KiB
SLICE = ITEMS * 8


class Disk(Ram):
    """A Ram that counts reads, and can be told to fail them or to wait in them."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reads = 0
        self.broken = False
        self.gate: threading.Event | None = None

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        self.reads += 1
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.broken:
            raise OSError(5, "broken")
        super().readv(segments, nowait=nowait)


def make(slices: int = 64, *, kept: int = 16) -> tuple[SliceCache, Disk]:
    """A cache of ``kept`` slices over a file in which item ``i`` of slice ``n`` is ``n << 16 | i``."""
    disk = Disk(slices * SLICE)
    for n in range(slices):
        struct.pack_into(f">{ITEMS}Q", disk.data, n * SLICE, *(n << 16 | i for i in range(ITEMS)))
    cache = SliceCache(
        StorageNode("disk", disk, True),
        lambda n: n * SLICE if n < slices else -1,
        typecode="Q", items=ITEMS, byteorder="big", budget=kept * (SLICE + OVERHEAD),
    )  # fmt: skip
    return cache, disk


def write_back(cache: SliceCache, disk: Disk) -> list[tuple[int, int]]:
    pieces = cache.capture()
    disk.writev(pieces)
    cache.settle()
    return [(offset, len(data)) for offset, data in pieces]


def on_disk(disk: Disk, number: int, item: int) -> int:
    return int(struct.unpack_from(">Q", disk.data, number * SLICE + item * 8)[0])


def test_slices_are_read_once_and_are_native_integers() -> None:
    cache, disk = make()
    items = cache.get(5)
    assert items is not None and items[7] == 5 << 16 | 7
    assert cache.get(5) is items and cache.young.get(5) is items and disk.reads == 1
    assert cache.get(64) is None and cache.peek(64) is None


def test_little_endian_and_bytes() -> None:
    disk = Disk(4096)
    disk.data[:4] = b"\x01\x02\x03\x04"
    node = StorageNode("disk", disk, True)
    shorts = SliceCache(node, lambda n: 0, typecode="H", items=2, byteorder="little", budget=1 << 20)
    octets = SliceCache(node, lambda n: 0, typecode="B", items=4, byteorder="big", budget=1 << 20)
    assert list(shorts.get(0) or ()) == [0x0201, 0x0403]
    assert list(octets.get(0) or ()) == [1, 2, 3, 4]


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    cache, disk = make(kept=8)
    for n in range(40):
        cache.get(n)
        cache.get(0)  # used all the time
        assert len({*cache.young, *cache._old}) <= 8
    assert disk.reads == 40, "slice 0 must have been read only once"


def test_changed_and_pinned_slices_are_never_forgotten() -> None:
    cache, _ = make(kept=4)
    changed = cache.edit(1)
    assert changed is not None
    changed[3] = 99
    cache.mark(1, 3, 3)
    pinned = cache.edit(2)
    cache.pin(2)
    cache.pin(2)
    cache.capture()
    cache.settle()  # slice 1 is clean again; slice 2 was never marked
    changed = cache.edit(1)
    assert changed is not None
    cache.mark(1, 0, 0)
    for n in range(10, 40):
        cache.get(n)
    assert cache.peek(1) is changed and cache.peek(2) is pinned
    cache.unpin(2)
    for n in range(10, 40):
        cache.get(n)
    assert cache.peek(2) is pinned, "one pin is left"
    cache.unpin(2)
    for n in range(10, 40):
        cache.get(n)
    assert cache.peek(2) is None


def test_only_changed_blocks_are_written_in_order() -> None:
    cache, disk = make()
    per_block = BLOCK // 8
    for number, item in ((9, 0), (3, per_block), (3, 2 * per_block + 5), (3, ITEMS - 1), (4, 1)):
        items = cache.edit(number)
        assert items is not None
        items[item] = 7
        cache.mark(number, item, item)
    assert cache.changed == 3
    written = write_back(cache, disk)
    assert written == [(3 * SLICE + BLOCK, 3 * BLOCK), (4 * SLICE, BLOCK), (9 * SLICE, BLOCK)]
    assert on_disk(disk, 3, ITEMS - 1) == on_disk(disk, 3, per_block) == on_disk(disk, 9, 0) == 7
    assert on_disk(disk, 3, 0) == 3 << 16 and on_disk(disk, 3, per_block + 1) == 3 << 16 | per_block + 1
    assert not cache.changed and write_back(cache, disk) == []


def test_new_slices_are_zeros_and_written_whole() -> None:
    cache, disk = make()
    items = cache.put(63)
    assert list(items) == [0] * ITEMS
    assert write_back(cache, disk) == [(63 * SLICE, SLICE)]
    assert on_disk(disk, 63, 5) == 0


def test_changes_made_while_writing_are_written_next() -> None:
    cache, disk = make()
    items = cache.edit(0)
    assert items is not None
    items[0] = 1
    cache.mark(0, 0, 0)
    pieces = cache.capture()
    items[0] = 2
    cache.mark(0, 0, 0)
    disk.writev(pieces)
    cache.settle()
    assert on_disk(disk, 0, 0) == 1
    write_back(cache, disk)
    assert on_disk(disk, 0, 0) == 2


def test_after_a_failed_write_everything_is_still_to_be_written() -> None:
    cache, disk = make(kept=4)
    items = cache.edit(0)
    assert items is not None
    items[0] = 1
    cache.mark(0, 0, 0)
    cache.capture()
    items[ITEMS - 1] = 2
    cache.mark(0, ITEMS - 1, ITEMS - 1)
    for n in range(10, 40):
        cache.get(n)  # must not push out what is being written
    cache.restore()
    assert write_back(cache, disk) == [(0, BLOCK), (3 * BLOCK, BLOCK)]
    assert (on_disk(disk, 0, 0), on_disk(disk, 0, ITEMS - 1)) == (1, 2)


def test_a_failed_read_leaves_nothing_behind() -> None:
    cache, disk = make()
    disk.broken = True
    with pytest.raises(OSError, match="broken"):
        cache.get(1)
    disk.broken = False
    items = cache.get(1)
    assert items is not None and items[0] == 1 << 16


def test_an_error_of_locate_reaches_the_caller() -> None:
    def locate(number: int) -> int:
        raise CorruptImage("image", "table", number)

    cache = SliceCache(
        StorageNode("disk", Disk(0), True), locate, typecode="Q", items=8, byteorder="big", budget=1 << 20
    )
    for _ in range(2):  # and the lock is free again
        with pytest.raises(CorruptImage, match="table is 3"):
            cache.get(3)


def test_dropped_slices_are_not_written() -> None:
    cache, disk = make()
    cache.put(1)
    cache.drop(1)
    assert write_back(cache, disk) == [] and cache.peek(1) is None
    cache.put(2)
    cache.clear()
    assert write_back(cache, disk) == [] and not cache.changed


def test_many_askers_one_reader() -> None:
    cache, disk = make()
    disk.gate = threading.Event()
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get(3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    disk.gate.set()
    for thread in threads:
        thread.join(10)
    assert disk.reads == 1 and len(found) == 8 and all(items is found[0] for items in found)


def test_a_changed_slice_is_never_missed_by_lookups_without_a_lock() -> None:
    cache, _ = make(kept=2)
    lock, stop = threading.Lock(), threading.Event()
    pinned = cache.edit(0)
    cache.pin(0)
    failures: list[int] = []

    def look() -> None:
        while not stop.is_set():
            if cache.peek(0) is not pinned:
                failures.append(1)

    def churn(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(3000):
            cache.get(chance.choice((0, chance.randrange(64))))
            with lock:
                cache.edit(0)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    churners = [threading.Thread(target=churn, args=(i,)) for i in range(2)]
    for thread in lookers + churners:
        thread.start()
    for thread in churners:
        thread.join()
    stop.set()
    for thread in lookers:
        thread.join()
    assert not failures


def test_no_change_is_lost_among_threads_and_write_backs() -> None:
    cache, disk = make(slices=16, kept=3)
    lock, rounds = threading.Lock(), 400

    def count(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            number = chance.randrange(16)
            cache.get(chance.randrange(16))
            with lock:
                items = cache.edit(number)
                assert items is not None
                items[seed] += 1
                cache.mark(number, seed, seed)
                if chance.random() < 0.1:
                    disk.writev(cache.capture())
                    cache.settle()

    before = [[on_disk(disk, n, seed) for n in range(16)] for seed in range(4)]
    threads = [threading.Thread(target=count, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write_back(cache, disk)
    for seed in range(4):
        assert sum(on_disk(disk, n, seed) for n in range(16)) == sum(before[seed]) + rounds


def test_generations_keep_what_is_used_and_are_bounded() -> None:
    table = Generations(4)
    values = {n: array("Q", [n]) for n in range(20)}
    for n, value in values.items():
        table.set(n, value)
        assert table.get(0) is values[0]
        assert len({*table.young, *table._old}) <= 4
    assert table.peek(0) is values[0] and table.get(1) is None
    table.clear()
    assert table.peek(0) is None
