"""parallels: the expandable disk image of Parallels Desktop and Virtuozzo."""

from diskwright.formats.parallels.driver import DRIVERS

__all__ = ["DRIVERS"]
