"""How a picture of a disk's allocation is shown: as blocks on a terminal, or as a PNG file."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING, Final, NamedTuple, TextIO

from diskwright.codecs import png
from diskwright.errors import ImageError
from diskwright.units import human_size

if TYPE_CHECKING:
    from diskwright.engine.picture import Picture

TEXT_ROWS: Final = 16
MAX_WIDTH: Final = 400
"""Columns: what wider terminals have beyond that stays empty."""

PNG_COLUMNS: Final = 192
PNG_ROWS: Final = 128
PNG_CELL: Final = 4
"""Pixels a cell is wide and high: the picture has 768 x 512."""


class Look(NamedTuple):
    """How a class is shown: in words, as a block, without Unicode, as one of a terminal's 256 colours, and in a PNG."""

    words: str
    block: str
    plain: str
    terminal: int
    colour: tuple[int, int, int]


LOOKS: Final = {
    "data": Look("data", "█", "#", 33, (31, 119, 180)),
    "backing-1": Look("in the backing file", "▓", "1", 208, (255, 127, 14)),
    "backing-2": Look("in the second backing file", "▒", "2", 70, (44, 160, 44)),
    "backing-deeper": Look("in deeper backing files", "▞", "3", 134, (148, 103, 189)),
    "compressed": Look("compressed", "▚", "c", 160, (214, 39, 40)),
    "zero": Look("zeros", "░", "0", 250, (170, 178, 189)),
    "unallocated": Look("unallocated", "·", ".", 240, (245, 245, 245)),
}


def text_cells() -> tuple[int, int]:
    """Columns and rows of a picture on this terminal."""
    try:
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):
        width = 80
    return max(10, min(width, MAX_WIDTH)), TEXT_ROWS


def as_text(picture: Picture, width: int, stream: TextIO) -> list[str]:
    """The picture in rows of ``width`` cells, and a legend. A cell shows what most of its bytes are."""
    from diskwright.engine.picture import CLASSES

    unicode = _can_show(stream)
    colours = stream.isatty() and not os.environ.get("NO_COLOR")
    looks = [LOOKS[name] for name in CLASSES]
    marks = [_painted(look.block if unicode else look.plain, look, colours) for look in looks]
    most = picture.counts.argmax(axis=1).tolist()
    lines = ["".join(marks[kind] for kind in most[at : at + width]) for at in range(0, len(most), width)]
    lines.append("")
    for mark, look, name in zip(marks, looks, CLASSES, strict=True):
        total = picture.totals()[name]
        if total:
            share = 100 * total / max(1, picture.length)
            lines.append(f"{mark} {look.words}: {human_size(total)} ({share:.3g} %)")
    lines.append(f"each cell: {human_size(max(1, picture.length // len(most)))} of {human_size(picture.length)}")
    return lines


def as_png(picture: Picture, columns: int, name: str) -> bytes:
    """The picture as a PNG file, cells row by row; a cell has the mean of its bytes' colours."""
    import numpy as np

    from diskwright.engine.picture import CLASSES

    palette = np.array([LOOKS[each].colour for each in CLASSES], np.float64)
    sizes = np.maximum(1, picture.counts.sum(axis=1, keepdims=True))
    cells = (picture.counts / sizes) @ palette
    rows = -(-len(cells) // columns)
    canvas = np.full((rows * columns, 3), 255.0)
    canvas[: len(cells)] = cells
    pixels = np.rint(canvas).astype(np.uint8).reshape(rows, columns, 3)
    pixels = pixels.repeat(PNG_CELL, axis=0).repeat(PNG_CELL, axis=1)
    legend = "; ".join(
        f"#{bytes(LOOKS[each].colour).hex()} {LOOKS[each].words} {total} bytes"
        for each, total in picture.totals().items()
    )
    texts = {"Title": f"Allocation of {name}", "Description": legend, "Software": "diskwright"}
    return png.encode(columns * PNG_CELL, rows * PNG_CELL, pixels.tobytes(), texts)


def write_png(filename: str, data: bytes) -> None:
    """Puts a picture into ``filename`` (``-``: standard output), whole or not at all. Raises ImageError rather than
    overwrite anything but a picture: the name may be an image's by mistake."""
    if filename == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        with open(filename, "rb") as old:
            if not os.path.isfile(filename) or old.read(len(png.SIGNATURE)) not in (png.SIGNATURE, b""):
                raise ImageError(f"'{filename}' exists and is not a PNG picture; it is not overwritten")
    except FileNotFoundError:
        pass
    fd, temporary = tempfile.mkstemp(prefix=".picture", dir=os.path.dirname(filename) or ".")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, filename)
    except BaseException:
        os.unlink(temporary)
        raise


def _can_show(stream: TextIO) -> bool:
    try:
        "".join(look.block for look in LOOKS.values()).encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _painted(mark: str, look: Look, colours: bool) -> str:
    return f"\x1b[38;5;{look.terminal}m{mark}\x1b[0m" if colours else mark
