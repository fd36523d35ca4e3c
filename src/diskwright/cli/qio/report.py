"""What commands print of the bytes they moved: how fast, whether they were as expected, and the bytes themselves."""

from __future__ import annotations

import sys
from typing import Final

from diskwright.cli.qio.language import amount

_ROW: Final = 16

_AT_ONCE: Final = 1 << 20
"""Bytes compared at a time: bounds the copies made for it."""

_DUMPED: Final = 1 << 16
"""Bytes shown at a time."""

_SHOWN: Final = bytes(i if chr(i).isascii() and chr(i).isalnum() else ord(".") for i in range(256))


def timing(verb: str, seconds: float, offset: int, wanted: int, moved: int, *, condensed: bool) -> None:
    """The lines that tell what one request moved in ``seconds``; ``condensed`` is one line for programs."""
    seconds = max(seconds, 1e-9)  # the clock may not have moved
    if condensed:
        print(f"{moved},1,{_clock(seconds)},{moved / seconds:.3f},{1 / seconds:.3f}")
        return
    took = _clock(seconds) if seconds >= 1 else f"00.{int(seconds * 100):02d} sec"
    print(f"{verb} {moved}/{wanted} bytes at offset {offset}")
    print(f"{amount(moved)}, 1 ops; {took} ({amount(moved / seconds)}/sec and {1 / seconds:.4f} ops/sec)")


def _clock(seconds: float) -> str:
    hundredths = int(seconds * 100)
    whole = hundredths // 100
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}.{hundredths % 100:02d}"


def dump(data: memoryview, offset: int) -> None:
    """The bytes in rows of sixteen, each with its place on the disk."""
    for start in range(0, len(data), _DUMPED):
        piece = bytes(data[start : start + _DUMPED])
        hexadecimal, text = piece.hex(" "), piece.translate(_SHOWN).decode("ascii")
        sys.stdout.writelines(
            f"{offset + start + at:08x}:  {hexadecimal[3 * at : 3 * at + 47]}  {text[at : at + _ROW]}\n"
            for at in range(0, len(piece), _ROW)
        )


def consists_of(data: memoryview, byte: int) -> bool:
    """Whether every byte of ``data`` is ``byte``."""
    expected = bytes((byte,)) * min(len(data), _AT_ONCE)
    for start in range(0, len(data), _AT_ONCE):
        piece = bytes(data[start : start + _AT_ONCE])
        if piece != expected[: len(piece)]:
            return False
    return True


def verify(data: memoryview, byte: int, offset: int) -> bool:
    """``consists_of``, and says so when not; ``offset`` is where on the disk ``data`` begins."""
    if consists_of(data, byte):
        return True
    print(f"Pattern verification failed at offset {offset}, {len(data)} bytes")
    return False
