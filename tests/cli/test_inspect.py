"""``inspect``: what it tells, that it follows nothing, and that no file makes it fail."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from diskwright.cli.output import escaped
from diskwright.engine.signatures import FILE_SYSTEMS, FILES, HEAD
from tests.cli.run import diskwright, make, needs_qemu
from tests.formats.qcow2.support import created, poked

KEYS = [
    "filename", "file-size", "allocated-size", "format", "version", "probe", "recognised", "virtual-size", "encrypted",
    "snapshots", "bitmaps", "image-end", "trailing-bytes", "facts", "features", "references", "content", "unreadable",
    "error", "problems",
]  # fmt: skip


def inspected(name: str, folder: Path, code: int = 0) -> dict[str, Any]:
    done = diskwright("inspect", "--json", name, cwd=folder)
    assert done.code == code, done
    found = json.loads(done.out)
    assert list(found) == KEYS
    shown = diskwright("inspect", name, cwd=folder)
    assert shown.code == code
    assert all(line.isprintable() for line in shown.out.splitlines())
    return found


def fact(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in found["facts"] if row["name"] == name)


def test_a_sound_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(created(size=1 << 20, cluster_size=4096))
    found = inspected("image", tmp_path)
    assert (found["format"], found["version"], found["virtual-size"]) == ("qcow2", 3, 1 << 20)
    assert (found["encrypted"], found["snapshots"], found["bitmaps"]) == (False, 0, 0)
    assert found["recognised"][0]["magic"] == "514649fb" and found["recognised"][0]["driver"]
    assert fact(found, "cluster_bits") == {"name": "cluster_bits", "value": 12, "offset": 20, "problem": None}
    assert found["content"]["blank"] and found["trailing-bytes"] == 0 and not found["problems"]


def test_what_lies_behind_the_end(tmp_path: Path) -> None:
    sound = created(size=1 << 20, cluster_size=4096)
    sound += bytes(-len(sound) % 4096)
    (tmp_path / "image").write_bytes(sound + b"hidden!")
    found = inspected("image", tmp_path)
    assert (found["image-end"], found["trailing-bytes"]) == (len(sound), 7)


@pytest.mark.parametrize(
    ("offset", "width", "value", "field"),
    [
        (4, 4, 9, "version"),
        (20, 4, 40, "cluster_bits"),
        (24, 8, 1 << 63, "size"),
        (32, 4, 7, "crypt_method"),
        (36, 4, 0xFFFFFFFF, "l1_size"),
        (40, 8, 513, "l1_table_offset"),
        (40, 8, 1 << 50, "l1_table_offset"),
        (48, 8, 0, "refcount_table_offset"),
        (56, 4, 1 << 30, "refcount_table_clusters"),
        (60, 4, 1 << 20, "nb_snapshots"),
        (96, 4, 7, "refcount_order"),
        (100, 4, 72, "header_length"),
        (16, 4, 1024, "backing_file_size"),
    ],
)
def test_wrong_fields_are_told_with_their_place(
    offset: int, width: int, value: int, field: str, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(poked(created(size=1 << 20, cluster_size=4096), offset, value, width))
    row = fact(inspected("image", tmp_path, 2), field)
    assert row["value"] == value and row["offset"] == offset and row["problem"]


def test_feature_bits(tmp_path: Path) -> None:
    image = poked(created(size=1 << 20, cluster_size=4096), 72, 1 << 40, 8)
    (tmp_path / "image").write_bytes(poked(image, 80, 1, 8))
    rows = {(row["kind"], row["bit"]): row for row in inspected("image", tmp_path, 2)["features"]}
    assert rows["compatible", 0] == {"kind": "compatible", "bit": 0, "name": "lazy refcounts", "known": True}
    assert not rows["incompatible", 40]["known"]


@needs_qemu
def test_references_are_told_and_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "qemu-img create -q -f qcow2 -o data_file=data data.qcow2 1M")
    name = "/etc/pass\x1b[31m\nwd\u202e"
    make(tmp_path, f"qemu-img create -q -f qcow2 -b {'x' * len(name.encode())} -F raw -u image 1M")
    image = (tmp_path / "image").read_bytes()
    (tmp_path / "image").write_bytes(image.replace(b"x" * len(name.encode()), name.encode()))
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *more, **named: opened.append(str(path)) or real(path, *more, **named))
    found = inspected("image", tmp_path)
    assert found["references"] == [
        {"role": "backing file", "name": "/etc/pass\\x1b[31m\\x0awd\\u202e", "format": "raw",
         "offset": fact(found, "backing_file_offset")["value"]}
    ]  # fmt: skip
    assert found["content"]["incomplete"]
    found = inspected("data.qcow2", tmp_path)
    assert [row["name"] for row in found["references"]] == ["data"]
    assert found["content"] is None and "not followed" in found["unreadable"]
    assert not [path for path in opened if path.rpartition("/")[2] in ("data", "wd\u202e")]
    assert "image" in opened  # the watch itself works


def test_encrypted_images_need_no_key(tmp_path: Path) -> None:
    # Made here: QEMU measures how fast it is first, which fails on a busy machine.
    words = ["create", "-q", "--object", "secret,id=s,data=abc"]
    more = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    assert diskwright(*words, "-f", "qcow2", "-o", more, "a", "1M", cwd=tmp_path).code == 0
    assert diskwright(*words, "-f", "luks", "-o", "key-secret=s,iter-time=10", "b", "1M", cwd=tmp_path).code == 0
    for name in ("a", "b"):
        found = inspected(name, tmp_path)
        assert found["encrypted"] and found["unreadable"] == "encrypted" and found["content"] is None
    assert fact(inspected("b", tmp_path), "key slot 0")["value"] == "in use"


@needs_qemu
@pytest.mark.parametrize("format", ["vmdk", "vhdx", "vpc", "vdi", "qed", "qcow", "parallels"])
def test_images_of_other_programs(format: str, tmp_path: Path) -> None:
    make(tmp_path, f"qemu-img create -q -f {format} image 4M")
    done = diskwright("inspect", "--json", "image", cwd=tmp_path)
    found = json.loads(done.out)
    row = found["recognised"][0]
    assert row["name"] == format
    assert done.code == (0 if row["driver"] else 3), done
    if not row["driver"]:
        assert any(format in text for text in found["probe"]["risks"])


@pytest.mark.parametrize(("magic", "name"), [(b"conectix", "vpc"), (b"koly", "dmg")])
def test_footers(magic: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 16) + magic.ljust(512, b"\0"))
    found = json.loads(diskwright("inspect", "--json", "image", cwd=tmp_path).out)
    row = found["recognised"][0]
    assert (row["name"], row["offset"]) == (name, 1 << 16)
    assert found["format"] == name or any(name in text for text in found["probe"]["risks"])


@pytest.mark.parametrize("row", [*FILES, *FILE_SYSTEMS], ids=lambda row: f"{row.name}-{row.what}")
def test_every_signature_is_found(row: Any, tmp_path: Path) -> None:
    data = bytearray(HEAD + 4096)
    at = row.offset % len(data)
    data[at : at + len(row.magic)] = row.magic
    (tmp_path / "image").write_bytes(data)
    done = diskwright("inspect", "--json", "image", cwd=tmp_path)
    found = json.loads(done.out)
    there = found["recognised"] if row in FILES else found["content"]["signatures"]
    assert row.name in [each["name"] for each in there]
    assert done.code in (0, 2, 3)


def test_partition_tables(tmp_path: Path) -> None:
    disk = bytearray(1 << 20)
    disk[446:462] = struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", 2048, 100)
    disk[510:512] = b"\x55\xaa"
    (tmp_path / "mbr").write_bytes(disk)
    content = inspected("mbr", tmp_path)["content"]
    assert content["partition-table"] == "mbr" and not content["blank"]
    assert content["partitions"] == [{"number": 1, "type": "0x83", "start": 1 << 20, "length": 51200}]
    assert "beyond the disk's end" in content["problems"][0]
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 99, 34, 90, b"g" * 16, 2, 128, 128, 0)
    disk[512 : 512 + len(header)] = header
    disk[1024 : 1024 + 128] = struct.pack("<16s16sQQQ72s", bytes(range(16)), b"u" * 16, 34, 41, 0, b"")
    (tmp_path / "gpt").write_bytes(disk)
    content = inspected("gpt", tmp_path)["content"]
    assert content["partition-table"] == "gpt" and not content["problems"]
    assert [(row["start"], row["length"]) for row in content["partitions"]] == [(34 * 512, 8 * 512)]
    assert content["partitions"][0]["type"] == "03020100-0504-0706-0809-0a0b0c0d0e0f"


@needs_qemu
def test_an_image_within_an_image_is_a_risk(tmp_path: Path) -> None:
    (tmp_path / "inner").write_bytes(created(size=1 << 20, cluster_size=4096))
    make(tmp_path, "qemu-img convert -f raw -O qcow2 inner image")
    risks = inspected("image", tmp_path)["probe"]["risks"]
    assert len(risks) == 1 and "begins like qcow2" in risks[0]


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "image").write_bytes(b"")
    assert inspected("image", tmp_path)["file-size"] == 0
    for words in (["gone"], ["folder"], ["-f", "file", "image"], ["-f", "none", "image"], []):
        done = diskwright("inspect", *words, cwd=tmp_path)
        assert done.code == 1 and not done.out and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a\nb\x1b\x7f", "a\\x0ab\\x1b\\x7f"),
        ("back\\slash", "back\\\\slash"),
        ("\u202e\u2028\U000e0001", "\\u202e\\u2028\\U000e0001"),
        (os.fsdecode(b"\xff\x80"), "\\xff\\x80"),
        ("ü 漢", "ü 漢"),
    ],
)
def test_escaping(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_headers_of_noise(tmp_path: Path) -> None:
    """Behind every magic, anything at all; also cut off anywhere."""
    chance = random.Random(3)
    for turn in range(150):
        row = chance.choice(FILES)
        size = chance.choice((0, 7, 8, 64, 511, 512, 600, 4096, 70000))
        data = bytearray(chance.randbytes(size) if turn % 2 else bytes(size))
        at = row.offset if row.offset >= 0 else max(0, size + row.offset)
        data[at : at + len(row.magic)] = row.magic
        for _ in range(8):
            place = chance.randrange(128)
            data[place : place + 1] = chance.choice((b"\0", b"\xff", b"\x01"))
        (tmp_path / "image").write_bytes(data)
        done = diskwright("inspect", *(["--json"] if turn % 3 else []), "image", cwd=tmp_path)
        assert done.code in (0, 2, 3) and not done.err, (turn, row, done)
