"""``map --picture``: its counts are those of ``map --output=json``, and its PNG is one that others can read."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path

import pytest

from diskwright.cli.picture import LOOKS, PNG_CELL, PNG_COLUMNS, PNG_ROWS
from diskwright.codecs import png
from diskwright.engine.picture import CLASSES, Picture, Runs
from tests.cli.images import NAMES, build
from tests.cli.run import diskwright, make, needs_qemu
from tests.formats.qcow2.support import created

DEEPEST = CLASSES.index("backing-deeper")


def counted(map_rows: list[dict[str, int]]) -> dict[str, int]:
    """Bytes by class, from what ``map --output=json`` prints."""
    totals = dict.fromkeys(CLASSES, 0)
    for row in map_rows:
        if row["data"]:
            name = CLASSES[min(row["depth"], DEEPEST)] if "offset" in row else "compressed"
        else:
            name = "zero" if row["present"] else "unallocated"
        totals[name] += row["length"]
    return totals


def both(folder: Path, *words: str) -> tuple[dict[str, int], dict[str, int]]:
    done = diskwright("map", "--json", *words, cwd=folder)
    drawn = diskwright("map", "--picture", "--json", *words, cwd=folder)
    assert (done.code, drawn.code) == (0, 0), (done, drawn)
    return json.loads(drawn.out)["bytes"], counted(json.loads(done.out))


@needs_qemu
@pytest.mark.parametrize("name", [name for name in NAMES if "gone" not in name])
def test_counts_are_those_of_the_map(name: str, tmp_path: Path) -> None:
    format = build(name, tmp_path)
    drawn, told = both(tmp_path, "-f", format, "image")
    assert drawn == told
    for words in (("-s", "100k"), ("-s", "4608", "-l", "70000")):
        if sum(told.values()) > 200_000:
            drawn, told_part = both(tmp_path, "-f", format, *words, "image")
            assert drawn == told_part


@needs_qemu
def test_a_chain_deeper_than_there_are_colours(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f qcow2 0 1M", "qemu-io -f qcow2 -c write~0~1M 0")
    for number in range(1, 6):
        make(
            tmp_path,
            f"qemu-img create -q -f qcow2 -b {number - 1} -F qcow2 {number}",
            f"qemu-io -f qcow2 -c write~{number * 64}k~128k {number}",
        )
    drawn, told = both(tmp_path, "5")
    assert drawn == told
    assert drawn["backing-1"] and drawn["backing-2"] and drawn["backing-deeper"] > drawn["data"]


def test_a_huge_disk(tmp_path: Path) -> None:
    """64 TiB of it, in windows; and a range of it."""
    (tmp_path / "image").write_bytes(created(size=64 << 40, cluster_size=2 << 20))
    drawn = diskwright("map", "--picture", "--json", "image", cwd=tmp_path)
    assert json.loads(drawn.out)["bytes"]["unallocated"] == 64 << 40
    drawn = diskwright("map", "--picture", "--json", "-s", "63T", "-l", "5G", "image", cwd=tmp_path)
    assert json.loads(drawn.out) == {
        "start": 63 << 40,
        "length": 5 << 30,
        "bytes": {**dict.fromkeys(CLASSES, 0), "unallocated": 5 << 30},
    }


def test_cells_against_a_count_of_every_byte() -> None:
    import numpy as np

    chance = random.Random(4)
    for _ in range(200):
        start, length = chance.randrange(50), chance.randrange(1, 300)
        ends = sorted({chance.randrange(1, length + 1) for _ in range(chance.randrange(20))} | {length})
        kinds = [chance.randrange(len(CLASSES)) for _ in ends]
        picture = Picture(start, length, chance.choice((1, 2, 7, 64, 1000)))
        at = 0
        while at < length:  # in windows, cut anywhere
            stop = chance.randrange(at + 1, length + 1)
            inside = [(min(end, stop), kind) for end, kind in zip(ends, kinds, strict=True) if end > at]
            upto = next(i for i, (end, _) in enumerate(inside) if end == stop) + 1
            columns = list(zip(*inside[:upto], strict=True))
            picture.add(start + at, Runs(np.array(columns[0]) + start, np.array(columns[1], np.uint8)))
            at = stop
        of_byte = [next(k for end, k in zip(ends, kinds, strict=True) if byte < end) for byte in range(length)]
        for cell in range(len(picture.counts)):
            low, high = picture.edges[cell] - start, picture.edges[cell + 1] - start
            expected = [of_byte[low:high].count(kind) for kind in range(len(CLASSES))]
            assert picture.counts[cell].tolist() == expected


@needs_qemu
def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    build("qcow2-data", tmp_path)
    done = diskwright("map", "--picture", "image", cwd=tmp_path)
    lines = done.out.splitlines()
    assert [len(line) for line in lines[:16]] == [40] * 16 and lines[16] == ""
    assert {character for line in lines[:16] for character in line} == {"█", "░", "·"}
    assert lines[17] == "█ data: 128 KiB (12.5 %)"


def pixels(data: bytes) -> tuple[int, int, bytes]:
    """The picture in a PNG file of the kind that is written, read by its specification."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert chunks[0][0] == b"IHDR" and chunks[-1] == (b"IEND", b"")
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    stride = 1 + 3 * width
    assert len(rows) == stride * height and not any(rows[::stride])
    return width, height, b"".join(rows[at + 1 : at + stride] for at in range(0, len(rows), stride))


@needs_qemu
def test_png(tmp_path: Path) -> None:
    make(
        tmp_path,
        f"qemu-img create -q -f qcow2 image {PNG_COLUMNS * PNG_ROWS * 64}k",
        "qemu-io -f qcow2 -c write~0~64k -c write~-z~64k~64k image",
    )
    done = diskwright("map", "--picture=png", "-o", "out.png", "image", cwd=tmp_path)
    assert (done.code, done.out) == (0, "")
    width, height, colours = pixels((tmp_path / "out.png").read_bytes())
    assert (width, height) == (PNG_COLUMNS * PNG_CELL, PNG_ROWS * PNG_CELL)
    cells = [tuple(colours[3 * PNG_CELL * i : 3 * PNG_CELL * i + 3]) for i in range(3)]
    assert cells == [LOOKS[name].colour for name in ("data", "zero", "unallocated")]
    assert diskwright("map", "--picture=png", "-o", "out.png", "image", cwd=tmp_path).code == 0  # again


def test_a_picture_never_overwrites_an_image(tmp_path: Path) -> None:
    image = created(size=1 << 20)
    (tmp_path / "image").write_bytes(image)
    for target in ("image", "./image"):
        done = diskwright("map", "--picture=png", "-o", target, "image", cwd=tmp_path)
        assert done.code == 1 and "not overwritten" in done.err
    assert (tmp_path / "image").read_bytes() == image
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_wrong_command_lines(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(created(size=1 << 20))
    for words in (["--picture=png"], ["--picture=gif"], ["-o", "x.png"], ["--picture", "-s", "2M"]):
        done = diskwright("map", *words, "image", cwd=tmp_path)
        assert done.code == 1 and not done.out and "internal" not in done.err, done


def test_a_png_of_a_wrong_size_is_not_made() -> None:
    with pytest.raises(ValueError, match="5 bytes are not 2 x 2 pixels"):
        png.encode(2, 2, bytes(5))
