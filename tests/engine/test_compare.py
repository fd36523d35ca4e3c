"""Comparison: the first byte that differs, whatever the maps of the two sides say."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.core.graph import Graph
from diskwright.core.node import StorageNode
from diskwright.engine import compare
from diskwright.engine.compare import beyond_is_zero, first_difference
from diskwright.extents import DATA, ZERO, Extent
from tests.core.ram import Ram
from tests.jobs.faulty import Fault, Faulty

B = 4096
LEASES = Graph().leases


def node(data: bytes, *, told: list[bool] | None = None) -> tuple[StorageNode, Ram]:
    """``told[i]``: block i, which is all zeros, is told as data all the same."""
    storage = Faulty(len(data))
    storage.data[:] = data

    def extent_at(offset: int, length: int) -> Extent:
        block = offset // B
        end = min(offset + length, (block + 1) * B)
        zero = not any(data[block * B : (block + 1) * B]) and not (told and told[block])
        return Extent(offset, end - offset, ZERO if zero else DATA, -1 if zero else offset)

    storage.extent_at = extent_at  # type: ignore[method-assign]
    return StorageNode("n", storage, True), storage


blocks = st.lists(st.sampled_from([b"\0", b"\0", b"a", b"b"]), min_size=1, max_size=12)


@given(left=blocks, right=blocks, spots=st.lists(st.tuples(st.integers(0, 12 * B), st.booleans()), max_size=3),
       told=st.lists(st.booleans(), min_size=13, max_size=13), chunk=st.sampled_from([B, 3 * B, 64 * B]))  # fmt: skip
def test_the_first_difference(
    left: list[bytes], right: list[bytes], spots: list[tuple[int, bool]], told: list[bool], chunk: int
) -> None:
    # Mostly alike, so that the first difference is not always at the beginning.
    same = min(len(left), len(right)) // 2
    right[:same] = left[:same]
    a, b = bytearray(b"".join(x * B for x in left)), bytearray(b"".join(x * B for x in right))
    for at, mine in spots:
        side = a if mine else b
        if at < len(side):
            side[at] ^= 0x55
    shorter = min(len(a), len(b))
    expected = next((i for i in range(shorter) if a[i] != b[i]), None)
    one, other = node(bytes(a), told=told)[0], node(bytes(b), told=told[::-1])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CHUNK", chunk)
        assert first_difference(one, other, LEASES) == expected
        assert first_difference(other, one, LEASES) == expected
        cut = shorter // 2
        assert first_difference(one, other, LEASES, length=cut) == (
            expected if expected is not None and expected < cut else None
        )
        for side, data in ((one, a), (other, b)):
            rest = next((i for i in range(cut, len(data)) if data[i]), None)
            assert beyond_is_zero(side, LEASES, cut) == rest


def test_zeros_on_both_sides_are_not_read() -> None:
    reads: list[int] = []
    one, storage = node(bytes(4 * B) + b"x" * B)
    other, second = node(bytes(4 * B) + b"x" * B)
    for each in (storage, second):
        each.hook = lambda what, offset, length: reads.append(offset)  # type: ignore[attr-defined]
    assert first_difference(one, other, LEASES) is None
    assert sorted(reads) == [4 * B, 4 * B]


def test_progress_tells_every_byte_once() -> None:
    told: list[int] = []
    one, other = node(b"x" * (7 * B) + bytes(5 * B))[0], node(b"x" * (7 * B) + bytes(5 * B))[0]
    assert first_difference(one, other, LEASES, progress=told.append) is None
    assert sum(told) == 12 * B


def test_an_error_is_not_equality() -> None:
    one, storage = node(b"x" * (9 * B))
    storage.hook = Fault("read", offset=8 * B, times=None)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="Input/output error"):
        first_difference(one, node(b"x" * (9 * B))[0], LEASES)
    with pytest.raises(OSError, match="Input/output error"):
        beyond_is_zero(node_of_zeros_that_fails(), LEASES, 0)


def node_of_zeros_that_fails() -> StorageNode:
    made, storage = node(bytes(9 * B), told=[True] * 9)
    storage.hook = Fault("read", offset=8 * B, times=None)  # type: ignore[attr-defined]
    return made


def test_stop_is_heard_while_comparing() -> None:
    stop = threading.Event()
    one, storage = node(b"x" * (64 * B))
    other = node(b"x" * (63 * B) + b"y" * B)[0]
    storage.hook = lambda what, offset, length: stop.set()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CHUNK", B)
        assert first_difference(one, other, LEASES, stop=stop.is_set) is None
