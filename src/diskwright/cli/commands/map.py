"""``diskwright map``: where in which file the bytes of an image are."""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from diskwright.cli import common
from diskwright.cli.common import Failure
from diskwright.cli.rowtext import row_text
from diskwright.errors import DiskwrightError, message_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.core.status import Spans

SUMMARY: Final = "list where the bytes of an image are"

_AT_ONCE: Final = 4096
"""Rows made into text at once: what is made of them stays in a processor's cache."""

_NOWHERE: Final = 1 << 7
_DEPTH: Final = 8
"""Bits of a row's code for its text, above the status's flags: it has no place; from which bit on its depth is."""


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
    parser.add_argument(
        "--picture", nargs="?", const="text", choices=("text", "png"),
        help="draw the allocation: with blocks and a legend with sizes (text), or as a PNG file (png, with -o)",
    )  # fmt: skip
    parser.add_argument("-o", dest="output_file", metavar="FILE", help="the PNG file (-: standard output)")
    parser.add_argument("filename", nargs="*")


def run(args: argparse.Namespace) -> int:
    filename = common.one_operand(args.filename)
    as_json = common.check_output(args)
    if (args.picture == "png") != (args.output_file is not None):
        raise Failure("--picture=png and -o FILE belong together")
    with common.graph_of(args) as graph:
        node = common.open_image(
            graph, filename, format=args.format, image_opts=args.image_opts, force_share=args.force_share
        )
        size = common.guest_size(node)
        end = size if args.max_length is None else min(size, args.start_offset + args.max_length)
        if args.picture is not None:
            _show_picture(node, args.start_offset, end, args, as_json)
            return 0
        layers = _Layers(node)
        rows = _rows(layers, args.start_offset, end)
        if as_json:
            _print_json(rows, args.start_offset)
        else:
            _print_table(rows, layers)
    return 0


def _show_picture(node: Node, start: int, end: int, args: argparse.Namespace, as_json: bool) -> None:
    """The picture, or with ``--output=json`` its counts."""
    from diskwright.cli import picture as show
    from diskwright.cli.output import json_text
    from diskwright.engine.picture import draw

    if start > end or (start == end and start):
        raise Failure(f"Offset {start} is beyond the disk's end, {end}")
    columns, rows = show.text_cells() if args.picture == "text" else (show.PNG_COLUMNS, show.PNG_ROWS)
    try:
        picture = draw(node, start, end - start, columns * rows)
    except (DiskwrightError, OSError) as error:
        raise Failure(f"Could not read file metadata: {message_of(error)}") from error
    if args.picture == "png":
        show.write_png(args.output_file, show.as_png(picture, columns, node.filename))
    elif not as_json:
        print("\n".join(show.as_text(picture, columns, sys.stdout)))
    if as_json:
        print(json_text({"start": start, "length": end - start, "bytes": picture.totals()}))


def _print_json(rows: Iterator[Spans], start: int) -> None:
    """One object a line, printed as they are found: a map can have millions of them."""
    write = sys.stdout.write
    before = "["
    for part in rows:
        # One column for all that is not a number.
        codes = part.flags + (part.depth.astype("int64") << _DEPTH) + (part.file_offset < 0) * _NOWHERE
        objects = row_text(codes, (part.offset, part.length, part.file_offset), _template)
        write(before + objects[:-2])
        before = objects[-2:]
    if before == "[":
        write(f'[{{ "start": {start}, "length": 0, "depth": 0, "present": false, "zero": false, "data": false}}')
    write("]\n")


def _template(code: int) -> tuple[str, ...]:
    """What stands before, between and behind the numbers of an object."""
    from diskwright.core.status import HAS_DATA, IS_PRESENT, IS_ZERO

    present, zero, data = (_word(code & bit != 0) for bit in (IS_PRESENT, IS_ZERO, HAS_DATA))
    rest = f', "depth": {code >> _DEPTH}, "present": {present}, "zero": {zero}, "data": {data}'
    return '{ "start": ', ', "length": ', rest if code & _NOWHERE else rest + ', "offset": ', "},\n"


def _word(value: bool) -> str:
    return "true" if value else "false"


def _print_table(rows: Iterator[Spans], layers: _Layers) -> None:
    """Only what is stored as it is: a table of places cannot show anything else."""
    from diskwright.core.status import HAS_DATA, IS_ZERO

    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for part in rows:
        data = part.flags & HAS_DATA != 0
        nowhere = data & (part.file_offset < 0)
        bad = bool(nowhere.any())
        if bad:
            data[int(nowhere.argmax()) :] = False
        shown = part.take(data & (part.flags & IS_ZERO == 0))
        columns = (shown.offset, shown.length, shown.file_offset, shown.depth)
        sys.stdout.write(
            "".join([
                f"{_hex(start)}{_hex(length)}{_hex(place)}{layers.names[depth]}\n"
                for start, length, place, depth in zip(*(column.tolist() for column in columns), strict=True)
            ])
        )  # fmt: skip
        if bad:
            raise Failure("File contains external, encrypted or compressed clusters.")


def _hex(value: int) -> str:
    return f"{value:<#16x}" if value else "0               "


def _rows(layers: _Layers, start: int, end: int) -> Iterator[Spans]:
    """What the map says, a few thousand rows at a time."""
    from diskwright.core.status import join, spans
    from diskwright.extents import windows

    kept: Spans | None = None
    try:
        for offset, length in windows(start, end - start):
            found = layers.seen(spans(layers.node, offset, length))
            kept = (join([kept, found]) if kept is not None else found).merge()
            while len(kept) > _AT_ONCE:
                yield kept.take(slice(_AT_ONCE))
                kept = kept.take(slice(_AT_ONCE, None))  # the last of it may go on in the next window
    except (DiskwrightError, OSError) as error:
        if kept is not None:
            yield kept.take(slice(len(kept) - 1))
        raise Failure(f"Could not read file metadata: {message_of(error)}") from error
    if kept is not None:
        yield kept


class _Layers:
    """The layers of an image by depth: the files their bytes are in, those files' names and holes."""

    def __init__(self, node: Node) -> None:
        from diskwright.core.node import FormatNode
        from diskwright.core.status import layers, may_have_holes

        self.node = node
        self.names: list[str] = []
        self._holes: list[_Holes | None] = []
        for layer in layers(node):
            file, sparse = layer, False
            if isinstance(layer, FormatNode):
                file, sparse = layer.format.children[layer.format.data_child], may_have_holes(layer)
            self.names.append(file.filename)
            self._holes.append(_Holes(file) if sparse else None)

    def seen(self, spans: Spans) -> Spans:
        """Runs as the map tells them: what lies beyond the end of a short backing image is credited to the image above
        it, as something that image does not have, and data is told from holes of the file."""
        import numpy as np

        from diskwright.core.status import IS_BEYOND, IS_PRESENT, Spans

        beyond = spans.flags & IS_BEYOND != 0
        if beyond.any():
            flags = spans.flags & ~(beyond * np.uint8(IS_PRESENT))
            spans = Spans(spans.offset, spans.length, flags, spans.depth - beyond, spans.file_offset)
        for depth, holes in enumerate(self._holes):
            if holes is not None:
                spans = holes.told(spans, depth)
        return spans


class _Holes:
    """What is known of a file's holes. Asking the kernel for each cluster of a fragmented image would take longer than
    all the rest."""

    _MOST: Final = 4096

    def __init__(self, file: Node) -> None:
        self._file, self._size = file, file.size
        self._starts: list[int] = []
        self._runs: list[tuple[int, bool]] = []  # (end, whether it is a hole)

    def told(self, spans: Spans, depth: int) -> Spans:
        """``spans`` with the data of that depth cut up by whether the file has anything where its bytes would be."""
        import numpy as np

        from diskwright.core.status import HAS_DATA, IS_ZERO, Spans

        rows = np.flatnonzero((spans.depth == depth) & (spans.flags & HAS_DATA != 0) & (spans.file_offset >= 0))
        if not len(rows):
            return spans
        place = spans.file_offset[rows]
        end = place + spans.length[rows]
        cuts, holes = self._runs_in(place, end)
        # Every cut within a row makes one row more of it.
        first = np.searchsorted(cuts, place, "right")
        count = np.ones(len(spans), np.int64)
        count[rows] += np.searchsorted(cuts, end, "left") - first
        if len(cuts) > 1 and int(count.max()) > 1:
            spans, rows = _split(spans, rows, count, cuts, first)
            place = spans.file_offset[rows]
        flags = spans.flags.copy()
        flags[rows] |= holes[np.searchsorted(cuts, place, "right") - 1] * np.uint8(IS_ZERO)
        return Spans(spans.offset, spans.length, flags, spans.depth, spans.file_offset)

    def _runs_in(self, place: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where in the file something, or nothing, begins, as far as it concerns ranges ``[place, end)``; and which
        of the two. The first is at the lowest place."""
        import numpy as np

        order = np.argsort(place)
        starts, ends = place[order].tolist(), np.maximum.accumulate(end[order]).tolist()
        cuts: list[int] = []
        holes: list[bool] = []
        at, index = starts[0], 0
        while index < len(starts):
            at = max(at, starts[index])
            stop, hole = self._run_at(at)
            cuts.append(at)
            holes.append(hole)
            index = bisect_right(ends, stop, index)
            at = stop
        return np.array(cuts), np.array(holes)

    def _run_at(self, offset: int) -> tuple[int, bool]:
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


def _split(
    spans: Spans, rows: NDArray[np.int64], count: NDArray[np.int64], cuts: NDArray[np.int64], first: NDArray[np.int64]
) -> tuple[Spans, NDArray[np.int64]]:
    """``spans`` with ``count`` rows for each of them: those of ``rows`` are cut in their file at ``cuts``, each from
    its ``first`` on. Also where that has put ``rows``."""
    import numpy as np

    from diskwright.core.status import Spans

    begin = np.cumsum(count) - count
    row = np.repeat(np.arange(len(spans)), count)
    found = spans.take(row)
    cut = np.zeros(len(spans), np.int64)
    cut[rows] = first
    step = np.arange(len(row)) - begin[row]
    later = step > 0
    place = cuts[(cut[row] + step - 1)[later]]
    found.offset[later] += place - found.file_offset[later]
    found.file_offset[later] = place
    chosen = np.zeros(len(spans), np.bool_)
    chosen[rows] = True
    end = int(spans.offset[-1] + spans.length[-1])
    length = np.diff(found.offset, append=end)
    return Spans(found.offset, length, found.flags, found.depth, found.file_offset), np.flatnonzero(chosen[row])
