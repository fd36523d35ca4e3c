"""Extents: the columns must say exactly what single extents say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, Extents, windows


@st.composite
def run_lists(draw: st.DrawFn, start: int | None = None) -> list[Extent]:
    offset = draw(st.integers(0, 1 << 40)) if start is None else start
    runs = []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 9)) * 512
        kind = draw(st.sampled_from((DATA, ZERO, UNALLOCATED, SPECIAL)))
        placed = kind in (DATA, SPECIAL) or (kind == ZERO and draw(st.booleans()))
        # Few distinct places, so that runs which adjoin in the file come up.
        file_offset = draw(st.integers(0, 20)) * 512 if placed else -1
        child = draw(st.integers(0, 1)) if kind == DATA else 0
        runs.append(Extent(offset, length, kind, file_offset, child, 512 if kind == SPECIAL else 0))
        offset += length
    return runs


def sectors(runs: Extents | list[Extent]) -> dict[int, tuple[int, int, int, int]]:
    """The answer for each 512 bytes, which no cutting or merging may change."""
    table = {}
    for run in runs:
        for step in range(0, run.length, 512):
            moving = run.file_offset >= 0 and run.kind != SPECIAL
            table[run.offset + step] = (
                run.kind,
                run.file_offset + step if moving else run.file_offset,
                run.child,
                run.stored,
            )
    return table


@given(run_lists())
def test_columns_give_back_their_rows(runs: list[Extent]) -> None:
    assert list(Extents.of(runs)) == runs


@given(run_lists(), st.integers(-5, 50), st.integers(1, 60))
def test_slice_keeps_every_sector_in_range_and_no_other(runs: list[Extent], skip: int, count: int) -> None:
    start, length = max(0, runs[0].offset + skip * 512), count * 512
    cut = Extents.of(runs).slice(start, length)
    expected = {k: v for k, v in sectors(runs).items() if start <= k < start + length}
    assert sectors(cut) == expected


@given(run_lists())
def test_merge_changes_no_sector_and_leaves_nothing_to_merge(runs: list[Extent]) -> None:
    merged = Extents.of(runs).merge()
    assert sectors(merged) == sectors(runs)
    for a, b in zip(list(merged), list(merged)[1:], strict=False):
        continued = a.file_offset + a.length if a.file_offset >= 0 else -1
        assert a.kind == SPECIAL or (a.kind, a.child, continued) != (b.kind, b.child, b.file_offset)


@given(run_lists(start=4096), run_lists(start=6144))
def test_intersect_cuts_both_alike(left: list[Extent], right: list[Extent]) -> None:
    a, b = Extents.of(left).intersect(Extents.of(right))
    assert [(r.offset, r.length) for r in a] == [(r.offset, r.length) for r in b]
    shared = sectors(left).keys() & sectors(right).keys()
    assert sectors(a) == {k: v for k, v in sectors(left).items() if k in shared}
    assert sectors(b) == {k: v for k, v in sectors(right).items() if k in shared}


def test_total_counts_bytes_of_one_kind() -> None:
    columns = Extents.of([Extent(0, 512, DATA, 0), Extent(512, 1024, ZERO), Extent(1536, 512, DATA, 4096)])
    assert columns.total(DATA) == 1024
    assert columns.total(UNALLOCATED) == 0


def test_of_nothing_is_empty() -> None:
    assert len(Extents.of([])) == 0
    assert list(Extents.of([]).merge()) == []


@given(st.integers(0, 1 << 33), st.integers(0, 1 << 33), st.sampled_from((1 << 20, 1 << 30)))
def test_windows_cover_the_range_within_their_step(offset: int, length: int, step: int) -> None:
    at = offset
    for start, size in windows(offset, length, max(step, length // 50)):
        assert start == at and 0 < size <= max(step, length // 50)
        at += size
    assert at == offset + length
