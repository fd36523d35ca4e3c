"""What only people see: hints after errors, and progress that nobody asked for."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.cli import faces
from diskwright.cli.hints import HINTS, hint_for
from diskwright.cli.progress import Amount, Reporter
from tests.cli.run import diskwright, environment, make, needs_qemu
from tests.formats.qcow2.support import created


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HINTS, "1")


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["info", "-f", "qcwo2", "image"], "Did you mean 'qcow2'?"),
        (["create", "-f", "qcow3", "x", "1M"], "Did you mean 'qcow2'?"),
        (["convert", "-O", "gadget", "image", "x"], "Formats are "),
        (["infoo", "image"], "Did you mean 'info'?"),
        (["convert", "--compress-level", "3"], "Did you mean '--compression-level'?"),
        (["create", "-f", "qcow2", "-o", "clustersize=4k", "x", "1M"], "Did you mean 'cluster_size'?"),
        (["create", "-f", "qcow2", "x", "10GB"], "Sizes are like"),
        (["resize", "image", "5Z"], "Sizes are like"),
        (["create", "-f", "qcow2", "-b", "image", "x"], "-F qcow2"),
        (["rebase", "-b", "base", "image"], "-F FMT"),
        (["map", "gone.qcow2"], "rebase -u"),
        (["map", "--gate", "closed", "gone.qcow2"], "--gate directory"),
    ],
)
@needs_qemu
def test_hints(words: list[str], hint: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(created(size=1 << 20))
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    make(tmp_path, "qemu-img create -q -u -f qcow2 -b gone -F qcow2 gone.qcow2 1M")
    done = diskwright(*words, cwd=tmp_path)
    first, *_, last = done.err.splitlines()
    assert done.code and first.startswith("PROGRAM: ") and hint in last, done


@needs_qemu
@pytest.mark.usefixtures("hints")
def test_an_image_in_use(tmp_path: Path) -> None:
    make(tmp_path, "qemu-img create -q -f qcow2 image 1M")
    command = ["qemu-io", "-f", "qcow2", "image"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None and user.stdin is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        assert user.stdout.readline()  # it has the image open
        for words, hint in (
            (["info", "image"], "-U looks at it"),
            (["inspect", "image"], "-U looks at it"),
            (["resize", "image", "2M"], "needs it to itself"),
        ):
            done = diskwright(*words, cwd=tmp_path)
            assert done.code == 1 and hint in done.err.splitlines()[-1], done
        assert diskwright("inspect", "-U", "image", cwd=tmp_path).code == 0
        user.stdin.close()
        user.wait(60)


def test_scripts_and_other_faces_see_none(monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = "Unknown driver 'qcwo2'", ["info"]
    monkeypatch.delenv(HINTS, raising=False)
    assert hint_for(text, words) == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert "qcow2" in hint_for(text, words)
    monkeypatch.setenv(HINTS, "0")
    assert hint_for(text, words) == ""
    monkeypatch.setenv(HINTS, "1")
    monkeypatch.setattr(faces, "_current", faces.FACES["qemu-img"])
    assert hint_for(text, words) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "face", "given", "style"),
    [
        (Terminal, "diskwright", {}, "line"),
        (io.StringIO, "diskwright", {}, None),
        (Terminal, "qemu-img", {}, None),
        (Terminal, "diskwright", {"quiet": True}, None),
        (Terminal, "diskwright", {"progress": "none"}, None),
        (Terminal, "diskwright", {"output": "json"}, None),
        (Terminal, "qemu-img", {"show_progress": True}, "line"),
        (io.StringIO, "diskwright", {"progress": "json"}, "json"),
    ],
)
def test_when_progress_is_shown(
    stream: Callable[[], io.StringIO], face: str, given: dict[str, object], style: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(faces, "_current", faces.FACES.get(face, faces.OWN))
    monkeypatch.setattr(sys, "stdout", stream())
    args = argparse.Namespace(**{"progress": None, "show_progress": False, "quiet": False, **given})
    assert Reporter.of(args, lambda: Amount(1, 2), phase="x").style == style


@pytest.mark.parametrize("long", [False, True])
def test_what_ends_soon_shows_nothing(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    seen = []

    def measure() -> Amount:
        seen.append(1)
        return Amount(1, 2)

    reporter = Reporter("line", measure, phase="x", patience=0.01 if long else 3600.0)
    with reporter:
        while long and not seen:
            pass
    reporter.end_line()
    assert ("50.00/100%" in shown.getvalue() and shown.getvalue().endswith("\n")) == long
    assert bool(shown.getvalue()) == long


def test_every_command_with_json_output_takes_json(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(created(size=1 << 20, cluster_size=4096))
    for words in (["info"], ["map"], ["check"], ["measure"], ["inspect"], ["compact"]):
        long = diskwright(*words, "--output=json", "image", cwd=tmp_path)
        short = diskwright(*words, "--json", "image", cwd=tmp_path)
        assert long.code == 0 and long.out.startswith(("{", "[")), long
        assert short == long


def test_a_start_loads_no_hints(tmp_path: Path) -> None:
    """An ordinary error of a script costs no look at all commands."""
    code = (
        "import sys; from diskwright.cli.main import main; main(['info', '-f', 'nothing', 'x']);"
        "assert 'diskwright.cli.describe' not in sys.modules and 'difflib' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**environment(), HINTS: ""}, capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
