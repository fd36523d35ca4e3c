"""vmdk: VMware's disk image."""

from diskwright.formats.vmdk.driver import DRIVERS

__all__ = ["DRIVERS"]
