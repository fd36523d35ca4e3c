"""Many clients of one disk, served by one thread at a time.

A thread for each client is what large requests want: copying runs in parallel. With small ones it is the worst there
is: Python runs one thread at a time, and threads that give way to each other at every system call spend most of their
time on that. So connections whose requests are small join a *crew*: one of their threads, the leader, waits for all
their sockets and serves whichever is ready; the others sleep. What would have to wait (for a client to take its
replies, for a medium, for a drained disk) or takes long, the leader does not do: it gives that connection back to its
own thread. There is a crew for each disk, so that a slow one holds up nobody else.
"""

from __future__ import annotations

import select
import threading
from enum import Enum
from typing import Protocol


class Call(Enum):
    """What a sleeping member is woken for."""

    LEAD = 1
    """To lead."""
    OWN = 2
    """To serve its own connection."""


class Member(Protocol):
    """A connection in a crew."""

    def fileno(self) -> int: ...

    def step(self) -> bool:
        """Serves what has arrived, without waiting for anything; called by any member's thread, by one at a time.
        False when the connection is to go back to its own thread. Never raises."""
        ...


class Crew:
    """The connections of one disk. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poll: select.epoll | None = None
        self._members: dict[int, tuple[Member, _Bed]] = {}
        self._led = False
        self.clients = 0
        """Connections of the disk, in the crew or not."""

    def join(self) -> None:
        """One more connection."""
        with self._lock:
            self.clients += 1
            if self._poll is None:
                self._poll = select.epoll()

    def leave(self) -> None:
        """One connection fewer; it is in no crew now."""
        with self._lock:
            self.clients -= 1
            if not self.clients and self._poll is not None:
                self._poll.close()
                self._poll = None

    def work(self, member: Member) -> None:
        """Takes ``member`` in; its thread leads, or sleeps. Returns when it is to serve its own connection."""
        poll = self._poll
        assert poll is not None, "the connection has joined"
        bed = _Bed()
        with self._lock:
            self._members[member.fileno()] = member, bed
            poll.register(member.fileno(), select.EPOLLIN)
            leads, self._led = not self._led, True
        if leads or bed.sleep() is Call.LEAD:
            self._lead(member, poll)

    def _lead(self, own: Member, poll: select.epoll) -> None:
        """Serves all until ``own`` has to go; then somebody else leads."""
        leads, members = True, self._members
        while leads:
            for fd, _ in poll.poll():
                member, bed = members[fd]
                # With one connection left a crew is of no use.
                if member.step() and self.clients > 1:
                    continue
                with self._lock:
                    del members[fd]
                    poll.unregister(fd)
                if member is own:
                    leads = False
                else:
                    bed.wake(Call.OWN)
        with self._lock:
            next_bed = next((bed for _, bed in members.values()), None)
            self._led = next_bed is not None
        if next_bed is not None:
            next_bed.wake(Call.LEAD)


class _Bed:
    """Where one thread sleeps, once or several times."""

    __slots__ = ("_call", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._call = Call.OWN

    def sleep(self) -> Call:
        self._lock.acquire()
        return self._call

    def wake(self, call: Call) -> None:
        self._call = call
        self._lock.release()
