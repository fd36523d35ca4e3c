"""Rows of numbers as text, against Python's own formatting."""

from __future__ import annotations

import random

import numpy as np
import pytest

from diskwright.cli.rowtext import row_text

TEXTS = {3: ("<", " and ", ">\n"), 70000: ("", "", "\u00fc, which is longer than the others\n"), 4: ("abcd", "x", "")}


def plain(code: int, numbers: tuple[int, ...]) -> str:
    first, *rest = TEXTS[code]
    return first + "".join(
        ("" if number < 0 else str(number)) + text for number, text in zip(numbers, rest, strict=True)
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_rows(seed: int) -> None:
    chance = random.Random(seed)
    most = 10 ** chance.randrange(1, 20)
    edges = [-1, 0, 1, 9, 10, 9999, 10000, 10001, 99999999, 100000000, 10**12 - 1, 10**12, (1 << 63) - 1]
    known = chance.sample(sorted(TEXTS), chance.randrange(1, 4))
    rows = [
        (chance.choice(known), tuple(
            chance.choice(edges) if chance.random() < 0.3 else min(chance.randrange(most), (1 << 63) - 1)
            for _ in range(2)
        ))
        for _ in range(chance.choice((1, 2, 500)))
    ]  # fmt: skip
    codes = np.array([code for code, _ in rows])
    columns = [np.array([numbers[i] for _, numbers in rows], np.int64) for i in range(2)]
    assert row_text(codes, columns, TEXTS.__getitem__) == "".join(plain(code, numbers) for code, numbers in rows)


def test_columns_with_no_numbers_at_all() -> None:
    nothing = np.full(3, -1)
    assert row_text(np.full(3, 3), (np.zeros(3, np.int64), nothing), TEXTS.__getitem__) == "<0 and >\n" * 3
