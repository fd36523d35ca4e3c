"""ova, ovf: packages of virtual machines; the disk in one."""

from diskwright.formats.ova.driver import DRIVERS

__all__ = ["DRIVERS"]
