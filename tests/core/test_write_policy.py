"""``discard`` and ``detect-zeroes``: what they leave is what QEMU leaves."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.errors import OptionError
from tests.cli.run import make, needs_qemu, qemu_img

K = 65536

ACTIONS = [
    ("write", 0, 2 * K, b"\0"), ("write", 3 * K, K, b"\0"), ("write", 4 * K, K, b"\7"), ("zero", 5 * K, K, b""),
    ("unmap", 6 * K, K, b""), ("discard", 7 * K, K, b""), ("write", 20 * K, K, b"\0"), ("zero", 21 * K, K, b""),
    ("unmap", 22 * K, K, b""), ("write", 24 * K, K, b"\3"),
]  # fmt: skip

POLICIES = [
    {}, {"discard": "ignore"}, {"discard": "unmap"}, {"detect-zeroes": "on"}, {"detect-zeroes": "unmap"},
    {"detect-zeroes": "on", "discard": "ignore"}, {"detect-zeroes": "off", "discard": "on"},
]  # fmt: skip


def ours(spec: dict[str, Any]) -> None:
    with diskwright.open(spec, writable=True) as disk:
        for action, offset, length, data in ACTIONS:
            if action == "write":
                disk.pwrite(offset, data * length)
            elif action == "discard":
                disk.trim(offset, length)
            else:
                disk.zero(offset, length, unmap=action == "unmap")


def theirs(options: str) -> None:
    words = {"write": "write -P {}", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
    commands: list[str] = []
    for action, offset, length, data in ACTIONS:
        commands += ["-c", f"{words[action].format(data[0] if data else '')} {offset} {length}"]
    done = subprocess.run(["qemu-io", "--image-opts", *commands, options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done


def facts(row: dict[str, Any]) -> list[tuple[object, ...]]:
    """What a row of the map says of each cluster; whether it has a place, but not where."""
    told = (row["depth"], row["present"], row["zero"], row["data"], "offset" in row)
    return [(at, *told) for at in range(row["start"], row["start"] + row["length"], K)]


@needs_qemu
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("format", ["qcow2", "overlay"])
def test_maps_are_those_qemu_leaves(policy: dict[str, str], format: str, tmp_path: Path) -> None:
    driver, create = "qcow2", "qemu-img create -q -f qcow2 "
    if format == "overlay":
        make(tmp_path, "qemu-img create -q -f raw base 2M", "qemu-io -f raw -c write~-P~9~0~2M base")
        create += "-b base -F raw "
    maps = []
    for name in ("ours", "theirs"):
        make(tmp_path, f"{create} {name} 2M", f"qemu-io -f {driver} -c write~-P~1~0~640k {name}")
        path = str(tmp_path / name)
        if name == "ours":
            ours({"driver": driver, "file": {"driver": "file", "filename": path}, **policy})
        else:
            # qemu-io itself gives space back unless it is told not to.
            more = "".join(f",{key}={value}" for key, value in {"discard": "unmap", **policy}.items())
            theirs(f"driver={driver},file.driver=file,file.filename={path}{more}")
        rows = json.loads(qemu_img("map", "--output=json", "-f", driver, name, cwd=tmp_path).out)
        maps.append([fact for row in rows for fact in facts(row)])
    make(tmp_path, f"qemu-img compare -q -f {driver} -F {driver} ours theirs")
    assert maps[0] == maps[1]


def test_a_policy_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(K))
    spec = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "a")}}
    for wrong in ({"detect-zeroes": "unmap", "discard": "ignore"}, {"discard": "maybe"}, {"detect-zeroes": "maybe"}):
        with pytest.raises(OptionError):
            diskwright.open({**spec, **wrong})


def test_order_is_kept_within_a_batch(tmp_path: Path) -> None:
    diskwright.create(tmp_path / "a", "qcow2", size=1 << 20)
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "a")}, "detect-zeroes": "on"}
    with diskwright.open(spec, writable=True) as disk:
        batch = [b"\1" * K, bytes(K), b"\2" * 512, bytes(512)]
        with disk.request():
            disk.writev([(0, memoryview(piece)) for piece in batch])
        assert disk.pread(0, 2 * K) == bytes(2 * K)
        with disk.request():
            disk.writev([(0, memoryview(piece)) for piece in reversed(batch)])
        assert disk.pread(0, K) == b"\1" * K


@needs_qemu
@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_discarded_clusters_keep_their_place_where_that_is_wanted(kept: bool, passed: bool, tmp_path: Path) -> None:
    diskwright.create(tmp_path / "a", "qcow2", size=4 << 20)
    spec = {
        "driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "a")}, "discard-no-unref": kept,
        "pass-discard-request": passed,
    }  # fmt: skip
    with diskwright.open(spec, writable=True) as disk:
        disk.pwrite(0, b"x" * (4 << 20))
        disk.flush()
        os.sync()
        full = (tmp_path / "a").stat().st_blocks
        disk.trim(K, 32 * K)
        disk.zero(40 * K, 8 * K, unmap=True)
        disk.flush()
        assert disk.pread(0, 50 * K) == b"x" * K + bytes(32 * K) + b"x" * 7 * K + bytes(8 * K) + b"x" * 2 * K
        place = disk.node.extent_at(2 * K, K).file_offset
        assert (place > 0) == kept
    for _ in range(2):  # what was given up is discarded when it is known that nobody reads it
        with diskwright.open(spec, writable=True) as disk:
            disk.flush()
    freed = full - (tmp_path / "a").stat().st_blocks
    # Less what the file system itself needed meanwhile.
    assert (freed >= 39 * K // 512) == passed
    make(tmp_path, "qemu-img check -q a")
