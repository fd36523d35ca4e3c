"""Writes, zeros and discards of whole clusters leave the map that qemu-io leaves; of any ranges, the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from tests.formats.luks.peers import needs_qemu, run
from tests.formats.qcow2.support import LONG

CLUSTER, SIZE, BELOW = 65536, 1 << 20, 11 * 65536
BACKED = "backing_file={folder}/below,backing_fmt=raw"
SHAPES = {
    "raw": None,
    "plain": "",
    "version 2": "compat=0.10",
    "backed": BACKED,
    "version 2, backed": f"compat=0.10,{BACKED}",
    "extended": "extended_l2=on",
    "extended, backed": f"extended_l2=on,{BACKED}",
    "data file": "data_file={folder}/{name}.data",
    "data file, backed": f"data_file={{folder}}/{{name}}.data,{BACKED}",
    "raw data file": "data_file={folder}/{name}.data,data_file_raw=on",
    "preallocated": "preallocation=metadata",
}
COMMANDS = {"write": "write -P 0x55", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
Operation = tuple[str, int, int]


def operations(rng: random.Random, *, whole: bool) -> list[Operation]:
    chosen: list[Operation] = []
    for _ in range(rng.randrange(2, 6)):
        offset, length = rng.randrange(SIZE), rng.randrange(1, 300_000)
        unit = CLUSTER if whole else rng.choice((CLUSTER, 4096, 512))
        offset -= offset % unit
        chosen.append((rng.choice(list(COMMANDS)), offset, min(length + -length % unit, SIZE - offset)))
    return chosen


def by_qemu(path: Path, fmt: str, chosen: list[Operation]) -> None:
    words = [word for name, offset, length in chosen for word in ("-c", f"{COMMANDS[name]} {offset} {length}")]
    # A discard that this version of the format cannot do is told as a failure.
    out = run("qemu-io", "-f", fmt, *words, str(path), check=False).stdout
    assert "write failed" not in out, out


def by_us(path: Path, fmt: str, chosen: list[Operation]) -> None:
    graph = Graph(OpenGate())
    try:
        disk = graph.disk(graph.open({"driver": fmt, "file.filename": str(path)}, writable=True))
        for name, offset, length in chosen:
            if name == "write":
                disk.pwrite(offset, b"\x55" * length)
            elif name == "discard":
                disk.trim(offset, length)
            else:
                disk.zero(offset, length, unmap=name == "unmap")
    finally:
        graph.close()


def shown(path: Path, fmt: str) -> list[tuple[int, object]]:
    """Where the map changes, and to what. Whether a file's own zeros are holes is not asked: new places of a write are
    not filled up where the file is zero already, and a file system decides about the rest."""
    found: list[tuple[int, object]] = []
    for row in json.loads(run("qemu-img", "map", "--output=json", "-f", fmt, str(path)).stdout):
        stored = "offset" in row
        kind = (row["depth"], row["present"], stored, row["zero"] and not stored)
        if not found or found[-1][1] != kind:
            found.append((row["start"], kind))
    return found


@needs_qemu
@pytest.mark.parametrize("shape", SHAPES)
def test_same_map_and_bytes(shape: str, tmp_path: Path) -> None:
    options = SHAPES[shape]
    fmt = "raw" if options is None else "qcow2"
    (tmp_path / "below").write_bytes(random.Random(1).randbytes(BELOW))
    for seed in range(60 if LONG else 4):
        whole = seed % 2 == 0
        chosen = operations(random.Random(seed), whole=whole)
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        for path in (ours, theirs):
            text = (options or "").format(folder=tmp_path, name=path.name)
            run("qemu-img", "create", "-q", "-f", fmt, *(("-o", text) if text else ()), str(path), str(SIZE))
        by_us(ours, fmt, chosen)
        by_qemu(theirs, fmt, chosen)
        partly = any(name == "discard" and (offset | length) % CLUSTER for name, offset, length in chosen)
        if not (partly and "extended" in shape):  # we discard by subclusters, too
            run("qemu-img", "compare", "-f", fmt, "-F", fmt, str(ours), str(theirs))
        # A raw data file's map is data throughout here; and in version 2 zeros behind a shorter backing file are
        # written out by QEMU, though the range reads as zeros.
        if whole and shape not in ("raw data file", "version 2, backed"):
            assert shown(ours, fmt) == shown(theirs, fmt), chosen
        if fmt == "qcow2":
            run("qemu-img", "check", str(ours))
        for path in (ours, theirs):
            path.unlink()
