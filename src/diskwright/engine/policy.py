"""What to do when a read or a write of a long operation fails: QMP's ``BlockdevOnError``."""

from __future__ import annotations

import errno
from enum import Enum

from diskwright.errors import errno_of


class OnError(Enum):
    """What the user asked for. ``AUTO`` stops when space runs out and reports anything else, as ``ENOSPC`` does."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class Action(Enum):
    """What that means for one error: give up; go on and try again later; pause until somebody resumes."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


def action(policy: OnError, error: BaseException) -> Action:
    """The action ``policy`` prescribes for ``error``."""
    if policy in (OnError.ENOSPC, OnError.AUTO):
        return Action.STOP if is_nospace(error) else Action.REPORT
    return Action(policy.value)


def is_nospace(error: BaseException) -> bool:
    """Whether ``error`` says that the medium is full: a fault that somebody can mend while the job waits."""
    return errno_of(error) in (errno.ENOSPC, errno.EDQUOT)


def io_status(error: BaseException) -> str:
    """QMP's ``BlockDeviceIoStatus`` of a job that stopped for ``error``."""
    return "nospace" if is_nospace(error) else "failed"
