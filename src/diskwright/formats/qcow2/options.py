"""What can be chosen when a qcow2 image is opened or created."""

from __future__ import annotations

from dataclasses import dataclass

from diskwright.core.options import BOOL, INT, SIZE, STR, OneOf, option
from diskwright.formats.qcow2.layout import CACHE_BYTES


@dataclass(frozen=True, kw_only=True)
class Qcow2Options:
    cache_size: int = option(SIZE, "most bytes of metadata tables kept in memory", default=CACHE_BYTES)
    repair: bool = option(
        BOOL, "open for check and repair only: also when the image is marked corrupt or dirty", default=False
    )
    snapshot: str | None = option(
        STR, "show the internal snapshot with this id, or else with this name, read-only", default=None
    )
    snapshot_id: str | None = option(STR, "show the internal snapshot with this id", default=None)
    snapshot_name: str | None = option(STR, "show the internal snapshot with this name", default=None)

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
    compression_type: str = option(OneOf("zlib", "zstd"), "method of compressed clusters", default="zlib")
    lazy_refcounts: bool = option(BOOL, "let other programs postpone refcount updates", default=False)
    refcount_bits: int = option(INT, "width of a refcount in bits, 1 to 64, a power of two", default=16)
