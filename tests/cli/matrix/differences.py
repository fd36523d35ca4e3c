"""What is meant to differ from qemu-img 7.2, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.cli.matrix.twins import Pair


@dataclass(frozen=True)
class Difference:
    """``words`` is a regular expression for command lines, ``may`` are the respects in which they may differ (``code``,
    ``out``, ``err``, ``files``), ``when`` decides by the outcomes, and ``reason`` is told in docs/tools/qemu-img.md."""

    reason: str
    words: str
    may: frozenset[str]
    example: str
    when: Callable[[Pair], bool] = lambda pair: True


TABLE: Final[tuple[Difference, ...]] = ()


def expected(pair: Pair) -> Difference | None:
    """The entry that explains how the outcomes differ; None when there is none."""
    line = " ".join(pair.words)
    for difference in TABLE:
        if pair.differing() <= difference.may and re.search(difference.words, line) and difference.when(pair):
            return difference
    return None
