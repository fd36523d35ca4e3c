"""``diskwright completion``: the script that lets a shell complete this program's command lines."""

from __future__ import annotations

import argparse
from typing import Final

SUMMARY: Final = "print the completion script for a shell: bash or zsh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that is to read the script")


def run(args: argparse.Namespace) -> int:
    from diskwright.cli.completion import script

    print(script(args.shell), end="")
    return 0
