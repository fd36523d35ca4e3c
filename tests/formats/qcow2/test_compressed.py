"""Compressed clusters: every method QEMU writes, and streams nobody should have written."""

from __future__ import annotations

import random
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import CorruptImage, UnsupportedFeature
from diskwright.extents import Extent
from diskwright.formats.qcow2 import compressed
from diskwright.formats.qcow2.compressed import Decoder
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED
from tests.formats.qcow2.support import Image, Tape, contents, created, header_of, qemu

K = 65536


def source(cluster_size: int) -> bytes:
    chance = random.Random(cluster_size)
    clusters = []
    for i in range(24):
        words = [chance.randbytes(chance.randrange(3, 9)) for _ in range(20 * (i + 1))]
        text = b"".join(chance.choices(words, k=cluster_size // 3))
        clusters.append(text[:cluster_size].ljust(cluster_size, b"."))
    return b"".join(clusters)[: 8 << 20] + b"the end".ljust(512, b"\0")


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_what_qemu_compresses_is_read(tmp_path: Path, method: str, cluster_size: int) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(source(cluster_size))
    options = f"cluster_size={cluster_size},compression_type={method}"
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    with Image(Tape(path.read_bytes()), writable=False) as image:
        report = image.format.check("off")
        assert report.compressed_clusters and not report.corruptions
        assert image.disk.pread(0, image.disk.size) == raw.read_bytes()
        chance = random.Random(1)
        for _ in range(100):
            offset = chance.randrange(image.disk.size)
            length = chance.randrange(1, 3 * cluster_size)
            assert image.disk.pread(offset, length) == raw.read_bytes()[offset : offset + length]


def test_without_isal_the_standard_library_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    text = b"abc" * 30000
    assert decode("zlib", deflated(text[:K])) == text[:K]


def deflated(data: bytes, window: int = -12) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, window)
    return squeeze.compress(data) + squeeze.flush()


def decode(method: str, raw: bytes, offset: int = 0, length: int = K) -> bytes:
    """Decodes by Python's libraries, and once more in the way for memory of ours, which must give the same."""
    try:
        plain = decode_once(method, raw, offset, length)
    except CorruptImage:
        with pytest.raises(CorruptImage):
            decode_once(method, bytearray(raw), offset, length)
        raise
    assert decode_once(method, bytearray(raw), offset, length) == plain
    return plain


def decode_once(method: str, raw: bytes | bytearray, offset: int, length: int) -> bytes:
    into = bytearray(length)
    extent = Extent(offset, length, 3, 4096, 0, len(raw))
    Decoder("image", method, K).decode(extent, memoryview(raw), memoryview(into))
    return bytes(into)


def zstd(data: bytes) -> bytes:
    module: Any = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    return bytes(module.compress(data))


@pytest.mark.parametrize("method", ["zlib", "zstd"])
class TestStreams:
    def pack(self, method: str, data: bytes) -> bytes:
        return deflated(data) if method == "zlib" else zstd(data)

    def test_what_follows_in_the_last_sector_does_not_matter(self, method: str) -> None:
        data = random.Random(1).randbytes(1000) * 66
        raw = self.pack(method, data[:K])
        assert decode(method, raw + b"\xff" * 511) == data[:K]
        assert decode(method, raw + raw) == data[:K]
        assert decode(method, raw + bytes(300), 100, 50) == data[100:150]

    def test_too_little_is_refused(self, method: str) -> None:
        with pytest.raises(CorruptImage, match=r"compressed cluster of guest offset 0x20000 .* decodes to 65535 bytes"):
            decode(method, self.pack(method, b"x" * (K - 1)), 2 * K + 10, 10)

    def test_cut_off_streams_are_refused(self, method: str) -> None:
        raw = self.pack(method, random.Random(2).randbytes(K))
        with pytest.raises(CorruptImage):
            decode(method, raw[: len(raw) // 2])
        with pytest.raises(CorruptImage):
            decode(method, b"")

    def test_noise_is_refused(self, method: str) -> None:
        chance = random.Random(3)
        for length in (1, 10, 512, 5000):
            with pytest.raises(CorruptImage):
                decode(method, b"\x07" + chance.randbytes(length))

    def test_a_stream_that_would_never_end_is_cut(self, method: str) -> None:
        """A gigabyte of zeros in a few kilobytes: a cluster of it is taken, and no more memory than that."""
        import tracemalloc

        raw = self.pack(method, bytes(256 << 20))[: 128 << 10]
        tracemalloc.start()
        assert decode(method, raw) == bytes(K)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_zstd_clusters_of_several_frames() -> None:
    data = random.Random(4).randbytes(K // 2)
    assert decode("zstd", zstd(data) + zstd(b"") + zstd(data) + b"junk") == data * 2


def test_a_frame_that_claims_a_huge_size() -> None:
    raw = zstd(bytes(1 << 20))
    assert decode("zstd", raw) == bytes(K)
    forged = struct.pack("<IBQ", 0xFD2FB528, 0b11100000, 1 << 40) + bytes(100)
    with pytest.raises(CorruptImage):
        decode("zstd", forged)


def test_a_wider_window_than_qemu_allows_is_read() -> None:
    data = random.Random(5).randbytes(20000)
    whole = (data * 4)[:K]
    raw = deflated(whole, -15)
    assert len(raw) < 30000, "the stream must reach further back than 4 KiB"
    assert decode("zlib", raw) == whole


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression", "compression.zstd", "backports", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedFeature, match="no zstd library"):
        decode("zstd", b"x")


def test_repeated_small_reads_decode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"text " * 20000
    decoder = Decoder("image", "zlib", K)
    raw = memoryview(deflated(text[:K]))
    times = 0
    inflate = decoder._inflate

    def counted(raw: memoryview) -> bytes:
        nonlocal times
        times += 1
        return inflate(raw)

    monkeypatch.setattr(decoder, "_inflate", counted)
    into = bytearray(512)
    for offset in range(0, K, 512):
        decoder.decode(Extent(offset, 512, 3, 77, 0, len(raw)), raw, memoryview(into))
        assert into == text[offset : offset + 512]
    assert times == 1
    other = memoryview(deflated(b"other".ljust(K, b" ")))  # the place holds something else now
    decoder.decode(Extent(0, 512, 3, 77, 0, len(other)), other, memoryview(into))
    assert into[:5] == b"other" and times == 2
    for place in range(100):
        decoder.decode(Extent(0, 512, 3, place, 0, len(raw)), raw, memoryview(into))
    assert len(decoder._kept) <= compressed._KEPT_MOST


def test_a_compressed_cluster_beyond_the_end_of_the_file() -> None:
    data = bytearray(created(size=1 << 20))
    header = header_of(bytes(data))
    data.extend(bytes(-len(data) % K))
    struct.pack_into(">Q", data, header.l1_table_offset, len(data) | COPIED)
    data.extend(struct.pack(">Q", COMPRESSED | 1 << 50).ljust(K, b"\0"))
    with pytest.raises(CorruptImage, match="compressed cluster of guest offset 0x0"):
        contents(bytes(data))
