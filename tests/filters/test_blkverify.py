"""blkverify: the first difference between an image and its raw copy is the end."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.errors import DiskwrightError, FatalError, OptionError
from tests.cli.run import diskwright
from tests.filters.opening import memory, opened
from tests.peers.qemu_img import qemu_img

SIZE = 1 << 20


def pair() -> tuple[Graph, FilterNode]:
    """Over two memories of one size."""
    return opened({"driver": "blkverify", "raw": memory(SIZE), "test": memory(SIZE)})


def test_both_get_what_is_written() -> None:
    graph, node = pair()
    node.pwrite(1000, b"data" * 100)
    node.write_zeros(1100, 100)
    node.flush()
    wanted = b"data" * 25 + bytes(100) + b"data" * 50
    for child in node.children().values():
        assert child.pread(1000, 400) == wanted
    assert node.pread(1000, 400) == wanted
    graph.close()


def test_the_first_difference_is_named_and_is_the_end() -> None:
    graph, node = pair()
    node.pwrite(0, b"x" * 65536)
    node.children()["test"].pwrite(5003, b"y")
    node.children()["test"].pwrite(6000, b"y")
    assert node.pread(0, 5003) == b"x" * 5003
    with pytest.raises(FatalError) as caught:
        node.pread(512, 60000)
    assert str(caught.value) == "blkverify: read offset=512 bytes=60000 contents mismatch at offset 5003"
    for request in (lambda: node.pread(0, 1), lambda: node.pwrite(0, b"z"), node.flush):
        with pytest.raises(FatalError, match="5003"):
            request()
    assert node.child.pread(0, 1) == b"x", "nothing more is written"
    graph.close()


def _failing(kind: str, number: int = 5) -> dict[str, object]:
    rule = {"event": "none", "iotype": kind, "errno": number}
    return {"driver": "blkdebug", "image": memory(SIZE), "inject-error": [rule]}


@pytest.mark.parametrize("side", ["raw", "test"])
@pytest.mark.parametrize("kind", ["read", "write", "flush"])
def test_what_fails_on_one_side_only_is_a_difference(kind: str, side: str) -> None:
    graph, node = opened({"driver": "blkverify", "raw": memory(SIZE), "test": memory(SIZE), side: _failing(kind)})
    requests = {
        "read": lambda: node.pread(512, 512),
        "write": lambda: node.pwrite(512, bytes(512)),
        "flush": node.flush,
    }
    with pytest.raises(FatalError, match=f"blkverify: {kind} offset=.*return value mismatch") as caught:
        requests[kind]()
    assert str(caught.value).endswith("-5 != 0" if side == "test" else "0 != -5")
    with pytest.raises(DiskwrightError):
        node.flush()
    graph.close()


def test_what_fails_on_both_sides_alike_is_a_plain_error() -> None:
    graph, node = opened({"driver": "blkverify", "raw": _failing("read"), "test": _failing("read")})
    with pytest.raises(OSError, match="Input/output error"):
        node.pread(0, 512)
    node.pwrite(0, b"x")
    graph.close()


def test_discards_and_sizes_are_left_alone() -> None:
    graph, node = pair()
    node.pwrite(0, b"x" * 4096)
    node.discard(0, 4096)
    assert node.pread(0, 4096) == b"x" * 4096
    with pytest.raises(OSError):
        node.resize(SIZE * 2)
    graph.close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(bytes(SIZE))
    qemu_img("create", "-q", "-f", "qcow2", str(image), str(SIZE))
    return raw, image


def test_by_name_the_copy_is_bytes_and_the_image_has_a_format(files: tuple[Path, Path]) -> None:
    graph = Graph(OpenGate())
    node = graph.open(f"blkverify:{files[0]}:{files[1]}", driver="raw", writable=True)
    verify = node.file
    assert verify is not None and [child.driver_name for child in verify.children().values()] == ["file", "qcow2"]
    graph.close()


def test_programs_end_like_qemus(files: tuple[Path, Path]) -> None:
    """One line, and nothing after it."""
    cwd = files[0].parent
    name = f"blkverify:{files[0]}:{files[1]}"
    commands = ("-c", "write -P 3 0 64k", "-c", "read -P 3 0 64k")
    assert diskwright("io", "-f", "raw", *commands, name, cwd=cwd).code == 0
    with files[0].open("r+b") as file:
        file.seek(4096)
        file.write(b"\4")
    told = []
    for command in ("read 0 64k", "read 4k 512"):
        run = diskwright("io", "-f", "raw", "-c", "read 0 512", "-c", command, "-c", "read 0 512", name, cwd=cwd)
        peer = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read 0 512", "-c", command, "-c", "read 0 512", name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (run.code, run.err) == (peer.returncode, peer.stderr)
        assert run.out.count("512/512") == 1
        told.append(run.err)
    assert told[0] == "blkverify: read offset=0 bytes=65536 contents mismatch at offset 4096\n"
    run = diskwright("compare", "-f", "raw", name, str(files[0]), cwd=cwd)
    assert run.code != 0 and "contents mismatch at offset 4096" in run.err


def test_a_name_without_an_image() -> None:
    with pytest.raises(OptionError, match="requires raw copy"):
        Graph(OpenGate()).open("blkverify:raw")
    with pytest.raises(OptionError, match='must be specified for "test"'):
        opened({"driver": "blkverify", "raw": memory(SIZE)})
