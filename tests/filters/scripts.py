"""Scripts of requests, carried out by us and by qemu-io on equal images that lie on a blkdebug; which step fails?"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, Node
from diskwright.filters.blkdebug.driver import Blkdebug
from diskwright.units import parse_size
from tests.peers.qemu_img import qemu_img

Step = tuple[str, ...]


@dataclass(frozen=True)
class Script:
    """``prepare`` makes ``image`` (and what belongs to it) in a directory. A step is a list of qemu-io's commands,
    after which nothing waits to be written: when metadata is written between is each program's own affair."""

    prepare: Callable[[Path], None]
    steps: tuple[Step, ...]


def _create(folder: Path, *options: str, size: str = "4M", name: str = "image", backing: bool = False) -> None:
    below = ("-b", str(folder / "base"), "-F", "qcow2") if backing else ()
    chosen = tuple(word for option in options for word in ("-o", option))
    qemu_img("create", "-q", "-f", "qcow2", *chosen, *below, str(folder / name), size)


def _qemu_io(*commands: str, image: Path) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, str(image)], check=True, capture_output=True)


def _on_a_base(folder: Path) -> None:
    _create(folder, name="base")
    _qemu_io("write -P 9 0 4M", image=folder / "base")
    _create(folder, backing=True)


def _with_data(folder: Path) -> None:
    _create(folder, "cluster_size=4k", size="8M")
    _qemu_io("write -P 1 0 1M", "write -P 2 4M 1M", image=folder / "image")


def _with_a_snapshot(folder: Path) -> None:
    _with_data(folder)
    qemu_img("snapshot", "-c", "one", str(folder / "image"))


SCRIPTS = {
    "new": Script(
        _on_a_base,
        (
            ("write -P 1 0 64k", "flush"),
            ("read 0 64k",),
            ("read 2M 4k",),
            ("write -P 2 70k 4k", "flush"),
            ("write -c -P 4 1M 64k", "flush"),
            ("read 1M 64k",),
            ("write -P 4 4k 4k", "flush"),
        ),
    ),
    "data": Script(
        _with_data,
        (
            ("read 0 4k",),
            ("write -P 3 0 4k", "flush"),
            ("write -P 3 2M 1M", "flush"),
            ("write -P 3 3M 1M", "flush"),
            ("truncate 64M",),
            ("write -P 4 32M 64k", "flush"),
            ("truncate 2G",),
        ),
    ),
    "snapshot": Script(
        _with_a_snapshot,
        (
            ("read 1M 4k",),
            ("write -P 4 0 4k", "flush"),
            ("write -P 4 4100k 2k", "flush"),
            ("write -P 4 4102k 2k", "flush"),
        ),
    ),
}


def prepare(script: Script, model: Path, folder: Path) -> None:
    """A fresh copy of the script's images, which are made once, in ``model``."""
    if not model.exists():
        model.mkdir(parents=True)
        script.prepare(model)
    folder.mkdir()
    shutil.copy(model / "image", folder / "image")


def ours(script: Script, folder: Path, config: Path | None, heard: list[str] | None = None) -> int | str | None:
    """The step that fails; ``open``; or None."""
    graph = Graph(OpenGate())
    try:
        node = graph.open(f"blkdebug:{config or ''}:{folder / 'image'}", writable=True)
    except OSError:
        return "open"
    debug = node.file.filter  # type: ignore[union-attr]
    assert isinstance(debug, Blkdebug) and isinstance(node, FormatNode)
    if heard is not None:
        debug.rules.heard = heard.append
    failed = None
    for number, step in enumerate(script.steps):
        try:
            for command in step:
                carry_out(node, command)
        except OSError:
            failed = number
            break
    try:
        graph.close()
    except OSError:
        pass  # an error at the end counts in neither program
    return failed


def carry_out(node: Node, command: str) -> None:
    """One of qemu-io's commands, as far as scripts need them."""
    name, *words = command.split()
    numbers = [parse_size(word) for word in words if word[0] != "-"]
    pattern = numbers.pop(0) if "-P" in words else 0
    if name == "flush":
        node.flush()
    elif name == "truncate":
        node.resize(numbers[0])
    elif name == "read":
        node.pread(*numbers)
    elif name == "discard":
        node.discard(*numbers)
    elif "-z" in words:
        node.write_zeros(*numbers, unmap="-u" in words)
    else:
        data = bytes([pattern]) * numbers[1]
        if "-c" in words:
            node.write_compressed([(numbers[0], memoryview(data))])
        else:
            node.pwrite(numbers[0], data)


def theirs(script: Script, folder: Path, config: Path) -> int | str | None:
    """The same of qemu-io. ``length`` after each step shows how far it has come."""
    words = [word for step in script.steps for command in (*step, "length") for word in ("-c", command)]
    done = subprocess.run(
        ["stdbuf", "-oL", "qemu-io", *words, f"blkdebug:{config}:{folder / 'image'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if "can't open" in done.stdout:
        return "open"
    step = 0
    for line in done.stdout.splitlines():
        if "failed" in line or "rror" in line:
            return step
        step += re.fullmatch(r"[0-9.]+ (bytes|[KMGT]iB)", line) is not None
    return None
