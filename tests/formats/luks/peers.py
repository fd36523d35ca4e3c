"""qemu-img, qemu-io and cryptsetup at work on encrypted images, by a passphrase that a file holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from diskwright.core.disk import Disk
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.secrets import Secrets

PASSPHRASE = b"correct horse"
TIMEOUT = 120

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
needs_cryptsetup = pytest.mark.skipif(shutil.which("cryptsetup") is None, reason="needs cryptsetup")


def secret_file(folder: Path, passphrase: bytes = PASSPHRASE) -> Path:
    path = folder / "passphrase"
    path.write_bytes(passphrase)
    return path


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
    return done


def qemu_create(path: Path, format: str, size: int, options: str) -> None:
    """qemu-img measures the processor's time, and gives up where the clock is too coarse: then again."""
    secret = f"secret,id=sec0,file={secret_file(path.parent)}"
    words = ("qemu-img", "create", "-q", "--object", secret, "-f", format, "-o", options, str(path), str(size))
    for _ in range(20):
        done = run(*words, check=False)
        if done.returncode == 0:
            return
        assert "CPU usage" in done.stderr, done.stderr
    pytest.skip("qemu-img cannot measure its time here")


def _image(path: Path, format: str) -> str:
    key = "key-secret" if format == "luks" else "encrypt.key-secret"
    return f"driver={format},file.filename={path},{key}=sec0"


def qemu_read(path: Path, format: str) -> bytes:
    """The guest's bytes, as qemu-img sees them."""
    out = path.parent / "read.raw"
    secret = f"secret,id=sec0,file={secret_file(path.parent)}"
    run("qemu-img", "convert", "--object", secret, "--image-opts", _image(path, format), "-O", "raw", str(out))
    data = out.read_bytes()
    out.unlink()
    return data


def qemu_write(path: Path, format: str, data: bytes) -> None:
    source = path.parent / "write.raw"
    source.write_bytes(data)
    secret = f"secret,id=sec0,file={secret_file(path.parent)}"
    run("qemu-img", "convert", "-n", "--object", secret, "--image-opts", f"driver=raw,file.filename={source}",
        "--target-image-opts", _image(path, format))  # fmt: skip
    source.unlink()


def qemu_check(path: Path) -> None:
    secret = f"secret,id=sec0,file={secret_file(path.parent)}"
    run("qemu-img", "check", "--object", secret, "--image-opts", _image(path, "qcow2"))


def qemu_io(path: Path, format: str, *commands: str) -> str:
    secret = f"secret,id=sec0,file={secret_file(path.parent)}"
    more = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "--object", secret, *more, "--image-opts", _image(path, format)).stdout
    assert "failed" not in out, out
    return out


def opened(path: Path, format: str, *, writable: bool = True, passphrase: bytes = PASSPHRASE, **more: object) -> Disk:
    graph = Graph(OpenGate(), Secrets({"sec0": passphrase}))
    key = "key-secret" if format == "luks" else "encrypt.key-secret"
    try:
        node = graph.open({"driver": format, "file.filename": str(path), key: "sec0", **more}, writable=writable)
    except BaseException:
        graph.close()
        raise
    return graph.disk(node, owns_graph=True)
