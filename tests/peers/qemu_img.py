"""qemu-img: makes images, and judges those that we made.

python -m tests.peers.qemu_img ARGUMENT...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.peers import process
from tests.peers.process import PeerError


def qemu_img(*arguments: str, check: bool = True, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs qemu-img; raises PeerError when it fails, unless ``check`` is off."""
    return process.run("qemu-img", *arguments, check=check, timeout=timeout)


def create(
    path: str,
    size: int | str | None,
    fmt: str = "qcow2",
    *,
    backing: str = "",
    backing_fmt: str = "",
    **options: object,
) -> str:
    """Creates an image and returns its path. Underscores in the names of ``options`` stand for themselves."""
    arguments = ["create", "-q", "-f", fmt]
    for name, value in options.items():
        arguments += ["-o", f"{name}={_text(value)}"]
    if backing:
        arguments += ["-b", backing, "-F", backing_fmt or "qcow2"]
    qemu_img(*arguments, path, *([] if size is None else [str(size)]))
    return path


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


def convert(source: str, target: str, fmt: str, *, source_fmt: str = "", arguments: tuple[str, ...] = ()) -> str:
    """Copies an image to a new one and returns the target's path."""
    qemu_img("convert", *(["-f", source_fmt] if source_fmt else []), "-O", fmt, *arguments, source, target)
    return target


def info_json(path: str, fmt: str = "", *arguments: str) -> dict[str, Any]:
    """Returns what ``info`` says. -U: the image may be open elsewhere."""
    text = qemu_img("info", "-U", "--output=json", *(["-f", fmt] if fmt else []), *arguments, path).stdout
    result: dict[str, Any] = json.loads(text)
    return result


def check_json(path: str, fmt: str = "", *arguments: str) -> dict[str, Any]:
    """Returns what ``check`` says, with its exit status as "status": 0 clean, 2 corruption, 3 leaks, 63 no check."""
    done = qemu_img("check", "--output=json", *(["-f", fmt] if fmt else []), *arguments, path, check=False)
    if done.returncode not in (0, 2, 3):
        raise PeerError(f"qemu-img check {path}: status {done.returncode}: {done.stderr.strip()}")
    return {"status": done.returncode, **json.loads(done.stdout)}


def assert_clean(path: str, fmt: str = "qcow2") -> None:
    """Fails unless ``check`` finds neither corruption nor a leaked cluster."""
    result = check_json(path, fmt)
    assert result["status"] == 0, {name: value for name, value in result.items() if value}


def compare(one: str, two: str, one_fmt: str = "", two_fmt: str = "", *, strict: bool = False) -> bool:
    """True when the two have the same contents. Raises PeerError when they can't be compared."""
    arguments = ["compare", *(["-f", one_fmt] if one_fmt else []), *(["-F", two_fmt] if two_fmt else [])]
    done = qemu_img(*arguments, *(["-s"] if strict else []), one, two, check=False)
    if done.returncode > 1:
        raise PeerError(f"qemu-img compare {one} {two}: {done.stderr.strip()}")
    return done.returncode == 0


def map_json(path: str, fmt: str = "") -> list[dict[str, Any]]:
    """Returns the extents that ``map`` lists."""
    text = qemu_img("map", "-U", "--output=json", *(["-f", fmt] if fmt else []), path).stdout
    result: list[dict[str, Any]] = json.loads(text)
    return result


def measure_json(*arguments: str) -> dict[str, Any]:
    """Returns what ``measure`` says."""
    result: dict[str, Any] = json.loads(qemu_img("measure", "--output=json", *arguments).stdout)
    return result


def qemu_io(path: str, *commands: str, fmt: str = "qcow2", read_only: bool = False) -> str:
    """Runs qemu-io commands on an image and returns their output. A failed read or write raises PeerError.

    qemu-io's exit status does not cover the verification of patterns (read -P): its output does.
    """
    arguments = ["-f", fmt, *(["-r"] if read_only else [])]
    for command in commands:
        arguments += ["-c", command]
    text = process.run("qemu-io", *arguments, path).stdout
    for line in text.splitlines():
        if "failed" in line.lower():
            raise PeerError(f"qemu-io {path}: {line}")
    return text


def read_all(path: str, fmt: str, scratch: str) -> bytes:
    """Returns the whole contents of a small image, as qemu-img reads it, through a raw file in ``scratch``."""
    raw = os.path.join(scratch, "read-all.raw")
    convert(path, raw, "raw", source_fmt=fmt)
    try:
        with open(raw, "rb") as file:
            return file.read()
    finally:
        os.unlink(raw)


if __name__ == "__main__":
    result = qemu_img(*sys.argv[1:], check=False)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    sys.exit(result.returncode)
