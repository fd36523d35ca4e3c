"""qed: QEMU's enhanced disk."""

from diskwright.formats.qed.driver import DRIVERS

__all__ = ["DRIVERS"]
