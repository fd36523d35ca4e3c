"""A format whose map is a list of runs given by the test."""

from __future__ import annotations

from typing import Any

from diskwright.core.driver import Format, OpenContext
from diskwright.core.node import Node
from diskwright.extents import SPECIAL, Extent


class TableMap(Format):
    """Answers from ``runs``, which must cover the size."""

    name = "tablemap"
    has_backing = True
    cluster_size = 4096

    def __init__(self, file: Node, size: int, runs: list[Extent]) -> None:
        self.children = (file,)
        self.size = size
        self.runs = runs

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> TableMap:
        raise NotImplementedError

    def extent_at(self, offset: int, length: int) -> Extent:
        for run in self.runs:
            if run.offset <= offset < run.end:
                moved = offset - run.offset if run.file_offset >= 0 and run.kind != SPECIAL else 0
                return run._replace(
                    offset=offset, length=min(length, run.end - offset), file_offset=run.file_offset + moved
                )
        raise AssertionError(f"nothing at {offset}")
