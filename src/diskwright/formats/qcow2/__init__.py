"""qcow2, QEMU's copy-on-write format (specification: ``docs/interop/qcow2`` of the QEMU project).

``layout`` numbers; ``header``; ``mapping`` guest to host offsets; ``refcounts`` and ``metadata`` what host
clusters are used for; ``writing`` changes, ``ordering`` when they reach the file; ``subclusters`` and
``subwriting`` both for extended L2 entries and data files; ``compressed`` decoding; ``resize``, ``check``,
``repair``, ``create`` the operations on a whole image; ``driver`` puts them together.
"""

from __future__ import annotations

from diskwright.formats.qcow2.driver import DRIVERS, Qcow2

__all__ = ["DRIVERS", "Qcow2"]
