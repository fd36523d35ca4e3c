"""``diskwright map``: where in which file the bytes of an image are."""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.core.status import Status

SUMMARY: Final = "list where the bytes of an image are"


class Row(NamedTuple):
    """One line of the map. ``place`` is where the bytes are in ``filename``, or -1."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    place: int
    filename: str

    def continues(self, last: Row) -> bool:
        if self[2:6] != last[2:6] or self.filename != last.filename:
            return False
        if self.place < 0 or last.place < 0:
            return self.place == last.place
        return self.place == last.place + last.length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser)
    common.add_output(parser)
    parser.add_argument(
        "-s",
        "--start-offset",
        metavar="OFFSET",
        type=common.size("start offset"),
        default=0,
        help="where to begin (default: 0)",
    )
    parser.add_argument(
        "-l",
        "--max-length",
        metavar="LENGTH",
        type=common.size("max length"),
        help="how far to go (default: to the end)",
    )
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    filename = common.one_operand(args.filename)
    as_json = common.check_output(args)
    with common.graph_of(args) as graph:
        node = common.open_image(
            graph, filename, format=args.format, image_opts=args.image_opts, force_share=args.force_share
        )
        size = common.guest_size(node)
        end = size if args.max_length is None else min(size, args.start_offset + args.max_length)
        rows = merged(_rows(node, args.start_offset, end))
        if as_json:
            _print_json(rows, args.start_offset)
        else:
            _print_table(rows)
    return 0


def _print_json(rows: Iterator[Row], start: int) -> None:
    """One object a line, printed as they are found: a map can have millions of them."""
    before = "["
    for row in rows:
        print(before + _object(row), end="")
        before = ",\n"
    if before == "[":
        print(before + _object(Row(start, 0, 0, False, False, False, -1, "")), end="")
    print("]")


def _object(row: Row) -> str:
    place = f', "offset": {row.place}' if row.place >= 0 else ""
    return (
        f'{{ "start": {row.start}, "length": {row.length}, "depth": {row.depth}, "present": {_word(row.present)}, '
        f'"zero": {_word(row.zero)}, "data": {_word(row.data)}{place}}}'
    )


def _word(value: bool) -> str:
    return "true" if value else "false"


def _print_table(rows: Iterator[Row]) -> None:
    """Only what is stored as it is: a table of places cannot show anything else."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for row in rows:
        if row.data and row.place < 0:
            raise Failure("File contains external, encrypted or compressed clusters.")
        if row.data and not row.zero:
            print(f"{_hex(row.start):<16}{_hex(row.length):<16}{_hex(row.place):<16}{row.filename}")


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"


def merged(rows: Iterator[Row]) -> Iterator[Row]:
    """Neighbours that say the same as one."""
    last: Row | None = None
    for row in rows:
        if last is not None and row.continues(last):
            last = last._replace(length=last.length + row.length)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last


def _rows(node: Node, start: int, end: int) -> Iterator[Row]:
    from diskwright.core.status import status
    from diskwright.extents import windows

    files = _Files()
    try:
        for offset, length in windows(start, end - start):
            for run in status(node, offset, length):
                yield from _rows_of(run, files)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Could not read file metadata: {message_of(error)}") from error


def _rows_of(run: Status, files: _Files) -> Iterator[Row]:
    """A run as the map tells it: what lies beyond the end of a short backing image is credited to the
    image above it, as something that image does not have."""
    size = run.node.size
    if run.depth and run.zero and run.end > size:
        inside = max(0, size - run.offset)
        if inside:
            yield from _rows_of(run._replace(length=inside), files)
        place = run.file_offset + inside if run.file_offset >= 0 else -1
        yield Row(run.offset + inside, run.length - inside, run.depth - 1, False, True, False, place, "")
        return
    place = run.file_offset
    if place < 0:
        yield Row(run.offset, run.length, run.depth, run.present, run.zero, run.data, -1, "")
        return
    file, holes = files.of(run.node)
    row = Row(run.offset, run.length, run.depth, run.present, run.zero, run.data, place, file.filename)
    if run.data and holes is not None:
        yield from _with_holes(row, holes)
    else:
        yield row


def _with_holes(row: Row, holes: _Holes) -> Iterator[Row]:
    """``row`` cut up by whether the file has anything where its bytes would be."""
    start, place, end = row.start, row.place, row.place + row.length
    while place < end:
        stop, hole = holes.run_at(place)
        length = min(stop, end) - place
        yield Row(start, length, row.depth, row.present, hole, row.data, place, row.filename)
        start, place = start + length, place + length


class _Holes:
    """What is known of a file's holes. Asking the kernel for each cluster of a fragmented image would take longer than
    all the rest."""

    _MOST: Final = 4096

    def __init__(self, file: Node) -> None:
        self._file, self._size = file, file.size
        self._starts: list[int] = []
        self._runs: list[tuple[int, bool]] = []  # (end, whether it is a hole)

    def run_at(self, offset: int) -> tuple[int, bool]:
        """``(end, whether it is a hole)`` of the run that ``offset`` is in. Behind the file's end all is hole."""
        from diskwright.extents import ZERO

        at = bisect_right(self._starts, offset)
        if at and offset < self._runs[at - 1][0]:
            return self._runs[at - 1]
        if offset >= self._size:
            return 1 << 63, True
        run = self._file.extent_at(offset, self._size - offset)
        found = offset + run.length, run.kind == ZERO
        if len(self._starts) >= self._MOST:
            self._starts.clear()
            self._runs.clear()
            at = 0
        self._starts.insert(at, offset)
        self._runs.insert(at, found)
        return found


class _Files:
    """For each layer the file its bytes are in, and that file's holes when they are worth looking for."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Node, _Holes | None]] = {}

    def of(self, node: Node) -> tuple[Node, _Holes | None]:
        known = self._known.get(id(node))
        if known is None:
            file, sparse = self._look(node)
            known = self._known[id(node)] = file, _Holes(file) if sparse else None
        return known

    @staticmethod
    def _look(node: Node) -> tuple[Node, bool]:
        from diskwright.core.node import FormatNode
        from diskwright.core.status import may_have_holes

        if not isinstance(node, FormatNode):
            return node, False
        return node.format.children[node.format.data_child], may_have_holes(node)
