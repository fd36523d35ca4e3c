"""dmg: what can be chosen when an image is made or opened."""

from __future__ import annotations

from dataclasses import dataclass

from diskwright.core.options import INT, SIZE, OneOf, option


@dataclass(frozen=True, kw_only=True)
class DmgOptions:
    compression_level: int | None = option(
        INT, "how hard chunks are packed that are written: 1 to 9 (zlib 3, bzip2 9, LZMA 3; LZFSE has none)",
        default=None,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DmgCreateOptions:
    size: int = option(SIZE, "virtual disk size", default=0)
    subformat: str = option(
        OneOf("UDZO", "UDBZ", "ULFO", "ULMO", "UDRO"), "how chunks are packed: zlib, bzip2, LZFSE, LZMA, not",
        default="UDZO",
    )  # fmt: skip
