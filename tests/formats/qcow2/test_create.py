"""Creating images: byte for byte what QEMU makes, and refusals."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.create import create_image
from diskwright.errors import DiskwrightError, ImageError, LimitExceeded, OptionError
from diskwright.formats.qcow2.header import CORRUPT, EXT_BACKING_FORMAT, EXT_FEATURE_NAMES
from tests.formats.qcow2.support import checked, contents, created, header_of, qemu, qemu_check
from tests.peers import find

SIZES = ("0", "512", "1000", "100M", "1G")
CLUSTERS = (512, 1024, 4096, 8192, 65536, 2 << 20)
VARIANTS: tuple[dict[str, str], ...] = (
    {},
    {"compat": "0.10"},
    {"compat": "v3"},
    {"compression_type": "zstd", "lazy_refcounts": "on"},
    {"refcount_bits": "1"},
    {"refcount_bits": "2"},
    {"refcount_bits": "8"},
    {"refcount_bits": "64"},
)


def both(tmp_path: Path, size: str, options: dict[str, str]) -> tuple[bytes, bytes]:
    """The image QEMU makes, and ours."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    words = ",".join(f"{name}={value}" for name, value in options.items())
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, theirs, size)
    create_image(str(ours), "qcow2", {**options, "size": size})
    return theirs.read_bytes(), ours.read_bytes()


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_new_images_are_those_of_qemu(tmp_path: Path, cluster_size: int, variant: dict[str, str]) -> None:
    for size in SIZES:
        theirs, ours = both(tmp_path, size, {"cluster_size": str(cluster_size), **variant})
        assert ours == theirs, size


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("size", ["1", "5M", "70M"])
def test_preallocated_metadata_lies_where_qemu_puts_it(tmp_path: Path, cluster_size: int, size: str) -> None:
    if cluster_size < 4096 and size == "70M":
        pytest.skip("the refcount table moves, and to another place than QEMU's")
    options = {"cluster_size": str(cluster_size), "preallocation": "metadata"}
    theirs, ours = both(tmp_path, size, options)
    assert ours == theirs


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("name", ["base.img", "a" * 200 + ".img"])
def test_backing_names_lie_where_qemu_puts_them(tmp_path: Path, cluster_size: int, compat: str, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(1 << 20))
    options = {
        "cluster_size": str(cluster_size), "compat": compat, "backing_file": str(name), "backing_fmt": "raw",
    }  # fmt: skip
    theirs, ours = both(tmp_path, "1M", options)
    assert ours == theirs
    backing = header_of(ours).backing
    assert backing is not None and backing == (name, "raw")


def test_fields_and_extensions() -> None:
    header = header_of(created(size=1 << 20, compression_type="zstd"))
    assert (header.version, header.size, header.compression, header.header_length) == (3, 1 << 20, "zstd", 112)
    assert header.extension(EXT_FEATURE_NAMES) and header.extension(EXT_BACKING_FORMAT) is None
    assert not header.incompatible_features & CORRUPT


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_preallocation_gives_every_cluster_a_place(tmp_path: Path, mode: str, cluster_size: int) -> None:
    path = tmp_path / "image"
    size = 3 << 20
    create_image(str(path), "qcow2", {"size": size, "cluster_size": cluster_size, "preallocation": mode})
    data = path.read_bytes()
    assert contents(data) == bytes(size)
    report = checked(data)
    assert (report.corruptions, report.leaks) == (0, 0)
    assert report.allocated_clusters == report.total_clusters == size // cluster_size
    assert report.image_end_offset == len(data), "nothing may lie behind the image"
    if mode != "metadata":
        assert path.stat().st_blocks * 512 >= size


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_qemu_accepts_preallocated_images(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image"
    create_image(str(path), "qcow2", {"size": 5 << 20, "preallocation": mode})
    numbers = qemu_check(path)
    assert (numbers["corruptions"], numbers["leaks"], numbers["allocated-clusters"]) == (0, 0, 80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_size": 1000}, "power of two"),
        ({"cluster_size": 256}, "power of two between 512"),
        ({"cluster_size": 4 << 20}, "power of two between 512"),
        ({"refcount_bits": 3}, "Refcount width"),
        ({"refcount_bits": 128}, "Refcount width"),
        ({"refcount_bits": 0}, "Refcount width"),
        ({"refcount_bits": -16}, "Refcount width"),
        ({"compat": "0.10", "refcount_bits": 8}, "compatibility level"),
        ({"compat": "0.10", "lazy_refcounts": True}, "compatibility level"),
        ({"compat": "0.10", "compression_type": "zstd"}, "compatibility level"),
        ({"backing_file": "b", "preallocation": "metadata"}, "at the same time"),
        ({"backing_fmt": "raw"}, "without backing file"),
        ({"backing_file": "b" * 1024}, "1023 bytes"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        created(size=1 << 20, **options)


def test_too_long_a_name_for_the_cluster() -> None:
    with pytest.raises(ImageError, match="does not fit into a cluster of 512"):
        created(size=1 << 20, cluster_size=512, backing_file="b" * 400)


def test_too_large_for_the_cluster_size() -> None:
    created(size=128 << 30, cluster_size=512)
    with pytest.raises(LimitExceeded, match="at most 137438953472 bytes"):
        created(size=(128 << 30) + 512, cluster_size=512)


def test_a_refused_creation_is_refused_by_qemu_too(tmp_path: Path) -> None:
    path = tmp_path / "image"
    words = [find("qemu-img"), "create", "-f", "qcow2", "-o", "cluster_size=512", str(path), str((128 << 30) + 512)]
    assert subprocess.run(words, capture_output=True, check=False).returncode
    with pytest.raises(DiskwrightError):
        create_image(str(path), "qcow2", {"cluster_size": 512, "size": (128 << 30) + 512})
