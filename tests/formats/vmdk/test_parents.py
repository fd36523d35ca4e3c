"""vmdk: parents, known by their CIDs."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.core.create import create_image
from diskwright.core.gate import DirectoryGate
from diskwright.core.graph import Graph
from diskwright.errors import CorruptImage, ImageError, UnsafeReference
from tests.formats.qcow2.support import qemu
from tests.formats.vmdk.support import descriptor

SIZE = 6 << 20


def _make(path: Path, *, by_qemu: bool, options: str = "") -> None:
    """A parent with something in it, and a child of it that is empty."""
    base = path.parent / "base.vmdk"
    qemu("qemu-img", "create", "-q", "-f", "vmdk", str(base), str(SIZE))
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 7 100k 3M", str(base))
    if by_qemu:
        words = ["-o", options] if options else []
        qemu("qemu-img", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", *words, str(path))
    else:
        given = dict(word.split("=") for word in options.split(",")) if options else {}
        create_image(str(path), "vmdk", {"backing_file": "base.vmdk", "backing_fmt": "vmdk", **given})


@pytest.mark.parametrize("by_qemu", [False, True], ids=["made here", "made by QEMU"])
@pytest.mark.parametrize("options", ["", "zeroed_grain=on", "subformat=twoGbMaxExtentSparse"])
def test_a_child_shows_what_its_parent_has(by_qemu: bool, options: str, tmp_path: Path) -> None:
    path, chance = tmp_path / "child.vmdk", random.Random(options)
    _make(path, by_qemu=by_qemu, options=options)
    before = (tmp_path / "base.vmdk").read_bytes()
    model = bytearray(SIZE)
    model[100 << 10 : (100 << 10) + (3 << 20)] = b"\7" * (3 << 20)
    with diskwright.open(str(path), format="vmdk", writable=True) as disk:
        assert disk.pread(0, SIZE) == model
        for _ in range(40):
            offset, length = chance.randrange(SIZE - 70000), chance.choice([1, 512, 4096, 65536, 70000])
            if chance.random() < 0.6:
                data = chance.randbytes(length)
                disk.pwrite(offset, data)
                model[offset : offset + length] = data
            else:
                disk.zero(offset, length)
                model[offset : offset + length] = bytes(length)
        assert disk.pread(0, SIZE) == model
    (tmp_path / "raw").write_bytes(model)
    qemu("qemu-img", "compare", "-f", "vmdk", "-F", "raw", str(path), str(tmp_path / "raw"))
    assert (tmp_path / "base.vmdk").read_bytes() == before


def test_a_parent_that_has_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "child.vmdk"
    _make(path, by_qemu=True)
    with diskwright.open(str(tmp_path / "base.vmdk"), writable=True) as disk:
        disk.pwrite(0, b"changed")
    with pytest.raises(ImageError, match="has changed since"):
        diskwright.open(str(path))
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "vmdk", "-c", "read 0 64k", str(path)], capture_output=True, text=True, check=False
    )
    assert "Invalid argument" in done.stdout + done.stderr
    assert main(["info", str(path)]) == 0
    assert "backing file: base.vmdk" in capsys.readouterr().out
    assert main(["rebase", "-u", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", str(path)]) == 0
    with diskwright.open(str(path)) as disk:
        assert disk.pread(0, 8) == b"changed\0"
    qemu("qemu-io", "-r", "-f", "vmdk", "-c", "read -P 7 1M 64k", str(path))


def test_after_a_commit_the_child_fits_again(tmp_path: Path) -> None:
    path = tmp_path / "child.vmdk"
    _make(path, by_qemu=False)
    with diskwright.open(str(path), writable=True) as disk:
        disk.pwrite(5 << 20, b"news" * 1000)
        disk.pwrite(100 << 10, b"more" * 1000)
    length = path.stat().st_size
    assert main(["commit", "-q", "-f", "vmdk", str(path)]) == 0
    assert path.stat().st_size < length
    for name in ("child.vmdk", "base.vmdk"):
        with diskwright.open(str(tmp_path / name)) as disk:
            assert (
                disk.pread(5 << 20, 4000) == b"news" * 1000
                and disk.pread(100 << 10, 4004) == b"more" * 1000 + b"\7" * 4
            )
    qemu("qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", str(path), str(tmp_path / "base.vmdk"))
    qemu("qemu-img", "check", "-f", "vmdk", str(path))


def test_rebase_to_nothing_and_back(tmp_path: Path) -> None:
    path = tmp_path / "child.vmdk"
    _make(path, by_qemu=True)
    assert main(["rebase", "-f", "vmdk", "-b", "", str(path)]) == 0
    assert b"parentCID=ffffffff" in path.read_bytes() and b"Hint" not in path.read_bytes()
    with diskwright.open(str(path)) as disk:
        assert disk.pread(1 << 20, 1000) == b"\7" * 1000
    assert main(["rebase", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", str(path)]) == 0
    qemu("qemu-img", "compare", "-f", "vmdk", "-F", "vmdk", str(path), str(tmp_path / "base.vmdk"))


def test_a_parent_without_a_name_or_a_cid(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(bytes(1024))
    path = descriptor(tmp_path / "a.vmdk", 'RW 2 FLAT "flat" 0')
    text = path.read_text()
    path.write_text(text.replace("parentCID=ffffffff", "parentCID=12345678"))
    with pytest.raises(CorruptImage, match="does not say which"):
        diskwright.open(str(path))
    path.write_text(text.replace("# Extent", 'parentFileNameHint="flat"\n# Extent'))
    with pytest.raises(CorruptImage, match="no parent"):
        diskwright.open(str(path))


def test_the_parents_name_goes_through_the_gate(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    qemu("qemu-img", "create", "-q", "-f", "vmdk", str(tmp_path / "base.vmdk"), "1M")
    path = tmp_path / "in" / "a.vmdk"
    qemu("qemu-img", "create", "-q", "-f", "vmdk", "-b", str(tmp_path / "base.vmdk"), "-F", "vmdk", str(path))
    with pytest.raises(UnsafeReference):
        Graph(DirectoryGate()).open(str(path))


def test_a_circle_of_parents_ends(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        qemu("qemu-img", "create", "-q", "-f", "vmdk", str(tmp_path / f"{name}.vmdk"), "1M")
        raw = bytearray((tmp_path / f"{name}.vmdk").read_bytes())
        at = raw.index(b"CID=")
        raw[at : at + 12] = b"CID=12345678"
        end = raw.index(b"\0", 512)
        text = bytes(raw[512:end]).replace(b"parentCID=ffffffff", b"parentCID=12345678")
        text = text.replace(b"# Extent", b'parentFileNameHint="%s.vmdk"\n# Extent' % other.encode())
        raw[512 : 512 + 20 * 512] = text.ljust(20 * 512, b"\0")
        (tmp_path / f"{name}.vmdk").write_bytes(raw)
    with pytest.raises(ImageError, match="comes back"):
        diskwright.open(str(tmp_path / "a.vmdk"))
