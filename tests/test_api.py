"""The library as programs use it, the README's own example first."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import OptionError
from tests.peers import qemu_img

SIZE = 8 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(3).randbytes(SIZE // 2) + bytes(SIZE // 2))
    return path


def test_the_readme_example_does_what_it_says(raw: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    expected = raw.read_bytes()
    qemu_img.convert(str(raw), str(tmp_path / "disk.qcow2"), "qcow2", source_fmt="raw")
    raw.unlink()
    scope: dict[str, object] = {}
    old = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(code[1], scope)
    finally:
        os.chdir(old)
    assert scope["boot_sector"] == expected[:512]
    assert raw.read_bytes() == expected
    qemu_img.qemu_img("check", str(tmp_path / "copy.qcow2"))
    assert diskwright.compare(raw, tmp_path / "copy.qcow2") is None


def test_importing_costs_nothing() -> None:
    script = "import sys, diskwright; print(*sorted(m for m in sys.modules if m.startswith(('diskwright', 'numpy'))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["diskwright", "diskwright.version"]


def test_every_public_name_is_there() -> None:
    for name in diskwright.__all__:
        assert getattr(diskwright, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        diskwright.nonsense  # noqa: B018


def test_create_open_write_read(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    diskwright.create(path, "qcow2", "64M", cluster_size=4096)
    with diskwright.open(path, writable=True) as disk:
        disk.seek(1000)
        assert disk.write(b"hello") == 5
        disk.pwrite(5 << 20, b"x" * 100_000)
    with diskwright.open(path) as disk:
        assert disk.pread(1000, 5) == b"hello" and disk.size == 64 << 20
        rows = disk.extents()
        assert sum(row.length for row in rows) == disk.size
        assert {row.data for row in rows if row.offset <= 5 << 20 < row.end} == {True}
        with pytest.raises(OSError, match="read-only"):
            disk.pwrite(0, b"x")
    assert diskwright.check(path).corruptions == 0
    facts = diskwright.info(path)
    assert (facts["format"], facts["virtual-size"], facts["cluster-size"]) == ("qcow2", 64 << 20, 4096)


def test_convert_reports_progress_that_ends_at_all(raw: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    copy = tmp_path / "copy.qcow2"
    diskwright.convert(raw, copy, source_format="raw", progress=lambda done, whole: seen.append((done, whole)))
    assert seen[-1] == (SIZE, SIZE) and seen == sorted(seen)
    assert diskwright.compare(raw, tmp_path / "copy.qcow2") is None


def test_compare_names_the_first_difference(raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    data = bytearray(raw.read_bytes())
    data[3_000_001] ^= 1
    data[4_000_000] ^= 1
    other.write_bytes(data)
    assert diskwright.compare(raw, other, left_format="raw", right_format="raw") == 3_000_001
    longer = tmp_path / "longer.raw"
    longer.write_bytes(raw.read_bytes() + bytes(100_000) + b"x")
    assert diskwright.compare(raw, longer, left_format="raw", right_format="raw") == SIZE + 100_000


def test_a_backing_file_elsewhere_needs_a_gate(raw: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    top = inside / "top.qcow2"
    qemu_img.create(str(top), None, backing=str(raw), backing_fmt="raw")
    with pytest.raises(diskwright.UnsafeReference, match="backing file"):
        diskwright.open(top)
    with diskwright.open(top, gate=diskwright.OpenGate()) as disk:
        assert disk.pread(0, 100) == raw.read_bytes()[:100]


def test_leaving_a_mirror_abandons_it_and_the_disk_goes_on(raw: Path, tmp_path: Path) -> None:
    with diskwright.open(raw, format="raw", writable=True) as disk:
        with diskwright.mirror(disk, tmp_path / "copy.raw", speed=100_000):
            disk.pwrite(0, b"still here")
        assert disk.pread(0, 10) == b"still here"
        assert len(disk.graph.nodes()) == 2  # the source's own


def test_a_mirror_with_pivot_under_load(raw: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    last: dict[int, bytes] = {}
    with diskwright.open(raw, format="raw", writable=True) as disk:

        def write() -> None:
            rng = random.Random(1)
            while not stop.is_set():
                slot = rng.randrange(SIZE // 4096)
                last[slot] = rng.randbytes(4096)
                disk.pwrite(slot * 4096, last[slot])

        writer = threading.Thread(target=write)
        writer.start()
        with diskwright.mirror(disk, tmp_path / "copy.qcow2", format="qcow2") as job:
            assert job.wait_ready(60)
            job.finish(pivot=True)
            assert disk.node is job.target
            threading.Event().wait(0.1)
            stop.set()
            writer.join()
            for slot, data in last.items():
                assert disk.pread(slot * 4096, 4096) == data
    qemu_img.qemu_img("check", str(tmp_path / "copy.qcow2"))
    with diskwright.open(tmp_path / "copy.qcow2") as copy:
        for slot, data in last.items():
            assert copy.pread(slot * 4096, 4096) == data


def test_serving_for_a_while(raw: Path, sock_dir: str) -> None:
    with diskwright.open(raw, format="raw", writable=True) as disk:
        server = diskwright.serve(disk, f"{sock_dir}/s")
        done = qemu_img.qemu_img("info", "--output=json", f"nbd+unix:///?socket={sock_dir}/s")
        server.close()
    assert f'"virtual-size": {SIZE}' in done.stdout


def test_a_source_is_never_overwritten_by_its_copy(raw: Path, tmp_path: Path) -> None:
    expected = raw.read_bytes()
    link = tmp_path / "link.raw"
    link.symlink_to(raw)
    for name in (raw, link):
        with pytest.raises(diskwright.DiskwrightError):
            diskwright.convert(raw, name, source_format="raw")
        done = subprocess.run(
            [sys.executable, "-m", "diskwright", "convert", "-U", "-f", "raw", "-O", "qcow2", str(raw), str(name)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and "would destroy it" in done.stderr
    assert raw.read_bytes() == expected


def test_backing_chains(tmp_path: Path) -> None:
    base, other, top = (tmp_path / name for name in ("base.raw", "other.raw", "top.qcow2"))
    rng = random.Random(5)
    base.write_bytes(rng.randbytes(1 << 20))
    other.write_bytes(rng.randbytes(1 << 19))
    diskwright.create(top, "qcow2", backing_file="base.raw", backing_fmt="raw")
    with diskwright.open(top, writable=True) as disk:
        disk.pwrite(1000, b"mine")
        expected = disk.pread(0, disk.size)
    told: list[tuple[int, int]] = []
    diskwright.rebase(top, "other.raw", "raw", progress=lambda done, all: told.append((done, all)))
    assert told[-1] == (1 << 20, 1 << 20)
    with diskwright.open(top) as disk:
        assert disk.pread(0, disk.size) == expected
    assert diskwright.info(top)["backing-filename"] == "other.raw"
    diskwright.commit(top)
    assert other.read_bytes() == expected
    with diskwright.open(top) as disk:
        assert disk.pread(0, disk.size) == expected
    diskwright.rebase(top, None)
    with pytest.raises(OptionError, match="no backing file"):
        diskwright.commit(top)
    with pytest.raises(OptionError, match="format"):
        diskwright.rebase(top, "base.raw")
    assert diskwright.compact(top).complete
    with diskwright.open(top) as disk:
        assert disk.pread(0, disk.size) == expected
