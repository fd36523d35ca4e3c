"""How long and how often things are measured: the only place where a whole run's time is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes, times in seconds."""

    quick: bool
    match: str = ""  # only configurations with this in their name
    rounds: int = 3
    # NBD
    warm_up: float = 0.15
    seconds: float = 0.6
    disk: int = 512 << 20
    empty_disk: int = 64 << 30
    structured: bool = False
    one_by_one: bool = False
    fio: bool = False
    # convert, mirror
    file_system: int = 4 << 30
    durable_rounds: int = 2
    mirror_rounds: int = 3
    writes_per_second: float = 2000
    compressed_system: int = 1 << 30  # qemu-img compresses some 60 MB a second
    # check
    table_disk: int = 1 << 40
    start_rounds: int = 15

    def wanted(self, name: str) -> bool:
        """Whether a configuration of this name is to be measured."""
        return self.match.lower() in name.lower()


FULL: Final = Settings(quick=False)
QUICK: Final = Settings(
    quick=True,
    warm_up=0.05,
    seconds=0.2,
    disk=128 << 20,
    empty_disk=16 << 30,
    file_system=1 << 30,
    durable_rounds=0,
    mirror_rounds=1,
    compressed_system=256 << 20,
    table_disk=128 << 30,
    start_rounds=5,
)
