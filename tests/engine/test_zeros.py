"""Zero detection against a byte-by-byte look."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.engine.zeros import is_zero, zero_runs


def naive(data: bytes, unit: int) -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    for start in range(0, len(data), unit):
        piece = data[start : start + unit]
        zero = not any(piece)
        if runs and runs[-1][2] == zero:
            runs[-1] = (runs[-1][0], runs[-1][1] + len(piece), zero)
        else:
            runs.append((start, len(piece), zero))
    return runs


@given(
    size=st.integers(0, 400),
    ones=st.lists(st.integers(0, 399), max_size=12),
    unit=st.sampled_from([8, 16, 24, 64, 512]),
    shift=st.integers(0, 7),
)
def test_runs_are_those_of_a_byte_by_byte_look(size: int, ones: list[int], unit: int, shift: int) -> None:
    memory = bytearray(b"\xff" * shift + bytes(size) + b"\xff" * 9)
    for at in ones:
        if at < size:
            memory[shift + at] = 1
    piece = memoryview(memory)[shift : shift + size]
    assert zero_runs(piece, unit) == naive(bytes(piece), unit)
    assert is_zero(piece) == (not any(piece))


@pytest.mark.parametrize("share", [0, 1, 20, 60, 100])
def test_whatever_the_share_of_zero_units(share: int) -> None:
    unit, units = 4096, 256
    data = bytearray()
    for i in range(units):
        if i * 37 % 100 < share:
            data += bytes(unit)
        else:
            # The only byte set is anywhere in its unit, also where a look at first words would miss it.
            block = bytearray(unit)
            block[i * 1021 % unit] = 7
            data += block
    assert zero_runs(memoryview(data), unit) == naive(bytes(data), unit)


def test_one_byte_anywhere_is_seen() -> None:
    data = bytearray(8192 + 5)
    for at in (0, 7, 8, 4095, 4096, 8191, 8192, 8196):
        data[at] = 1
        assert not is_zero(memoryview(data))
        assert sum(n for _, n, zero in zero_runs(memoryview(data), 4096) if zero) == (
            len(data) - (5 if at >= 8192 else 4096)
        )
        data[at] = 0
    assert zero_runs(memoryview(data), 4096) == [(0, len(data), True)]
    assert zero_runs(memoryview(os.urandom(4096)), 4096) == [(0, 4096, False)]
