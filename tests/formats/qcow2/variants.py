"""Images with extended L2 entries, with a data file, or both: what their tests share."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any, Final

from diskwright.cli.main import main
from diskwright.core.create import create_image
from diskwright.core.disk import Disk
from diskwright.core.gate import DirectoryGate
from diskwright.core.graph import Graph
from tests.formats.qcow2.support import qemu, qemu_check

OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "extended": {"extended_l2": True},
    "extended, 16k": {"extended_l2": True, "cluster_size": 16384},
    "extended, preallocated": {"extended_l2": True, "preallocation": "metadata"},
    "data file": {"data_file": "data"},
    "data file, 512": {"data_file": "data", "cluster_size": 512},
    "raw data file": {"data_file": "data", "data_file_raw": True},
    "both": {"extended_l2": True, "data_file": "data"},
    "both, raw": {"extended_l2": True, "data_file": "data", "data_file_raw": True},
}


def make(folder: Path, options: dict[str, Any], size: int, *, backing: bytes | None = None, ours: bool = True) -> Path:
    """A new image in ``folder``, of our making or QEMU's, over a raw file with the bytes ``backing``."""
    path = folder / "image.qcow2"
    wanted = dict(options)
    if "data_file" in wanted:
        wanted["data_file"] = str(folder / "data")  # QEMU takes a relative name as seen from where it is started
    if backing is not None:
        (folder / "base.raw").write_bytes(backing)
        wanted.update(backing_file="base.raw", backing_fmt="raw")
    if ours:
        create_image(str(path), "qcow2", {**wanted, "size": size}, gate=DirectoryGate())
    else:
        words = ",".join(f"{name}={_word(value)}" for name, value in wanted.items())
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, path, size)
    return path


def _word(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def opened(path: Path, *, writable: bool = True) -> Disk:
    graph = Graph(DirectoryGate())
    return graph.disk(graph.open(str(path), driver="qcow2", writable=writable), owns_graph=True)


def our_map(path: Path) -> Any:
    """What ``diskwright map --output=json`` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["map", "--output=json", str(path)]) == 0
    return json.loads(out.getvalue())


def their_map(path: Path) -> Any:
    return json.loads(qemu("qemu-img", "map", "--output=json", path))


def a_range(chance: random.Random, size: int) -> tuple[int, int]:
    """Where to do something next: small or large, often at the borders of clusters or subclusters."""
    offset = chance.randrange(size // 512) * 512
    length = chance.choice((512, 1024, 2048, 4096, 65536, 100 << 10, 200 << 10))
    if chance.random() < 0.3:
        unit = chance.choice((2048, 65536))
        offset, length = offset // unit * unit, unit * chance.randrange(1, 4)
    return offset, min(size - offset, length)


def play(path: Path, chance: random.Random, steps: int, *, resizing: bool) -> bytes:
    """A guest of ours does anything at random, and sees at each step what it should. Returns the disk."""
    disk = opened(path)
    size = disk.size
    model = bytearray(disk.pread(0, size))
    for _ in range(steps):
        offset, length = a_range(chance, size)
        action = chance.random()
        if action < 0.45:
            data = bytes([chance.randrange(1, 256)]) * length
            disk.pwrite(offset, data)
            model[offset : offset + length] = data
        elif action < 0.7:
            disk.zero(offset, length, unmap=chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif action < 0.9:
            before = bytes(model[offset : offset + length])
            disk.trim(offset, length)
            model[offset : offset + length] = disk.pread(offset, length)
            changed = zip(model[offset : offset + length], before, strict=True)
            assert all(now in (0, old) for now, old in changed), "neither zeros nor what was there"
        elif action < 0.95 or not resizing:
            disk.flush()
        else:
            size = max(1024, size + chance.randrange(-300, 600) * 512)
            with disk.drained():
                disk.node.resize(size)
            model = bytearray(bytes(model[:size]).ljust(size, b"\0"))
        assert disk.pread(0, size) == model
    disk.close()
    return bytes(model)


def play_theirs(path: Path, chance: random.Random, steps: int, size: int) -> bytes:
    """The same with qemu-io; what it should then read as, where that is certain: a discard is of zeros only."""
    commands: list[str] = []
    model = bytearray(size)
    for _ in range(steps):
        offset, length = a_range(chance, size)
        action, byte = chance.random(), chance.randrange(1, 256)
        if action < 0.5:
            commands.append(f"write -P {byte} {offset} {length}")
            model[offset : offset + length] = bytes([byte]) * length
        else:
            commands.append(f"write -z {'-u ' if action < 0.7 else ''}{offset} {length}")
            model[offset : offset + length] = bytes(length)
            if action > 0.85:
                commands.append(f"discard {offset} {length}")
    qemu("qemu-io", *(word for command in commands for word in ("-c", command)), path)
    return bytes(model)


def agreed(path: Path, disk: bytes, folder: Path) -> None:
    """QEMU finds nothing wrong with an image, reads ``disk`` from it, and maps it as we do."""
    found = qemu_check(path)
    assert (found["corruptions"], found["leaks"], found["check-errors"]) == (0, 0, 0), found
    qemu("qemu-img", "convert", "-O", "raw", path, folder / "read.raw")
    assert (folder / "read.raw").read_bytes() == disk
    assert our_map(path) == their_map(path)
