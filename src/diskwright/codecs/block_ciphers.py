"""Block ciphers by the names disk encryption uses, on top of the package ``cryptography`` (OpenSSL).

Everything above works on whole runs of blocks: one call encrypts or decrypts as many as it is given, each
by itself (electronic codebook), and the chaining of a mode is arithmetic around that. One call a block would
cost fifty times as much.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.errors import UnsupportedFeature

if TYPE_CHECKING:
    from collections.abc import Callable

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Algorithm:
    """A block cipher: its name in LUKS headers, its block and its possible keys in bytes."""

    name: str
    block: int
    key_sizes: tuple[int, ...]


_KNOWN: Final = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("aes", 16, (16, 24, 32)),
        Algorithm("camellia", 16, (16, 24, 32)),
        Algorithm("cast5", 8, (16,)),
        Algorithm("sm4", 16, (16,)),
    )
}

_NAMED_ONLY: Final = ("serpent", "twofish", "cast6", "anubis", "kuznyechik", "aria", "blowfish", "des", "des3_ede")
"""Ciphers such images may use and that no library here has: refused by name."""


def algorithm(name: str) -> Algorithm:
    """The cipher called ``name``. Raises UnsupportedFeature."""
    found = _KNOWN.get(name)
    if found is None:
        what = "is not available here" if name in _NAMED_ONLY else "is not known"
        raise UnsupportedFeature(f"The cipher '{name}' {what}; {', '.join(_KNOWN)} are")
    return found


def primitive(name: str, key: bytes) -> Any:
    """The algorithm object of ``cryptography`` for a cipher and key of that algorithm's sizes."""
    try:
        from cryptography.hazmat.primitives.ciphers import algorithms
    except ImportError as error:
        raise UnsupportedFeature("Encrypted images need the package 'cryptography', which is not installed") from error
    if name == "aes":
        return algorithms.AES(key)
    if name == "sm4":
        return algorithms.SM4(key)
    try:
        from cryptography.hazmat.decrepit.ciphers import algorithms as old
    except ImportError as error:
        raise UnsupportedFeature(f"This version of 'cryptography' does not have the cipher '{name}'") from error
    title = {"cast5": "CAST5", "camellia": "Camellia"}[name]
    found = getattr(old, title, None) or getattr(algorithms, title, None)
    if found is None:
        raise UnsupportedFeature(f"This version of 'cryptography' does not have the cipher '{name}'")
    return found(key)


class Blocks:
    """One cipher under one key, applied to each block by itself. Thread-safe.

    A context of the library may be used by one thread at a time, and setting one up costs as much as
    hundreds of blocks: every thread keeps its own.
    """

    def __init__(self, name: str, key: bytes) -> None:
        """Raises UnsupportedFeature for a cipher, or a key length, that there is not."""
        found = algorithm(name)
        if len(key) not in found.key_sizes:
            sizes = ", ".join(str(size * 8) for size in found.key_sizes)
            raise UnsupportedFeature(f"The cipher '{name}' has keys of {sizes} bits, not {len(key) * 8}")
        self.name, self.block = name, found.block
        self._primitive = primitive(name, key)
        self._contexts = threading.local()

    def __repr__(self) -> str:
        return f"<Blocks {self.name}>"

    def native(self, mode: object) -> Any:
        """The library's cipher object in one of its own modes."""
        from cryptography.hazmat.primitives.ciphers import Cipher

        return Cipher(self._primitive, mode)

    def encrypt(self, source: Buffer) -> bytes:
        """Whole blocks, as new bytes. For a few."""
        return bytes(self._context("enc").update(source))

    def decrypt(self, source: Buffer) -> bytes:
        return bytes(self._context("dec").update(source))

    @property
    def encrypt_into(self) -> Callable[[Buffer, Buffer], int]:
        """``(source, into)``: as ``encrypt``, without a copy. ``into`` must be a block longer than ``source``;
        nothing is written to what it has more. This thread's only."""
        into: Callable[[Buffer, Buffer], int] = self._context("enc").update_into
        return into

    @property
    def decrypt_into(self) -> Callable[[Buffer, Buffer], int]:
        into: Callable[[Buffer, Buffer], int] = self._context("dec").update_into
        return into

    def _context(self, way: str) -> Any:
        found = getattr(self._contexts, way, None)
        if found is None:
            from cryptography.hazmat.primitives.ciphers import modes

            cipher = self.native(modes.ECB())
            found = cipher.encryptor() if way == "enc" else cipher.decryptor()
            setattr(self._contexts, way, found)
        return found
