"""Sizes: parsing, printing, alignment, and the limits that hold everywhere with their reasons."""

from __future__ import annotations

from typing import Final

from diskwright.errors import OptionError, OutOfRange

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

SECTOR: Final = 512
"""The unit a virtual disk's size is rounded up to when it is created."""

MAX_DISK_SIZE: Final = (1 << 63) - 512
"""Offsets are signed 64-bit on every interface below us (off_t); the last sector is left out."""

MAX_REQUEST: Final = 32 * MiB
"""The longest single NBD payload accepted: what peers assume by default, and a bound on a connection's memory."""

MAX_CHAIN: Final = 200
"""How many images deep a backing chain may be: deeper ones cost seconds to open and are a sign of a loop."""

MAX_BACKING_NAME: Final = 1023
"""Longest backing file name in bytes; the qcow2 specification's limit, adopted for every format."""

_SUFFIX: Final = {"b": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB, "p": 1 << 50, "e": 1 << 60}


def parse_size(text: str, *, most: int = MAX_DISK_SIZE) -> int:
    """Bytes for ``text``: digits, optionally a fraction, optionally one suffix of b k M G T P E (powers of 1024); or
    0x and hexadecimal digits. A fraction of less than a byte is cut off.

    Raises OutOfRange for sizes above ``most``, else OptionError for anything else, negative sizes included.
    """
    body, scale = text.lstrip().removeprefix("+"), 1
    if body[:2].lower() == "0x" and _is_hex(body[2:]):
        value = int(body, 16)
    else:
        if body and body[-1].lower() in _SUFFIX:
            body, scale = body[:-1], _SUFFIX[body[-1].lower()]
        whole, dot, fraction = body.partition(".")
        if not body.isascii() or not whole.isdigit() or (fraction and (scale == 1 or not fraction.isdigit())):
            raise OptionError(f"Invalid size '{text}': give bytes, or a number with a suffix k, M, G, T, P or E")
        value = int(whole) * scale
        if dot and fraction:
            value += int(fraction) * scale // 10 ** len(fraction)
    if value > most:
        raise OutOfRange(f"Size '{text}' is larger than the largest possible, {most} bytes")
    return value


def _is_hex(digits: str) -> bool:
    return bool(digits) and all(digit in "0123456789abcdefABCDEF" for digit in digits)


def human_size(size: int) -> str:
    """``size`` bytes with three significant digits and a binary unit: ``1.5 GiB``, ``196 KiB``, ``512 B``."""
    value, unit = float(size), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    # 1000, not 1024: with three significant digits 1000 KiB would need four, so it is shown as 0.977 MiB.
    while value >= 1000 and unit < len(units) - 1:
        value /= 1024
        unit += 1
    return f"{value:.3g} {units[unit]}"


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` that is not above ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``value``."""
    return value + -value % alignment


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
