"""The life of a job: its states, which follow which, and what may be asked for in each. All of it is here.

The names are QMP's (``JobStatus`` and ``JobVerb`` of the QAPI reference). A job runs through

    created -> running [-> ready] -> waiting -> pending -> concluded -> null

with excursions running <-> paused and ready <-> standby, and by way of aborting when it fails or is cancelled.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from diskwright.errors import JobError


class State(Enum):
    """Where a job is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(Enum):
    """What a user may ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


_S, _V = State, Verb
_LIVE: Final = frozenset({_V.CANCEL, _V.PAUSE, _V.RESUME, _V.SET_SPEED})

TABLE: Final[dict[State, tuple[frozenset[State], frozenset[Verb]]]] = {
    # state: (states that may follow, verbs that are accepted)
    _S.CREATED: (frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}), _LIVE),
    _S.RUNNING: (frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}), _LIVE | {_V.CHANGE}),
    _S.PAUSED: (frozenset({_S.RUNNING}), _LIVE | {_V.CHANGE}),
    _S.READY: (frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}), _LIVE | {_V.CHANGE, _V.COMPLETE}),
    # Asked to complete while on standby, a job does so once it is resumed.
    _S.STANDBY: (frozenset({_S.READY}), _LIVE | {_V.CHANGE, _V.COMPLETE}),
    _S.WAITING: (frozenset({_S.PENDING, _S.ABORTING}), frozenset({_V.CANCEL})),
    _S.PENDING: (frozenset({_S.ABORTING, _S.CONCLUDED}), frozenset({_V.CANCEL, _V.FINALIZE})),
    _S.ABORTING: (frozenset({_S.CONCLUDED}), frozenset()),
    _S.CONCLUDED: (frozenset({_S.NULL}), frozenset({_V.DISMISS})),
    _S.NULL: (frozenset(), frozenset()),
}

ENDED: Final = frozenset({State.CONCLUDED, State.NULL})


def check_move(job: str, old: State, new: State) -> None:
    """Raises AssertionError for a step the table does not have: that is a bug, never a user's mistake."""
    if new not in TABLE[old][0]:
        raise AssertionError(f"Job '{job}' cannot go from {old.value} to {new.value}")


def check_verb(job: str, state: State, verb: Verb) -> None:
    """Raises JobError when ``verb`` is not accepted in ``state``."""
    if verb not in TABLE[state][1]:
        raise JobError(f"Job '{job}' in state '{state.value}' cannot accept command verb '{verb.value}'")
