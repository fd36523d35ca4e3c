"""``--fork`` and ``--pid-file``: serving in the background, with a parent that ends as soon as the server listens."""

from __future__ import annotations

import os
from typing import Final

from diskwright.cli.common import Failure

_READY: Final = b"r"


class Background:
    """The child's end. ``ready`` lets the parent go."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self, *, keep_stderr: bool) -> None:
        """The server listens: from now on nobody waits for this process, and its standard streams lead nowhere."""
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1) if keep_stderr else (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        os.write(self._pipe, _READY)
        os.close(self._pipe)


def fork() -> Background | int:
    """Goes on in a child. Returns, in the parent, the exit code once the child is ready or has failed; it has told why
    on the standard error they share. To be called before any thread is started."""
    mine, childs = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(mine)
        os.setsid()
        return Background(childs)
    os.close(childs)
    with os.fdopen(mine, "rb") as pipe:
        if pipe.read(1) == _READY:
            return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or 1


def write_pid_file(path: str) -> None:
    """Stores this process's id. Raises Failure."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failure(f"Could not create '{path}': {error.strerror}") from None
    with os.fdopen(descriptor, "r+b") as file:
        file.truncate()
        file.write(b"%d\n" % os.getpid())
