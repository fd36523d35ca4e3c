"""``help``: the list of commands, and what their options mean."""

from __future__ import annotations

from typing import Final

from diskwright.cli.qio.language import CommandError
from diskwright.cli.qio.session import Session
from diskwright.cli.qio.table import COMMANDS, find

_STATISTICS = {
    "-C": "one line of figures for programs: bytes, requests, time, bytes and requests a second",
    "-q": "no figures",
}
_CHECK = {"-P N": "complain unless all that is read is byte N"}
_FILL = {"-P N": "write byte N instead of 0xcd"}
_DUMP = {"-v": "show what is read, in hexadecimal"}
_DURABLE = {"-f": "the command ends when the bytes are on the medium"}
_UNMAP = {"-u": "with -z, space may be given back"}

_SIZES = (
    "Offsets and lengths are bytes, in decimal or hexadecimal, with a suffix k, M, G, T, P or E for powers of 1024."
)
_LATER = (
    "The command has succeeded once the request is under way; how it went is told when it has ended. aio_flush waits "
    "for all requests."
)

_MORE: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "aio_read": (f"Reads while further commands are carried out, into one buffer for each length. {_LATER}",
                 {**_STATISTICS, **_CHECK, **_DUMP, "-i": "only count a request that could not be made"}),
    "aio_write": (f"Writes while further commands are carried out, from one buffer for each length. {_LATER}",
                  {**_STATISTICS, **_FILL, **_DURABLE, **_UNMAP, "-z": "write zeros by telling the image so",
                   "-i": "only count a request that could not be made"}),
    "discard": (f"Says that a range is no longer needed: its space may be given back. {_SIZES}", _STATISTICS),
    "open": ("Opens an image for the commands that follow.",
             {"-r": "read-only", "-s": "write to a temporary overlay, and leave the image as it is",
              "-C": "keep what is read from a backing file", "-n": "the same as -t none",
              "-U": "also while another program writes to it (with -r)", "-k": "the same as -i native",
              "-i MODE": "threads, native or io_uring", "-t MODE": "cache mode",
              "-d MODE": "whether discards are carried out: unmap or ignore",
              "-o OPTIONS": "options for the driver: driver=raw,offset=1M"}),
    "read": (f"Reads a range. {_SIZES}",
             {"-b": "from the machine's state, not from the disk", **_STATISTICS, **_CHECK,
              "-s OFF": "with -P, where in the range the check begins", "-l LEN": "with -P, how much of it is checked",
              "-p": "accepted", **_DUMP}),
    "readv": ("Reads a range into one buffer for each length.", {**_STATISTICS, **_CHECK, **_DUMP}),
    "reopen": ("Changes how the image is open.",
               {"-r": "read-only", "-w": "for writing too", "-c MODE": "cache mode",
                "-o OPTIONS": "other options of the driver"}),
    "sigraise": ("Sends the program the signal of that number.", {}),
    "write": (f"Writes a range. {_SIZES}",
              {"-b": "to the machine's state, not to the disk", "-c": "compressed", **_DURABLE, **_FILL,
               "-s FILE": "write what FILE holds, over and over", "-z": "write zeros by telling the image so",
               **_UNMAP, "-n": "with -z, fail rather than write zeros out", "-p": "accepted", **_STATISTICS}),
    "writev": ("Writes a range from one buffer for each length.", {**_STATISTICS, **_FILL, **_DURABLE}),
}  # fmt: skip


def help_(session: Session, words: list[str]) -> None:
    if not words:
        for command in COMMANDS:
            print(command.usage())
        print("\nUse 'help commandname' for extended help.")
        return
    (name,) = words
    found = find(name)
    if found is None:
        raise CommandError(f"command {name} not found")
    print(found.usage(name))
    more = _MORE.get(found.name)
    if more is not None:
        _show(*more)


def _show(text: str, options: dict[str, str]) -> None:
    import textwrap

    print()
    print(textwrap.fill(text, 80, initial_indent=" ", subsequent_indent=" "))
    if options:
        print()
    for option, meaning in sorted(options.items(), key=lambda item: item[0].lower()):
        print(f" {option:<10} {meaning}")
