"""qcow2, QEMU's copy-on-write format (specification: ``docs/interop/qcow2`` of the QEMU project).

``layout`` numbers; ``header``; ``mapping`` guest to host offsets; ``refcounts`` and ``metadata`` what host
clusters are used for; ``writing`` changes, ``ordering`` when they reach the file; ``subclusters`` and
``subwriting`` both for extended L2 entries and data files; ``compressed`` decoding, ``encoding`` and ``packing``
compressing; ``resize``, ``check``, ``repair``, ``create``, ``amend``, ``measure`` the operations on a whole image;
``snapshots`` their table, ``changes`` (with ``counts``, ``trees`` and ``vmstate``) what is done with them; ``driver``
puts them together.
"""

from __future__ import annotations

from diskwright.formats.qcow2.driver import DRIVERS, Qcow2

__all__ = ["DRIVERS", "Qcow2"]
