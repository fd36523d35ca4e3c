"""Text of rows of numbers, thousands at a time.

Formatting in Python takes longer than finding out what to print when there are millions of rows. So all rows are made
as one array of 4-byte words: text that does not change is put there from a template, numbers four digits a word from a
table. What a row does not use of its words stays NUL, and NULs are dropped in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WORD: Final = 4
_BASE: Final = 10**_WORD


def row_text(
    codes: NDArray[Any], columns: Sequence[NDArray[np.int64]], template: Callable[[int], Sequence[str]]
) -> str:
    """One row after the other: the texts that ``template`` gives for a row's code, one more than there are columns,
    and between them its numbers in decimal. A negative number is left out. Texts have no NULs."""
    import numpy as np

    known, which = np.unique(codes, return_inverse=True)
    texts = [[text.encode() for text in template(code)] for code in known.tolist()]
    widths = [_words(max(map(len, same))) for same in zip(*texts, strict=True)]
    room = [_words(len(str(int(column.max())))) for column in columns]
    lines = b"".join(
        b"".join(text.ljust(width * _WORD, b"\0") + bytes(space * _WORD) for text, width, space in zip(
            row, widths, [*room, 0], strict=True
        ))
        for row in texts
    )  # fmt: skip
    out = np.frombuffer(lines, np.uint32).reshape(len(known), -1).take(which, axis=0)
    at = 0
    for column, width, space in zip(columns, widths, room, strict=False):
        at += width
        _put(column, out[:, at : at + space])
        at += space
    return out.tobytes().translate(None, b"\0").decode()


def _put(numbers: NDArray[np.int64], out: NDArray[np.uint32]) -> None:
    """Writes each number's digits to the end of a row of ``out``."""
    import numpy as np

    left = None
    if int(numbers.min()) < 0:
        left = numbers >= 0
        numbers = np.where(left, numbers, 0)
    last, others = _tables()
    for at in range(out.shape[1] - 1, -1, -1):
        higher = numbers // _BASE
        index = numbers - higher * _BASE
        index += (higher != 0) * np.int64(_BASE)
        words = (last if at == out.shape[1] - 1 else others).take(index)
        out[:, at] = words if left is None else words * left
        numbers = higher


@cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Words for numbers up to 9999: without zeros in front, and, from 10000 on, with them. In the second table 0
    without digits in front is nothing."""
    import numpy as np

    bare = [b"%d" % number for number in range(_BASE)]
    full = b"".join(text.rjust(_WORD, b"0") for text in bare)
    last = b"".join(text.rjust(_WORD, b"\0") for text in bare)
    return np.frombuffer(last + full, np.uint32), np.frombuffer(bytes(_WORD) + last[_WORD:] + full, np.uint32)


def _words(length: int) -> int:
    return -(-length // _WORD)
