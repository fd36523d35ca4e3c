"""copy-on-read, compress and preallocate: what they leave in an image."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.core.status import status
from diskwright.errors import GraphError, ImageError, OptionError
from diskwright.units import KiB, MiB
from tests.filters.opening import memory, opened
from tests.peers.qemu_img import qemu_img

UNIT = 64 * KiB


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """base has 1 MiB of 7, mid some 8 at 512 KiB and zeros at 768 KiB, top nothing."""
    paths = [tmp_path / name for name in ("base", "mid", "top")]
    for i, path in enumerate(paths):
        below = ("-b", str(paths[i - 1]), "-F", "qcow2") if i else ()
        qemu_img("create", "-q", "-f", "qcow2", *below, str(path), "1M")
    commands = {"base": ["write -P 7 0 1M"], "mid": ["write -P 8 512k 64k", "write -z 768k 64k"]}
    for path in paths[:2]:
        words = [word for command in commands[path.name] for word in ("-c", command)]
        subprocess.run(["qemu-io", *words, str(path)], check=True, capture_output=True)
    return paths


CONTENT = b"\7" * (512 * KiB) + b"\10" * UNIT + b"\7" * (192 * KiB) + bytes(UNIT) + b"\7" * (192 * KiB)


def copying(chain: list[Path], bottom: str | None = None) -> tuple[Graph, FilterNode]:
    options: dict[str, object] = {"driver": "copy-on-read", "file": {"driver": "qcow2", "file.filename": str(chain[2])}}
    if bottom is not None:
        options["bottom"] = bottom
        names = {"driver": "qcow2", "file.filename": str(chain[1]), "node-name": "mid"}
        options["file"] = {"driver": "qcow2", "file.filename": str(chain[2]), "backing": names, "node-name": "top"}
    return opened(options)


def own(node: FilterNode) -> list[int]:
    """The clusters the upper image has itself."""
    return sorted(
        at // UNIT for run in status(node.child, 0, MiB) if run.depth == 0 for at in range(run.offset, run.end, UNIT)
    )


def test_what_is_read_is_kept(chain: list[Path]) -> None:
    graph, node = copying(chain)
    assert node.pread(100, 10) == b"\7" * 10
    assert own(node) == [0]
    assert node.pread(4 * UNIT - 1, 2) == b"\7" * 2
    assert own(node) == [0, 3, 4]
    assert node.pread(768 * KiB, 512) == bytes(512), "zeros are kept as zeros"
    assert own(node) == [0, 3, 4, 12]
    assert [run.zero for run in status(node.child, 12 * UNIT, UNIT)] == [True]
    assert node.pread(0, MiB) == CONTENT and own(node) == list(range(16))
    graph.close()
    for path in chain[:2]:
        path.write_bytes(b"")  # nothing needs them any more
    qemu_img("rebase", "-u", "-b", "", str(chain[2]))
    qemu_img("check", "-q", str(chain[2]))
    graph = Graph(OpenGate())
    assert graph.open(str(chain[2])).pread(0, MiB) == CONTENT
    graph.close()


def test_as_qemu_does_it(chain: list[Path], tmp_path: Path) -> None:
    """The same reads through both programs leave the same map."""
    maps = []
    for program in ("ours", "theirs"):
        top = tmp_path / f"top-{program}"
        qemu_img("create", "-q", "-f", "qcow2", "-b", str(chain[1]), "-F", "qcow2", str(top), "1M")
        if program == "ours":
            graph, node = copying([*chain[:2], top])
            for offset in (0, 600 * KiB, 770 * KiB):
                node.pread(offset, 4 * KiB)
            graph.close()
        else:
            words = ["-c", "read 0 4k", "-c", "read 600k 4k", "-c", "read 770k 4k"]
            subprocess.run(["qemu-io", "-C", *words, str(top)], check=True, capture_output=True)
        found = qemu_img("map", "--output=json", str(top)).stdout
        maps.append([line.partition(', "offset"')[0] for line in found.splitlines()])
    assert maps[0] == maps[1]


def test_only_down_to_the_bottom(chain: list[Path]) -> None:
    graph, node = copying(chain, bottom="mid")
    assert node.pread(0, MiB) == CONTENT
    assert own(node) == [8, 12], "what only base has is not copied"
    graph.close()


def test_a_bottom_that_is_not_there(chain: list[Path]) -> None:
    with pytest.raises(GraphError, match="Bottom node 'nowhere' not found"):
        copying(chain, bottom="nowhere")


def test_a_read_only_image(chain: list[Path]) -> None:
    graph = Graph(OpenGate())
    with pytest.raises(ImageError, match="Block node is read-only"):
        graph.open({"driver": "copy-on-read", "file.driver": "qcow2", "file.file.filename": str(chain[2])})
    graph.close()


def test_a_copy_makes_nothing_dirty_and_a_write_does(chain: list[Path]) -> None:
    graph, node = copying(chain)
    bitmap = DirtyBitmap(MiB, UNIT)
    node.child.add_bitmap(bitmap)
    node.pread(0, 1)
    assert bitmap.count == 0
    node.pwrite(0, b"x")
    assert bitmap.count > 0
    graph.close()


def test_a_read_that_must_not_wait_copies_nothing(chain: list[Path]) -> None:
    graph, node = copying(chain)
    with pytest.raises(BlockingIOError):
        node.readv([(0, memoryview(bytearray(512)))], nowait=True)
    assert own(node) == [] and node.place(0, 512) is None
    graph.close()


def test_writes_are_not_undone_by_copies(chain: list[Path]) -> None:
    graph, node = copying(chain)

    def write() -> None:
        for at in range(0, MiB, 4 * KiB):
            node.pwrite(at, b"w" * 512)

    def read() -> None:
        for at in range(0, MiB, 4 * KiB):
            node.pread(at, 512)

    threads = [threading.Thread(target=each) for each in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = node.pread(0, MiB)
    for at in range(0, MiB, 4 * KiB):
        assert found[at : at + 512] == b"w" * 512 and found[at + 512 : at + 1024] == CONTENT[at + 512 : at + 1024]
    graph.close()
    qemu_img("check", "-q", str(chain[2]))


def test_it_is_taken_out_under_load(chain: list[Path]) -> None:
    graph, node = copying(chain)
    disk = graph.disk(node)
    graph.release(node)
    stop = threading.Event()
    wrong: list[int] = []

    def load() -> None:
        at = 0
        while not stop.is_set():
            at = (at + 12345) % (MiB - 512)
            if disk.pread(at, 512) != CONTENT[at : at + 512]:
                wrong.append(at)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    child = node.child
    graph.remove_filter(node)
    stop.set()
    for thread in threads:
        thread.join()
    assert disk.node is child and not wrong
    disk.close()
    graph.close()


# -- compress --------------------------------------------------------------------------------------


def test_everything_is_written_compressed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "1000k")
    graph, node = opened({"driver": "compress", "file": {"driver": "qcow2", "file.filename": str(path)}})
    content = bytearray(1000 * KiB)
    for offset, length, byte in (
        (1000, 100_000, 1),
        (65536, 65536, 2),
        (0, 10, 3),
        (980 * KiB, 20 * KiB, 4),
        (0, 1, 5),
    ):
        content[offset : offset + length] = bytes([byte]) * length
        node.pwrite(offset, bytes([byte]) * length)
    node.write_zeros(70_000, 1000)
    content[70_000:71_000] = bytes(1000)
    assert node.pread(0, len(content)) == content
    assert all(run.compressed for run in status(node.child, 0, len(content)) if run.data)
    graph.close()
    assert "100.00% compressed" in qemu_img("check", str(path)).stdout
    graph = Graph(OpenGate())
    assert graph.open(str(path)).pread(0, len(content)) == content
    graph.close()


def test_threads_in_one_cluster(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "1M")
    graph, node = opened({"driver": "compress", "file": {"driver": "qcow2", "file.filename": str(path)}})
    threads = [
        threading.Thread(target=lambda i=i: [node.pwrite(n * 4096 + i * 512, bytes([i + 1]) * 512) for n in range(20)])  # type: ignore[misc]
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.pread(0, 20 * 4096) == b"".join(bytes([i + 1]) * 512 for i in range(8)) * 20
    graph.close()
    qemu_img("check", "-q", str(path))


def test_what_cannot_compress() -> None:
    with pytest.raises(OptionError, match="not supported for underlying format: memory"):
        opened({"driver": "compress", "file": memory(MiB)})


# -- preallocate -----------------------------------------------------------------------------------


def reserving(path: Path, **options: object) -> tuple[Graph, FilterNode]:
    below = {"driver": "file", "filename": str(path)}
    return opened({"driver": "preallocate", "file": below, **{k.replace("_", "-"): v for k, v in options.items()}})


def test_the_file_grows_in_steps_and_ends_where_its_data_does(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    graph, node = reserving(path, prealloc_size=MiB, prealloc_align=256 * KiB)
    node.pwrite(0, b"x" * 1000)
    assert node.size == 1000 and path.stat().st_size == MiB + 256 * KiB
    assert path.stat().st_blocks * 512 >= MiB, "the space is taken"
    for at in range(1000, 500_000, 1000):
        node.pwrite(at, b"x" * 1000)
    assert path.stat().st_size == MiB + 256 * KiB, "all of that fitted"
    assert node.pread(500_000, 10) == bytes(10), "what is reserved reads as what lies beyond an end does"
    node.write_zeros(500_000, 100)
    assert node.size == 500_100
    graph.close()
    assert path.read_bytes() == b"x" * 500_000 + bytes(100)


def test_a_change_of_size_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    graph, node = reserving(path, prealloc_size=MiB)
    node.pwrite(0, b"x" * 1000)
    node.resize(500)
    assert (node.size, path.stat().st_size) == (500, 500)
    node.resize(3000)
    assert node.pread(0, 3000) == b"x" * 500 + bytes(2500)
    graph.close()
    assert path.stat().st_size == 3000


def test_an_image_over_it_is_sound_and_as_long_as_it_must_be(tmp_path: Path) -> None:
    plain, reserved = tmp_path / "plain", tmp_path / "reserved"
    for path in (plain, reserved):
        qemu_img("create", "-q", "-f", "qcow2", str(path), "8M")
        file: dict[str, object] = {"driver": "file", "filename": str(path)}
        if path == reserved:
            file = {"driver": "preallocate", "file": file, "prealloc-size": 4 * MiB}
        graph, node = opened({"driver": "qcow2", "file": file})
        for at in range(0, 4 * MiB, 100_000):
            node.pwrite(at, b"data" * 1000)
        node.flush()
        graph.close()
        qemu_img("check", "-q", str(path))
    assert plain.stat().st_size == reserved.stat().st_size
    qemu_img("compare", str(plain), str(reserved))


def test_where_space_cannot_be_taken_it_is_in_nobodys_way() -> None:
    rules = [{"event": "none", "iotype": "write-zeroes"}]
    graph, node = opened(
        {"driver": "preallocate", "file": {"driver": "blkdebug", "image": memory(0), "inject-error": rules}}
    )
    node.pwrite(0, b"x" * 1000)
    assert node.size == 1000 and node.pread(0, 1000) == b"x" * 1000
    graph.close()


@pytest.mark.parametrize(
    ("options", "what"), [({"prealloc-align": 100}, "not aligned to 512"), ({"prealloc-align": 0}, "512")]
)
def test_options_that_cannot_be(options: dict[str, object], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        opened({"driver": "preallocate", "file": memory(MiB), **options})
