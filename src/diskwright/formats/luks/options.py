"""What can be chosen when a LUKS image is opened, created or amended. The names are QEMU's."""

from __future__ import annotations

from dataclasses import dataclass

from diskwright.core.cipher_options import CIPHERS, HASHES, PBKDFS, SlotOptions
from diskwright.core.options import BOOL, INT, SIZE, OneOf, option
from diskwright.core.secrets import SECRET, Secret


@dataclass(frozen=True, kw_only=True)
class LuksOptions:
    key_secret: Secret | None = option(SECRET, "ID of the secret with a passphrase of a key slot", default=None)


@dataclass(frozen=True, kw_only=True)
class LuksCreateOptions:
    size: int = option(SIZE, "virtual disk size", default=0)
    key_secret: Secret | None = option(SECRET, "ID of the secret that provides the keyslot passphrase", default=None)
    cipher_alg: str = option(CIPHERS, "encryption cipher and its key length", default="aes-256")
    cipher_mode: str = option(OneOf("xts", "cbc", "ctr", "ecb"), "mode of the cipher", default="xts")
    ivgen_alg: str = option(OneOf("plain64", "plain", "essiv"), "how sectors' vectors are made", default="plain64")
    ivgen_hash_alg: str | None = option(HASHES, "hash of the essiv generator; default: sha256", default=None)
    hash_alg: str = option(HASHES, "hash for keys from passphrases", default="sha256")
    iter_time: int = option(INT, "time to spend on a passphrase, in milliseconds", default=2000)
    detached_header: bool = option(BOOL, "make a header only, for data in another file", default=False)
    preallocation: str = option(OneOf("off", "falloc", "full"), "how space is taken in advance", default="off")
    luks_version: str = option(OneOf("1", "2"), "version of the format", default="1")
    pbkdf: str | None = option(OneOf(*PBKDFS), "version 2: how keys are derived; default: argon2id", default=None)
    sector_size: int | None = option(SIZE, "version 2: bytes encrypted together; default: 512", default=None)


@dataclass(frozen=True, kw_only=True)
class LuksAmendOptions(SlotOptions):
    """Passphrases are all that can be changed."""
