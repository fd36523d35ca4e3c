"""Creating images: options are checked first, images in use stay as they are, failures leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diskwright.core import registry
from diskwright.core.create import create_image, plan
from diskwright.core.driver import Format, OpenContext
from diskwright.core.gate import ClosedGate, OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import Node
from diskwright.core.options import SIZE, STR, OneOf, option
from diskwright.errors import DiskwrightError, ImageLocked, OptionError
from diskwright.extents import DATA, Extent


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    size: int = option(SIZE, "virtual size")
    backing_file: str | None = option(STR, "backing file", default=None)
    backing_fmt: str | None = option(STR, "its format", default=None)
    cluster_size: int = option(SIZE, "cluster size; not 13", default=512)
    preallocation: str = option(OneOf("off", "metadata"), "preallocation", default="off")


class Toy(Format):
    """A format with a 512-byte header, whose creation can be made to fail at different times."""

    name = "create-toy"
    create_options = ToyOptions
    fail_after_header = False

    def __init__(self, file: Node) -> None:
        self.children, self.size = (file,), 512

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Toy:
        return cls(context.file)

    @classmethod
    def create(cls, file: Node, options: ToyOptions) -> None:
        assert file.size == 0
        if options.cluster_size == 13:
            raise OptionError("cluster size 13 brings bad luck")
        file.pwrite(0, b"TOY" + options.size.to_bytes(8, "big") + bytes(501))
        if cls.fail_after_header and file.driver_name != "memory":
            raise OSError(28, "No space left on device", file.filename)

    def extent_at(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, DATA, offset + 512)


class NotCreatable(Format):
    name = "create-none"

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> NotCreatable:
        raise NotImplementedError

    def extent_at(self, offset: int, length: int) -> Extent:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    registry.register(Toy)
    registry.register(NotCreatable)
    Toy.fail_after_header = False
    yield
    registry._known.pop(Toy.name)
    registry._known.pop(NotCreatable.name)


def test_raw_gets_its_size_rounded_up_to_sectors(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    create_image(str(path), "raw", {"size": "1k"})
    assert path.stat().st_size == 1024
    create_image(str(path), "raw", {"size": 1000})
    assert path.stat().st_size == 1024
    assert not path.read_bytes().strip(b"\0")


def test_raw_overwrites_what_nobody_uses(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 5000)
    create_image(str(path), "raw", {"size": 2048})
    assert path.read_bytes() == bytes(2048)


def test_raw_preallocation_takes_space(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    create_image(str(path), "raw", {"size": 1 << 20, "preallocation": "full"})
    assert path.stat().st_blocks * 512 >= 1 << 20
    assert path.read_bytes() == bytes(1 << 20)


def test_storage_driver_as_format(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_image(str(path), "file", {"size": 4096})
    assert path.stat().st_size == 4096


def test_prefix_is_not_part_of_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a:b"
    create_image(f"file:{path}", "raw", {"size": 512})
    assert path.stat().st_size == 512


def test_plan_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    creation = plan(str(path), "raw", {"size": "1M", "preallocation": "off"})
    assert creation.size == 1 << 20
    assert dict(creation.given) == {"size": 1 << 20, "preallocation": "off"}
    assert not path.exists()


def test_format_is_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.toy"
    create_image(str(path), Toy.name, {"size": 7, "nocow": "on"})
    assert path.read_bytes()[:11] == b"TOY" + (7).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("raw", {}, "needs a size"),
        ("raw", {"size": None}, "needs a size"),
        ("raw", {"size": "big"}, "size"),
        ("raw", {"size": -1}, "size"),
        ("raw", {"size": 1, "bogus": 2}, "Invalid parameter 'bogus'"),
        ("raw", {"size": 1, "filename": "elsewhere"}, "Invalid parameter 'filename'"),
        ("raw", {"size": 1, "preallocation": "maybe"}, "does not accept value 'maybe'"),
        ("raw", {"size": 1, "backing_file": "b"}, "Backing file not supported for file format 'raw'"),
        ("raw", {"size": 1, "backing_fmt": "raw"}, "Backing file format not supported"),
        ("no-such", {"size": 1}, "Unknown file format 'no-such'"),
        ("create-none", {"size": 1}, "does not support image creation"),
        ("create-toy", {"size": 1, "backing_fmt": "raw"}, "cannot be used without backing file"),
        ("create-toy", {"size": 1, "backing_file": ""}, "empty string"),
        ("create-toy", {"size": 1, "backing-file": "a", "backing_file": "a"}, "given twice"),
        ("create-toy", {"size": 1, "backing_file": "x" * 1024, "backing_fmt": "raw"}, "longer than the 1023"),
        ("create-toy", {"size": 1, "backing_file": "gone", "backing_fmt": "raw"}, "No such file"),
    ],
)
def test_wrong_options_are_refused_before_anything_happens(
    tmp_path: Path, format: str, options: dict[str, object], words: str
) -> None:
    path = tmp_path / "disk"
    with pytest.raises((DiskwrightError, OSError)) as caught:
        create_image(str(path), format, options)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_existing_contents_survive_options_the_format_refuses(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious" * 100)
    with pytest.raises(OptionError, match="bad luck"):
        create_image(str(path), Toy.name, {"size": 512, "cluster_size": 13, "preallocation": "metadata"})
    assert path.read_bytes() == b"precious" * 100


def test_new_file_is_removed_when_the_format_fails(tmp_path: Path) -> None:
    Toy.fail_after_header = True
    with pytest.raises(OSError, match="No space"):
        create_image(str(tmp_path / "disk"), Toy.name, {"size": 512})
    assert os.listdir(tmp_path) == []


def test_file_that_was_there_is_not_removed_when_the_format_fails(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    Toy.fail_after_header = True
    with pytest.raises(OSError, match="No space"):
        create_image(str(path), Toy.name, {"size": 512})
    assert path.exists()


def test_a_file_put_in_our_place_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"

    def replaced_meanwhile(file: Node, options: ToyOptions) -> None:
        path.unlink()
        path.write_bytes(b"somebody else's")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Toy, "create", classmethod(lambda cls, file, options: replaced_meanwhile(file, options)))
    with pytest.raises(OSError, match="Input/output"):
        create_image(str(path), Toy.name, {"size": 512})
    assert path.read_bytes() == b"somebody else's"


@pytest.mark.parametrize("format", ["raw", "create-toy"])
@pytest.mark.parametrize("writable", [True, False])
def test_image_in_use_is_left_alone(tmp_path: Path, format: str, writable: bool) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"in use" * 1000)
    graph = Graph()
    try:
        graph.open(str(path), driver="raw", writable=writable)
        with pytest.raises(ImageLocked):
            create_image(str(path), format, {"size": 512})
        assert path.read_bytes() == b"in use" * 1000
    finally:
        graph.close()
    create_image(str(path), format, {"size": 512})
    assert path.stat().st_size == 512


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        create_image(str(tmp_path / "no" / "disk"), "raw", {"size": 512})
    assert caught.value.filename == str(tmp_path / "no" / "disk")


def test_directory_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        create_image(str(tmp_path), "raw", {"size": 512})
    assert tmp_path.is_dir()


def test_dangling_link_is_not_followed_into_creation(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="No such file"):
        create_image(str(link), "raw", {"size": 512})
    assert os.listdir(tmp_path) == ["link"]


def test_size_comes_from_the_backing_file_relative_to_the_new_image(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.raw").write_bytes(bytes(1536))
    creation = plan(str(tmp_path / "sub" / "o"), Toy.name, {"backing_file": "base.raw", "backing_fmt": "raw"})
    assert creation.size == 1536


def test_backing_file_a_guest_is_writing_to_can_be_named(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(1024))
    graph = Graph()
    try:
        graph.open(str(base), driver="raw", writable=True)
        creation = plan(str(tmp_path / "o"), Toy.name, {"backing_file": "base.raw", "backing_fmt": "raw"})
        assert creation.size == 1024
    finally:
        graph.close()


def test_backing_format_has_to_be_said(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1024))
    with pytest.raises(OptionError, match="without backing format; it was detected as raw"):
        plan(str(tmp_path / "o"), Toy.name, {"backing_file": "base.raw"})


def test_unchecked_backing_file_need_not_exist_but_needs_a_size(tmp_path: Path) -> None:
    wanted = {"backing_file": "gone", "backing_fmt": "raw"}
    with pytest.raises(OptionError, match="needs a size"):
        plan(str(tmp_path / "o"), Toy.name, wanted, check_backing=False)
    assert plan(str(tmp_path / "o"), Toy.name, {**wanted, "size": 512}, check_backing=False).size == 512
    with pytest.raises(OptionError, match="without backing format"):
        plan(str(tmp_path / "o"), Toy.name, {"backing_file": "gone", "size": 512}, check_backing=False)


def test_image_is_not_its_own_backing_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 512)
    for name in ("disk", "./disk", str(path)):
        with pytest.raises(OptionError, match="same filename"):
            create_image(str(path), Toy.name, {"size": 512, "backing_file": name, "backing_fmt": "raw"})
    assert path.read_bytes() == b"x" * 512


def test_gate_is_for_what_the_backing_file_names_not_for_itself(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1024))
    wanted = {"backing_file": "base.raw", "backing_fmt": "raw"}
    for gate in (ClosedGate(), OpenGate()):
        assert plan(str(tmp_path / "o"), Toy.name, wanted, gate=gate).size == 1024
