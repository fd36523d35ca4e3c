"""Runs this project's command line and, where it is installed, qemu-img."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TIMEOUT = 60


@dataclass(frozen=True)
class Result:
    """What a command left behind. The program's own name in ``err`` reads PROGRAM for both."""

    code: int
    out: str
    err: str


def diskwright(*words: str, cwd: Path) -> Result:
    """Runs a command within this process, which saves an interpreter's start; signals are for ``separately``."""
    from diskwright.cli.main import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    texts = []
    for stream in (out, err):
        stream.flush()
        raw = stream.buffer
        assert isinstance(raw, io.BytesIO)
        texts.append(raw.getvalue().decode(errors="surrogateescape"))
    return _result(code, *texts, "diskwright")


def separately(*words: str, cwd: Path, **more: object) -> Result:
    """Runs a command as a process of its own."""
    return _run([sys.executable, "-m", "diskwright.cli.main", *words], "diskwright", cwd, more)


def qemu_img(*words: str, cwd: Path) -> Result:
    return _run(["qemu-img", *words], "qemu-img", cwd, {})


def qemu_img_with_keys(*words: str, cwd: Path) -> Result:
    """qemu-img where it makes or measures keys: it times itself, and gives up where the clock is too coarse; then
    again."""
    for _ in range(20):
        done = qemu_img(*words, cwd=cwd)
        if "CPU usage" not in done.err:
            return done
    pytest.skip("qemu-img cannot measure its time here")


def make(cwd: Path, *commands: str) -> None:
    """Runs qemu-img or qemu-io command lines that must succeed; words are split at spaces, ``~`` is a space."""
    for command in commands:
        words = [word.replace("~", " ") for word in command.split()]
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """This environment, in which the package under test can be imported wherever the command runs."""
    import diskwright

    source = str(Path(diskwright.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{inherited}" if inherited else source}


def _run(command: list[str], program: str, cwd: Path, more: dict[str, object]) -> Result:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        stdin=subprocess.DEVNULL,
        **more,  # type: ignore[call-overload]
    )
    # Not by subprocess's text mode, which would turn the carriage returns of progress lines into newlines.
    out, err = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
    return _result(done.returncode, out, err, program)


def _result(code: int, out: str, err: str, program: str) -> Result:
    err = err.replace(f"{program}: ", "PROGRAM: ").replace(f"'{program} ", "'PROGRAM ")
    return Result(code, out, err)


@cache
def qemu_version() -> tuple[int, ...]:
    """The installed qemu-img's version; empty when there is none."""
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        return ()
    text = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout
    return tuple(int(part) for part in text.split()[2].split("(")[0].split(".")[:2])


needs_qemu = pytest.mark.skipif(not qemu_version(), reason="needs qemu-img and qemu-io")
needs_same_texts = pytest.mark.skipif(
    not (7, 0) <= qemu_version() < (8, 0), reason="texts are compared with those of qemu-img 7"
)


def same(*words: str, cwd: Path, err: bool = True) -> Result:
    """Runs both programs; asserts equal exit codes, standard output and (unless told not to) standard error."""
    theirs = qemu_img(*words, cwd=cwd)
    ours = diskwright(*words, cwd=cwd)
    assert (ours.code, ours.out) == (theirs.code, theirs.out), (ours, theirs)
    if err:
        assert ours.err == theirs.err
    else:
        assert bool(ours.err) == bool(theirs.err), (ours, theirs)
    return ours
