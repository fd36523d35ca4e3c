"""The language: how a line becomes words, how numbers are written, how amounts are shown, and how a command fails."""

from __future__ import annotations

import re
import sys
from typing import Final

from diskwright.cli.faces import program

MAX_REQUEST: Final = (1 << 31) - 512
"""The longest request in bytes: a signed 32-bit count of bytes in whole sectors, as every peer of this language has."""

_MAX: Final = (1 << 63) - 1

_LONGEST: Final = 100
"""Digits of a number that are looked at: no sensible one has as many."""

_AFTER_HEX: Final = tuple("kmgtp")
"""Suffixes that are no hexadecimal digits."""

_UNITS: Final = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}

_SIZE: Final = re.compile(
    r"[ \t\n\v\f\r]*\+?(?:0[xX](?P<hex>[0-9a-fA-F]+)|(?P<whole>[0-9]+)(?P<fraction>\.[0-9]*)?)(?P<rest>.*)", re.S
)
_NUMBER: Final = re.compile(r"[ \t\n\v\f\r]*\+?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")


class CommandError(Exception):
    """A command has failed. ``message`` goes to standard output, where results go, or is empty when all is said."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message


class Misuse(CommandError):
    """The words after a command are not what it takes: its usage line is shown."""


class Refused(CommandError):
    """A command has failed for a reason of the program's: told on standard error, under the program's name."""


def split(line: str) -> list[str]:
    """The words of a line. Only spaces part them, and there is no quoting."""
    return [word for word in line.split(" ") if word]


def size(text: str) -> int:
    """Bytes for ``text``: decimal or hexadecimal digits, and one of the suffixes b k M G T P E (powers of 1024), before
    which there may be a decimal fraction. Raises CommandError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise _not_numeric(text)
    if len(text) > _LONGEST:
        raise _too_large(text)
    rest, digits = match["rest"], match["fraction"] or ""
    if match["hex"]:
        value = int(match["hex"], 16)
        if rest[:1].lower() in _AFTER_HEX:
            print(
                f"{program()}: warning: Using a multiplier suffix on hex numbers is deprecated: {text}", file=sys.stderr
            )
    else:
        value = int(match["whole"])
    if rest.lower() not in ("", *_UNITS):
        raise _not_numeric(text)
    unit = 1 << _UNITS.get(rest.lower(), 0)
    fraction = float(f"0{digits}") % 1.0 if digits else 0.0
    if fraction and unit == 1:
        raise _not_numeric(text)
    value = value * unit + int(fraction * unit + 0.5)
    if value > _MAX:
        raise _too_large(text)
    return value


def _too_large(text: str) -> CommandError:
    return CommandError(f"Parsing error: argument too large -- {text}")


def _not_numeric(text: str) -> CommandError:
    return CommandError(f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")


def number(text: str) -> int | None:
    """A whole number in decimal, hexadecimal (0x) or octal (0); None for anything else."""
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        return None
    digits = match[1].lower()
    return int(digits, 16) if digits.startswith("0x") else int(digits, 8 if digits[0] == "0" else 10)


def pattern(text: str) -> int:
    """A byte's value. Raises CommandError."""
    value = number(text)
    if value is None or value > 255:
        raise CommandError(f"{text} is not a valid pattern byte")
    return value


def request_sizes(texts: list[str]) -> list[int]:
    """The lengths of a request's buffers. Raises CommandError, also when they are too long together."""
    lengths: list[int] = []
    total = 0
    for text in texts:
        length = size(text)
        if length > MAX_REQUEST:
            raise CommandError(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        total += length
        if total > MAX_REQUEST:
            raise CommandError(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
        lengths.append(length)
    return lengths


def amount(value: float) -> str:
    """Bytes for people: ``512 bytes``, ``1.500 KiB``."""
    for shift, unit in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.3f}".removesuffix(".000") + f" {unit}"
    return f"{value:.6f}".removesuffix(".000000") + " bytes"
