"""Gates: what an image may make us open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diskwright.core.gate import ClosedGate, DirectoryGate, OpenGate, has_prefix, resolve
from diskwright.errors import UnsafeReference


def admits(gate: DirectoryGate, reference: str, image: Path) -> bool:
    try:
        gate.admit(reference, named_by=str(image), role="backing file")
    except UnsafeReference:
        return False
    return True


def test_directory_gate(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    image = inside / "top.qcow2"
    for path in (inside / "base", inside / "sub" / "base", outside / "base"):
        path.write_bytes(b"x")
    (inside / "link").symlink_to(outside / "base")
    os.mkfifo(inside / "pipe")
    gate = DirectoryGate()
    assert admits(gate, str(inside / "base"), image)
    assert admits(gate, str(inside / "sub" / "base"), image)
    assert not admits(gate, str(outside / "base"), image)
    assert not admits(gate, str(inside / ".." / "out" / "base"), image)
    assert not admits(gate, str(inside / "link"), image)
    assert not admits(gate, str(inside / "pipe"), image)
    assert not admits(gate, "nbd:localhost:10809", image)
    assert not admits(gate, "json:{}", image)
    assert admits(DirectoryGate(str(outside)), str(outside / "base"), image)


def test_open_and_closed_gates() -> None:
    OpenGate().admit("/etc/passwd", named_by="x", role="backing file")
    with pytest.raises(UnsafeReference, match=r"x: names 'y' as its data file"):
        ClosedGate().admit("y", named_by="x", role="data file")


@pytest.mark.parametrize(
    ("reference", "base", "result"),
    [
        ("base.img", "top.qcow2", "base.img"),
        ("base.img", "/a/b/top.qcow2", "/a/b/base.img"),
        ("sub/base.img", "b/top.qcow2", "b/sub/base.img"),
        ("/x/base.img", "/a/top.qcow2", "/x/base.img"),
        ("nbd://h/e", "/a/top.qcow2", "nbd://h/e"),
        ("base.img", "file:/a/top.qcow2", "/a/base.img"),
        ("base.img", "http://h/d/top.qcow2", "http://h/d/base.img"),
        ("", "/a/b", ""),
    ],
)
def test_resolve(reference: str, base: str, result: str) -> None:
    assert resolve(reference, base) == result


def test_prefix() -> None:
    assert has_prefix("nbd:x") and has_prefix("json:{}") and has_prefix("fat:rw:/d")
    assert not has_prefix("/a:b") and not has_prefix("./a:b") and not has_prefix("ab") and not has_prefix(":x")
