"""LUKS2 made and amended here beside cryptsetup: each opens what the other has made and changed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import diskwright
from diskwright.codecs.luks import read_header
from diskwright.codecs.luks.luks2_write import publish
from diskwright.core.graph import Graph
from diskwright.core.options import parse
from diskwright.core.secrets import Secrets
from diskwright.errors import DiskwrightError, ImageError, OptionError, UnsupportedFeature
from diskwright.formats.luks.options import LuksAmendOptions
from tests.codecs.test_luks import area_of
from tests.formats.luks.peers import PASSPHRASE, needs_cryptsetup, opened, run, secret_file

SIZE = 1 << 20
SECRETS = {"sec0": PASSPHRASE, "sec1": b"another"}


def create(path: Path, **more: object) -> None:
    chosen = {"key-secret": "sec0", "iter-time": 1, "luks-version": "2", "pbkdf": "pbkdf2", **more}
    diskwright.create(path, "luks", SIZE, secrets=SECRETS, **chosen)


def amend(path: Path, **changes: str) -> None:
    graph = Graph(secrets=Secrets(SECRETS))
    node = graph.open({"driver": "luks", "file.filename": str(path), "key-secret": "sec0"}, writable=True)
    try:
        node.amend(parse(LuksAmendOptions, changes, owner="luks"))  # type: ignore[attr-defined]
    finally:
        graph.close()


def opens_by_cryptsetup(path: Path, passphrase: bytes = PASSPHRASE) -> bool:
    key = str(secret_file(path.parent, passphrase))
    return run("cryptsetup", "open", "--test-passphrase", "--key-file", key, str(path), check=False).returncode == 0


def volume_key(path: Path, passphrase: bytes = PASSPHRASE) -> bytes:
    target = path.parent / "volume-key"
    run("cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", str(target), "--key-file",
        str(secret_file(path.parent, passphrase)), str(path))  # fmt: skip
    data = target.read_bytes()
    target.unlink()
    return data


@needs_cryptsetup
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"pbkdf": "argon2id"},
        {"pbkdf": "argon2i", "sector-size": 4096},
        {"sector-size": 2048, "cipher-alg": "aes-128"},
        {"cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha512"},
        {"cipher-mode": "cbc", "ivgen-alg": "plain", "cipher-alg": "aes-192"},
        {"cipher-mode": "ecb", "sector-size": 512},
    ],
)
def test_made_here_opened_by_cryptsetup(chosen: dict[str, object], tmp_path: Path) -> None:
    path, data = tmp_path / "a.luks", random.Random(1).randbytes(SIZE)
    create(path, **chosen)
    disk = opened(path, "luks")
    form = disk.node.format  # type: ignore[attr-defined]
    assert disk.size == SIZE and path.stat().st_size == SIZE + (16 << 20)
    key = form.header.unlock(form.area, PASSPHRASE)
    disk.pwrite(0, data)
    disk.close()
    assert opens_by_cryptsetup(path) and not opens_by_cryptsetup(path, b"other")
    assert volume_key(path) == key
    dump = run("cryptsetup", "luksDump", str(path)).stdout
    assert f"{chosen.get('pbkdf', 'pbkdf2')}\n" in dump and f"sector: {chosen.get('sector-size', 512)} [" in dump
    again = opened(path, "luks", writable=False)
    assert again.pread(0, SIZE) == data and again.pread(777, 5555) == data[777 : 777 + 5555]
    again.close()


@needs_cryptsetup
def test_key_slots_changed_by_each_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    amend(path, **{"state": "active", "new-secret": "sec1", "iter-time": "1"})
    assert opens_by_cryptsetup(path) and opens_by_cryptsetup(path, b"another")
    (tmp_path / "third").write_bytes(b"third")
    run("cryptsetup", "luksAddKey", "-q", "--pbkdf", "argon2id", "--pbkdf-memory", "4096", "--pbkdf-force-iterations",
        "4", "--key-file", str(secret_file(tmp_path)), str(path), str(tmp_path / "third"))  # fmt: skip
    opened(path, "luks", passphrase=b"third").close()
    run("cryptsetup", "luksKillSlot", "-q", "--key-file", str(tmp_path / "third"), str(path), "1")
    with pytest.raises(ImageError, match="Invalid password"):
        opened(path, "luks", passphrase=b"another")
    amend(path, **{"state": "active", "new-secret": "sec1", "iter-time": "1"})
    amend(path, state="inactive", keyslot="2")
    assert opens_by_cryptsetup(path, b"another") and not opens_by_cryptsetup(path, b"third")
    amend(path, **{"state": "inactive", "old-secret": "sec0"})
    assert not opens_by_cryptsetup(path) and opens_by_cryptsetup(path, b"another")


@needs_cryptsetup
@pytest.mark.parametrize("place", [0, 16384])
def test_a_damaged_copy_of_the_header_is_told_and_repaired(place: int, tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    create(path)
    with path.open("r+b") as file:
        file.seek(place + 5000)
        file.write(b"\xff")
    opened(path, "luks").close()  # the other one is enough
    words = ("--object", f"secret,id=sec0,file={secret_file(tmp_path)}", "--image-opts")
    image = f"driver=luks,file.filename={path},key-secret=sec0"
    from diskwright.cli.main import main

    before = path.read_bytes()
    assert main(["check", *words, image]) == 2
    assert path.read_bytes() == before
    assert main(["check", "-r", "all", *words, image]) == 0
    assert main(["check", *words, image]) == 0
    good = path.read_bytes()
    assert good[4096:16384] == good[16384 + 4096 : 32768] == before[16384 - place + 4096 : 32768 - place]
    assert opens_by_cryptsetup(path)


@needs_cryptsetup
def test_a_detached_header(tmp_path: Path) -> None:
    header = tmp_path / "header"
    create(header, **{"detached-header": True})
    (tmp_path / "data").write_bytes(bytes(SIZE))
    disk = opened(tmp_path / "data", "luks", **{"header.filename": str(header)})
    disk.pwrite(0, b"guest" * 100)
    assert disk.size == SIZE
    disk.close()
    key = str(secret_file(tmp_path))
    run("cryptsetup", "open", "--test-passphrase", "--key-file", key, "--header", str(header), str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("chosen", "kind", "what"),
    [
        ({"luks-version": "1", "pbkdf": "argon2id"}, OptionError, "version 1"),
        ({"luks-version": "1", "pbkdf": "pbkdf2", "sector-size": 4096}, OptionError, "version 1"),
        ({"sector-size": 8192}, OptionError, "sector-size is 8192"),
        ({"sector-size": 4096, "ivgen-alg": "plain"}, UnsupportedFeature, "plain"),
        ({"cipher-alg": "twofish-256"}, UnsupportedFeature, "twofish"),
        ({"key-secret": "nope"}, OptionError, "nope"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_touched(
    chosen: dict[str, object], kind: type[DiskwrightError], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.luks"
    path.write_bytes(b"precious")
    with pytest.raises(kind, match=what):
        create(path, **chosen)
    assert path.read_bytes() == b"precious"


def test_sectors_are_numbered_from_the_tweak_on(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    path = tmp_path / "a.luks"
    create(path)
    area, medium = area_of(path.read_bytes())
    header = read_header(area)
    key = header.unlock(area, PASSPHRASE)
    data = json.loads(json.dumps(header.data))
    data["segments"]["0"]["iv_tweak"] = "1000"
    publish(header, area, data)  # type: ignore[arg-type]
    path.write_bytes(medium.data)
    disk = opened(path, "luks")
    disk.pwrite(5 * 512, b"p" * 512 * 40)
    disk.close()
    raw = path.read_bytes()[(16 << 20) :]
    for sector in (5, 44):
        cipher = Cipher(algorithms.AES(key), modes.XTS((1000 + sector).to_bytes(16, "little"))).encryptor()
        assert raw[sector * 512 :][:512] == cipher.update(b"p" * 512)
