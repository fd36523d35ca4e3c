"""luks beside qemu-img and cryptsetup, both ways; detached headers; wrong keys; what opens without one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import diskwright
from diskwright.core.graph import Graph
from diskwright.core.options import parse
from diskwright.core.secrets import Secrets
from diskwright.errors import CorruptImage, DiskwrightError, ImageError, OptionError
from diskwright.formats.luks.options import LuksAmendOptions
from tests.formats.luks.peers import (
    PASSPHRASE,
    needs_cryptsetup,
    needs_qemu,
    opened,
    qemu_create,
    qemu_io,
    qemu_read,
    qemu_write,
    run,
    secret_file,
)

SIZE = 1 << 20
SECRETS = {"sec0": PASSPHRASE}

COMBINATIONS = [
    ("aes-256", "xts", "plain64", None, "sha256"),
    ("aes-128", "xts", "plain", None, "sha1"),
    ("aes-192", "xts", "plain64", None, "sha512"),
    ("aes-256", "xts", "essiv", "sha256", "sha256"),
    ("aes-128", "cbc", "plain64", None, "sha256"),
    ("aes-256", "cbc", "essiv", "sha256", "sha224"),
    ("aes-128", "cbc", "essiv", "md5", "md5"),
    ("aes-256", "ctr", "plain64", None, "sha384"),
    ("aes-128", "ctr", "essiv", "sha256", "sha256"),
    ("aes-256", "ecb", "plain64", None, "ripemd160"),
    ("cast5-128", "cbc", "plain64", None, "sha256"),
    ("cast5-128", "ctr", "plain", None, "sha256"),
]


def options(alg: str, mode: str, ivgen: str, ivhash: str | None, hash: str) -> dict[str, object]:
    made: dict[str, object] = {"cipher-alg": alg, "cipher-mode": mode, "ivgen-alg": ivgen, "hash-alg": hash}
    if ivhash is not None:
        made["ivgen-hash-alg"] = ivhash
    return made


def create(path: Path, size: int = SIZE, **more: object) -> None:
    diskwright.create(path, "luks", size, secrets=SECRETS, **{"key-secret": "sec0", "iter-time": 1, **more})


@needs_qemu
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_made_here_read_and_written_by_qemu(combination: tuple[str, str, str, str | None, str], tmp_path: Path) -> None:
    path, data = tmp_path / "a.luks", random.Random(1).randbytes(SIZE)
    create(path, **options(*combination))
    disk = opened(path, "luks")
    disk.pwrite(0, data)
    disk.close()
    assert qemu_read(path, "luks") == data
    qemu_write(path, "luks", data[::-1])
    disk = opened(path, "luks", writable=False)
    assert disk.pread(0, SIZE) == data[::-1] and disk.pread(1000, 3000) == data[::-1][1000:4000]
    disk.close()


@needs_qemu
@pytest.mark.parametrize(
    "combination",
    # qemu-img takes seconds to measure its time: as a rule two of its images are enough.
    [pytest.param(row, marks=[] if at in (5, 10) else pytest.mark.long) for at, row in enumerate(COMBINATIONS)],
)
def test_made_by_qemu_read_and_written_here(combination: tuple[str, str, str, str | None, str], tmp_path: Path) -> None:
    path, data = tmp_path / "a.luks", random.Random(2).randbytes(SIZE)
    chosen = ",".join(f"{name}={value}" for name, value in options(*combination).items())
    qemu_create(path, "luks", SIZE, f"key-secret=sec0,iter-time=50,{chosen}")
    qemu_write(path, "luks", data)
    disk = opened(path, "luks")
    assert disk.pread(0, SIZE) == data
    disk.pwrite(70_001, b"x" * 3)
    disk.pwrite(512 * 300, b"y" * 512 * 40)
    disk.close()
    expected = bytearray(data)
    expected[70_001:70_004] = b"xxx"
    expected[512 * 300 : 512 * 340] = b"y" * 512 * 40
    assert qemu_read(path, "luks") == expected


@needs_qemu
def test_patterns_of_qemu_io(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    qemu_io(path, "luks", "write -P 0x5a 4096 8192", "write -P 0xa5 100 1000")
    disk = opened(path, "luks")
    assert disk.pread(4096, 8192) == b"\x5a" * 8192 and disk.pread(100, 1000) == b"\xa5" * 1000
    disk.zero(4000, 500)
    disk.close()
    qemu_io(path, "luks", "read -P 0 4000 500", "read -P 0x5a 4500 7788")


# -- cryptsetup ----------------------------------------------------------------------------------


@needs_cryptsetup
def test_cryptsetup_opens_what_is_made_here(tmp_path: Path) -> None:
    path, key = tmp_path / "a.luks", str(secret_file(tmp_path))
    for number, chosen in enumerate(({}, options("aes-192", "cbc", "plain64", None, "sha1"))):
        create(path, **chosen)
        run("cryptsetup", "open", "--test-passphrase", "--key-file", key, str(path))
        dump = run("cryptsetup", "luksDump", str(path)).stdout
        assert ("xts-plain64", "cbc-plain64")[number] in dump and "Key Slot 0: ENABLED" in dump
        run("cryptsetup", "luksAddKey", "-q", "--iter-time", "10", "--key-file", key, str(path), key)
        assert "Key Slot 1: ENABLED" in run("cryptsetup", "luksDump", str(path)).stdout
        opened(path, "luks").close()
        path.unlink()


def formatted(path: Path, *words: str, size: int = 32 << 20) -> None:
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
    key = str(secret_file(path.parent))
    run("cryptsetup", "luksFormat", "-q", "--key-file", key, *words, str(path))


def dumped_key(path: Path) -> bytes:
    target = path.parent / "volume-key"
    run("cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", str(target), "--key-file",
        str(path.parent / "passphrase"), str(path))  # fmt: skip
    return target.read_bytes()


@needs_cryptsetup
@pytest.mark.parametrize(
    "words",
    [
        ("--type", "luks1", "--iter-time", "10"),
        ("--type", "luks1", "--iter-time", "10", "-c", "aes-cbc-essiv:sha256", "-s", "256"),
        ("--type", "luks1", "--iter-time", "10", "-c", "aes-cbc-plain64", "-s", "192"),
        ("--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
        ("--type", "luks2", "--pbkdf", "argon2id", "--pbkdf-memory", "4096", "--pbkdf-force-iterations", "4"),
        ("--type", "luks2", "--pbkdf", "argon2i", "--pbkdf-memory", "4096", "--pbkdf-force-iterations", "4",
         "--sector-size", "512", "--hash", "sha512"),
        ("--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096",
         "-c", "aes-cbc-essiv:sha256", "-s", "256", "--luks2-metadata-size", "64k"),
    ],
)  # fmt: skip
def test_the_volume_key_of_what_cryptsetup_made(words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    formatted(path, *words)
    disk = opened(path, "luks")
    form = disk.node.format  # type: ignore[attr-defined]
    assert form.header.unlock(form.area, PASSPHRASE) == dumped_key(path)
    data = random.Random(3).randbytes(100_000)
    disk.pwrite(5000, data)
    disk.close()
    again = opened(path, "luks", writable=False)
    assert again.pread(5000, len(data)) == data
    again.close()
    run("cryptsetup", "open", "--test-passphrase", "--key-file", str(tmp_path / "passphrase"), str(path))
    with pytest.raises(ImageError, match="Invalid password"):
        opened(path, "luks", passphrase=b"other")


@needs_cryptsetup
def test_luks2_sectors_are_as_the_specification_says(tmp_path: Path) -> None:
    """One data unit a sector of 4096 bytes, its number counted in 512 bytes."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    path = tmp_path / "a.luks"
    formatted(path, "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096")
    disk = opened(path, "luks")
    disk.pwrite(3 * 4096, b"p" * 4096)
    start = disk.node.format.header.payload_start  # type: ignore[attr-defined]
    disk.close()
    tweak = (3 * 8).to_bytes(16, "little")
    cipher = Cipher(algorithms.AES(dumped_key(path)), modes.XTS(tweak)).encryptor()
    assert path.read_bytes()[start + 3 * 4096 :][:4096] == cipher.update(b"p" * 4096)


# -- detached headers ----------------------------------------------------------------------------


def test_a_detached_header(tmp_path: Path) -> None:
    create(tmp_path / "header", **{"detached-header": True})
    assert (tmp_path / "header").stat().st_size == 2068480
    (tmp_path / "data").write_bytes(bytes(SIZE))
    disk = opened(tmp_path / "data", "luks", **{"header.filename": str(tmp_path / "header")})
    assert disk.size == SIZE
    disk.pwrite(0, b"guest" * 100)
    disk.close()
    assert b"guest" not in (tmp_path / "data").read_bytes()
    with pytest.raises(CorruptImage, match="detached"):
        opened(tmp_path / "header", "luks")


@needs_cryptsetup
def test_a_detached_header_by_cryptsetup(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(SIZE))
    header = tmp_path / "header"
    key = str(secret_file(tmp_path))
    run("cryptsetup", "luksFormat", "-q", "--type", "luks1", "--iter-time", "10", "--header", str(header), "--key-file",
        key, str(tmp_path / "data"))  # fmt: skip
    disk = opened(tmp_path / "data", "luks", **{"header.filename": str(header)})
    assert disk.size == SIZE
    disk.close()


# -- keys, and their absence ---------------------------------------------------------------------


def test_wrong_missing_and_unknown_secrets(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    with pytest.raises(ImageError, match=r"^Invalid password, cannot unlock any keyslot$"):
        opened(path, "luks", passphrase=b"wrong")
    with pytest.raises(OptionError, match=r"^Parameter 'key-secret' is required for cipher$"):
        diskwright.open(path)
    with pytest.raises(OptionError, match=r"^No secret with id 'nope'$"):
        diskwright.open({"driver": "luks", "file.filename": str(path), "key-secret": "nope"})
    assert diskwright.info(path)["encrypted"] is True
    graph = Graph()
    node = graph.open(str(path), writable=True, guest_data=False)
    before = path.read_bytes()
    for work in (lambda: node.pread(0, 512), lambda: node.pwrite(0, bytes(512)), lambda: node.write_zeros(0, 10)):
        with pytest.raises(ImageError, match="opened without its key"):
            work()
    graph.close()
    assert path.read_bytes() == before


def test_a_failed_creation_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    path.write_bytes(b"precious" * 1000)
    for chosen, what in (
        ({"cipher-alg": "serpent-256"}, "serpent"),
        ({"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha512"}, "key size 64"),
        ({"key-secret": "nope"}, "nope"),
        ({"iter-time": 0}, "iter-time"),
    ):
        with pytest.raises(DiskwrightError, match=what):
            create(path, **chosen)
        assert path.read_bytes() == b"precious" * 1000


def test_key_slots_are_amended(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    graph = Graph(secrets=Secrets({**SECRETS, "sec1": b"another"}))
    node = graph.open({"driver": "luks", "file.filename": str(path), "key-secret": "sec0"}, writable=True)
    for changes in (
        {"state": "active", "new-secret": "sec1", "iter-time": "1"},
        {"state": "inactive", "old-secret": "sec0"},
    ):
        node.amend(parse(LuksAmendOptions, changes, owner="luks"))  # type: ignore[attr-defined]
    graph.close()
    opened(path, "luks", passphrase=b"another").close()
    with pytest.raises(ImageError, match="Invalid password"):
        opened(path, "luks")


def test_a_new_volume_does_not_claim_to_be_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    disk = opened(path, "luks")
    assert not disk.node.zero_init and any(disk.pread(0, 512))
    source = tmp_path / "zeros.raw"
    source.write_bytes(bytes(SIZE))
    disk.close()
    chosen = {"key-secret": "sec0", "iter-time": 1}
    diskwright.convert(source, tmp_path / "b.luks", format="luks", options=chosen, secrets=SECRETS)
    copy = opened(tmp_path / "b.luks", "luks", writable=False)
    assert copy.pread(0, SIZE) == bytes(SIZE)
    copy.close()


def test_growing(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    disk = opened(path, "luks")
    disk.pwrite(SIZE - 512, b"e" * 512)
    with disk.drained():
        disk.node.resize(2 * SIZE)
    disk.pwrite(2 * SIZE - 512, b"f" * 512)
    assert disk.size == 2 * SIZE and disk.pread(SIZE - 512, 512) == b"e" * 512
    disk.close()
