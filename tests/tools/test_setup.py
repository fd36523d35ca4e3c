"""The decisions of tools/setup.py. That it works on a bare machine takes a bare machine: docs/testing.md says how."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tools import setup


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of no contents, with setup.py believing that it is its own."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "setup.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("")
    for name, path in (("ROOT", ""), ("VENV", ".venv"), ("VENV_PYTHON", ".venv/bin/python")):
        monkeypatch.setattr(setup, name, str(tmp_path / path).rstrip("/"))
    monkeypatch.setattr(setup, "STAMP", str(tmp_path / ".venv" / "setup.json"))
    monkeypatch.setattr(setup, "LOG", str(tmp_path / "log"))
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_missing_packages_are_named_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "there", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    needs = (("there", "a"), ("absent-1", "b"), ("absent-2", "c"), ("absent-3", "b"), (str(tmp_path / "there"), "d"))
    assert setup.missing_packages(needs) == ["b", "c"]
    assert setup.missing_packages(((str(tmp_path / "absent"), "e"),)) == ["e"]
    assert setup.install_packages([]) is False


def test_what_cannot_be_installed_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match="not a Debian machine: install what Debian calls fio nbdkit"):
        setup.install_packages(["fio", "nbdkit"])
    program(tmp_path / "apt-get", "exit 1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(setup.SetupError, match="run as root, or install sudo, to install: fio"):
        setup.install_packages(["fio"])


def test_package_lists_are_fetched_when_an_installation_fails(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """apt-get here is a script that can install only after an update."""
    calls = place / "calls"
    updated = place / "updated"
    cases = f"*update*) : > {updated};; *fio*) test -e {updated};; *) echo nope; false;;"
    program(place / "apt-get", f'echo "$@" >> {calls}\ncase "$*" in {cases} esac')
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert setup.install_packages(["fio"]) is True
    words = [line.split() for line in calls.read_text().splitlines()]
    assert ["install" in line for line in words] == [True, False, True]
    assert all("--no-install-recommends" in line for line in words if "install" in line)
    with pytest.raises(setup.SetupError, match="can't be installed: no-such"):
        setup.install_packages(["no-such"])
    assert "nope" in capfd.readouterr().err  # the log's end is shown


def test_an_environment_is_made_anew_only_when_it_has_to_be(place: Path) -> None:
    assert not setup.environment_is_ready(())
    stamp = Path(setup.STAMP)
    stamp.write_text(json.dumps({"key": setup.key(), "extras": ["dev"]}))
    assert setup.environment_is_ready(()) and setup.environment_is_ready(("dev",))
    assert not setup.environment_is_ready(("dev", "more"))
    (place / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert not setup.environment_is_ready(())
    stamp.write_text(json.dumps({"key": setup.key(), "extras": []}))
    assert setup.environment_is_ready(())
    os.unlink(setup.VENV_PYTHON)
    assert not setup.environment_is_ready(())
    stamp.write_text("{")
    assert not setup.environment_is_ready(())


def test_the_key_depends_on_the_place(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = setup.key()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tools").symlink_to(place / "tools")
    (other / "pyproject.toml").symlink_to(place / "pyproject.toml")
    monkeypatch.setattr(setup, "ROOT", str(other))
    assert setup.key() != before


def test_the_running_python_is_taken_when_new_enough() -> None:
    assert setup.find_python() == (os.path.realpath(sys.executable), sys.version_info[:2])


def test_another_python_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 or newer is needed; the newest found is 3\.9"):
        setup.find_python()
    program(tmp_path / "python3", "echo 3 9")
    program(tmp_path / "python3.12", "echo this version is not installed; exit 127")
    with pytest.raises(setup.SetupError, match="needed"):
        setup.find_python()
    program(tmp_path / "python3.11", "echo 3 11")
    assert setup.find_python() == (str(tmp_path / "python3.11"), (3, 11))


def test_a_failing_command_shows_its_own_end_of_the_log(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup.run(["/bin/sh", "-c", "echo earlier"], "never")
    with pytest.raises(setup.SetupError, match="it broke"):
        setup.run(["/bin/sh", "-c", "seq 100; exit 3"], "it broke")
    shown = capfd.readouterr().err
    assert "100\n" in shown and "earlier" not in shown and "\n50\n" not in shown
    assert setup.logged(["/no/such/program"]) == 127


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "nonsense"])
    assert setup.main() == 2
    assert "usage" in capsys.readouterr().err
