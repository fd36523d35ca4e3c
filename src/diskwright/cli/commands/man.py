"""``diskwright man``: the manual pages."""

from __future__ import annotations

import argparse
import os
from typing import Final

from diskwright.cli.common import Failure
from diskwright.cli.faces import OWN_NAME

SUMMARY: Final = "print a manual page, or write them all into a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--directory", metavar="DIR", help="write all pages into this folder, made if need be")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="print this command's page, not the program's")


def run(args: argparse.Namespace) -> int:
    from diskwright.cli.roff import pages

    found = pages()
    if args.directory is None:
        name = f"{OWN_NAME}-{args.command}.1" if args.command else f"{OWN_NAME}.1"
        if name not in found:
            raise Failure(f"There is no command '{args.command}'")
        print(found[name], end="")
        return 0
    if args.command:
        raise Failure("With -d all pages are written; leave the command out")
    os.makedirs(args.directory, exist_ok=True)
    for name, text in found.items():
        with open(os.path.join(args.directory, name), "w", encoding="utf-8") as file:
            file.write(text)
    if not args.quiet:
        print(f"{len(found)} pages in {args.directory}")
    return 0
