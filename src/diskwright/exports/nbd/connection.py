"""One NBD client: its requests are received, parsed and served in batches.

All requests in the receive buffer are parsed at once. Small reads that follow each other become one ``readv`` and
one ``send``, writes one ``writev``; the rest is in ``commands``.

A connection begins with its own thread, which waits for whatever has to be waited for. While others use the same disk
and its requests are small and quick it joins their ``Crew``. Whoever serves it there never waits: what cannot be done
at once is kept in ``_late``, and the connection goes back to its own thread, which does that first.

A connection takes at most ``RECEIVE`` + 2 x ``REPLY`` + one longest request (``units.MAX_REQUEST``) bytes, and
``commands.MAX_AWAY`` requests of less than ``SENDFILE`` bytes with its workers.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final

from diskwright.core.disk import Disk
from diskwright.errors import ProtocolError
from diskwright.exports.nbd.channel import Channel
from diskwright.exports.nbd.commands import FAILURES, Commands, wire_error
from diskwright.exports.nbd.crew import Crew
from diskwright.exports.nbd.places import SENDFILE, Places
from diskwright.exports.nbd.replies import Replies
from diskwright.units import MAX_REQUEST, KiB, MiB
from diskwright.wire.nbd import constants as c

if TYPE_CHECKING:
    from diskwright.exports.nbd.channel import Stream
    from diskwright.exports.nbd.contexts import Context

_HEADER: Final = c.REQUEST.size

RECEIVE: Final = 2 * MiB
"""Receive buffer: a 1 MiB write fits, and 400 writes of 4 KiB."""
REPLY: Final = 1 * MiB
"""Answers to reads gathered for one send."""
LAST_ROUNDS: Final = 4
"""Times a connection still receives when the server closes; a TCP client could go on for ever."""

SMALL_WRITE: Final = 64 * KiB
"""Longer writes are a reason to leave the crew: copying them keeps a thread busy."""
QUICK: Final = 0.001
"""Seconds a round of requests may take in a crew."""
QUICK_ROUNDS: Final = 8
"""Rounds of small requests, each of them quick, after which a connection joins its crew."""

HALVED: Final = 8 * _HEADER
"""From so many bytes of requests on they are answered in two halves: while the second is served, a client that has its
own thread, or processor, is busy with the first and with its next requests."""

SPINS: Final = 30
"""Looks at an empty socket before sleeping on it, some 40 us: a client that sends its next request when it has the
last reply is back by then, and both of two wake-ups a request would cost more than the request."""
MAX_MISSES: Final = 4
"""Looks in vain, one after the other, after which a connection sleeps at once, until its client is prompt again."""
PROMPT: Final = 100e-6
"""Seconds of sleep that were hardly worth it."""

_COOKIE: Final = slice(8, 16)  # of both kinds of header before the data of a read
_CPUS: Final = len(os.sched_getaffinity(0))

_Read = tuple[int, int, int]  # cookie, offset, length
_Write = tuple[int, int, memoryview]  # cookie, offset, payload


class Clients:
    """What the connections of a server know of each other, and how far the server's end has come: ``closing`` (serve
    what has arrived), then ``cut`` (wait for no client)."""

    def __init__(self) -> None:
        self.connected = 0
        self.closing = False
        self.cut = threading.Event()


class Connection:
    """One client in its transmission phase. ``serve`` is its whole life. ``contexts`` are those that were agreed on,
    with their ids."""

    def __init__(
        self,
        sock: Stream,
        disk: Disk,
        read_only: bool,
        structured: bool,
        contexts: Sequence[tuple[int, Context]],
        clients: Clients,
        crew: Crew,
    ) -> None:
        self._sock, self._disk, self._read_only = sock, disk, read_only
        self._clients, self._crew = clients, crew
        self._replies = Replies(structured)
        self._channel = Channel(sock)
        self._places = Places(sock, disk)
        self._commands = Commands(
            self._channel, self._places, disk, self._replies, read_only=read_only, contexts=contexts
        )
        self._view = memoryview(bytearray(RECEIVE))
        self._have = 0
        self._patient = True  # may wait: served by its own thread
        self._late: list[Callable[[], object]] = []  # what the crew left to the own thread
        self._misses = 0
        self._last_rounds = LAST_ROUNDS
        self._light = True  # the last round had small requests only
        # Reads of one batch: the answers, each behind its header as they go out, and what to read where. One buffer
        # costs less to send than a list of them.
        self._reply = memoryview(bytearray(REPLY))
        self._segments: list[tuple[int, memoryview]] = []
        self._writes: list[_Write] = []
        self._write_flush = False

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- rounds ----------------------------------------------------------------------------------

    def serve(self, rest: bytes) -> None:
        """Serves until the client leaves or breaks the protocol. Raises OSError or ProtocolError; replies to all
        requests that were received whole have been sent then, as far as the client took them."""
        self._have = len(rest)
        self._view[: self._have] = rest
        self._crew.join()
        try:
            while self._serve_alone():
                self._patient = False
                self._crew.work(self)
                self._patient = True
                late, self._late = self._late, []
                for work in late:
                    work()
        finally:
            self._crew.leave()
            self._commands.end()
            self._places.end(self._clients.cut)

    def _serve_alone(self) -> bool:
        """The own thread's rounds. True when the crew would do better, False at the end."""
        clients, crew, pending = self._clients, self._crew, self._places.pending
        quick = 0
        while True:
            begun = perf_counter()
            at = self._parse()
            if at < 0:
                return False
            self._keep_from(at)
            if crew.clients > 1 and not pending and not clients.closing:
                quick = quick + 1 if self._light and perf_counter() - begun < QUICK else 0
                if quick == QUICK_ROUNDS:
                    return True
            if pending:
                self._places.wait_for_client()
            if clients.closing:
                self._last_rounds -= 1
                if self._last_rounds < 0:
                    return False
            got = self._receive(self._view[self._have :])
            if not got:
                if self._have:
                    raise ProtocolError("The client left in the middle of a request")
                return False
            self._have += got

    def step(self) -> bool:
        """See ``crew.Member``."""
        begun = perf_counter()
        try:
            got = self._sock.recv_into(self._view[self._have :], 0, socket.MSG_DONTWAIT)
            self._have += got
            if not got or self._clients.closing:
                return False
            self._keep_from(self._parse())
        except BlockingIOError:
            return True
        except BaseException as error:
            self._late.append(partial(_fail, error))
            return False
        return self._light and not self._late and perf_counter() - begun < QUICK

    def _receive(self, buffer: memoryview) -> int:
        """Bytes received; 0 when the client has left. Spins first for a client that is prompt, where it is the only
        one and there is a processor left for it to run on."""
        receive = self._sock.recv_into
        if self._clients.connected != 1 or _CPUS < 2:
            return receive(buffer)
        if self._misses < MAX_MISSES:
            for _ in range(SPINS):
                try:
                    got = receive(buffer, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                self._misses = 0
                return got
            self._misses += 1
            return receive(buffer)
        asleep = perf_counter()
        got = receive(buffer)
        if perf_counter() - asleep < PROMPT:
            self._misses = 0
        return got

    def _keep_from(self, at: int) -> None:
        """Forgets what was received before ``at``."""
        left = self._have - at
        if left and at:
            self._view[:left] = self._view[at : self._have]
        self._have = left

    # -- requests --------------------------------------------------------------------------------

    def _parse(self) -> int:
        """Serves the whole requests that are here; returns where the first begins that is not served, or -1 at the end.
        Without patience stops at the first that may take long."""
        view, have, at, used = self._view, self._have, 0, 0
        unpack, segments, reply = c.REQUEST.unpack_from, self._segments, self._reply
        gap, put_header = self._replies.read_header_size, self._replies.put_read_header
        self._light = True
        half = have // 2 if self._patient and have >= HALVED else have
        while have - at >= _HEADER:
            if at >= half:
                half = have
                self._do_batches(used)
                used = 0
            magic, flags, kind, cookie, offset, length = unpack(view, at)
            if magic != c.REQUEST_MAGIC:
                self._do_batches(used)
                raise ProtocolError(f"NBD request magic is {magic:#x}")
            if kind == c.CMD_READ and 0 < length < SENDFILE and flags <= c.CMD_FLAG_FUA:
                start = used + gap
                stop = start + length
                if stop > REPLY or self._writes:
                    self._do_batches(used)
                    if self._late:
                        return at
                    used, start, stop = 0, gap, gap + length
                put_header(reply, used, cookie, offset, length)
                segments.append((offset, reply[start:stop]))
                used = stop
                at += _HEADER
                continue
            if kind == c.CMD_WRITE and ((length <= SMALL_WRITE and not flags) or self._gathers(flags, length)):
                if have - at - _HEADER < length:
                    break
                if segments:
                    self._do_batches(used)
                    if self._late:
                        return at
                    used = 0
                at += _HEADER
                self._writes.append((cookie, offset, view[at : at + length]))
                at += length
                if flags or length > SMALL_WRITE:
                    self._light = False
                    self._write_flush = self._write_flush or bool(flags)
                continue
            self._light = False
            self._do_batches(used)
            used = 0
            if not self._patient:
                return at
            end = self._serve_one(flags, kind, cookie, offset, length, at)
            if end <= at:
                return end
            at = end
        self._do_batches(used)
        return at

    def _serve_one(self, flags: int, kind: int, cookie: int, offset: int, length: int, at: int) -> int:
        """Serves the request at ``at``, which fits into no batch. Returns where it ends; ``at`` when more of it has to
        be received; -1 when it is the last."""
        if kind == c.CMD_DISC:
            return -1
        if kind == c.CMD_WRITE:
            end = self._odd_write(flags, cookie, offset, length, at + _HEADER)
            return at if end < 0 else end
        self._commands.run(flags, kind, cookie, offset, length)
        return at + _HEADER

    def _gathers(self, flags: int, length: int) -> bool:
        """Whether a write goes into a batch although it is large, or wants to be flushed."""
        return self._patient and flags <= c.CMD_FLAG_FUA and length <= RECEIVE - _HEADER

    def _odd_write(self, flags: int, cookie: int, offset: int, length: int, at: int) -> int:
        """A write with flags that are wrong, or with more bytes than are received at once, from ``at`` on. Returns
        where it ends; -1 when more has to be received before. It is applied when it is whole."""
        have = self._have - at
        if have >= length:
            payload, end = self._view[at : at + length], at + length
        elif _HEADER + length <= RECEIVE:
            return -1
        elif length > MAX_REQUEST:
            raise ProtocolError(f"NBD write of {length} bytes, more than the {MAX_REQUEST} announced")
        else:
            payload, end = memoryview(bytearray(length)), self._have
            payload[:have] = self._view[at : self._have]
            while have < length:
                got = self._sock.recv_into(payload[have:])
                if not got:
                    raise ProtocolError("The client left in the middle of a write")
                have += got
        if flags & ~c.CMD_FLAG_FUA:
            self._channel.put(self._replies.failed(cookie, c.wire_error(errno.EINVAL), False))
        else:
            self._write([(cookie, offset, payload)], bool(flags))
        return end

    # -- batches ---------------------------------------------------------------------------------

    def _do_batches(self, used: int) -> None:
        """Does what is gathered: reads whose answers take ``used`` bytes, or writes."""
        if self._segments:
            self._read(used)
        elif self._writes:
            writes, self._writes = self._writes, []
            flush, self._write_flush = self._write_flush, False
            self._write(writes, flush)

    def _later(self, work: Callable[..., object], *arguments: object) -> None:
        """For what may wait: at once in the own thread, else when it is its turn."""
        if self._patient:
            work(*arguments)
        else:
            self._late.append(partial(work, *arguments))

    def _send(self, data: bytes | memoryview) -> None:
        if self._patient:
            self._channel.put(data)
        elif not self._channel.offer(data):
            self._late.append(self._channel.settle)

    def _read(self, used: int) -> None:
        disk, segments = self._disk, self._segments
        try:
            token = disk.begin(wait=self._patient)
            try:
                disk.readv(segments, nowait=True)
            finally:
                disk.end(token)
        except BlockingIOError:
            # Outside the gate: whoever waits for a worker inside it would keep a drain waiting for those behind it.
            self._later(self._send_reads_away, self._gathered())
        except FAILURES as error:
            self._later(self._reads_failed, self._gathered(), error)
        else:
            segments.clear()
            self._send(self._reply[:used])

    def _gathered(self) -> list[_Read]:
        """The reads of the batch, which ends with that."""
        reads: list[_Read] = []
        gap = self._replies.read_header_size
        at = 0
        for offset, buffer in self._segments:
            reads.append((int.from_bytes(self._reply[at:][_COOKIE], "big"), offset, len(buffer)))
            at += gap + len(buffer)
        self._segments.clear()
        return reads

    def _send_reads_away(self, reads: list[_Read]) -> None:
        for read in reads:
            self._commands.send_away(self._commands.read_alone, *read)

    def _reads_failed(self, reads: list[_Read], error: BaseException) -> None:
        """Answers reads of a batch that failed: one by one, to tell whose fault it is."""
        if len(reads) == 1:
            self._channel.put(self._replies.failed(reads[0][0], wire_error(error), True))
            return
        for read in reads:
            self._commands.read_alone(*read)

    def _write(self, writes: list[_Write], flush: bool) -> None:
        """Writes, flushes where asked, and answers."""
        if self._read_only:
            denied = c.wire_error(errno.EPERM)
            self._send(b"".join([self._replies.failed(cookie, denied, False) for cookie, _, _ in writes]))
            return
        disk, done = self._disk, self._replies.done
        try:
            token = disk.begin(wait=self._patient)
            try:
                disk.writev([(offset, payload) for _, offset, payload in writes if len(payload)])
                if flush:
                    disk.flush_node()
            finally:
                disk.end(token)
        except FAILURES as error:
            if not self._patient:  # what is received next takes the place of these bytes
                writes = [(cookie, offset, memoryview(bytes(payload))) for cookie, offset, payload in writes]
            if isinstance(error, BlockingIOError) and not self._patient:
                self._later(self._write, writes, flush)  # the disk is drained
            else:
                self._later(self._writes_failed, writes, flush, error)
            return
        self._send(b"".join([done(cookie) for cookie, _, _ in writes]))

    def _writes_failed(self, writes: list[_Write], flush: bool, error: BaseException) -> None:
        """Answers writes of a batch that failed: each is done once more by itself, to tell whose fault it is."""
        if len(writes) == 1:
            out = [self._replies.failed(writes[0][0], wire_error(error, errno.ENOSPC), False)]
        else:
            out = [self._write_alone(write, flush) for write in writes]
        self._channel.put(b"".join(out))

    def _write_alone(self, write: _Write, flush: bool) -> bytes:
        cookie, offset, payload = write
        try:
            with self._disk.request():
                if len(payload):
                    self._disk.writev([(offset, payload)])
                if flush:
                    self._disk.flush_node()
            return self._replies.done(cookie)
        except FAILURES as error:
            return self._replies.failed(cookie, wire_error(error, errno.ENOSPC), False)


def _fail(error: BaseException) -> None:
    raise error
