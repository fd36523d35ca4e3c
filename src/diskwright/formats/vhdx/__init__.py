"""vhdx: Hyper-V's virtual disk, version 2; fixed, dynamic and differencing."""

from diskwright.formats.vhdx.driver import DRIVERS

__all__ = ["DRIVERS"]
