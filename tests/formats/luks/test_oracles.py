"""The data of LUKS volumes, as programs see it that share no code with QEMU: cryptsetup and libluksde; binary keys."""

from __future__ import annotations

import base64
import importlib.util
import random
from pathlib import Path

import pytest

import diskwright
from diskwright.core.graph import Graph
from diskwright.core.secrets import Secrets
from diskwright.errors import UnsupportedFeature
from tests.cli.run import diskwright as ours
from tests.formats.luks.peers import PASSPHRASE, needs_cryptsetup, opened, run, secret_file

SIZE = 1 << 20
HERE = {"key-secret": "sec0", "iter-time": 1}
SECOND = {**HERE, "luks-version": "2", "pbkdf": "pbkdf2"}
BINARY = bytes(range(256)) * 3 + b"\0\n\r\xff" + b"end\n"


def make(path: Path, data: bytes, **options: object) -> None:
    diskwright.create(path, "luks", len(data), secrets={"sec0": PASSPHRASE}, **options)
    disk = opened(path, "luks")
    disk.pwrite(0, data)
    disk.close()


@needs_cryptsetup
@pytest.mark.parametrize(
    "options",
    [
        {"sector-size": 512},
        {"sector-size": 4096},
        {"cipher-alg": "aes-128", "sector-size": 1024},
        {"cipher-mode": "cbc", "ivgen-alg": "essiv"},
        {"cipher-mode": "cbc", "ivgen-alg": "plain64", "sector-size": 4096},
        {"cipher-mode": "cbc", "ivgen-alg": "plain", "cipher-alg": "aes-192"},
    ],
)
def test_cryptsetup_decrypts_what_was_written_here(options: dict[str, object], tmp_path: Path) -> None:
    """In place, without a device mapper."""
    path, data = tmp_path / "image", random.Random(1).randbytes(SIZE)
    make(path, data, **SECOND, **options)
    run("cryptsetup", "reencrypt", "-q", "--decrypt", "--force-offline-reencrypt", "--header", str(tmp_path / "header"),
        "--key-file", str(secret_file(tmp_path)), str(path))  # fmt: skip
    assert path.read_bytes()[:SIZE] == data


@needs_cryptsetup
@pytest.mark.parametrize("cipher", ["aes-xts-plain64", "aes-cbc-essiv:sha256"])
def test_what_cryptsetup_encrypted_anew_is_read_here(cipher: str, tmp_path: Path) -> None:
    path, data = tmp_path / "image", random.Random(2).randbytes(SIZE)
    make(path, data, **SECOND, **{"sector-size": 4096})
    key, bits = str(secret_file(tmp_path)), "512" if "xts" in cipher else "256"
    words = ("-q", "--force-offline-reencrypt", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "-c", cipher)
    run("cryptsetup", "reencrypt", *words, "-s", bits, "--key-file", key, str(path))
    disk = opened(path, "luks", writable=False)
    assert disk.pread(0, SIZE) == data
    disk.close()


@needs_cryptsetup
def test_a_reencryption_under_way_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, bytes(SIZE), **SECOND)
    words = ("-q", "--init-only", "--force-offline-reencrypt", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    run("cryptsetup", "reencrypt", *words, "--key-file", str(secret_file(tmp_path)), str(path))
    with pytest.raises(UnsupportedFeature, match="reencrypt"):
        opened(path, "luks")


@pytest.mark.skipif(importlib.util.find_spec("pyluksde") is None, reason="needs libluksde-python")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cipher-alg": "aes-128", "hash-alg": "sha512"},
        {"cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
        {"cipher-mode": "cbc", "ivgen-alg": "plain64", "cipher-alg": "aes-128"},
    ],
)
def test_libluksde_reads_what_was_written_here(options: dict[str, object], tmp_path: Path) -> None:
    import pyluksde

    path, data = tmp_path / "image", random.Random(3).randbytes(SIZE)
    make(path, data, **HERE, **options)
    volume = pyluksde.volume()
    volume.set_password(PASSPHRASE.decode())
    volume.open(str(path))
    assert not volume.is_locked() and volume.get_size() == SIZE and volume.read_buffer(SIZE) == data
    volume.close()


@needs_cryptsetup
@pytest.mark.parametrize("version", ["1", "2"])
def test_a_binary_key_file(version: str, tmp_path: Path) -> None:
    """Every byte counts, zeros and line ends too; a secret may be the file itself or its base64. (qemu-img
    takes UTF-8 only.)"""
    key, text = tmp_path / "key", tmp_path / "text"
    key.write_bytes(BINARY)
    text.write_bytes(base64.encodebytes(BINARY))
    objects = ("--object", "secret,id=k,file=key", "--object", "secret,id=t,file=text,format=base64")
    kdf = ["-o", "luks-version=2,pbkdf=pbkdf2"] if version == "2" else []
    words = ("create", *objects, "-f", "luks", "-o", "key-secret=k,iter-time=1", *kdf, "image", "1M")
    assert ours(*words, cwd=tmp_path).code == 0
    run("cryptsetup", "open", "--test-passphrase", "--key-file", str(key), str(tmp_path / "image"))
    image = f"driver=luks,file.filename={tmp_path}/image,key-secret="
    for secret in ("k", "t"):
        done = ours("convert", *objects, "--image-opts", image + secret, "-O", "raw", "copy", cwd=tmp_path)
        assert done.code == 0, done.err
    with pytest.raises(diskwright.DiskwrightError, match="Invalid password"):
        graph = Graph(secrets=Secrets({"k": BINARY[:-1]}))
        try:
            graph.open({"driver": "luks", "file.filename": f"{tmp_path}/image", "key-secret": "k"})
        finally:
            graph.close()
