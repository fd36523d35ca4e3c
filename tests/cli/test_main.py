"""The entry point: finding commands, what goes wrong, and what a start loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diskwright.cli import main as entry
from diskwright.cli.common import Failure, Parser, UsageError
from tests.cli.run import environment, separately


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from diskwright.version import __version__

    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"diskwright {__version__}\n"


def test_overview_lists_every_command_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("create", "info", "map", "convert", "compare", "check"):
        assert f"\n  {name} " in out
    for name in ("common", "output", "main", "progress"):
        assert f"\n  {name} " not in out


@pytest.mark.parametrize("name", ["create", "info", "map", "convert", "compare", "check"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: diskwright {name} ")
    assert "--gate" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "Not enough arguments"),
        (["bogus"], "Command not found: bogus"),
        (["main"], "Command not found: main"),
        (["common"], "Command not found: common"),
        (["../info"], "Command not found: ../info"),
        (["os.path"], "Command not found: os.path"),
        (["--bogus"], "unrecognized option '--bogus'"),
        (["info"], "Expecting one image file name"),
        (["info", "-f"], "missing argument for option '-f'"),
        (["info", "--zz", "x"], "unrecognized option '--zz'"),
    ],
)
def test_wrong_command_lines(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(words) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first == f"diskwright: {line}"
    assert second.startswith("Try 'diskwright ") and second.endswith("--help' for more information")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Failure("no good", 7), 7, "no good"),
        (OSError(2, "No such file or directory", "x"), 1, "x: No such file or directory"),
        (MemoryError(), 1, "out of memory"),
        (RecursionError("deep"), 1, "something in the command line or an image is nested too deeply"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("no", name="nump"), 1, "this needs the Python package 'nump', which is not installed"),
        (KeyError("k"), 1, "internal error: KeyError: 'k' (set DISKWRIGHT_TRACEBACK=1 to see where)"),
        (
            ValueError("two\nlines"),
            1,
            "internal error: ValueError: two lines (set DISKWRIGHT_TRACEBACK=1 to see where)",
        ),
    ],
)
def test_every_error_is_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diskwright.cli.commands import info

    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert entry.main(["info", "x"]) == code
    assert capsys.readouterr().err == f"diskwright: {line}\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from diskwright.cli.commands import info

    monkeypatch.setattr(info, "run", lambda args: {}["k"])
    monkeypatch.setenv(entry.TRACEBACK, "1")
    with pytest.raises(KeyError):
        entry.main(["info", "x"])


def test_operands_and_options_in_any_order() -> None:
    parser = Parser()
    parser.add_argument("-o")
    parser.add_argument("-p", action="store_true")
    parser.add_argument("-q", action="store_true")
    parser.add_argument("--long-name", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse(["a", "-o", "x", "b", "-pq", "--long", "c", "--", "-d", "--", "e"])
    assert args.names == ["a", "b", "c", "-d", "--", "e"]
    assert (args.o, args.p, args.q, args.long_name) == ("x", True, True, True)
    with pytest.raises(UsageError, match="unrecognized option '-z'"):
        parser.parse(["a", "-z"])


def test_a_name_after_two_hyphens_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "-f").write_bytes(bytes(512))
    done = separately("info", "--output=json", "--", "-f", cwd=tmp_path)
    assert json.loads(done.out)["filename"] == "-f"


@pytest.mark.parametrize("words", [["-f", "raw", "disk.raw"], ["-f", "qcow2", "disk.qcow2"], ["disk.qcow2"]])
def test_info_loads_neither_numpy_nor_package_metadata(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    assert entry.main(["create", "-q", "-f", "qcow2", str(tmp_path / "disk.qcow2"), "1M"]) == 0
    program = (
        "import sys\n"
        "from diskwright.cli.main import main\n"
        f"code = main(['info', *{words}])\n"
        "unwanted = ('numpy', 'importlib.metadata', 'asyncio', 'json', 'email', 'shutil')\n"
        "heavy = [name for name in unwanted if name in sys.modules]\n"
        "ours = [name[15:] for name in sys.modules if name.startswith('diskwright.cli.')]\n"
        "print(code, heavy, sorted(ours))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    expected = ["commands", "commands.info", "common", "faces", "failure", "main", "output", "parser"]
    assert done.stdout.splitlines()[-1] == f"0 [] {expected}"


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for index in range(4000):  # holes and data in turn: a map larger than a pipe holds
            file.seek(index * 131072)
            file.write(b"x" * 512)
    command = [sys.executable, "-m", "diskwright.cli.main", "map", "--output=json", "-f", "raw", str(path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_full_output_device_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "diskwright.cli.main", "info", "-f", "raw", "disk.raw"],
            cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "diskwright: No space left on device\n"


def test_interrupt_is_130(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from diskwright.cli import main\n"
        "from diskwright.cli.commands import info\n"
        # A shell that starts the tests in the background has them ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "info.run = lambda args: os.kill(os.getpid(), signal.SIGINT) or signal.pause()\n"
        "sys.exit(main.main(['info', 'x']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "diskwright: interrupted\n")


def test_undecodable_names_are_printed_as_they_are(tmp_path: Path) -> None:
    name = b"disk-\xff\xe9.raw"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(bytes(512))
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"diskwright.cli.main", b"info", b"-f", b"raw", name],
        cwd=tmp_path, env=environment(), capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == b"image: " + name
