"""What can be chosen when a qcow2 image is opened or created."""

from __future__ import annotations

from dataclasses import dataclass

from diskwright.core.cipher_options import CIPHERS, HASHES
from diskwright.core.options import BOOL, INT, SIZE, STR, OneOf, option
from diskwright.core.secrets import SECRET, Secret
from diskwright.formats.qcow2.layout import CACHE_BYTES


@dataclass(frozen=True, kw_only=True)
class Qcow2Options:
    cache_size: int | None = option(
        SIZE, f"most bytes of metadata tables kept in memory; default: {CACHE_BYTES >> 20}M", default=None
    )
    l2_cache_size: int | None = option(SIZE, "of these, for L2 tables", default=None)
    refcount_cache_size: int | None = option(SIZE, "of these, for refcounts", default=None)
    l2_cache_entry_size: int | None = option(
        SIZE, "512 bytes to a cluster, a power of two; accepted, tables are read in pieces that suit them", default=None
    )
    cache_clean_interval: int = option(
        INT, "seconds after which tables nobody has used are given up; 0: they are kept", default=0
    )
    overlap_check: str = option(
        OneOf("none", "constant", "cached", "all"),
        "accepted: no write ever goes to where metadata is known to lie",
        default="cached",
    )
    pass_discard_request: bool = option(BOOL, "tell the file of clusters the guest discarded", default=True)
    pass_discard_snapshot: bool = option(BOOL, "tell it of clusters a deleted snapshot had", default=True)
    pass_discard_other: bool = option(BOOL, "tell it of all others that became free", default=False)
    discard_no_unref: bool = option(BOOL, "clusters keep their place when they are discarded", default=False)
    compression_level: int | None = option(
        INT, "how hard clusters are compressed: zlib 1 to 9 (3; 6 gives qemu-img's sizes), zstd 1 to 19 (1)",
        default=None,
    )  # fmt: skip
    repair: bool = option(
        BOOL, "open for check and repair only: also when the image is marked corrupt or dirty", default=False
    )
    snapshot: str | None = option(
        STR, "show the internal snapshot with this id, or else with this name, read-only", default=None
    )
    snapshot_id: str | None = option(STR, "show the internal snapshot with this id", default=None)
    snapshot_name: str | None = option(STR, "show the internal snapshot with this name", default=None)
    encrypt_format: str | None = option(
        OneOf("luks", "aes"), "how the image must be encrypted", default=None, name="encrypt.format"
    )
    encrypt_key_secret: Secret | None = option(
        SECRET, "ID of the secret with the AES key or a LUKS passphrase", default=None, name="encrypt.key-secret"
    )

    @property
    def shows_snapshot(self) -> bool:
        return (self.snapshot, self.snapshot_id, self.snapshot_name) != (None, None, None)


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
    extended_l2: bool = option(BOOL, "L2 entries that divide each cluster into 32 subclusters", default=False)
    data_file: str | None = option(STR, "file that holds the guest's data, made along with the image", default=None)
    data_file_raw: bool = option(BOOL, "keep the data file valid as a raw image", default=False)
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


@dataclass(frozen=True, kw_only=True)
class Qcow2AmendOptions:
    """What can be changed in an image that exists; None stands for what shall stay."""

    backing_file: str | None = option(STR, "image that answers for what this one does not have", default=None)
    backing_fmt: str | None = option(STR, "format of the backing file", default=None)
    compat: str | None = option(STR, "compatibility level: 0.10 (v2) or 1.1 (v3)", default=None)
    data_file: str | None = option(STR, "name of the external data file", default=None)
    data_file_raw: bool | None = option(BOOL, "the data file stays valid as a raw image", default=None)
    lazy_refcounts: bool | None = option(BOOL, "let other programs postpone refcount updates", default=None)
    refcount_bits: int | None = option(INT, "width of a refcount in bits, 1 to 64, a power of two", default=None)
    size: int | None = option(SIZE, "virtual disk size", default=None)
    encrypt_state: str | None = option(
        OneOf("active", "inactive"), "what the key slots shall be", default=None, name="encrypt.state"
    )
    encrypt_new_secret: Secret | None = option(SECRET, "the passphrase to set", default=None, name="encrypt.new-secret")
    encrypt_old_secret: Secret | None = option(
        SECRET, "a passphrase: all slots it opens are meant", default=None, name="encrypt.old-secret"
    )
    encrypt_keyslot: int | None = option(
        INT, "number of the one key slot that is meant", default=None, name="encrypt.keyslot"
    )
    encrypt_iter_time: int | None = option(
        INT, "time to spend on the passphrase, in milliseconds", default=None, name="encrypt.iter-time"
    )
