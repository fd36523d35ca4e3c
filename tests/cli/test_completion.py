"""Completion: the generated scripts, run by the shells they are for."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diskwright.cli.completion import script
from diskwright.cli.describe import commands, format_names

SHELLS = ("bash", "zsh")

CASES = [
    (["diskwright", "comp"], {"compact", "compare", "completion"}),
    (["diskwright", "convert", "-O", "qc"], {name for name in format_names() if name.startswith("qc")}),
    (["diskwright", "info", "--format=r"], {"raw"}),
    (["diskwright", "info", "--form"], {"--format"}),
    (["diskwright", "check", "--output=j"], {"json"}),
    (["diskwright", "check", "-r", ""], {"leaks", "all"}),
    (["diskwright", "convert", "-t", "write"], {"writeback", "writethrough"}),
    (["qemu-img", "create", "-f", "qcow2", "-o", "clus"], {"cluster_size="}),
    (["diskwright", "create", "-f", "qcow2", "-o", "cluster_size=4k,lazy"], {"lazy_refcounts="}),
    (["diskwright", "create", "-f", "qcow2", "-o", "cluster_size=4k,lazy_refcounts="], {"on", "off"}),
    (["diskwright", "convert", "-f", "raw", "-O", "qcow2", "-o", "compression_type=z"], {"zlib", "zstd"}),
    (["diskwright", "amend", "-o", "cluster"], set()),
    (["diskwright", "amend", "-o", "comp"], {"compat="}),
    (["diskwright", "dd", "b"], {"bs="}),
    (["diskwright", "dd", "if=disk"], {"disk one.raw", "disk.qcow2"}),
    (["diskwright", "info", "-f", "raw", "disk"], {"disk one.raw", "disk.qcow2"}),
    (["diskwright", "create", "-b", "disk."], {"disk.qcow2"}),
    (["diskwright", "serve", "--socket=disk."], {"disk.qcow2"}),
    (["diskwright", "info", "--", "disk."], {"disk.qcow2"}),
    (["diskwright", "map", "--picture=p"], {"png"}),
    (["diskwright", "map", "--picture", "disk."], {"disk.qcow2"}),
    (["qemu-nbd", "--cache=d"], {"directsync"}),
    (["qemu-nbd", "--cache", "d"], {"directsync"}),
    (["qemu-io", "-f", "qco"], {name for name in format_names() if name.startswith("qco")}),
    (["diskwright", "nbd", "--pers"], {"--persistent"}),
    (["diskwright", "completion", ""], {"bash", "zsh"}),
    (["diskwright", "create", "-o", "no_such=x,", "more"], set()),
]  # fmt: skip

# Calls the function as the shell would, with words cut where bash cuts them, and prints what is offered.
BASH = r"""
. "$1"; shift
COMP_WORDS=()
for word in "$@"; do
    first=1
    while [[ $word == *[=:]* ]]; do
        head="${word%%[=:]*}"
        if [[ -n $head ]]; then COMP_WORDS+=("$head"); first=; fi
        rest="${word#"$head"}"
        COMP_WORDS+=("${rest:0:1}")
        word="${rest:1}"
    done
    if [[ -n $word || -z ${*: -1} || ${#COMP_WORDS[@]} -eq 0 ]]; then COMP_WORDS+=("$word"); fi
done
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { :; }
_diskwright
printf '%s\n' "${COMPREPLY[@]}"
"""

# zsh's own completion takes care of what fits; what it was told is printed instead.
ZSH = r"""
compdef() { print -r -- "$*" > /dev/null }
script=$1; shift
. $script
compset() { PREFIX=${PREFIX[$2+1,-1]} }
compadd() {
    local word
    while [[ $1 != -- ]]; do shift; done
    shift
    for word in "$@"; do [[ $word == "$PREFIX"* ]] && print -r -- $word; done
    return 0
}
_files() { print -rl -- ${PREFIX}*(N) }
words=("$@")
CURRENT=$#
PREFIX="${words[-1]}"
_diskwright
"""


def run_shell(program: str, shell: str, code: str, words: list[str], folder: Path) -> set[str]:
    options = ["--norc", "--noprofile"] if shell == "bash" else ["-f"]
    done = subprocess.run(
        [program, *options, "-c", code, shell, str(folder / "script"), *words],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done
    # bash replaces what follows the last "=", zsh what follows the last ",": each is told what it replaces.
    return {line.rpartition(",")[2] for line in done.stdout.splitlines()} - {""}


@pytest.fixture(params=SHELLS)
def offered(
    request: pytest.FixtureRequest, peer: Callable[[str], str], tmp_path: Path
) -> Callable[[list[str]], set[str]]:
    shell = request.param
    program = peer(shell)
    (tmp_path / "script").write_text(script(shell))
    for name in ("disk one.raw", "disk.qcow2", "other"):
        (tmp_path / name).touch()
    code = BASH if shell == "bash" else ZSH
    return lambda words: run_shell(program, shell, code, words, tmp_path)


def test_what_is_offered(offered: Callable[[list[str]], set[str]]) -> None:
    wrong = [(words, found, right) for words, right in CASES if (found := offered(words)) != right]
    assert not wrong


def test_every_command_and_option_is_offered(offered: Callable[[list[str]], set[str]]) -> None:
    described = commands()
    names = {command.name for command in described}
    assert {"create", "convert", "inspect", "completion", "man"} <= names
    assert offered(["diskwright", ""]) == names | {"--help", "--version"}
    for command in described:
        if command.options:
            wanted = {name for option in command.options for name in option.names}
            if command.name == "map":
                wanted |= {"--picture=text", "--picture=png"}
            assert offered(["diskwright", command.name, "-"]) == wanted, command.name


@pytest.mark.parametrize("shell", SHELLS)
def test_syntax(shell: str, peer: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(shell))
    done = subprocess.run([peer(shell), "-n", str(tmp_path / "script")], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_zsh_finds_it_by_itself(peer: Callable[[str], str], tmp_path: Path) -> None:
    """compinit reads the first line; the function is loaded from the file on its first call."""
    (tmp_path / "_diskwright").write_text(script("zsh"))
    code = f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u -D; print -r -- $_comps[qemu-img]"
    done = subprocess.run([peer("zsh"), "-f", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "_diskwright\n", done
