"""Programs that read VMDK images and share nothing with this one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def by_libvmdk(path: Path) -> bytes:
    import pyvmdk

    handle: Any = pyvmdk.handle()
    handle.open(str(path))
    handle.open_extent_data_files()
    data = bytes(handle.read_buffer(handle.get_media_size()))
    handle.close()
    return data


def by_dissect(path: Path) -> bytes:
    from dissect.hypervisor.disk.vmdk import VMDK

    disk: Any = VMDK(path)
    return bytes(disk.read(disk.size))


def by_fs_explorer(path: Path) -> bytes:
    from fs_explorer.containers.vmdk import VMDKDriver
    from fs_explorer.io.source import NULL_STATS, BytesRA, Cache
    from fs_explorer.tree import Context, ProbeHint

    raw = path.read_bytes()
    file = BytesRA(raw)
    context = Context(Cache(), NULL_STATS, resolver=lambda name: (path.parent / name).open("rb"))
    disk: Any = VMDKDriver.open(file, context, ProbeHint(file, raw[:65536], raw[-65536:], len(raw), path.name))
    device = disk.device()
    return bytes(device.read_at(0, device.size))


READERS = [
    pytest.param(by_libvmdk, marks=pytest.mark.skipif(not find_spec("pyvmdk"), reason="needs libvmdk-python")),
    pytest.param(by_dissect, marks=pytest.mark.skipif(not find_spec("dissect"), reason="needs dissect.hypervisor")),
    pytest.param(by_fs_explorer, marks=pytest.mark.skipif(not find_spec("fs_explorer"), reason="needs fs-explorer")),
]
