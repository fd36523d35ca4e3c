"""What can be chosen when a qcow2 image is opened or created."""

from __future__ import annotations

from dataclasses import dataclass

from diskwright.core.cipher_options import CIPHERS, HASHES
from diskwright.core.options import BOOL, INT, SIZE, STR, OneOf, option
from diskwright.core.secrets import SECRET, Secret
from diskwright.formats.qcow2.layout import CACHE_BYTES


@dataclass(frozen=True, kw_only=True)
class Qcow2Options:
    cache_size: int = option(SIZE, "most bytes of metadata tables kept in memory", default=CACHE_BYTES)
    repair: bool = option(
        BOOL, "open for check and repair only: also when the image is marked corrupt or dirty", default=False
    )
    encrypt_format: str | None = option(
        OneOf("luks", "aes"), "how the image must be encrypted", default=None, name="encrypt.format"
    )
    encrypt_key_secret: Secret | None = option(
        SECRET, "ID of the secret with the AES key or a LUKS passphrase", default=None, name="encrypt.key-secret"
    )


@dataclass(frozen=True, kw_only=True)
class Qcow2CreateOptions:
    size: int = option(SIZE, "virtual disk size")
    compat: str = option(OneOf("1.1", "v3", "0.10", "v2"), "compatibility level: 1.1 is version 3", default="1.1")
    cluster_size: int = option(SIZE, "allocation unit, 512 bytes to 2 MiB, a power of two", default=65536)
    backing_file: str | None = option(STR, "image that answers for what this one does not have", default=None)
    backing_fmt: str | None = option(STR, "format of the backing file", default=None)
    preallocation: str = option(
        OneOf("off", "metadata", "falloc", "full"), "what is taken in advance: tables, space, or both", default="off"
    )
    compression_type: str = option(OneOf("zlib", "zstd"), "method of compressed clusters", default="zlib")
    lazy_refcounts: bool = option(BOOL, "let other programs postpone refcount updates", default=False)
    refcount_bits: int = option(INT, "width of a refcount in bits, 1 to 64, a power of two", default=16)
    encryption: bool = option(BOOL, "the same as encrypt.format=aes", default=False)
    encrypt_format: str | None = option(
        OneOf("luks", "aes"), "encrypt the image; aes is weak, for old programs", default=None, name="encrypt.format"
    )
    encrypt_key_secret: Secret | None = option(
        SECRET, "ID of the secret with the AES key or LUKS passphrase", default=None, name="encrypt.key-secret"
    )
    encrypt_cipher_alg: str | None = option(
        CIPHERS, "encryption cipher and its key length", default=None, name="encrypt.cipher-alg"
    )
    encrypt_cipher_mode: str | None = option(
        OneOf("xts", "cbc", "ctr", "ecb"), "mode of the cipher", default=None, name="encrypt.cipher-mode"
    )
    encrypt_ivgen_alg: str | None = option(
        OneOf("plain64", "plain", "essiv"), "how sectors' vectors are made", default=None, name="encrypt.ivgen-alg"
    )
    encrypt_ivgen_hash_alg: str | None = option(
        HASHES, "hash of the essiv generator", default=None, name="encrypt.ivgen-hash-alg"
    )
    encrypt_hash_alg: str | None = option(
        HASHES, "hash for keys from passphrases", default=None, name="encrypt.hash-alg"
    )
    encrypt_iter_time: int | None = option(
        INT, "time to spend on a passphrase, in milliseconds", default=None, name="encrypt.iter-time"
    )
