"""The commands that open and close, tell facts, wait, and end the program."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from typing import Final

from diskwright.cli.qio.getopt import Options
from diskwright.cli.qio.language import CommandError, Misuse, Refused, amount, number, size
from diskwright.cli.qio.opening import Opening, cache_mode, check_changes, pairs
from diskwright.cli.qio.session import Session, explain
from diskwright.errors import DiskwrightError

_IN_MEMORY: Final = "memory"

_GLANCE: Final = 0.01
"""Seconds between two looks whether a request in the background has ended."""

_LONGEST_SLEEP: Final = 3600.0
"""Seconds: the system does not take any number of them at once."""

_GUARD: Final = "probe_guard"
"""The one filter that is there without having been asked for."""


def open_(session: Session, words: list[str]) -> None:
    options = Options("open", words, "snCro:ki:t:d:U")
    how = Opening()
    by_option = False
    for option, value in options:
        if option == "o":
            if session.image_opts:
                raise CommandError("--image-opts and 'open -o' are mutually exclusive")
            how.take_text(value)
            by_option = True
        else:
            how.take(option, value)
    operands = options.operands
    if len(operands) > 1 or (not operands and not by_option):
        raise Misuse()
    open_named(session, operands[0] if operands else None, how)


def open_named(session: Session, name: str | None, how: Opening) -> None:
    """Opens an image as a user names it. Raises Refused."""
    if session.image_opts and name is not None:
        how.take_text(name)
        name = None
    session.open(name, how)


def close(session: Session, words: list[str]) -> None:
    try:
        session.close()
    except (DiskwrightError, OSError) as error:
        explain(error)
        raise CommandError() from error


def reopen(session: Session, words: list[str]) -> None:
    """The image is closed, and opened again as it is to be."""
    how, wanted = _wanted(session, Options("reopen", words, "c:o:rw"))
    check_changes(session.open_disk, wanted)
    if how == session.how:
        return
    _refuse_what_would_be_lost(session)
    session.settle()
    name, before = session.name, session.how
    session.close()
    try:
        session.open(name, how)
    except Refused:
        session.open(name, before)
        raise


def _wanted(session: Session, options: Options) -> tuple[Opening, dict[str, str]]:
    """How the image is to be open, and the options given by name. Raises Refused or Misuse."""
    how = dataclasses.replace(session.how, options=dict(session.how.options))
    wanted: dict[str, str] = {}
    given: set[str] = set()
    for option, value in options:
        if option == "c":
            how.cache = cache_mode(value)
        elif option == "o":
            wanted = pairs(value)
        elif given & {"r", "w"}:
            raise Refused("Only one -r/-w option may be given")
        else:
            how.read_only = option == "r"
        given.add(option)
    if options.operands:
        raise Misuse()
    if given & {"r", "w"} and "read-only" in wanted:
        raise Refused("Cannot set both -r/-w and 'read-only'")
    if "c" in given and any(key.startswith("cache.") for key in wanted):
        raise Refused("Cannot set both -c and the cache options")
    _adopt(how, wanted)
    return how, wanted


def _adopt(how: Opening, wanted: dict[str, str]) -> None:
    from diskwright.core.options import BOOL
    from diskwright.errors import OptionError

    for key, value in wanted.items():
        if key == "read-only":
            try:
                how.read_only = BOOL.parse(key, value)
            except OptionError as error:
                raise Refused(str(error)) from None
        elif key == "discard" and value not in ("ignore", "off", "unmap", "on"):
            raise Refused("Invalid discard option")
        elif key not in ("auto-read-only", "lazy-refcounts"):
            how.options[key] = value


def _refuse_what_would_be_lost(session: Session) -> None:
    nodes = session.open_disk.graph.nodes()
    if session.how.temporary or any(node.driver_name == _IN_MEMORY for node in nodes):
        raise Refused("Cannot reopen what is kept nowhere but in this program")


def flush(session: Session, words: list[str]) -> None:
    try:
        session.open_disk.flush()
    except (DiskwrightError, OSError) as error:
        explain(error)
        raise CommandError() from error


def info(session: Session, words: list[str]) -> None:
    from diskwright.core.driver import Info
    from diskwright.core.node import FormatNode, below_filters
    from diskwright.core.snapshots import Snapshots

    node = below_filters(session.node)
    facts, state_at = Info(), 0
    if isinstance(node, FormatNode):
        facts = node.format.info()
        if isinstance(node.format, Snapshots):
            try:
                state_at = node.format.vm_state_range()[0]
            except OSError:
                pass  # there is none
    # Filters that were put there without being asked for by name are not spoken of.
    name = session.node.driver_name
    hidden = name == _GUARD or session.how.copy_on_read
    print(f"format name: {node.driver_name if hidden else name}")
    print(f"cluster size: {amount(facts.cluster_size or 0)}")
    print(f"vm state offset: {amount(state_at)}")
    if facts.specific is not None:
        from diskwright.cli.output import indented

        print("Format specific information:")
        print("\n".join(indented(facts.specific, 1)))


def sleep(session: Session, words: list[str]) -> None:
    """Waits, and tells of requests in the background that end meanwhile."""
    milliseconds = number(words[0])
    if milliseconds is None:
        raise CommandError(f"{words[0]} is not a valid number")
    start = time.monotonic()
    while (left := milliseconds / 1000 - (time.monotonic() - start)) > 0:
        session.deliver()
        time.sleep(min(left, _GLANCE if session.busy else _LONGEST_SLEEP))
    session.deliver()


def sigraise(session: Session, words: list[str]) -> None:
    which = size(words[0])
    if which > signal.NSIG:
        raise CommandError(f"signal argument '{words[0]}' is too large to be a valid signal")
    sys.stdout.flush()
    if which == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.kill(os.getpid(), which)
    except OSError:
        pass  # there is no such signal, and nothing happens


def abort(session: Session, words: list[str]) -> None:
    sys.stdout.flush()
    os.abort()


def quit_(session: Session, words: list[str]) -> None:
    session.finished = True
