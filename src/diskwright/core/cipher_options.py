"""Options of encrypting formats: the names by which they choose ciphers and hashes (those of QEMU, and some more), and
what changes key slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from diskwright.core.options import INT, OneOf, option
from diskwright.core.secrets import SECRET, Secret

CIPHERS: Final = OneOf(
    "aes-128", "aes-192", "aes-256", "cast5-128", "serpent-128", "serpent-192", "serpent-256",
    "twofish-128", "twofish-192", "twofish-256", "camellia-128", "camellia-192", "camellia-256", "sm4-128",
)  # fmt: skip
HASHES: Final = OneOf("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")

PBKDFS: Final = ("argon2id", "argon2i", "pbkdf2")


@dataclass(frozen=True, kw_only=True)
class SlotOptions:
    """Which key slots of LUKS shall become what; QEMU's names. None: not said."""

    state: str | None = option(OneOf("active", "inactive"), "what the key slots shall be", default=None)
    new_secret: Secret | None = option(SECRET, "the passphrase to set", default=None)
    old_secret: Secret | None = option(SECRET, "a passphrase: all slots it opens are meant", default=None)
    keyslot: int | None = option(INT, "number of the one key slot that is meant", default=None)
    iter_time: int | None = option(INT, "time to spend on the passphrase, in milliseconds", default=None)
