"""vdi: VirtualBox's disk image."""

from diskwright.formats.vdi.driver import DRIVERS

__all__ = ["DRIVERS"]
