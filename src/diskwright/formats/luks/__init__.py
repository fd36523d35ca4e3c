"""LUKS: a disk encrypted as a whole, behind a header with the key."""

from __future__ import annotations

from diskwright.formats.luks.driver import DRIVERS, Luks

__all__ = ["DRIVERS", "Luks"]
