"""Manual pages: every option of every parser is there, and groff has nothing to say about them."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from diskwright.cli.common import Parser
from diskwright.cli.describe import command_names, describe
from diskwright.cli.roff import _text, pages
from tests.cli.run import diskwright


def plain(page: str) -> str:
    """A page without its markup."""
    text = re.sub(r"\\f[BIR]|\\&|\\:", "", page)
    for written, meant in (("\\-", "-"), ("\\(aq", "'"), ("\\(dq", '"'), ("\\(ha", "^"), ("\\(ti", "~"), ("\\e", "\\")):
        text = text.replace(written, meant)
    return text


def test_every_option_of_every_parser_has_its_place() -> None:
    found = pages()
    assert set(found) == {"diskwright.1", *(f"diskwright-{name}.1" for name in command_names())}
    checked = 0
    for name in command_names():
        module = import_module(f"diskwright.cli.commands.{name.replace('-', '_')}")
        assert f"\\fB{_text(name)}\\fR\n{_text(module.SUMMARY)}" in found["diskwright.1"]
        if not hasattr(module, "add_arguments"):
            for option in describe(name, module).options:
                assert f"\n.TP\n{', '.join(option.names)}" in plain(found[f"diskwright-{name}.1"])
            continue
        parser = Parser()
        module.add_arguments(parser)
        text = plain(found[f"diskwright-{name}.1"])
        for action in parser._actions:
            if action.help == argparse.SUPPRESS:
                continue
            if action.option_strings:
                term = f"\n.TP\n{', '.join(action.option_strings)}"
                assert term in text, (name, action.option_strings)
                checked += 1
            if action.help:
                assert " ".join(action.help.split()) in text, (name, action.help)
    assert checked > 100


def test_options_out_of_a_help_text() -> None:
    """Of programs with a command line of their own."""
    from diskwright.cli.commands import io, nbd
    from diskwright.cli.qnbd.arguments import OPTIONS

    options = {names[-1]: option for option in describe("nbd", nbd).options if (names := option.names)}
    assert set(options) == {f"--{option.name}" for option in OPTIONS} - {"--selinux-label"}
    for option in OPTIONS:
        if option.name != "selinux-label":
            told = options[f"--{option.name}"]
            assert bool(told.value) == option.takes_value
            assert told.names == ((f"-{option.letter}",) if option.letter else ()) + (f"--{option.name}",)
    assert options["--detect-zeroes"].words == ("off", "on", "unmap")
    assert options["--snapshot"].help.endswith("is lost at the end")
    options = {option.names[-1]: option for option in describe("io", io).options}
    assert {"--cmd", "--cache", "--read-only", "--version"} <= set(options)
    assert options["--cache"].words == ("none", "writeback", "writethrough", "directsync", "unsafe")


def test_keys_of_formats_and_exit_codes_are_there() -> None:
    found = pages()
    assert "\ncluster_size=size\n" in plain(found["diskwright-create.1"])
    assert "\ncluster_size=size\n" not in plain(found["diskwright-amend.1"])
    assert "\n63\nthe format has no check\n" in plain(found["diskwright-check.1"])


@pytest.mark.parametrize("name", ["diskwright.1", *(f"diskwright-{name}.1" for name in command_names())])
def test_groff_is_content(name: str, peer: Callable[[str], str]) -> None:
    done = subprocess.run(
        [peer("groff"), "-man", "-Tutf8", "-ww", "-P-cbou"], input=pages()[name], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "NAME" in done.stdout and "EXIT" in done.stdout


@pytest.mark.parametrize("text", [".SH", "'br", "a\\b", "a-b", '"quoted"', "^~`"])
def test_text_is_shown_as_it_is(text: str, peer: Callable[[str], str]) -> None:
    page = f'.TH X 1\n.nh\n.SH "A"\n{_text(text)}\n'
    done = subprocess.run(
        [peer("groff"), "-man", "-Tascii", "-ww", "-P-cbou"], input=page, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.stderr == "" and text in done.stdout


def test_the_command(tmp_path: Path) -> None:
    done = diskwright("man", "-d", "pages", cwd=tmp_path)
    assert done.code == 0 and done.out == f"{len(pages())} pages in pages\n"
    assert {path.name: path.read_text() for path in (tmp_path / "pages").iterdir()} == pages()
    assert diskwright("man", cwd=tmp_path).out == pages()["diskwright.1"]
    assert diskwright("man", "map", cwd=tmp_path).out == pages()["diskwright-map.1"]
    for words in (["nothing"], ["-d", "pages", "map"]):
        assert diskwright("man", *words, cwd=tmp_path).code == 1
