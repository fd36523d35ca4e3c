"""Encrypted qcow2 beside qemu-img, both ways; hostile pointers; key slots; growth; compressed clusters."""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest

import diskwright
from diskwright.core.disk import Disk
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.secrets import Secrets
from diskwright.errors import DiskwrightError, ImageError, OptionError
from diskwright.formats.qcow2.encryption import amend_encryption
from tests.formats.luks.peers import (
    PASSPHRASE,
    needs_qemu,
    opened,
    qemu_check,
    qemu_create,
    qemu_io,
    qemu_read,
    qemu_write,
)

SIZE = 1 << 20
SECRETS = {"sec0": PASSPHRASE}

KINDS: dict[str, dict[str, object]] = {
    "luks": {"encrypt.format": "luks"},
    "luks-essiv": {"encrypt.format": "luks", "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "essiv"},
    "luks-aes-128": {"encrypt.format": "luks", "encrypt.cipher-alg": "aes-128", "encrypt.hash-alg": "sha512"},
    "luks-512": {"encrypt.format": "luks", "cluster_size": 512},
    "luks-2M": {"encrypt.format": "luks", "cluster_size": 2 << 20},
    "luks-v2": {"encrypt.format": "luks", "compat": "0.10"},
    "luks-prealloc": {"encrypt.format": "luks", "preallocation": "metadata"},
    "aes": {"encrypt.format": "aes"},
    "aes-v2": {"encrypt.format": "aes", "compat": "0.10", "cluster_size": 4096},
}


def create(path: Path, size: int = SIZE, **more: object) -> None:
    chosen: dict[str, object] = {"encrypt.format": "luks", "encrypt.key-secret": "sec0", **more}
    if chosen["encrypt.format"] == "luks":
        chosen.setdefault("encrypt.iter-time", 1)
    diskwright.create(path, "qcow2", size, secrets=SECRETS, **chosen)


def scatter(disk: Disk, seed: int) -> bytes:
    """Writes, zeros and discards here and there; returns what the guest then has."""
    rng = random.Random(seed)
    for _ in range(30):
        offset = rng.randrange(SIZE - 9000)
        action = rng.randrange(4)
        if action < 3:
            disk.pwrite(offset, rng.randbytes(rng.choice((1, 512, 700, 4096, 9000))))
        else:
            length = rng.randrange(1, min(200_000, SIZE - offset))
            disk.zero(offset, length, unmap=bool(rng.randrange(2)))
    return disk.pread(0, SIZE)


@needs_qemu
@pytest.mark.parametrize("kind", KINDS)
def test_made_here(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path, **KINDS[kind])
    disk = opened(path, "qcow2")
    data = scatter(disk, 1)
    disk.close()
    qemu_check(path)
    assert qemu_read(path, "qcow2") == data
    other = random.Random(2).randbytes(SIZE)
    qemu_write(path, "qcow2", other)
    disk = opened(path, "qcow2", writable=False)
    assert disk.pread(0, SIZE) == other
    disk.close()
    report = diskwright.check(path)
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages


@needs_qemu
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("luks", "aes", "aes-v2") else pytest.mark.long) for kind in KINDS]
)
def test_made_by_qemu(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    chosen = {"encrypt.key-secret": "sec0", **KINDS[kind]}
    if "luks" in kind:
        chosen["encrypt.iter-time"] = 50
    qemu_create(path, "qcow2", SIZE, ",".join(f"{name}={value}" for name, value in chosen.items()))
    qemu_write(path, "qcow2", random.Random(3).randbytes(SIZE // 2) + bytes(SIZE // 2))
    disk = opened(path, "qcow2")
    assert disk.pread(0, SIZE // 2) == random.Random(3).randbytes(SIZE // 2)
    data = scatter(disk, 4)
    disk.close()
    qemu_check(path)
    assert qemu_read(path, "qcow2") == data


@needs_qemu
def test_snapshots_of_qemu_stay_what_they_were(tmp_path: Path) -> None:
    """Copy on write moves a cluster: its sectors have other vectors in the new place."""
    path = tmp_path / "a.qcow2"
    create(path)
    qemu_io(path, "qcow2", "write -P 0x11 0 256k")
    from tests.formats.luks.peers import run, secret_file

    words = ("--object", f"secret,id=sec0,file={secret_file(tmp_path)}")
    image = ("--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=sec0")
    run("qemu-img", "snapshot", *words, "-c", "before", *image)
    disk = opened(path, "qcow2")
    disk.pwrite(1000, b"\x22" * 70_000)
    disk.close()
    qemu_check(path)
    qemu_io(path, "qcow2", "read -P 0x11 0 1000", "read -P 0x22 1000 70000", "read -P 0x11 71000 100000")
    run("qemu-img", "snapshot", *words, "-a", "before", *image)
    disk = opened(path, "qcow2", writable=False)
    assert disk.pread(0, 256 << 10) == b"\x11" * (256 << 10)
    disk.close()


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_nothing_of_the_guest_lies_open(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path, **KINDS[kind])
    disk = opened(path, "qcow2")
    disk.pwrite(0, b"PLAINTEXT-" * 20_000)
    disk.pwrite(300_001, b"PLAINTEXT-")
    disk.close()
    stored = path.read_bytes()
    assert b"PLAINTEXT-" not in stored and PASSPHRASE not in stored


def test_backing_files_encrypted_and_not(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2")
    disk = opened(tmp_path / "base.qcow2", "qcow2")
    disk.pwrite(0, b"b" * 200_000)
    disk.close()
    spec = {"driver": "qcow2", "file.filename": str(tmp_path / "base.qcow2"), "encrypt.key-secret": "sec0"}
    create(tmp_path / "top.qcow2")
    disk = opened(tmp_path / "top.qcow2", "qcow2", backing=spec)
    disk.pwrite(1001, b"t" * 100)
    assert disk.pread(0, 200_000) == b"b" * 1001 + b"t" * 100 + b"b" * (200_000 - 1101)
    disk.close()
    diskwright.create(tmp_path / "plain.qcow2", "qcow2", SIZE)
    graph = Graph(OpenGate(), Secrets(SECRETS))
    plain = {"driver": "qcow2", "file.filename": str(tmp_path / "plain.qcow2"), "backing": spec}
    node = graph.open(plain, writable=True)
    node.pwrite(5, b"p")
    assert node.pread(0, 70_000) == b"b" * 5 + b"p" + b"b" * 69_994
    # Past the overlay the backing node's bytes are not what lies in its file.
    assert node.place(100_000, 512) is None
    graph.close()


@pytest.mark.parametrize("kind", ["luks", "aes"])
@pytest.mark.parametrize("size", [65536 * 3 + 512, 65536 * 3 + 32768])
def test_growing_from_within_a_cluster(kind: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path, size, **KINDS[kind])
    disk = opened(path, "qcow2")
    disk.pwrite(0, b"g" * size)
    with disk.drained():
        disk.node.resize(SIZE)
    assert disk.pread(0, SIZE) == b"g" * size + bytes(SIZE - size)
    with disk.drained():
        disk.node.resize(65536 + 512)
    with disk.drained():
        disk.node.resize(SIZE)
    assert disk.pread(0, SIZE) == b"g" * (65536 + 512) + bytes(SIZE - 65536 - 512)
    disk.close()


def test_a_preallocated_image_does_not_claim_to_be_zeros(tmp_path: Path) -> None:
    for preallocation, zeros in (("off", True), ("metadata", False), ("full", False)):
        path = tmp_path / preallocation
        create(path, preallocation=preallocation)
        disk = opened(path, "qcow2")
        assert disk.node.zero_init is zeros
        disk.close()


def test_writes_to_one_sector_at_the_same_time_all_survive(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path)
    disk = opened(path, "qcow2")
    disk.pwrite(0, bytes(65536))

    def work(number: int) -> None:
        for turn in range(20):
            for sector in range(4):
                disk.pwrite(sector * 512 + number * 128, bytes([number * 20 + turn + 1]) * 128)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = b"".join(bytes([number * 20 + 20]) * 128 for number in range(4)) * 4
    assert disk.pread(0, 2048) == expected
    disk.close()


# -- keys ----------------------------------------------------------------------------------------


def test_wrong_missing_and_unexpected(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path)
    with pytest.raises(ImageError, match=r"^Invalid password, cannot unlock any keyslot$"):
        opened(path, "qcow2", passphrase=b"wrong")
    with pytest.raises(OptionError, match=r"^Parameter 'encrypt.key-secret' is required for cipher$"):
        diskwright.open(path)
    with pytest.raises(OptionError, match="Header reported 'luks' encryption format but options specify 'aes'"):
        opened(path, "qcow2", **{"encrypt.format": "aes"})
    diskwright.create(tmp_path / "plain", "qcow2", SIZE)
    with pytest.raises(OptionError, match="No encryption in image header"):
        opened(tmp_path / "plain", "qcow2", **{"encrypt.format": "luks"})
    specific = diskwright.info(path)["format-specific"]
    assert isinstance(specific, dict) and specific["data"]["encrypt"]["cipher-alg"] == "aes-256"


@needs_qemu
def test_key_slots(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path)
    graph = Graph(secrets=Secrets({**SECRETS, "sec1": b"another"}))
    spec = {"driver": "qcow2", "file.filename": str(path), "encrypt.key-secret": "sec0"}
    node = graph.open(spec, writable=True)
    image = node.format  # type: ignore[attr-defined]
    node.pwrite(0, b"k" * 5000)
    amend_encryption(
        image, {"encrypt.state": "active", "encrypt.new-secret": "sec1", "encrypt.iter-time": "1"}, force=False
    )
    with pytest.raises(OptionError, match="Parameter 'state' is missing"):
        amend_encryption(image, {"encrypt.new-secret": "sec1"}, force=False)
    amend_encryption(image, {"encrypt.state": "inactive", "encrypt.keyslot": "0"}, force=False)
    graph.close()
    with pytest.raises(ImageError, match="Invalid password"):
        opened(path, "qcow2")
    disk = opened(path, "qcow2", passphrase=b"another")
    assert disk.pread(0, 5000) == b"k" * 5000
    disk.close()
    (tmp_path / "passphrase").unlink(missing_ok=True)
    report = diskwright.check(path)
    assert (report.corruptions, report.leaks) == (0, 0)


# -- hostile images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (32, struct.pack(">I", 3), "method 3"),
        (32, struct.pack(">I", 0xFFFFFFFF), "method"),
        (112, struct.pack(">I", 0x12345678), "encryption header extension is missing"),
        (116, struct.pack(">I", 8), "8 bytes long"),
        (120, struct.pack(">Q", 0), "LUKS header offset"),
        (120, struct.pack(">Q", 100), "LUKS header offset"),
        (120, struct.pack(">Q", 1 << 40), "LUKS header offset"),
        (120, struct.pack(">Q", (1 << 64) - 65536), "LUKS header offset"),
        (120, struct.pack(">Q", 65536), "LUKS magic"),
        (128, struct.pack(">Q", 0), "LUKS header"),
        (128, struct.pack(">Q", 591), "LUKS header"),
        (128, struct.pack(">Q", 600), "key material"),
        (128, struct.pack(">Q", 1 << 60), "at most"),
    ],
)
def test_hostile_pointers(at: int, value: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path)
    data = bytearray(path.read_bytes())
    assert data[112:116] == struct.pack(">I", 0x0537BE77)
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(DiskwrightError, match=what):
        opened(path, "qcow2")


def test_guest_data_never_goes_to_the_key_slots(tmp_path: Path) -> None:
    """Not even in an image that counts their clusters as free."""
    path = tmp_path / "a.qcow2"
    create(path)
    data = bytearray(path.read_bytes())
    offset, length = struct.unpack_from(">QQ", data, 120)
    for cluster in range(offset >> 16, (offset + length + 65535) >> 16):
        struct.pack_into(">H", data, 2 * 65536 + 2 * cluster, 0)
    path.write_bytes(data)
    disk = opened(path, "qcow2")
    try:
        disk.pwrite(0, b"d" * SIZE)
        disk.flush()
    except DiskwrightError:
        pass
    disk.close()
    assert path.read_bytes()[offset : offset + 2068480] == bytes(data[offset : offset + 2068480])
    assert diskwright.check(path).corruptions >= 1


def test_repair_counts_the_key_slots(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create(path)
    disk = opened(path, "qcow2")
    disk.pwrite(0, b"d" * 300_000)
    disk.close()
    data = bytearray(path.read_bytes())
    data[2 * 65536 : 3 * 65536] = bytes(65536)  # every refcount
    path.write_bytes(data)
    assert diskwright.check(path, repair="all").corruptions_fixed
    report = diskwright.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    disk = opened(path, "qcow2")
    disk.pwrite(500_000, b"e" * 100_000)
    assert disk.pread(0, 300_000) == b"d" * 300_000
    disk.close()
    opened(path, "qcow2", writable=False).close()
