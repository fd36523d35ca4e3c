"""The commands about space: what is allocated, how long the disk is, and making it longer or shorter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from diskwright.cli.qio.getopt import Options
from diskwright.cli.qio.language import Misuse, Refused, amount, size
from diskwright.cli.qio.session import Session, attempt, reason
from diskwright.errors import DiskwrightError, message_of
from diskwright.extents import UNALLOCATED, windows

if TYPE_CHECKING:
    from diskwright.core.node import Node

_PREALLOCATION: Final = ("off", "metadata", "falloc", "full")

_SECTOR: Final = 512

_ONE_BY_ONE: Final = 4096
"""Runs asked for one at a time, before it is worth while to load what answers in bulk."""


def alloc(session: Session, words: list[str]) -> None:
    start = size(words[0])
    length = size(words[1]) if len(words) > 1 else _SECTOR
    length = max(0, min(length, session.size - start))
    held = 0

    def look() -> None:
        nonlocal held
        with session.open_disk.request():
            held = sum(run for _, run, allocated in _runs(session, start, length) if allocated)

    attempt("is_allocated", look)
    print(f"{held}/{length} bytes allocated at offset {amount(start)}")


def map_(session: Session, words: list[str]) -> None:
    try:
        with session.open_disk.request():
            for start, length, allocated in _runs(session, 0, session.size):
                what = "    allocated" if allocated else "not allocated"
                print(f"{amount(length)} ({length:#x}) bytes {what} at offset {amount(start)} ({start:#x})")
    except (DiskwrightError, OSError) as error:
        raise Refused(f"Failed to get allocation status: {reason(error)}") from error


def _runs(session: Session, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """``(offset, length, allocated)`` of a range, merged. What counts is the image itself, not its backing files."""
    from diskwright.core.node import below_filters

    last: tuple[int, int, bool] | None = None
    for at, step, allocated in _answers(below_filters(session.node), offset, length):
        if last is not None and last[2] == allocated:
            last = last[0], last[1] + step, allocated
            continue
        if last is not None:
            yield last
        last = at, step, allocated
    if last is not None:
        yield last


def _answers(node: Node, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    end, on_map = offset + length, min(offset + length, node.size)
    for _ in range(_ONE_BY_ONE):
        if offset >= on_map:
            break
        run = node.extent_at(offset, on_map - offset)
        yield offset, run.length, run.kind != UNALLOCATED
        offset = run.end
    for start, step in windows(offset, on_map - offset):
        yield from _in_bulk(node, start, step)
    offset = max(offset, on_map)
    if offset < end:  # the rest of the last sector
        yield offset, end - offset, node.extent_at(on_map - 1, 1).kind != UNALLOCATED if on_map else False


def _in_bulk(node: Node, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    import numpy as np

    found = node.extents(offset, length)
    allocated = found.kind != UNALLOCATED
    heads = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(np.diff(allocated)) + 1))
    starts = found.offset[heads]
    lengths = np.diff(starts, append=offset + length)
    yield from zip(starts.tolist(), lengths.tolist(), allocated[heads].tolist(), strict=True)


def length(session: Session, words: list[str]) -> None:
    print(amount(session.size))


def truncate(session: Session, words: list[str]) -> None:
    options = Options("truncate", words, "m:")
    mode = "off"
    for _, value in options:
        if value not in _PREALLOCATION:
            raise Refused(f"Invalid preallocation mode '{value}'")
        mode = value
    if not options.operands:
        raise Misuse()
    wanted = size(options.operands[0])
    session.settle()
    _check_size(session, wanted, mode)
    try:
        with session.open_disk.drained():
            session.node.resize(wanted, preallocation=mode)
    except OSError as error:
        raise Refused(f"Could not resize file: {error.strerror or error}") from error
    except (DiskwrightError, ValueError) as error:
        raise Refused(message_of(error)) from error


def _check_size(session: Session, wanted: int, mode: str) -> None:
    from diskwright.core.node import FormatNode, below_filters

    node = below_filters(session.node)
    mapped = isinstance(node, FormatNode) and node.format.linear is None
    if mapped and wanted % _SECTOR:
        raise Refused(f"The new size must be a multiple of {_SECTOR}")
    if mode != "off" and wanted < session.size:
        why = (
            "Preallocation can't be used for shrinking an image"
            if mapped
            else "Cannot use preallocation for shrinking files"
        )
        raise Refused(why)
