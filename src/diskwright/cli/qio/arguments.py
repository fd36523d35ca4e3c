"""The program's own command line, and its help."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from diskwright.cli.faces import program
from diskwright.cli.qio.getopt import Options
from diskwright.cli.qio.language import Misuse, Refused
from diskwright.cli.qio.opening import Opening

_LETTERS: Final = "hVc:d:f:rsnCmki:t:T:U"

_LONG: Final = {
    "help": "h", "version": "V", "cmd": "c:", "format": "f:", "read-only": "r", "snapshot": "s", "nocache": "n",
    "copy-on-read": "C", "misalign": "m", "native-aio": "k", "discard": "d:", "cache": "t:", "aio": "i:", "trace": "T:",
    "force-share": "U", "object": "object:", "image-opts": "image-opts",
}  # fmt: skip

_HELP: Final = """\
Usage: {program} [OPTIONS]... [-c STRING]... [file]
Reads, writes and examines a virtual disk by typed commands.

  -c, --cmd STRING     carry out this command; may be given many times. Without
                       it commands are read from standard input
  -f, --format FMT     the image's format; probed when not given
  --image-opts         the image is given as options: driver=raw,file.filename=x
  --object DEF         define a secret that options name by its id
  -r, --read-only      open the image read-only
  -U, --force-share    open it even while another program writes to it (with -r)
  -s, --snapshot       write to a temporary overlay, and leave the image as it is
  -C, --copy-on-read   what is read from a backing file is kept in the image
  -t, --cache=MODE     none, writeback, writethrough, directsync or unsafe
  -n, --nocache        the same as -t none
  -d, --discard=MODE   whether discards are carried out: unmap (on) or ignore (off)
  -i, --aio=MODE       threads, native or io_uring: accepted, and threads used
  -k, --native-aio     the same as -i native
  -m, --misalign       accepted
  -T, --trace PATTERN  accepted; nothing is traced
  -h, --help           show this and exit
  -V, --version        show the version and exit

'{program} -c help' lists the commands.
"""


class Done(Exception):
    """The command line asked for nothing but what has been printed."""


@dataclass
class Arguments:
    """What was asked for."""

    commands: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    image_opts: bool = False
    opening: Opening = field(default_factory=Opening)
    image: str | None = None


def parse(words: Sequence[str]) -> Arguments:
    """Raises Misuse with the usage shown, Refused, or Done."""
    found = Arguments()
    options = Options(program(), words, _LETTERS, _LONG)
    try:
        for option, value in options:
            _take(found, option, value)
        if len(options.operands) > 1:
            raise Misuse()
    except Misuse:
        _show_help()
        raise
    if options.operands:
        found.image = options.operands[0]
    if found.image_opts and found.opening.format is not None:
        raise Refused("--image-opts and -f are mutually exclusive")
    return found


def _take(found: Arguments, option: str, value: str) -> None:
    if option == "h":
        _show_help()
        raise Done()
    if option == "V":
        from diskwright.cli.faces import current
        from diskwright.cli.help import version

        print(version(current()))
        raise Done()
    if option == "c":
        found.commands.append(value)
    elif option == "f":
        found.opening.format = value
    elif option == "T":
        _warn_of_trace(value)
    elif option == "object":
        found.objects.append(value)
    elif option == "image-opts":
        found.image_opts = True
    else:
        found.opening.take(option, value)


def _warn_of_trace(value: str) -> None:
    """There is nothing here that can be traced."""
    pattern = value.partition(",")[0].removeprefix("enable=")
    if "=" not in pattern and "*" not in pattern:
        print(f"{program()}: warning: trace event '{pattern}' does not exist", file=sys.stderr)


def _show_help() -> None:
    sys.stdout.write(_HELP.format(program=program()))
