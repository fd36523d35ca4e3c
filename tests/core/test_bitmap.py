"""DirtyBitmap against a set of granule numbers."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diskwright.core.bitmap import MAX_GRANULARITY, RUN_WINDOW, DirtyBitmap
from diskwright.errors import GraphError, LimitExceeded, OptionError

G = 512


class Model(RuleBasedStateMachine):
    """Every operation on a bitmap and on a Python set, which must agree after each."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 100 * G - 100
        self.bitmap = DirtyBitmap(self.size, G)
        self.model: set[int] = set()

    def granules(self, offset: int, length: int) -> set[int]:
        last = -(-self.size // G)
        return {g for g in range(offset // G, (offset + length - 1) // G + 1) if g < last}

    ranges = st.tuples(st.integers(0, 110 * G), st.integers(1, 40 * G))

    @rule(where=ranges)
    def set(self, where: tuple[int, int]) -> None:
        self.bitmap.set(*where)
        if self.bitmap.enabled:
            self.model |= self.granules(*where)

    @rule(where=st.lists(ranges, max_size=5))
    def set_segments(self, where: list[tuple[int, int]]) -> None:
        self.bitmap.set_segments([(o, memoryview(bytes(n))) for o, n in where])
        if self.bitmap.enabled:
            for o, n in where:
                self.model |= self.granules(o, n)

    @rule(where=ranges)
    def mark(self, where: tuple[int, int]) -> None:
        self.bitmap.mark(*where)
        self.model |= self.granules(*where)

    @rule(where=ranges)
    def clear(self, where: tuple[int, int]) -> None:
        self.bitmap.clear(*where)
        self.model -= self.granules(*where)

    @rule(on=st.booleans())
    def enable(self, on: bool) -> None:
        self.bitmap.enabled = on

    @rule(all=st.booleans())
    def everything(self, all: bool) -> None:
        if all:
            self.bitmap.set_all()
            self.model = set(range(-(-self.size // G)))
        else:
            self.bitmap.clear_all()
            self.model = set()

    def first_run(self, offset: int, longest: int | None) -> tuple[int, int] | None:
        dirty = [g for g in sorted(self.model) if g >= offset // G]
        if not dirty:
            return None
        stop = dirty[0] + 1
        while stop in self.model and (longest is None or (stop + 1 - dirty[0]) * G <= longest):
            stop += 1
        return dirty[0] * G, min(stop * G, self.size) - dirty[0] * G

    @rule(offset=st.integers(0, 110 * G), longest=st.none() | st.integers(1, 30 * G))
    def take(self, offset: int, longest: int | None) -> None:
        expected = self.first_run(offset, longest)
        assert self.bitmap.next_dirty(offset, longest) == expected
        assert self.bitmap.take(offset, longest) == expected
        if expected is not None:
            self.model -= self.granules(*expected)

    @rule(size=st.integers(0, 120 * G))
    def resize(self, size: int) -> None:
        self.size = size
        self.bitmap.resize(size)
        self.model = {g for g in self.model if g < -(-size // G)}

    @rule(other=st.sets(st.integers(0, 119)), coarse=st.integers(0, 3))
    def merge(self, other: set[int], coarse: int) -> None:
        theirs = DirtyBitmap(self.size, G << coarse)
        for g in other:
            theirs.set(g * (G << coarse), 1)
        self.bitmap.merge(theirs)
        for g in other:
            if g << coarse < -(-self.size // G):
                self.model |= self.granules(g * (G << coarse), G << coarse)

    @rule(where=st.tuples(st.integers(0, 14), st.binary(max_size=16)))
    def load(self, where: tuple[int, bytes]) -> None:
        byte, packed = where
        self.bitmap.load_bits(byte * 8 * G, packed)
        for i, value in enumerate(packed):
            for bit in range(8):
                g = (byte + i) * 8 + bit
                if g < -(-self.size // G):
                    (self.model.add if value >> bit & 1 else self.model.discard)(g)

    @invariant()
    def agrees(self) -> None:
        assert self.bitmap.granules == len(self.model)
        assert self.bitmap.count == len(self.model) * G
        assert self.bitmap.dirty_bytes == sum(min(G, self.size - g * G) for g in self.model)
        packed = self.bitmap.read_bits(0, self.size) if self.size else b""
        assert {i * 8 + b for i, v in enumerate(packed) for b in range(8) if v >> b & 1} == self.model
        for g in (0, 1, 50, 99):
            if g < -(-self.size // G):
                assert self.bitmap.get(g * G) == (g in self.model)
        offsets, lengths = self.bitmap.runs(0, self.size)
        assert offsets.dtype == lengths.dtype == np.int64
        seen = {g for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True) for g in self.granules(o, n)}
        assert seen == self.model
        assert all(o + n < p for o, n, p in zip(offsets, lengths, offsets[1:], strict=False))
        assert sum(lengths.tolist()) == self.bitmap.dirty_bytes


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("granularity", [0, -512, 100, 256, 1000, 513])
def test_granularity_must_be_a_power_of_two_from_512(granularity: int) -> None:
    with pytest.raises(OptionError, match="Granularity must be power of 2 and at least 512"):
        DirtyBitmap(1 << 20, granularity)


def test_granularity_has_an_upper_limit() -> None:
    assert DirtyBitmap(1 << 30, MAX_GRANULARITY).granularity == 2 << 30
    with pytest.raises(OptionError, match="4294967296"):
        DirtyBitmap(1 << 30, 4 << 30)


def test_a_bitmap_that_would_not_fit_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(LimitExceeded, match="granularity 512"):
        DirtyBitmap(1 << 62, 512)


def test_runs_are_cut_at_the_ends_of_the_range_and_come_in_bounded_windows() -> None:
    bitmap = DirtyBitmap(3 * RUN_WINDOW * G, G)
    bitmap.set(G, 10 * G)
    bitmap.set((RUN_WINDOW - 5) * G, 10 * G)
    offsets, lengths = bitmap.runs(3 * G + 7, 4 * G)
    assert (offsets.tolist(), lengths.tolist()) == ([3 * G + 7], [4 * G])
    with pytest.raises(ValueError, match="granules"):
        bitmap.runs(0, (RUN_WINDOW + 1) * G)
    found = [pair for o, n in bitmap.run_windows(0, bitmap.size) for pair in zip(o.tolist(), n.tolist(), strict=True)]
    assert found[0] == (G, 10 * G)
    assert sum(n for _, n in found) == 20 * G == bitmap.dirty_bytes


def test_numpy_sees_the_same_memory() -> None:
    bitmap = DirtyBitmap(64 * G, G)
    view = np.frombuffer(bitmap.buffer, np.uint8)
    bitmap.set(9 * G, 1)
    assert view.tolist() == [0, 2, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_bits_can_be_stored_only_in_whole_bytes() -> None:
    bitmap = DirtyBitmap(64 * G, G)
    with pytest.raises(ValueError, match="8 granules"):
        bitmap.read_bits(G, G)
    with pytest.raises(ValueError, match="8 granules"):
        bitmap.load_bits(4 * G, b"\1")


def test_merge_refuses_another_size() -> None:
    with pytest.raises(GraphError, match="destination size is 1024, source size is 2048"):
        DirtyBitmap(1024, G).merge(DirtyBitmap(2048, G))


def test_merge_with_itself_changes_nothing() -> None:
    bitmap = DirtyBitmap(64 * G, G)
    bitmap.set(0, 1)
    bitmap.merge(bitmap)
    assert bitmap.granules == 1


def test_states_are_refused_by_name() -> None:
    bitmap = DirtyBitmap(64 * G, G, name="b0")
    bitmap.hold()
    with pytest.raises(GraphError, match="Bitmap 'b0' is currently in use by another operation"):
        bitmap.hold()
    with pytest.raises(GraphError, match="in use"):
        bitmap.check()
    bitmap.set(0, 1)  # a guest's write is recorded all the same
    assert bitmap.granules == 1
    bitmap.release()
    bitmap.check()
    bitmap.readonly = True
    with pytest.raises(GraphError, match="Bitmap 'b0' is readonly"):
        bitmap.check()
    bitmap.check(allow_readonly=True)
    bitmap.readonly, bitmap.inconsistent = False, True
    with pytest.raises(GraphError, match="Bitmap 'b0' is inconsistent"):
        bitmap.check()
    bitmap.check(allow_inconsistent=True)


def test_no_bit_is_lost_between_writers_and_a_taker() -> None:
    """Writers add 1 to a granule's counter and then set its bit; the taker copies the counter after taking the
    bit. When all have ended, one more round of taking must leave every copy up to date."""
    granules, rounds = 64, 3000
    bitmap = DirtyBitmap(granules * G, G)
    source, target = [[0] * granules for _ in range(4)], [[0] * granules for _ in range(4)]
    done = threading.Event()

    def write(me: int) -> None:
        for i in range(rounds):
            g = (i * 7 + me * 13) % granules
            source[me][g] += 1
            if i % 3:
                bitmap.set(g * G, G)
            else:
                bitmap.set_segments([(g * G, memoryview(bytes(G)))])

    def drain() -> None:
        while run := bitmap.take(0, 3 * G):
            for g in range(run[0] // G, (run[0] + run[1]) // G):
                for mine, theirs in zip(target, source, strict=True):
                    mine[g] = theirs[g]

    def copy() -> None:
        while not done.is_set():
            drain()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        copier = threading.Thread(target=copy)
        for thread in (*writers, copier):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        copier.join()
    finally:
        sys.setswitchinterval(interval)
    drain()
    assert target == source
    assert bitmap.granules == 0


CHANGES = {
    "mark": lambda b: b.mark(0, 1),
    "clear": lambda b: b.clear(0, 1),
    "take": lambda b: b.take(0),
    "merge": lambda b: b.merge(DirtyBitmap(b.size, b.granularity)),
    "resize": lambda b: b.resize(1 << 21),
    "disable": lambda b: setattr(b, "enabled", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_guard_is_asked_before_the_first_change(change: str) -> None:
    bitmap = DirtyBitmap(1 << 20, 512)
    bitmap.mark(4096, 1)
    before = bytes(bitmap.buffer), bitmap.enabled, bitmap.size
    calls = []

    def guard() -> None:
        calls.append((bytes(bitmap.buffer), bitmap.enabled, bitmap.size))
        if len(calls) == 1:
            raise OSError(5, "no")

    bitmap.guard = guard
    with pytest.raises(OSError, match="no"):
        CHANGES[change](bitmap)
    assert (bytes(bitmap.buffer), bitmap.enabled, bitmap.size) == before
    CHANGES[change](bitmap)
    CHANGES[change](bitmap)
    assert calls == [before, before]
