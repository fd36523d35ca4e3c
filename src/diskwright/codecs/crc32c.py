"""CRC-32C (Castagnoli): the checksum of VHDX metadata and of iSCSI digests. Reflected polynomial 0x82F63B78.

Python's own libraries have only the other CRC-32. Two ways lead to the same number: a table walk in plain Python for
short inputs, which costs a command nothing to start, and for long ones NumPy, where many stretches of the input go
through the tables at once and their results are put together afterwards. Zeros at the end, of which metadata is full,
are not walked through: what they do to the register is a linear map, and those are composed by squaring.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POLYNOMIAL: Final = 0x82F63B78
_SHORT: Final = 1 << 11
"""From this many bytes on NumPy is quicker, when it is loaded already."""
_LONG: Final = 1 << 20
"""From this many bytes on it is worth loading; and input is worked on in pieces of this many."""
_STRETCH: Final = 64
"""Bytes of one of the stretches that go through the tables together; a multiple of 8."""


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The checksum of ``data``; with ``value``, of what had that checksum followed by ``data``."""
    register = value ^ 0xFFFFFFFF
    body = bytes(data).rstrip(b"\0")
    quick = len(body) >= _LONG or "numpy" in sys.modules
    for start in range(0, len(body), _LONG):
        piece = body[start : start + _LONG]
        register = (_wide if quick and len(piece) >= _SHORT else _narrow)(piece, register)
    return _zeros(register, len(data) - len(body)) ^ 0xFFFFFFFF


def _narrow(data: bytes, register: int) -> int:
    """The register after ``data``, byte by byte."""
    table = _table()
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register


@cache
def _table() -> tuple[int, ...]:
    """What each value of the register's low byte does to the rest."""
    entries = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


@cache
def _zero_map(power: int) -> tuple[int, ...]:
    """What ``2 ** power`` zero bytes make of each bit of the register."""
    if power == 0:
        table = _table()
        return tuple(table[bit & 0xFF] ^ bit >> 8 for bit in (1 << i for i in range(32)))
    half = _zero_map(power - 1)
    return tuple(_apply(half, image) for image in half)


def _apply(images: tuple[int, ...], register: int) -> int:
    result = 0
    while register:
        low = register & -register
        result ^= images[low.bit_length() - 1]
        register ^= low
    return result


def _zeros(register: int, count: int) -> int:
    """The register after ``count`` zero bytes."""
    power = 0
    while count:
        if count & 1:
            register = _apply(_zero_map(power), register)
        count >>= 1
        power += 1
    return register


@cache
def _tables(power: int) -> Any:
    """Four tables by which all four bytes of a register go through ``2 ** power`` zero bytes."""
    import numpy as np

    images = _zero_map(power)
    tables = np.zeros((4, 256), np.uint32)
    for place in range(4):
        for bit in range(8):
            at = np.flatnonzero(np.arange(256) >> bit & 1)
            tables[place, at] ^= np.uint32(images[8 * place + bit])
    return tables


@cache
def _slices() -> Any:
    """Tables for a byte that has 7, 6, ... 0 others behind it."""
    import numpy as np

    slices = np.zeros((8, 256), np.uint32)
    slices[7] = _table()
    for place in range(6, -1, -1):
        slices[place] = _shifted(slices[place + 1], 0)
    return slices


def _shifted(registers: NDArray[Any], power: int) -> NDArray[Any]:
    """All of them after ``2 ** power`` zero bytes."""
    tables = _tables(power)
    result: NDArray[Any] = tables[0][registers & 0xFF]
    for place in (1, 2, 3):
        result = result ^ tables[place][registers >> (8 * place) & 0xFF]
    return result


def _wide(data: bytes, register: int) -> int:
    """The register after ``data`` (4 bytes or more). Zeros in front change nothing once it is taken into the data."""
    import numpy as np

    count = 1 << max(0, (len(data) + 3) // _STRETCH).bit_length()
    room = np.zeros(count * _STRETCH, np.uint8)
    start = len(room) - len(data)
    room[start:] = np.frombuffer(data, np.uint8)
    room[start : start + 4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)
    columns = room.reshape(count, _STRETCH).T.copy()
    slices, registers = _slices(), np.zeros(count, np.uint32)
    for at in range(0, _STRETCH, 8):
        mixed = slices[4][columns[at + 4]]
        for place in (0, 1, 2, 3):
            mixed ^= slices[place][columns[at + place] ^ (registers >> (8 * place) & 0xFF).astype(np.uint8)]
        for place in (5, 6, 7):
            mixed ^= slices[place][columns[at + place]]
        registers = mixed
    power = _STRETCH.bit_length() - 1
    while len(registers) > 1:
        registers = _shifted(registers[0::2], power) ^ registers[1::2]
        power += 1
    return int(registers[0])
