"""CRC-32 of what is put together of parts whose CRC-32 is known, without their bytes.

A CRC is a polynomial over GF(2) modulo that of CRC-32; to append n bytes is to multiply it by x^(8n), so a
few dozen steps with integers do it for any n. Bits are in the order of ``zlib.crc32``: bit 31 is x^0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

_POLYNOMIAL: Final = 0xEDB88320
_ONE: Final = 1 << 31
_BYTE: Final = 1 << 23
"""x^8"""
_FULL: Final = 0xFFFFFFFF


def joined(first: int, second: int, length: int) -> int:
    """The CRC-32 of two parts, one after the other; ``length`` is the second one's, in bytes."""
    return _times(_power(length), first) ^ second


@lru_cache(maxsize=1024)
def of_zeros(length: int) -> int:
    """The CRC-32 of so many zero bytes."""
    return _times(_power(length), _FULL) ^ _FULL


@lru_cache(maxsize=1024)
def _power(length: int) -> int:
    """x^(8 * length)."""
    found, base = _ONE, _BYTE
    while length:
        if length & 1:
            found = _times(found, base)
        base = _times(base, base)
        length >>= 1
    return found


def _times(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _FULL
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product
