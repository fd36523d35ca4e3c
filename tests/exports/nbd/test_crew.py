"""Connections that share one thread: whatever happens to one of them, the others go on, and no byte is wrong."""

from __future__ import annotations

import errno
import random
import threading
import time
from contextlib import ExitStack
from struct import pack

import pytest

from diskwright.exports.nbd.connection import QUICK, QUICK_ROUNDS
from tests.exports.nbd.client import FLUSH, FUA, MIB, READ, WRITE, Client, Medium, Served, serving_medium

SIZE = 8 * MIB


def members(served: Served) -> int:
    crew = served.server._crews.get(served.disk)  # made only after the client has its answer
    return len(crew._members) if crew is not None else 0


def into_crew(served: Served, *clients: Client) -> None:
    """Works with ``clients`` until all are in the crew."""
    before = members(served)
    deadline = time.monotonic() + 30
    while members(served) < before + len(clients):
        assert time.monotonic() < deadline
        for client in clients:
            for _ in range(QUICK_ROUNDS + 1):
                client.read(0, 512)


@pytest.mark.parametrize("structured", [False, True])
def test_all_kinds_of_requests_from_many_threads(sock_dir: str, structured: bool) -> None:
    """Each client has its own part of the disk, and knows what must be there."""
    medium, count = Medium(SIZE), 6
    share = SIZE // count // 512 * 512

    def work(number: int) -> None:
        rng, base = random.Random(number), number * share
        mine = bytearray(share)
        with Client(served.path, structured=structured) as client:
            for _ in range(400):
                length = rng.choice((1, 512, 4096, 4096, 4096, 70000, 200000))
                at = rng.randrange(share - length)
                if rng.random() < 0.5:
                    data = rng.randbytes(length)
                    flags = FUA if rng.random() < 0.05 else 0
                    assert client.ask(WRITE, base + at, length, data, flags).error == 0
                    mine[at : at + length] = data
                else:
                    assert client.read(base + at, length) == mine[at : at + length]
            # Many at a time, answered in any order.
            wanted = {}
            for _ in range(100):
                at = rng.randrange(share - 4096)
                wanted[client.send(READ, base + at, 4096)] = bytes(mine[at : at + 4096])
            for _ in range(100):
                cookie, reply = client.receive()
                assert reply.error == 0 and reply.data == wanted.pop(cookie)

    with serving_medium(medium, sock_dir) as served:
        failed: list[BaseException] = []

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_a_client_that_takes_no_replies_holds_up_nobody(sock_dir: str) -> None:
    medium = Medium(SIZE)
    medium.data[:] = random.Random(1).randbytes(SIZE)
    with serving_medium(medium, sock_dir) as served, ExitStack() as stack:
        deaf, one, other = (stack.enter_context(Client(served.path)) for _ in range(3))
        into_crew(served, deaf, one, other)
        sent = [deaf.send(READ, i * 60000, 60000) for i in range(60)]  # answers of 3.6 MB: more than a socket takes
        for i in range(50):
            assert one.read(i * 512, 512) == medium.data[i * 512 : i * 512 + 512]
            assert other.write(SIZE - 512, bytes([i]) * 512) == 0
        for cookie in sent:  # and none of its replies is lost or torn
            answered, reply = deaf.receive()
            assert answered == cookie
            assert reply.data == medium.data[(cookie - sent[0]) * 60000 :][:60000]


def test_a_drained_disk_lets_go_on_afterwards(sock_dir: str) -> None:
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir) as served, ExitStack() as stack:
        clients = [stack.enter_context(Client(served.path)) for _ in range(3)]
        into_crew(served, *clients)
        with served.disk.drained():
            before = bytes(medium.data)
            reads = [client.send(READ, 0, 512) for client in clients]
            writes = [c.send(WRITE, i * 512, 512, b"w" * 512) for i, c in enumerate(clients)]
            time.sleep(0.1)
            assert medium.data == before
        for client, read, write in zip(clients, reads, writes, strict=True):
            answers = dict(client.receive() for _ in range(2))
            assert answers[read].error == 0 and answers[write].error == 0
        assert medium.data[: 3 * 512] == b"w" * (3 * 512)
        into_crew(served, *[c for c in clients if members(served) < len(clients)][: len(clients) - members(served)])


def test_cold_reads_and_failures_go_back_to_their_own_thread(sock_dir: str) -> None:
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir) as served, ExitStack() as stack:
        clients = [stack.enter_context(Client(served.path, structured=True)) for _ in range(2)]
        into_crew(served, *clients)
        medium.cold = True
        medium.go.clear()
        cookies = [clients[0].send(READ, i * 512, 512) for i in range(5)]
        for _ in cookies:
            assert medium.waiting.acquire(timeout=30)
        medium.cold = False
        assert clients[1].read(0, 512) == bytes(512)  # while the others wait for the medium
        medium.go.set()
        assert {clients[0].receive()[0] for _ in cookies} == set(cookies)
        medium.fail_reads = errno.EIO
        assert clients[0].ask(READ, 0, 512).error == errno.EIO
        medium.fail_reads = 0
        assert clients[1].ask(READ, SIZE - 512, 1024).error == errno.EINVAL
        assert clients[1].ask(WRITE, SIZE - 512, 1024, bytes(1024)).error == errno.ENOSPC
        assert clients[0].ask(FLUSH, 0, 0).error == 0
        assert clients[0].write(0, b"x" * 512) == 0 and clients[1].read(0, 512) == b"x" * 512


def test_garbage_and_departures(sock_dir: str) -> None:
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir) as served, ExitStack() as stack:
        good = stack.enter_context(Client(served.path))
        bad = [stack.enter_context(Client(served.path)) for _ in range(4)]
        into_crew(served, good, *bad)
        bad[0].sock.sendall(b"x" * 28)
        bad[1].sock.sendall(pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 4096) + b"half")
        bad[1].close()
        bad[2].close()
        bad[3].sock.sendall(pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 0xFFFFFFFF))
        assert bad[0].ended() and bad[3].ended()
        for i in range(50):
            assert good.write(i * 512, b"g" * 512) == 0
            assert good.read(i * 512, 512) == b"g" * 512


def test_a_slow_disk_gets_its_threads_back(sock_dir: str) -> None:
    """Where every read takes a while, clients must not wait for each other."""

    class Slow(Medium):
        together = most = 0

        def readv(self, segments: object, *, nowait: bool = False) -> None:
            self.together += 1
            self.most = max(self.most, self.together)
            time.sleep(QUICK * 5 * slow)
            super().readv(segments, nowait=nowait)  # type: ignore[arg-type]
            self.together -= 1

    medium, slow = Slow(SIZE), 0
    with serving_medium(medium, sock_dir) as served, ExitStack() as stack:
        clients = [stack.enter_context(Client(served.path)) for _ in range(4)]
        into_crew(served, *clients)
        slow = 1
        for _ in range(20):
            cookies = [client.send(READ, 0, 512) for client in clients]
            assert [client.receive()[0] for client in clients] == cookies
        assert medium.most > 1
        assert not members(served)


def test_the_server_closes_while_a_crew_works(sock_dir: str) -> None:
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir) as served, ExitStack() as stack:
        clients = [stack.enter_context(Client(served.path)) for _ in range(5)]
        into_crew(served, *clients)
        sent = {client: [client.send(WRITE, i * 512, 512, b"z" * 512) for i in range(20)] for client in clients}
        served.server.close(5)
        for client, cookies in sent.items():
            assert [client.receive()[0] for _ in cookies] == cookies  # what had arrived is served
            assert client.ended()
    assert medium.data[: 20 * 512] == b"z" * (20 * 512)


def test_one_client_left_over_goes_on_alone(sock_dir: str) -> None:
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir) as served:
        with Client(served.path) as first:
            with Client(served.path) as second:
                into_crew(served, first, second)
            for i in range(20):
                assert first.write(i, b"1") == 0
            deadline = time.monotonic() + 30
            while members(served):
                assert time.monotonic() < deadline
                first.read(0, 1)
        with Client(served.path) as third:
            assert third.read(0, 20) == b"1" * 20
