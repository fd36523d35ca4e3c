"""Load from other processes, steady load, and what commands cost."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from bench.expected import Expected
from bench.load import BLOCK, PAYLOAD, Workload
from bench.nbd import lane_of
from bench.paced import Paced, PacedOutcome
from bench.pool import LoadFailed, Pool
from bench.servers import KINDS, NbdServer
from bench.timing import CommandFailed, cpu_seconds, family, peak_memory, run

from tests.bench.nbd_server import TinyServer, disk_of

SIZE = 8 << 20


def test_two_processes_write_what_the_model_expects_and_a_peer_keeps_it(sock_dir: str) -> None:
    image, reference = os.path.join(sock_dir, "image"), os.path.join(sock_dir, "reference")
    with open(image, "wb") as file:
        file.write(disk_of(reference, SIZE))
    work = Workload(write=True, block=BLOCK, depth=16, sequential=False, size=SIZE, seed=1)
    expected = Expected(SIZE, reference)
    with NbdServer(KINDS[0], image, "raw") as server, Pool(2) as pool:
        expected.check_server(server.socket)
        turn = pool.run(server.socket, work, 2, warm_up=0.02, seconds=0.1)
        assert turn.rate > 0 and len(turn.issued) == 2 and turn.requests >= 32
        for lane, issued in enumerate(turn.issued):
            expected.mark(lane_of(work, lane, 2), issued)
        expected.check_server(server.socket, structured=True, writable=False)
        assert server.peak > 1 << 20
    expected.check_image(image, "raw")


def test_the_pool_goes_on_after_a_failed_turn(sock_dir: str) -> None:
    work = Workload(write=False, block=BLOCK, depth=2, sequential=False, size=1 << 20)
    with Pool(1) as pool:
        with pytest.raises(LoadFailed, match="FileNotFoundError"):
            pool.run(os.path.join(sock_dir, "nobody"), work, 1, warm_up=0, seconds=0.05)
        bad, good = os.path.join(sock_dir, "bad"), os.path.join(sock_dir, "good")
        with TinyServer(bad, bytearray(1 << 20), fail_at=3), pytest.raises(LoadFailed, match="error"):
            pool.run(bad, work, 1, warm_up=0, seconds=30)
        os.unlink(bad)
        writes = replace(work, write=True)
        with TinyServer(bad, bytearray(1 << 20), close_at=3), pytest.raises(LoadFailed):
            pool.run(bad, writes, 1, warm_up=0, seconds=30)
        with TinyServer(good, bytearray(1 << 20)):
            assert pool.run(good, work, 1, warm_up=0, seconds=0.1).requests > 0


def test_a_steady_load_writes_and_reports_every_latency(sock_dir: str) -> None:
    path = os.path.join(sock_dir, "s")
    with TinyServer(path, bytearray(1 << 20)) as server, Pool(1) as pool:
        pool.start_paced(path, Paced(rate=2000, size=1 << 20))
        pool.paced_connected()
        while len(server.cookies) < 20:
            pass
        outcome = pool.stop_paced()
        assert len(outcome.due) == len(outcome.latency) == len(server.cookies) >= 20
        assert min(outcome.latency) > 0
        blocks = {bytes(server.disk[at : at + BLOCK]) for at in range(0, 1 << 20, BLOCK)}
        assert blocks == {PAYLOAD, bytes(BLOCK)}


def test_a_steady_load_whose_server_goes(sock_dir: str) -> None:
    path = os.path.join(sock_dir, "s")
    with Pool(1) as pool:
        for fault, may_close in (("close_at", True), ("close_at", False), ("fail_at", True)):
            with TinyServer(path, bytearray(1 << 20), **{fault: 3}) as server:
                pool.start_paced(path, Paced(rate=1000, size=1 << 20, may_close=may_close))
                pool.paced_connected()
                while len(server.cookies) < 4:
                    pass
                if fault == "close_at" and may_close:
                    assert len(pool.stop_paced().due) <= 3
                else:
                    with pytest.raises(LoadFailed, match=r"closed|BrokenPipe|ConnectionReset|error 5"):
                        pool.stop_paced()
            os.unlink(path)


def test_latencies_are_those_of_the_window() -> None:
    outcome = PacedOutcome([0.0, 1.0, 1.5, 2.0, 9.0], [5.0, 0.1, 0.3, 0.2, 7.0])
    rate, p99, worst = outcome.within(1.0, 3.0)
    assert (rate, worst) == (1.5, 0.3) and 0.2 < p99 <= 0.31
    assert outcome.within(3.0, 1.0) == (0.0, 0.0, 0.0)


def test_a_command_costs_its_own_memory_and_not_ours() -> None:
    ballast = bytearray(256 << 20)
    bare = run([sys.executable, "-c", "pass"])
    large = run([sys.executable, "-c", "x = b'1' * (96 << 20)"])
    assert len(ballast) > 0
    assert bare.peak < 64 << 20 <= 96 << 20 <= large.peak < 192 << 20
    assert bare.seconds > 0 and bare.cpu > 0


def test_a_failing_command_is_an_error() -> None:
    with pytest.raises(CommandFailed, match=r"status 3: .*gone wrong"):
        run([sys.executable, "-c", "import sys; print('gone wrong'); sys.exit(3)"])
    with pytest.raises(CommandFailed, match="could not be started"):
        run(["/nonexistent/program"])
    assert run([sys.executable, "-c", "raise SystemExit(3)"], codes=(0, 3)).seconds > 0


def test_memory_and_cpu_of_a_running_process_and_its_child() -> None:
    child = "import time; x = b'1' * (48 << 20); t = time.process_time()\nwhile time.process_time() - t < 0.05: pass\n"
    child += "print('ready', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        assert len(family(process.pid)) == 2
        assert peak_memory(process.pid) >= 48 << 20
        assert cpu_seconds(process.pid) >= 0.05
        process.stdin.write(b"\n")
    assert process.wait() == 0
