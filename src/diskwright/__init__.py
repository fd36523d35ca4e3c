"""Diskwright: a block layer for virtual disks.

    import diskwright

    with diskwright.open("disk.qcow2") as disk:
        print(disk.size, disk.pread(0, 512))

The names below load the rest of the package when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diskwright.version import __version__

if TYPE_CHECKING:
    from diskwright.api import (
        apply_snapshot,
        check,
        commit,
        compact,
        compare,
        convert,
        create,
        create_snapshot,
        delete_snapshot,
        info,
        mirror,
        open,
        rebase,
        serve,
        snapshots,
    )
    from diskwright.core.disk import Disk
    from diskwright.core.gate import ClosedGate, DirectoryGate, Gate, OpenGate
    from diskwright.core.snapshots import SnapshotInfo, VmState
    from diskwright.errors import (
        CorruptImage,
        DiskwrightError,
        GraphError,
        ImageError,
        ImageLocked,
        JobError,
        LimitExceeded,
        OptionError,
        ProtocolError,
        SnapshotNotFound,
        UnsafeReference,
        UnsupportedFeature,
    )
    from diskwright.live import backup, live_commit, stream

_HOMES = {
    "diskwright.api": (
        "apply_snapshot",
        "check",
        "commit",
        "compact",
        "compare",
        "convert",
        "create",
        "create_snapshot",
        "delete_snapshot",
        "info",
        "mirror",
        "open",
        "rebase",
        "serve",
        "snapshots",
    ),
    "diskwright.core.disk": ("Disk",),
    "diskwright.core.gate": ("ClosedGate", "DirectoryGate", "Gate", "OpenGate"),
    "diskwright.core.snapshots": ("SnapshotInfo", "VmState"),
    "diskwright.errors": (
        "CorruptImage",
        "DiskwrightError",
        "GraphError",
        "ImageError",
        "ImageLocked",
        "JobError",
        "LimitExceeded",
        "OptionError",
        "ProtocolError",
        "SnapshotNotFound",
        "UnsafeReference",
        "UnsupportedFeature",
    ),
    "diskwright.live": ("backup", "live_commit", "stream"),
}

__all__ = [
    "ClosedGate",
    "CorruptImage",
    "DirectoryGate",
    "Disk",
    "DiskwrightError",
    "Gate",
    "GraphError",
    "ImageError",
    "ImageLocked",
    "JobError",
    "LimitExceeded",
    "OpenGate",
    "OptionError",
    "ProtocolError",
    "SnapshotInfo",
    "SnapshotNotFound",
    "UnsafeReference",
    "UnsupportedFeature",
    "VmState",
    "__version__",
    "apply_snapshot",
    "backup",
    "check",
    "commit",
    "compact",
    "compare",
    "convert",
    "create",
    "create_snapshot",
    "delete_snapshot",
    "info",
    "live_commit",
    "mirror",
    "open",
    "rebase",
    "serve",
    "snapshots",
    "stream",
]


def __getattr__(name: str) -> object:
    """Loads a public name from its module on first use, so that ``import diskwright`` costs nothing."""
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value: object = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'diskwright' has no attribute '{name}'")
