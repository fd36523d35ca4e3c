"""The names the program answers to: how it is called by them, what that changes, and the links that do it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.cli import faces, main
from diskwright.cli.common import Failure, Parser, UsageError
from tests.cli.run import diskwright, environment, needs_qemu


@pytest.fixture
def called(request: pytest.FixtureRequest) -> Iterator[None]:
    faces.put_on("/some/where/qemu-img")
    yield
    faces.put_on("diskwright")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The console script as installers write it."""
    path = tmp_path / "bin" / "diskwright"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom diskwright.cli.main import main\nif __name__ == '__main__':\n"
        "    sys.argv[0] = sys.argv[0].removesuffix('.exe')\n    sys.exit(main())\n"
    )
    path.chmod(0o755)
    return path


def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(
        command, env={**environment(), **more}, capture_output=True, text=True, check=False, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


# -- what the name changes -----------------------------------------------------------------------


@pytest.mark.usefixtures("called")
def test_version_names_the_one_that_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert re.match(r"qemu-img version 7\.2\.\d+ \(diskwright \S+\)\n", capsys.readouterr().out)


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["info", "-h"], ["convert", "a", "--he"]])
def test_help_is_one_page(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("qemu-img version ")
    (formats,) = re.findall(r"^Supported formats: (.*)$", out, re.MULTILINE)
    assert {"raw", "qcow2", "luks"} <= set(formats.split())
    for command in ("bench", "convert", "snapshot"):
        assert re.search(rf"^  {command} .*\[-q\]", out, re.MULTILINE)
    assert "\n  mirror " not in out and "\n  compact " not in out


@pytest.mark.usefixtures("called")
def test_only_the_commands_of_that_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["compact", "x"]) == 1
    assert capsys.readouterr().err.startswith("qemu-img: Command not found: compact\nTry 'qemu-img --help'")


def test_defaults_are_those_of_the_face(monkeypatch: pytest.MonkeyPatch) -> None:
    from diskwright.cli.commands import convert

    seen = []
    monkeypatch.setattr(convert, "run", lambda args: seen.append(args.target_cache) or 0)
    main.main(["convert", "a", "b"])
    faces.put_on("qemu-img")
    try:
        main.main(["convert", "a", "b"])
        main.main(["convert", "-t", "none", "a", "b"])
    finally:
        faces.put_on("diskwright")
    assert seen == ["writeback", "unsafe", "none"]


def test_our_own_options_do_not_stand_in_the_way() -> None:
    parser = Parser()
    parser.add_argument("--progress")
    parser.add_argument("--preallocation")
    with pytest.raises(UsageError, match="unrecognized option '--p'"):
        parser.parse(["--p", "x"])
    parser.shortened = frozenset({"--preallocation"})
    assert parser.parse(["--p", "x"]).preallocation == "x"
    assert parser.parse(["--progress=y"]).progress == "y"


# -- the command line ----------------------------------------------------------------------------


def test_values_may_look_like_options() -> None:
    parser = Parser()
    parser.add_argument("-o")
    parser.add_argument("-q", action="store_true")
    parser.add_argument("--long")
    parser.add_argument("names", nargs="*")
    args = parser.parse(["-o", "-q", "--long", "--", "-qo-x", "-", "-o", "last"])
    assert (args.o, args.q, args.long, args.names) == ("last", True, "--", ["-"])
    with pytest.raises(UsageError, match="missing argument for option '-o'"):
        parser.parse(["a", "-o"])
    with pytest.raises(UsageError, match="unrecognized option '-qz'"):
        parser.parse(["-qz"])


def test_the_first_mistake_is_told() -> None:
    def refuse(text: str) -> str:
        raise Failure(f"bad {text}")

    parser = Parser()
    parser.add_argument("-a", type=refuse)
    with pytest.raises(Failure, match="bad x"):
        parser.parse(["-a", "x", "--unknown"])
    with pytest.raises(UsageError, match="unrecognized option '--unknown'"):
        parser.parse(["--unknown", "-a", "x"])


def test_operands_go_where_they_were_declared() -> None:
    parser = Parser()
    parser.add_argument("first")
    parser.add_argument("rest", nargs="*")
    args = parser.parse(["a", "b", "c"])
    assert (args.first, args.rest) == ("a", ["b", "c"])
    with pytest.raises(UsageError, match="first is missing"):
        parser.parse([])
    single = Parser()
    single.add_argument("one")
    with pytest.raises(UsageError, match="Unexpected argument: b"):
        single.parse(["a", "b"])


def test_options_that_exclude_each_other() -> None:
    parser = Parser()
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-a", "--alpha")
    group.add_argument("-b", "--beta", action="store_true")
    parser.add_argument("--must", required=True)
    with pytest.raises(UsageError, match="--al and -b exclude each other"):
        parser.parse(["--al", "x", "-b", "--must=1"])
    with pytest.raises(UsageError, match="--must is missing"):
        parser.parse(["-b"])
    assert parser.parse(["-b", "--must=1"]).beta


def test_salvaging_keeps_all_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sectors of the source give errors; all others of their pieces are in the copy."""
    from diskwright.core.node import FormatNode

    data = bytes(range(1, 251)) * 4000
    data += bytes(-len(data) % 512)
    (tmp_path / "source").write_bytes(data)
    honest = FormatNode.readv

    def failing(self: FormatNode, segments: object, **more: object) -> None:
        for offset, piece in segments:  # type: ignore[attr-defined]
            if self.filename == "source" and any(offset <= bad < offset + len(piece) for bad in (4096, 900 * 512)):
                raise OSError(5, "Input/output error")
        honest(self, segments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(FormatNode, "readv", failing)
    monkeypatch.setattr(FormatNode, "place", lambda self, offset, length: None)
    failed = diskwright("convert", "-f", "raw", "source", "copy", cwd=tmp_path)
    assert failed.code == 1 and "error while reading at byte" in failed.err
    done = diskwright("convert", "-f", "raw", "--salvage", "source", "copy", cwd=tmp_path)
    assert done.code == 0
    assert sorted(done.err.splitlines()) == [
        "PROGRAM: warning: error while reading offset 4096: Input/output error",
        "PROGRAM: warning: error while reading offset 460800: Input/output error",
    ]
    wanted = bytearray(data)
    for bad in (4096, 900 * 512):
        wanted[bad : bad + 512] = bytes(512)
    assert (tmp_path / "copy").read_bytes() == wanted
    assert diskwright("convert", "-q", "-f", "raw", "--salvage", "source", "copy", cwd=tmp_path).err == ""


# -- links ---------------------------------------------------------------------------------------


def test_install_and_uninstall(script: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1024))
    done = run(script, "tools", "install", tmp_path, "qemu-img", PATH=f"{tmp_path}:{os.environ['PATH']}")
    link = tmp_path / "qemu-img"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{link} -> {script}\n", "")
    shown = run(link, "info", tmp_path / "nowhere")
    assert shown.returncode == 1 and shown.stderr.startswith("qemu-img: Could not open ")
    again = run(script, "tools", "install", "-q", tmp_path, "qemu-img", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    listed = run(script, "tools", "list", PATH=str(tmp_path))
    assert listed.stdout.split() == ["qemu-img", "diskwright", str(link)]
    gone = run(script, "tools", "uninstall", tmp_path)
    assert (gone.returncode, gone.stdout) == (0, f"{link} removed\n") and not link.is_symlink()


def test_a_link_to_a_link(script: Path, tmp_path: Path) -> None:
    """As pipx makes them: its own link to the script of a virtual environment is what is called."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "diskwright").symlink_to(script)
    assert run(tmp_path / "local" / "diskwright", "tools", "install", tmp_path).returncode == 0
    assert run(tmp_path / "qemu-img", "--version").stdout.startswith("qemu-img version")


def test_other_programs_are_left_alone(script: Path, tmp_path: Path) -> None:
    (tmp_path / "qemu-img").write_text("#!/bin/sh\n")
    done = run(script, "tools", "install", tmp_path)
    assert done.returncode == 1 and "not one of ours; nothing was installed" in done.stderr
    assert not (tmp_path / "qemu-nbd").exists() and not (tmp_path / "qemu-io").exists()
    gone = run(script, "tools", "uninstall", tmp_path)
    assert gone.returncode == 0 and "left alone" in gone.stderr
    assert (tmp_path / "qemu-img").read_text() == "#!/bin/sh\n"


def test_a_link_that_path_does_not_lead_to_is_told(script: Path, tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    done = run(script, "tools", "install", tmp_path / "aside", "qemu-img", PATH="/nowhere")
    assert done.returncode == 0 and "PATH does not lead to" in done.stderr


def test_a_link_of_an_installation_that_is_gone_is_ours(script: Path, tmp_path: Path) -> None:
    (tmp_path / "qemu-img").symlink_to(tmp_path / "old" / "diskwright")
    assert run(script, "tools", "install", tmp_path, "qemu-img").returncode == 0
    assert (tmp_path / "qemu-img").resolve() == script


@pytest.mark.parametrize("long", [False, True])
def test_launchers(long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no script to link to. The package is found without any variable of the environment."""
    from diskwright.cli.commands import tools

    if long:
        directory = tmp_path / ("long name with spaces " + "x" * 120)
        directory.mkdir()
        (directory / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (directory / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(directory / "python"))
    monkeypatch.setattr(sys, "argv", ["/x/diskwright/__main__.py"])
    assert diskwright("tools", "install", str(tmp_path), "qemu-img", cwd=tmp_path).code == 0
    launcher = tmp_path / "qemu-img"
    assert tools.is_ours(str(launcher)) and not launcher.is_symlink()
    (tmp_path / "json.py").write_text("raise SystemExit('a module beside the launcher was taken')\n")
    done = subprocess.run(
        [launcher, "--version"], capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path
    )
    assert done.stdout.startswith("qemu-img version"), done.stderr
    assert diskwright("tools", "uninstall", str(tmp_path), cwd=tmp_path).code == 0
    assert not launcher.exists()


@pytest.mark.parametrize("words", ["tools", "tools none", "tools install", "tools install . it", "tools install no"])
def test_wrong_words(words: str, tmp_path: Path) -> None:
    assert diskwright(*words.split(), cwd=tmp_path).code == 1


# -- starting ------------------------------------------------------------------------------------


@needs_qemu
def test_info_under_that_name_loads_as_little(script: Path, tmp_path: Path) -> None:
    link = tmp_path / "qemu-img"
    link.symlink_to(script)
    assert run(link, "create", "-q", "-f", "qcow2", tmp_path / "disk", "1M").returncode == 0
    done = run(sys.executable, "-X", "importtime", link, "info", tmp_path / "disk")
    assert done.returncode == 0 and done.stdout.startswith("image: ")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "diskwright.cli.parser" in loaded
    unwanted = {
        "numpy",
        "asyncio",
        "json",
        "shutil",
        "tempfile",
        "importlib.metadata",
        "email",
        "cryptography",
        "ctypes",
    }
    assert not loaded & unwanted
