"""Probing: which format an image is in, from its first bytes."""

from __future__ import annotations

from typing import Final

from diskwright.core import registry
from diskwright.core.driver import Format
from diskwright.core.node import Node

HEAD: Final = 2048
"""How many of an image's first bytes formats may look at."""


def probe_head(head: bytes, filename: str) -> type[Format]:
    """The format that is surest of an image beginning with ``head``; raw when nobody else claims it."""
    best, score = _surest(registry.builtin_formats(), head, filename)
    if score <= 1:  # nobody but raw: perhaps a driver from another distribution knows it
        best, score = _surest(registry.formats(), head, filename)
    return best


def probe(file: Node) -> type[Format]:
    """The format of the image in ``file``."""
    return probe_head(file.pread(0, min(HEAD, file.size)), file.filename)


def _surest(formats: list[type[Format]], head: bytes, filename: str) -> tuple[type[Format], int]:
    scored = [(driver.probe(head, filename), driver.name, driver) for driver in formats]
    # The name is the second key so that a tie does not depend on the order modules were loaded in.
    score, _, best = max(scored, key=lambda row: row[:2])
    return best, score
