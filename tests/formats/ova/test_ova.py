"""ova, ovf: packages, written and read."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import subprocess
import tarfile
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.core.gate import DirectoryGate
from diskwright.core.graph import Graph
from diskwright.errors import CorruptImage, DiskwrightError, LimitExceeded, UnsafeReference, UnsupportedFeature
from tests.formats.qcow2.support import qemu
from tests.formats.reading import Reading
from tests.formats.vmdk.support import strict

SIZE = 8 << 20
OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"


def _content() -> bytes:
    chance, disk = random.Random(4), bytearray(SIZE)
    for _ in range(12):
        at = chance.randrange(SIZE - 200_000)
        disk[at : at + 150_000] = chance.randbytes(150_000) if chance.random() < 0.5 else b"some text." * 15_000
    return bytes(disk)


@pytest.fixture(scope="module")
def content() -> bytes:
    return _content()


@pytest.fixture
def raw(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    return path


def _members(path: Path) -> dict[str, bytes]:
    """By Python's own reader of archives."""
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member)
            assert member.isreg() and file is not None
            found[member.name] = file.read()
    return found


def _check_manifest(manifest: bytes, files: dict[str, bytes]) -> None:
    told = dict(re.findall(r"SHA256\((.*)\)= (\w+)\n", manifest.decode()))
    assert told == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _check_descriptor(text: bytes, disk_name: str, disk: bytes, size: int) -> None:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{OVF}Envelope"
    (file,) = root.iter(f"{OVF}File")
    assert file.attrib == {f"{OVF}href": disk_name, f"{OVF}id": "file1", f"{OVF}size": str(len(disk))}
    (entry,) = root.iter(f"{OVF}Disk")
    assert entry.get(f"{OVF}fileRef") == "file1" and entry.get(f"{OVF}capacity") == str(size)
    assert entry.get(f"{OVF}capacityAllocationUnits") == "byte"
    assert str(entry.get(f"{OVF}format")).endswith("#streamOptimized")
    hosts = [each.text for each in root.iter() if each.tag.endswith("HostResource")]
    assert hosts == [f"ovf:/disk/{entry.get(f'{OVF}diskId')}"]


@pytest.mark.parametrize("words", [(), ("-c", "--compression-level", "9"), ("-o", "adapter_type=ide,cpus=4,memory=3G")])
def test_an_archive_is_what_others_expect(words: tuple[str, ...], raw: Path, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "machine.ova"
    assert main(["convert", "-O", "ova", *words, str(raw), str(path)]) == 0
    files = _members(path)
    assert list(files) == ["machine.ovf", "machine-disk1.vmdk", "machine.mf"]
    manifest = files.pop("machine.mf")
    _check_manifest(manifest, files)
    disk = files["machine-disk1.vmdk"]
    _check_descriptor(files["machine.ovf"], "machine-disk1.vmdk", disk, SIZE)
    strict(disk)
    (tmp_path / "disk.vmdk").write_bytes(disk)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(raw), str(tmp_path / "disk.vmdk"))
    raw_archive = path.read_bytes()
    assert len(raw_archive) % 10240 == 0 and raw_archive[257:265] == b"ustar\x0000"
    with diskwright.open(str(path)) as image:
        assert image.pread(0, SIZE) == content
    listing = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True).stdout
    assert listing.split() == ["machine.ovf", "machine-disk1.vmdk", "machine.mf"]


def test_a_descriptor_with_files_beside_it(raw: Path, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    path = folder / "machine.ovf"
    assert main(["convert", "-O", "ovf", "-o", "name=A & <B>", str(raw), str(path)]) == 0
    files = {each.name: each.read_bytes() for each in folder.iterdir()}
    assert sorted(files) == ["machine-disk1.vmdk", "machine.mf", "machine.ovf"]
    _check_manifest(files.pop("machine.mf"), files)
    _check_descriptor(files["machine.ovf"], "machine-disk1.vmdk", files["machine-disk1.vmdk"], SIZE)
    assert b"A &amp; &lt;B&gt;" in files["machine.ovf"]
    with diskwright.open(str(path)) as image:
        assert image.pread(0, SIZE) == content
    assert main(["convert", "-O", "qcow2", str(path), str(tmp_path / "back.qcow2")]) == 0
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(tmp_path / "back.qcow2"))


def test_there_and_back(raw: Path, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, back = tmp_path / "machine.ova", tmp_path / "back.raw"
    diskwright.convert(str(raw), str(path), source_format="raw")
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "file format: ova" in out and "id: vmdisk1" in out
    assert main(["check", str(path)]) == 0
    assert main(["convert", "-O", "raw", str(path), str(back)]) == 0
    assert back.read_bytes() == content
    assert main(["compare", "-F", "raw", str(path), str(raw)]) == 0


def test_the_same_source_gives_the_same_disk(raw: Path, tmp_path: Path) -> None:
    disks = []
    for name in ("a", "b"):
        assert main(["convert", "-O", "ova", str(raw), str(tmp_path / f"{name}.ova")]) == 0
        disks.append(_members(tmp_path / f"{name}.ova")[f"{name}-disk1.vmdk"])
    assert strict(disks[0]) == strict(disks[1]) and len(disks[0]) == len(disks[1])


def test_an_incomplete_archive_is_none(raw: Path, tmp_path: Path) -> None:
    from diskwright.engine.package import Package

    path, graph = tmp_path / "machine.ova", Graph()
    Package(graph, str(path), "ova", {}, SIZE)
    graph.close()
    assert not any(path.read_bytes()[:512])
    with pytest.raises(DiskwrightError):
        diskwright.open(str(path), format="ova")


def test_the_source_is_not_overwritten(raw: Path, content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "machine-disk1.vmdk"
    source.write_bytes(content)
    assert main(["convert", "-f", "raw", "-O", "ovf", str(source), str(tmp_path / "machine.ovf")]) == 1
    assert source.read_bytes() == content


@pytest.mark.parametrize("words", ["cpus=0", "memory=1k", "name=a\nb", "adapter_type=foo", "backing_file=x"])
def test_options_that_make_no_sense(words: str, raw: Path, tmp_path: Path) -> None:
    assert main(["convert", "-O", "ova", "-o", words, str(raw), str(tmp_path / "machine.ova")]) == 1
    assert not (tmp_path / "machine.ova").exists()


def test_an_archive_larger_than_old_numbers_can_say() -> None:
    from diskwright.formats.ova.archive import header

    for size in (8**11 - 1, 8**11, 1 << 50):
        assert tarfile.TarInfo.frombuf(header("disk.vmdk", size), "utf-8", "strict").size == size


# -- archives of others ----------------------------------------------------------------------------

ENVELOPE = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
<References>{files}</References><DiskSection><Info/>{disks}</DiskSection></Envelope>"""
FILE = '<File ovf:id="{id}" ovf:href="{href}" {more}/>'
DISK = (
    '<Disk ovf:diskId="{id}" ovf:fileRef="{file}" ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte * 2^20"/>'
)


def _envelope(*disks: tuple[str, str], more: str = "") -> str:
    return ENVELOPE.format(
        files="".join(FILE.format(id=f"f{name}", href=href, more=more) for name, href in disks),
        disks="".join(DISK.format(id=name, file=f"f{name}", capacity=SIZE >> 20) for name, href in disks),
    )


def _archive(path: Path, *files: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def vmdk(raw: Path, tmp_path: Path) -> bytes:
    path = tmp_path / "made.vmdk"
    qemu("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(path))
    return path.read_bytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_other_programs(format: int, vmdk: bytes, content: bytes, tmp_path: Path) -> None:
    name = (
        "a rather long name " * 4 + ("of a disk" if format == tarfile.USTAR_FORMAT else "ünd so weiter " * 6) + ".vmdk"
    )
    path = _archive(
        tmp_path / "a.ova", ("a.ovf", _envelope(("one", name)).encode()), ("a.mf", b""), (name, vmdk), format=format
    )
    with diskwright.open(str(path)) as image:
        assert image.pread(0, SIZE) == content


def test_a_disk_of_several(vmdk: bytes, content: bytes, tmp_path: Path) -> None:
    other = tmp_path / "other.vmdk"
    qemu("qemu-img", "create", "-q", "-f", "vmdk", str(other), "1M")
    text = _envelope(("one", "1.vmdk"), ("two", "2%20.vmdk")).encode()
    path = _archive(tmp_path / "a.ova", ("a.ovf", text), ("1.vmdk", other.read_bytes()), ("2 .vmdk", vmdk))
    for which, size in (("0", 1 << 20), ("one", 1 << 20), ("1", SIZE), ("two", SIZE)):
        graph = Graph()
        assert graph.open({"driver": "ova", "disk": which, "file.filename": str(path)}).size == size
        graph.close()
    for which in ("2", "three", "-1"):
        with pytest.raises(DiskwrightError, match="has no disk"):
            Graph().open({"driver": "ova", "disk": which, "file.filename": str(path)})


def test_a_wrong_digest_is_found(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.ova"
    assert main(["convert", "-O", "ova", str(raw), str(path)]) == 0
    files = _members(path)
    broken = bytearray(files["machine-disk1.vmdk"])
    broken[600] ^= 1
    files["machine-disk1.vmdk"] = bytes(broken)
    _archive(path, *files.items(), ("machine.txt", b""))
    assert main(["check", str(path)]) == 2
    assert "'machine-disk1.vmdk' has another SHA256 digest" in capsys.readouterr().err


# -- hostile ones ----------------------------------------------------------------------------------

BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "]><Envelope>&i;</Envelope>"
)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (BOMB, UnsupportedFeature),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>', UnsupportedFeature),
        ("<Envelope>", CorruptImage),
        ("", CorruptImage),
        (_envelope(), DiskwrightError),
        (_envelope(("one", "missing.vmdk")), CorruptImage),
        (_envelope(("one", "../../etc/passwd")), CorruptImage),
        (_envelope(("one", "d.vmdk"), more='ovf:compression="gzip"'), UnsupportedFeature),
        (_envelope(("one", "d.vmdk"), more='ovf:chunkSize="10"'), UnsupportedFeature),
        (_envelope(("one", "text.vmdk")), UnsupportedFeature),
        (_envelope(*((f"d{i}", "d.vmdk") for i in range(2000))), LimitExceeded),
        ("<Envelope>" + "<a>" * 100_000, CorruptImage),
    ],
)
def test_a_hostile_descriptor(text: str, error: type[Exception], vmdk: bytes, tmp_path: Path) -> None:
    """A VMDK descriptor in an archive would name files outside of it: that is no disk in one file."""
    path = _archive(
        tmp_path / "a.ova",
        ("a.ovf", text.encode()),
        ("d.vmdk", vmdk),
        ("text.vmdk", b'# Disk DescriptorFile\nRW 1 FLAT "x" 0'),
    )
    with pytest.raises(error):
        diskwright.open(str(path))


def test_a_disk_with_a_parent_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.vmdk"
    qemu("qemu-img", "create", "-q", "-f", "vmdk", str(base), str(SIZE))
    qemu("qemu-img", "create", "-q", "-f", "vmdk", "-b", str(base), "-F", "vmdk", str(tmp_path / "child.vmdk"))
    path = _archive(
        tmp_path / "a.ova",
        ("a.ovf", _envelope(("one", "c.vmdk")).encode()),
        ("c.vmdk", (tmp_path / "child.vmdk").read_bytes()),
    )
    with pytest.raises(UnsupportedFeature, match="parent"):
        diskwright.open(str(path))


def test_archives_that_lie(vmdk: bytes, tmp_path: Path) -> None:
    path = _archive(
        tmp_path / "a.ova",
        ("a.ovf", _envelope(("one", "d.vmdk")).encode()),
        ("d.vmdk", vmdk),
        format=tarfile.USTAR_FORMAT,
    )
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(CorruptImage, match="behind the end"):
        diskwright.open(str(path))
    broken = bytearray(sound)
    broken[100] ^= 1
    path.write_bytes(broken)
    with pytest.raises(CorruptImage, match="checksum"):
        diskwright.open(str(path))
    _archive(path, ("a.ovf", b"<x/>"), *((f"{i}", b"") for i in range(1100)))
    with pytest.raises(LimitExceeded):
        diskwright.open(str(path))
    _archive(path, ("a.ovf", b" " * (5 << 20)))
    with pytest.raises(CorruptImage, match="too long"):
        diskwright.open(str(path))


def test_the_files_of_a_descriptor_go_through_the_gate(vmdk: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.vmdk").write_bytes(vmdk)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.ovf"
    for href in ("../d.vmdk", str(tmp_path / "d.vmdk"), "file:../d.vmdk", "http://localhost/d.vmdk", "..%2fd.vmdk"):
        path.write_text(_envelope(("one", href)))
        with pytest.raises(UnsafeReference):
            Graph(DirectoryGate()).open(str(path))


def test_packages_are_not_written_to(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "machine.ova"
    assert main(["convert", "-O", "ova", str(raw), str(path)]) == 0
    before = path.read_bytes()
    assert main(["io", "-c", "write 0 512", str(path)]) == 1
    assert main(["resize", str(path), "1G"]) == 1
    assert main(["convert", "-n", "-O", "ova", str(raw), str(path)]) == 1
    assert path.read_bytes() == before


class TestReading(Reading):
    format_name = "ova"
    qemu_reads = False
    structures: ClassVar[tuple[tuple[int, int], ...]] = ((0, 512), (512, 2600), (3584, 512), (4096, 1100))

    def disk(self) -> bytes:
        return _content()

    def image(self) -> bytes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "raw")
            Path(source).write_bytes(self.disk())
            diskwright.convert(source, os.path.join(folder, "a.ova"), source_format="raw")
            return Path(folder, "a.ova").read_bytes()


def test_long_texts_take_no_time(vmdk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ova"
    _archive(path, ("a.ovf", _envelope(("one", "d.vmdk")).encode()), ("d.vmdk", vmdk), ("a.mf", b"SHA256(" * 140_000))
    assert main(["check", "-q", str(path)]) == 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.ovf")
        member.pax_headers = {f"k{i}": "" for i in range(100_000)}
        archive.addfile(member)
    with pytest.raises(DiskwrightError):
        diskwright.open(str(path), format="ova")
