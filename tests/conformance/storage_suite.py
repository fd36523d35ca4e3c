"""The suite every storage driver passes.

Subclass ``StorageConformance`` as ``Test...`` and write ``make(size)``; what a driver cannot do is declared
by the class attributes. ``self.home`` is an empty directory that is removed afterwards, and what
``make`` returned is closed by the suite.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diskwright.core.driver import FilePlace, Storage, runs_of
from diskwright.core.permissions import FORCED, LIVE_READER, READER, WRITER
from diskwright.errors import OptionError
from diskwright.extents import DATA, ZERO
from diskwright.units import KiB, MiB, is_power_of_two

SIZE = MiB
RAGGED = MiB + 3 * KiB + 777
"""A size that is a multiple of nothing."""

CROSSINGS = [(0, 1), (511, 2), (4095, 4097), (512, 512), (1, 65536), (70000, 200001), (4096, 8192), (65535, 1)]


class StorageConformance:
    """What a driver must keep."""

    keeps_data: ClassVar[bool] = True
    """False: reads do not give what was written."""
    can_grow: ClassVar[bool] = True
    """A write beyond the end makes the storage longer."""
    can_truncate: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    """Sizes need not be multiples of a sector."""
    can_zero: ClassVar[bool] = True
    """``write_zeros`` with ``unmap`` works, fast."""
    has_holes: ClassVar[bool] = True
    """``extents`` of a new storage says that it is all zeros."""
    has_place: ClassVar[bool] = True
    """``place`` gives something for bytes within the size."""
    can_copy: ClassVar[bool] = True
    """``copy_from`` takes a file of ``self.home``, for aligned ranges at least."""
    model_examples: ClassVar[int] = 60

    home: Path
    _opened: list[Storage]

    def make(self, size: int) -> Storage:
        """A new storage of ``size`` bytes, writable, that nobody has written to."""
        raise NotImplementedError

    @contextmanager
    def failing_flush(self, storage: Storage) -> Iterator[None]:
        """While it lasts, the medium refuses to be flushed. Skips where there is no way to do that."""
        pytest.skip("no way to make a flush fail")
        yield

    @pytest.fixture(autouse=True)
    def _keep_house(self, tmp_path: Path) -> Iterator[None]:
        self.home, self._opened = tmp_path, []
        yield
        for storage in self._opened:
            storage.close()

    # -- helpers ---------------------------------------------------------------------------------

    def fresh(self, size: int = SIZE) -> Storage:
        storage = self.make(size)
        self._opened.append(storage)
        return storage

    def filled(self, size: int = SIZE, seed: int = 1) -> tuple[Storage, bytearray]:
        """A storage of random bytes, none of them zero, and those bytes."""
        storage, content = self.fresh(size), bytearray(noise(size, seed))
        write(storage, 0, content)
        return storage, content

    def need(self, what: str) -> None:
        if not getattr(self, what):
            pytest.skip(f"the driver declares {what} = False")

    def zero_it(self, storage: Storage, offset: int, length: int, *, unmap: bool, fast: bool = False) -> bool:
        """``write_zeros`` as its callers do it: False when it is not to be had and nothing was written."""
        try:
            storage.write_zeros(offset, length, unmap=unmap, fast=fast)
        except OSError as error:
            assert error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP)
            assert not (self.can_zero and unmap), "the driver declares can_zero"
            if fast:
                return False
            write(storage, offset, bytes(length))
        return True

    # -- what it is ------------------------------------------------------------------------------

    def test_states_what_it_is(self) -> None:
        storage = self.fresh()
        assert storage.name and storage.filename
        assert is_power_of_two(storage.alignment)
        assert storage.size == SIZE

    def test_has_the_very_size_it_was_made_with(self) -> None:
        self.need("any_size")
        assert self.fresh(RAGGED).size == RAGGED

    def test_new_bytes_read_as_zeros_when_it_says_so(self) -> None:
        storage = self.fresh()
        if not storage.zero_init:
            pytest.skip("zero_init is False")
        assert read(storage, 0, SIZE) == bytes(SIZE)

    def test_takes_any_access_while_nobody_else_uses_it(self) -> None:
        storage = self.fresh()
        for access in (WRITER, READER, FORCED, LIVE_READER, WRITER):
            storage.set_access(access)

    def test_allocated_size_is_unknown_or_grows_with_what_is_written(self) -> None:
        storage = self.fresh(8 * MiB)
        before = storage.allocated_size()
        if before is None or not (self.keeps_data and self.has_holes):
            pytest.skip("allocation is unknown here")
        write(storage, 0, noise(MiB))
        storage.flush()
        after = storage.allocated_size()
        assert after is not None and after - before >= MiB

    # -- reading and writing ---------------------------------------------------------------------

    def test_reads_what_was_written(self) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        assert read(storage, 0, SIZE) == content

    @pytest.mark.parametrize(("offset", "length"), CROSSINGS)
    def test_writes_any_range_and_nothing_else(self, offset: int, length: int) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        write(storage, offset, noise(length, 2))
        content[offset : offset + length] = noise(length, 2)
        assert read(storage, 0, SIZE) == content

    @pytest.mark.parametrize(("offset", "length"), CROSSINGS)
    def test_reads_any_range_into_that_buffer_and_no_further(self, offset: int, length: int) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        frame = bytearray(b"\xee" * (length + 64))
        storage.readv([(offset, memoryview(frame)[32 : 32 + length])])
        assert frame[:32] == frame[32 + length :] == b"\xee" * 32
        assert frame[32 : 32 + length] == content[offset : offset + length]

    def test_reads_many_segments_in_any_order(self) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        wanted = [(offset, length) for offset, length in CROSSINGS for _ in range(2)]
        random.Random(3).shuffle(wanted)
        buffers = [bytearray(length) for _, length in wanted]
        storage.readv([(offset, memoryview(b)) for (offset, _), b in zip(wanted, buffers, strict=True)])
        assert buffers == [content[offset : offset + length] for offset, length in wanted]

    def test_writes_many_segments_of_which_later_ones_win(self) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        parts = [(offset, noise(length, seed)) for seed, (offset, length) in enumerate(CROSSINGS)]
        storage.writev([(offset, memoryview(data)) for offset, data in parts])
        for offset, data in parts:
            content[offset : offset + len(data)] = data
        assert read(storage, 0, SIZE) == content

    def test_adjoining_segments_beyond_what_one_system_call_takes(self) -> None:
        self.need("keeps_data")
        storage = self.fresh()
        lengths = [1 + i % 3 for i in range(2500)]
        data = noise(sum(lengths))
        cuts = [100]
        for length in lengths:
            cuts.append(cuts[-1] + length)
        storage.writev([(a, memoryview(data)[a - 100 : b - 100]) for a, b in itertools.pairwise(cuts)])
        assert read(storage, 100, len(data)) == data
        got = bytearray(len(data))
        storage.readv([(a, memoryview(got)[a - 100 : b - 100]) for a, b in itertools.pairwise(cuts)])
        assert got == data

    def test_long_segments(self) -> None:
        self.need("keeps_data")
        storage = self.fresh(8 * MiB)
        data = noise(5 * MiB + 3)
        write(storage, 12345, data)
        assert read(storage, 12345, len(data)) == data
        assert storage.size == 8 * MiB

    def test_nowait_gives_the_bytes_or_refuses(self) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        for offset, length in CROSSINGS:
            buffer = bytearray(length)
            try:
                storage.readv([(offset, memoryview(buffer))], nowait=True)
            except BlockingIOError:
                storage.readv([(offset, memoryview(buffer))])
            assert buffer == content[offset : offset + length]

    def test_nowait_of_many_segments(self) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        buffers = [bytearray(length) for _, length in CROSSINGS]
        segments = [(offset, memoryview(b)) for (offset, _), b in zip(CROSSINGS, buffers, strict=True)]
        try:
            storage.readv(segments, nowait=True)
        except BlockingIOError:
            return
        assert buffers == [content[offset : offset + length] for offset, length in CROSSINGS]

    # -- the end ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("nowait", [False, True])
    def test_beyond_the_end_reads_as_zeros(self, nowait: bool) -> None:
        size = RAGGED if self.any_size else SIZE
        storage, content = self.filled(size)
        for offset, length in ((size - 100, 5000), (size - 1, 2), (size, 100), (size + 123456, 70000)):
            buffer = bytearray(b"\xee" * length)
            try:
                storage.readv([(offset, memoryview(buffer))], nowait=nowait)
            except BlockingIOError:
                assert nowait
                continue
            inside = content[offset:] if self.keeps_data else bytes(max(0, size - offset))
            assert buffer == inside + bytes(length - len(inside))
        assert storage.size == size

    def test_segments_of_one_read_beyond_the_end(self) -> None:
        storage, content = self.filled()
        buffers = [bytearray(b"\xee" * 300) for _ in range(3)]
        places = (SIZE - 300, SIZE, SIZE + 300)
        storage.readv([(offset, memoryview(b)) for offset, b in zip(places, buffers, strict=True)])
        assert buffers[0] == (content[-300:] if self.keeps_data else bytes(300))
        assert buffers[1] == buffers[2] == bytes(300)

    @pytest.mark.parametrize("offset", [SIZE - 10, SIZE, SIZE + 1, SIZE + 70000])
    def test_writes_beyond_the_end_make_it_just_that_much_longer(self, offset: int) -> None:
        self.need("can_grow")
        storage, content = self.filled()
        write(storage, offset, noise(333, 2))
        assert storage.size == max(SIZE, offset + 333)
        content.extend(bytes(storage.size - SIZE))
        content[offset : offset + 333] = noise(333, 2)
        assert read(storage, 0, len(content)) == content

    def test_a_storage_that_cannot_grow_says_so(self) -> None:
        if self.can_grow:
            pytest.skip("it can")
        storage = self.fresh()
        with pytest.raises(OSError) as caught:
            write(storage, SIZE - 512, bytes(1024))
        assert caught.value.errno == errno.ENOSPC
        assert storage.size == SIZE

    def test_grows_byte_by_byte_from_nothing(self) -> None:
        self.need("can_grow")
        storage = self.fresh(0)
        data = noise(1100)
        for i in range(0, 1100, 11):
            write(storage, i, data[i : i + 11])
            assert storage.size == i + 11
        assert read(storage, 0, 1100) == data

    def test_rewriting_the_ragged_end_does_not_move_it(self) -> None:
        self.need("any_size")
        self.need("keeps_data")
        storage, content = self.filled(RAGGED)
        for start in (RAGGED - 1, RAGGED - 600, RAGGED - 5000):
            write(storage, start, noise(RAGGED - start, 4))
            content[start:] = noise(RAGGED - start, 4)
            assert storage.size == RAGGED
        assert read(storage, 0, RAGGED) == content

    # -- zeros and discards ----------------------------------------------------------------------

    @pytest.mark.parametrize("fast", [False, True])
    @pytest.mark.parametrize("unmap", [False, True])
    @pytest.mark.parametrize(("offset", "length"), [*CROSSINGS, (0, SIZE)])
    def test_zeroes_any_range_and_nothing_else(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        if self.zero_it(storage, offset, length, unmap=unmap, fast=fast):
            content[offset : offset + length] = bytes(length)
        assert read(storage, 0, SIZE) == content
        assert storage.size == SIZE

    @pytest.mark.parametrize("unmap", [False, True])
    def test_zeroing_beyond_the_end_makes_it_longer(self, unmap: bool) -> None:
        self.need("can_grow")
        storage, content = self.filled(RAGGED)
        self.zero_it(storage, RAGGED - 500, 5000, unmap=unmap)
        assert storage.size == RAGGED + 4500
        self.zero_it(storage, RAGGED + 9000, 777, unmap=unmap)
        assert storage.size == RAGGED + 9777
        content[RAGGED - 500 :] = bytes(500 + 9777)
        assert read(storage, 0, len(content)) == content

    def test_unmapped_zeros_take_no_space(self) -> None:
        self.need("keeps_data")
        storage, _ = self.filled(8 * MiB)
        storage.flush()
        before = storage.allocated_size()
        if before is None or not (self.can_zero and self.has_holes):
            pytest.skip("allocation is unknown here")
        self.zero_it(storage, MiB, 6 * MiB, unmap=True)
        self.zero_it(storage, 8 * MiB, 4 * MiB, unmap=True)
        after = storage.allocated_size()
        assert after is not None and before - after >= 6 * MiB - 64 * KiB

    @pytest.mark.parametrize(("offset", "length"), [*CROSSINGS, (0, SIZE)])
    def test_discard_touches_nothing_else(self, offset: int, length: int) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        storage.discard(offset, length)
        now = read(storage, 0, SIZE)
        assert now[:offset] == content[:offset] and now[offset + length :] == content[offset + length :]
        assert storage.size == SIZE
        write(storage, offset, noise(length, 5))
        assert read(storage, offset, length) == noise(length, 5)

    # -- extents ---------------------------------------------------------------------------------

    def patchwork(self) -> tuple[Storage, bytearray]:
        """Written, zeroed and untouched parts."""
        storage, content = self.fresh(), bytearray(SIZE)
        for start, length in ((0, 4096), (65536, 70000), (300001, 5), (900000, SIZE - 900000)):
            write(storage, start, noise(length, start))
            content[start : start + length] = noise(length, start)
        self.zero_it(storage, 80000, 40000, unmap=True)
        content[80000:120000] = bytes(40000)
        return storage, content

    def test_extents_cover_the_range_exactly(self) -> None:
        storage, _ = self.patchwork()
        for start, length in ((0, SIZE), (4095, 70001), (81000, 1), (SIZE - 1, 1), (SIZE - 1000, 5000)):
            at = start
            for run in storage.extents(start, length):
                assert run.offset == at and run.length > 0
                assert run.kind in (DATA, ZERO)
                assert run.file_offset == run.offset or (run.kind == ZERO and run.file_offset == -1)
                at = run.end
            assert at == start + length

    def test_extents_agree_with_extent_at(self) -> None:
        storage, _ = self.patchwork()
        storage.flush()
        for start, length in ((0, SIZE), (4095, 70001), (81000, 1), (SIZE - 1000, 5000)):
            one_by_one = kinds(runs_of(storage.extent_at, start, length))
            assert kinds(storage.extents(start, length)) == one_by_one

    def test_what_is_called_zero_reads_as_zeros(self) -> None:
        self.need("keeps_data")
        storage, content = self.patchwork()
        zeros = [run for run in storage.extents(0, SIZE) if run.kind == ZERO]
        for run in zeros:
            assert content[run.offset : run.end] == bytes(run.length)
        if self.has_holes:
            assert sum(run.length for run in zeros) >= SIZE // 2

    def test_a_new_storage_has_no_data(self) -> None:
        self.need("has_holes")
        storage = self.fresh(64 * MiB)
        assert [run.kind for run in storage.extents(0, 64 * MiB)] == [ZERO]
        assert storage.extent_at(5, MiB)[:3] == (5, MiB, ZERO)

    def test_beyond_the_end_is_zero(self) -> None:
        storage, _ = self.filled()
        assert storage.extent_at(SIZE, 4096)[:3] == (SIZE, 4096, ZERO)
        assert list(storage.extents(SIZE - 4096, 8192))[-1].kind == ZERO

    def test_places_hold_the_bytes_that_are_read(self) -> None:
        self.need("keeps_data")
        storage, content = self.patchwork()
        for start, length in ((0, SIZE), (4095, 70001), (81000, 1), (SIZE - 1, 1), (SIZE - 1000, 5000)):
            place = storage.place(start, length)
            if not self.has_place:
                assert place is None
                continue
            assert place is not None and 0 < place.length <= min(length, SIZE - start)
            assert os.pread(place.fd, place.length, place.offset) == content[start : start + place.length]

    def test_no_place_beyond_the_end(self) -> None:
        storage, _ = self.filled()
        assert storage.place(SIZE, 4096) is None

    # -- copies in the kernel --------------------------------------------------------------------

    @pytest.mark.parametrize(("offset", "start", "length"), [(0, 0, SIZE), (8192, 4096, 65536), (777, 33, 70001)])
    def test_copies_like_a_write(self, offset: int, start: int, length: int) -> None:
        self.need("keeps_data")
        storage, content = self.filled()
        data = noise(SIZE, 6)
        with self.source(data) as fd:
            try:
                storage.copy_from(offset, FilePlace(fd, start, length))
            except OSError as error:
                assert error.errno == errno.ENOTSUP
                assert not (self.can_copy and (offset | length) % 4096 == 0), "the driver declares can_copy"
                write(storage, offset, data[start : start + length])
        content[offset : offset + length] = data[start : start + length]
        assert read(storage, 0, SIZE) == content

    def test_a_copy_from_beyond_the_sources_end_is_left_to_the_caller(self) -> None:
        with self.source(b"short") as fd, pytest.raises(OSError) as caught:
            self.fresh().copy_from(0, FilePlace(fd, 0, 4096))
        assert caught.value.errno == errno.ENOTSUP

    @contextmanager
    def source(self, data: bytes) -> Iterator[int]:
        path = self.home / "source"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    # -- size ------------------------------------------------------------------------------------

    def test_grown_bytes_are_zeros_and_cut_off_ones_do_not_come_back(self) -> None:
        self.need("can_truncate")
        storage, content = self.filled(RAGGED)
        storage.truncate(300001)
        assert storage.size == 300001
        storage.truncate(RAGGED + 5000)
        assert storage.size == RAGGED + 5000
        assert read(storage, 0, RAGGED + 5000) == content[:300001] + bytes(RAGGED + 5000 - 300001)
        storage.truncate(0)
        assert storage.size == 0

    @pytest.mark.parametrize("preallocation", ["falloc", "full"])
    def test_preallocated_bytes_are_zeros_and_have_space(self, preallocation: str) -> None:
        self.need("can_truncate")
        storage, content = self.filled(RAGGED)
        storage.truncate(4 * MiB + 99, preallocation=preallocation)
        assert storage.size == 4 * MiB + 99
        assert read(storage, 0, 4 * MiB + 99) == content + bytes(4 * MiB + 99 - RAGGED)
        allocated = storage.allocated_size()
        assert allocated is None or allocated >= 4 * MiB

    def test_preallocation_is_not_for_shrinking(self) -> None:
        self.need("can_truncate")
        storage, content = self.filled()
        with pytest.raises(OptionError):
            storage.truncate(SIZE // 2, preallocation="full")
        with pytest.raises(OptionError):
            storage.truncate(2 * SIZE, preallocation="plenty")
        assert read(storage, 0, SIZE) == content and storage.size == SIZE

    def test_a_fixed_size_is_refused_politely(self) -> None:
        if self.can_truncate:
            pytest.skip("it can truncate")
        storage = self.fresh()
        with pytest.raises(OSError) as caught:
            storage.truncate(2 * SIZE)
        assert caught.value.errno == errno.ENOTSUP
        assert storage.size == SIZE

    # -- durability ------------------------------------------------------------------------------

    def test_flushes(self) -> None:
        storage, _ = self.filled()
        for _ in range(3):
            storage.flush()

    def test_after_a_failed_flush_every_flush_fails(self) -> None:
        storage, _ = self.filled()
        with self.failing_flush(storage), pytest.raises(OSError) as first:
            storage.flush()
        for _ in range(2):
            with pytest.raises(OSError) as later:
                storage.flush()
            assert later.value.errno == first.value.errno
            assert later.value.filename == first.value.filename == storage.filename

    # -- many at once ----------------------------------------------------------------------------

    def test_threads_that_write_side_by_side_do_not_meet(self) -> None:
        """Neighbouring pieces share blocks and pages, whatever their size is."""
        self.need("keeps_data")
        storage, content = self.filled()
        pieces = [(i * 701, noise(701, i)) for i in range(400)]
        for offset, data in pieces:
            content[offset : offset + 701] = data

        def some(worker: int) -> None:
            for offset, data in pieces[worker::8]:
                write(storage, offset, data)
                assert read(storage, offset, 701) == data

        together(some, 8)
        assert read(storage, 0, SIZE) == content

    def test_threads_that_zero_and_write_side_by_side_do_not_meet(self) -> None:
        self.need("keeps_data")
        storage, content = self.filled()

        def some(worker: int) -> None:
            for i in range(worker, 300, 6):
                if i % 2:
                    write(storage, i * 701, noise(701, i))
                else:
                    self.zero_it(storage, i * 701, 701, unmap=i % 4 == 0)

        together(some, 6)
        for i in range(300):
            content[i * 701 : i * 701 + 701] = noise(701, i) if i % 2 else bytes(701)
        assert read(storage, 0, SIZE) == content

    def test_threads_that_make_it_grow_lose_nothing(self) -> None:
        self.need("can_grow")
        storage = self.fresh(0)
        order = list(range(240))
        random.Random(7).shuffle(order)

        def some(worker: int) -> None:
            for i in order[worker::6]:
                if i % 3:
                    write(storage, i * 1000, noise(1000, i))
                else:
                    self.zero_it(storage, i * 1000, 1000, unmap=i % 2 == 0)

        together(some, 6)
        assert storage.size == 240000
        for i in range(240):
            assert read(storage, i * 1000, 1000) == (noise(1000, i) if i % 3 else bytes(1000))

    def test_threads_that_flush_while_others_write(self) -> None:
        storage = self.fresh()

        def some(worker: int) -> None:
            for i in range(20):
                write(storage, (worker * 20 + i) * 4096, noise(4096, i))
                storage.flush()

        together(some, 4)
        if self.keeps_data:
            assert all(read(storage, i * 4096, 4096) == noise(4096, i % 20) for i in range(80))

    # -- everything together ---------------------------------------------------------------------

    def test_random_operations_match_a_bytearray(self) -> None:
        self.need("keeps_data")
        limit = 40000
        offsets = st.integers(0, limit) | st.integers(0, limit // 512).map(lambda n: n * 512)
        lengths = st.integers(1, 9000) | st.sampled_from([512, 4096, 8192])
        names = ["write", "zero", "zero-unmap", "discard", "writes"] + ["truncate"] * self.can_truncate
        operations = st.tuples(st.sampled_from(names), offsets, lengths, st.integers(0, 1 << 20))

        @settings(
            max_examples=self.model_examples,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        @given(st.lists(operations, max_size=12), st.integers(0, 3000))
        def play(moves: list[tuple[str, int, int, int]], odd: int) -> None:
            size = 20000 + odd if self.any_size else 65536
            storage = self.make(size)
            try:
                self.play(storage, bytearray(read(storage, 0, size)), moves)
            finally:
                storage.close()

        play()

    def play(self, storage: Storage, model: bytearray, moves: list[tuple[str, int, int, int]]) -> None:
        for name, offset, length, seed in moves:
            if not self.can_grow:
                offset, length = offset % len(model), min(length, len(model) - offset % len(model))
            self.move(storage, model, name, offset, length, seed)
            assert storage.size == len(model)
            assert read(storage, 0, len(model) + 600) == model + bytes(600)
            for run in storage.extents(0, max(1, len(model))):
                assert run.kind == DATA or not any(model[run.offset : run.end])

    def move(self, storage: Storage, model: bytearray, name: str, offset: int, length: int, seed: int) -> None:
        if name == "truncate":
            storage.truncate(offset)
            del model[offset:]
            model.extend(bytes(offset - len(model)))
            return
        if name == "discard":
            length = min(length, len(model) - offset)
            if length > 0:
                storage.discard(offset, length)
                model[offset : offset + length] = read(storage, offset, length)
            return
        model.extend(bytes(max(0, offset + length - len(model))))
        if name == "writes":
            cut = 1 + seed % length
            data = noise(length, seed)
            storage.writev(
                [(offset + cut, memoryview(data)[cut:])] * (cut < length) + [(offset, memoryview(data)[:cut])]
            )
            model[offset : offset + length] = data
        elif name == "write":
            write(storage, offset, noise(length, seed))
            model[offset : offset + length] = noise(length, seed)
        else:
            self.zero_it(storage, offset, length, unmap=name == "zero-unmap")
            model[offset : offset + length] = bytes(length)


def read(storage: Storage, offset: int, length: int) -> bytes:
    # A buffer of other bytes than zeros, so that what is not filled in shows.
    buffer = bytearray(b"\xee" * length)
    if length:
        storage.readv([(offset, memoryview(buffer))])
    return bytes(buffer)


def write(storage: Storage, offset: int, data: bytes | bytearray) -> None:
    if data:
        storage.writev([(offset, memoryview(data))])


def noise(length: int, seed: int = 0) -> bytes:
    """The same bytes for the same seed; none of them is zero."""
    tile = bytes(1 + byte % 255 for byte in random.Random(seed).randbytes(min(length, 4099)))
    return (tile * (length // len(tile) + 1))[:length] if tile else b""


def kinds(runs: object) -> list[tuple[int, int, int]]:
    """``(offset, length, kind)`` with adjoining runs of a kind put together: drivers may cut where they like."""
    merged: list[tuple[int, int, int]] = []
    for run in runs:  # type: ignore[attr-defined]
        if merged and merged[-1][2] == run.kind and merged[-1][0] + merged[-1][1] == run.offset:
            start, length, kind = merged.pop()
            merged.append((start, length + run.length, kind))
        else:
            merged.append((run.offset, run.length, run.kind))
    return merged


def together(work: Callable[[int], None], workers: int) -> None:
    """Runs ``work(0)`` to ``work(workers - 1)`` at the same time. Raises what any of them raised."""
    gate = threading.Barrier(workers)

    def begin(worker: int) -> None:
        gate.wait(30)
        work(worker)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(begin, worker) for worker in range(workers)]:
            done.result(120)
