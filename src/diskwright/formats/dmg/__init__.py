"""dmg: Apple's disk images (UDIF)."""

from diskwright.formats.dmg.driver import DRIVERS

__all__ = ["DRIVERS"]
