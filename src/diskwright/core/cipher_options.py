"""The names by which options of encrypting formats choose ciphers and hashes: those of QEMU, and some more."""

from __future__ import annotations

from typing import Final

from diskwright.core.options import OneOf

CIPHERS: Final = OneOf(
    "aes-128", "aes-192", "aes-256", "cast5-128", "serpent-128", "serpent-192", "serpent-256",
    "twofish-128", "twofish-192", "twofish-256", "camellia-128", "camellia-192", "camellia-256", "sm4-128",
)  # fmt: skip
HASHES: Final = OneOf("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
