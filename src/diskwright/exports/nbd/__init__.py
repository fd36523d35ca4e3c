"""The NBD export: disks served to NBD clients."""

from diskwright.exports.nbd.server import NbdExport, NbdServer

__all__ = ["NbdExport", "NbdServer"]
