"""Inspections: what a format tells of a file without trusting, following or changing anything.

Opening an image stops at the first field that is wrong. An inspection goes on: it tells each field as it is, and
what is wrong with it. Everything here is made of plain values, and bounded by ``MAX_ROWS``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from diskwright.core.node import Node

MAX_ROWS: Final = 256
"""Facts, features and references at most, each: formats have a few dozen fields, and what an image lists itself
(extensions, extents) may go on for ever."""

MAX_TEXT: Final = 1024
"""Characters of a text out of an image that are shown: a little more than the longest backing file name."""


class Fact(NamedTuple):
    """A field of a header. ``offset`` is its place in the file in bytes; ``problem`` what contradicts the
    specification, None when nothing does."""

    name: str
    value: int | str | bool
    offset: int | None = None
    problem: str | None = None


class Feature(NamedTuple):
    """A feature bit that is set. ``known``: this program knows what it means. ``kind`` is the format's own word for
    what a bit of that set demands (``incompatible``)."""

    kind: str
    bit: int
    name: str
    known: bool


class Reference(NamedTuple):
    """Another file that the image names as its ``role``. ``format`` is what the image says it is in, if it does."""

    role: str
    name: str
    format: str | None = None
    offset: int | None = None


@dataclass
class Inspection:
    """What a format tells of one file. None: it does not tell, or cannot."""

    version: int | str | None = None
    virtual_size: int | None = None
    encrypted: bool | None = None
    snapshots: int | None = None
    bitmaps: int | None = None
    end: int | None = None
    """Where what belongs to the image ends in the file, in bytes: what follows is nobody's."""
    facts: list[Fact] = field(default_factory=list)
    features: list[Feature] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is wrong that no single fact tells."""


class Field(NamedTuple):
    """How one number of a header is read. ``layout`` is one character of ``struct`` with its byte order in front.
    ``judge(value)`` says what is wrong with it."""

    name: str
    offset: int
    layout: str
    judge: Callable[[int], str | None] = lambda value: None


def read_fields(head: bytes, fields: Sequence[Field]) -> list[Fact]:
    """The facts of a header that begins the file. A field that ``head`` is too short for is told as missing."""
    facts: list[Fact] = []
    for name, offset, layout, judge in fields:
        if offset + struct.calcsize(layout) > len(head):
            facts.append(Fact(name, "missing", offset, "the file ends before it"))
            continue
        (value,) = struct.unpack_from(layout, head, offset)
        facts.append(Fact(name, value, offset, judge(value)))
    return facts


def one_of(*values: int) -> Callable[[int], str | None]:
    """A judge for a field with few right values."""
    text = " or ".join(map(str, values))
    return lambda value: None if value in values else f"must be {text}"


def between(low: int, high: int) -> Callable[[int], str | None]:
    """A judge for a field with a least and a largest value."""
    return lambda value: None if low <= value <= high else f"must be {low} to {high}"


def text_of(raw: bytes) -> str:
    """A zero-terminated text out of a header, whatever its bytes are."""
    return raw.split(b"\0", 1)[0][:MAX_TEXT].decode("utf-8", "surrogateescape")


def pread_up_to(file: Node, offset: int, length: int) -> bytes:
    """What there is of ``length`` bytes at ``offset``."""
    return file.pread(offset, max(0, min(length, file.size - offset)))
