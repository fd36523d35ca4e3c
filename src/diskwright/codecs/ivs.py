"""Initialisation vectors of disk sectors: plain, plain64, plain64be, null, essiv.

The vector of a sector follows from its number (in units of 512 bytes, whatever the sector's size). All of a run
are made in one go, in C, without NumPy: small requests need them too.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from array import array
from typing import Final

from diskwright.codecs.block_ciphers import Blocks, algorithm
from diskwright.errors import UnsupportedFeature

NAMES: Final = ("plain", "plain64", "plain64be", "essiv", "null")


class Ivs(ABC):
    """Makes vectors of ``length`` bytes each."""

    def __init__(self, length: int) -> None:
        self.length = length

    @abstractmethod
    def run(self, first: int, count: int, step: int) -> bytes:
        """The vectors of ``count`` sectors, one after the other; their numbers begin at ``first``, ``step`` apart."""


class Plain64(Ivs):
    """The number, little-endian, padded with zeros."""

    bits = 64

    def run(self, first: int, count: int, step: int) -> bytes:
        last = first + count * step
        numbers: range | list[int] = range(first, last, step)
        if last > 1 << self.bits:
            mask = (1 << self.bits) - 1
            numbers = [number & mask for number in numbers]
        vectors = array("Q", bytes(count * self.length))
        vectors[:: self.length // 8] = array("Q", numbers)
        if sys.byteorder == "big":
            vectors.byteswap()
        return vectors.tobytes()


class Plain(Plain64):
    """As Plain64, but the number has 32 bits and begins again at 0 every 2 TiB."""

    bits = 32


class Plain64Be(Ivs):
    """The number, big-endian, at the end of the vector."""

    def run(self, first: int, count: int, step: int) -> bytes:
        width = self.length // 8
        vectors = array("Q", bytes(count * self.length))
        vectors[width - 1 :: width] = array("Q", range(first, first + count * step, step))
        if sys.byteorder == "little":
            vectors.byteswap()
        return vectors.tobytes()


class Null(Ivs):
    def run(self, first: int, count: int, step: int) -> bytes:
        return bytes(count * self.length)


class Essiv(Plain64):
    """Plain64, encrypted under a hash of the key: nobody else can tell the vectors."""

    def __init__(self, length: int, cipher: str, hash: str, key: bytes) -> None:
        super().__init__(length)
        salt = hasher(hash)(key).digest()
        if len(salt) not in algorithm(cipher).key_sizes:
            raise UnsupportedFeature(
                f"No {cipher.upper()} cipher with key size {len(salt)} available"  # qemu-img's words: scripts see them
            )
        self._blocks = Blocks(cipher, salt)

    def run(self, first: int, count: int, step: int) -> bytes:
        return self._blocks.encrypt(super().run(first, count, step))


def make_ivs(name: str, hash: str, length: int, cipher: str, key: bytes) -> Ivs:
    """The generator called ``name`` (``hash`` is essiv's). Raises UnsupportedFeature."""
    if name == "essiv":
        return Essiv(length, cipher, hash, key)
    simple: dict[str, type[Ivs]] = {"plain": Plain, "plain64": Plain64, "plain64be": Plain64Be, "null": Null}
    if name not in simple:
        raise UnsupportedFeature(f"The IV generator '{name}' is not known; {', '.join(NAMES)} are")
    return simple[name](length)


def hasher(name: str) -> Hash:
    """hashlib's function of that name. Raises UnsupportedFeature when this Python has none."""
    try:
        width = hashlib.new(name).digest_size
    except (ValueError, TypeError):
        width = 0
    if not width:  # unknown, or of no fixed length
        raise UnsupportedFeature(f"The hash '{name}' is not available in this Python") from None
    return Hash(name)


class Hash:
    """A hash function by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, data: bytes = b"") -> hashlib._Hash:
        return hashlib.new(self.name, data)
