"""The command language of ``diskwright io`` where ``qemu-io`` is no yardstick: breakpoints, requests in the background,
a terminal."""

from __future__ import annotations

import errno
import os
import pty
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.cli.qio import report, table
from diskwright.cli.qio.background import MAX_THREADS, MAX_WAITING, Background
from diskwright.cli.qio.breakpoints import Breakpoints
from diskwright.cli.qio.console import execute
from diskwright.cli.qio.opening import Opening
from diskwright.cli.qio.session import Session
from diskwright.core.driver import Filter, Segments
from diskwright.core.node import Node
from diskwright.core.secrets import Secrets
from tests.cli.run import diskwright, environment


class Suspender(Filter):
    """Suspends writes at its one event, ``write``."""

    name = "suspender"

    def __init__(self, child: Node) -> None:
        self.child = child
        self._changed = threading.Condition()
        self._tags: dict[str, bool] = {}

    def breakpoint(self, event: str, tag: str) -> None:
        if event != "write":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._tags[tag] = False

    def remove_breakpoint(self, tag: str) -> None:
        self.resume(tag)

    def resume(self, tag: str) -> None:
        with self._changed:
            if tag not in self._tags:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            del self._tags[tag]
            self._changed.notify_all()

    def is_suspended(self, tag: str) -> bool:
        return self._tags.get(tag, False)

    def writev(self, segments: Segments) -> None:
        with self._changed:
            for tag in list(self._tags):
                self._tags[tag] = True
                while tag in self._tags:
                    self._changed.wait()
        self.child.writev(segments)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"A" * (1 << 20))
    return path


@pytest.fixture
def session(image: Path) -> Iterator[Session]:
    session = Session(Secrets())
    session.open(str(image), Opening(format="raw"))
    disk = session.open_disk
    disk.graph.insert_filter(Suspender(disk.node))
    yield session
    session.end()


def said(capsys: pytest.CaptureFixture[str], session: Session, *lines: str) -> tuple[list[bool], str]:
    """How lines went, and what was printed, times left out."""
    done = [execute(session, line) for line in lines]
    return done, re.sub(r"ops; .*", "ops", capsys.readouterr().out)


# -- breakpoints -----------------------------------------------------------------------------------


def test_a_suspender_has_breakpoints() -> None:
    assert isinstance(Suspender.__new__(Suspender), Breakpoints)
    assert not isinstance(Filter.__new__(Filter), Breakpoints)


def test_a_request_is_suspended_and_goes_on(capsys: pytest.CaptureFixture[str], session: Session) -> None:
    lines = ["break write A", "aio_write -P 1 0 4k", "wait_break A", "read -P 65 0 4k", "length"]
    lines += ["resume A", "aio_flush", "read -P 1 0 4k"]
    done, out = said(capsys, session, *lines)
    assert done == [True] * len(lines)
    assert out.split("\n") == [
        "blkdebug: Suspended request 'A'", "read 4096/4096 bytes at offset 0", "4 KiB, 1 ops", "1 MiB",
        "blkdebug: Resuming request 'A'", "wrote 4096/4096 bytes at offset 0", "4 KiB, 1 ops",
        "read 4096/4096 bytes at offset 0", "4 KiB, 1 ops", "",
    ]  # fmt: skip


def test_a_removed_breakpoint(capsys: pytest.CaptureFixture[str], session: Session) -> None:
    done, out = said(capsys, session, "break write A", "remove_break A", "write 0 4k", "remove_break A", "resume A")
    assert done == [True, True, True, False, False]
    assert out.splitlines()[-2:] == [
        "Could not remove breakpoint A: No such file or directory",
        "Could not resume request: No such file or directory",
    ]


def test_an_unknown_event(capsys: pytest.CaptureFixture[str], session: Session) -> None:
    done, out = said(capsys, session, "break nonsense A")
    assert (done, out) == ([False], "Could not set breakpoint: No such file or directory\n")


@pytest.mark.parametrize("last", ["close", "q", "truncate 1M"])
def test_what_waits_for_all_requests_lets_them_go_on(
    last: str, capsys: pytest.CaptureFixture[str], session: Session, image: Path
) -> None:
    """qemu-io hangs."""
    said(capsys, session, "break write A", "aio_write -P 1 0 4k", "wait_break A", last)
    session.close()
    assert image.read_bytes()[:4096] == bytes([1]) * 4096


# -- the background --------------------------------------------------------------------------------


def test_requests_run_beside_each_other(capsys: pytest.CaptureFixture[str], session: Session) -> None:
    """Both are held at once, and the one begun later may end first."""
    done, _ = said(
        capsys, session, "break write A", "aio_write 0 4k", "wait_break A", "aio_read -P 65 8k 4k", "sleep 300"
    )
    assert done == [True] * 5
    _, out = said(capsys, session, "resume A", "aio_flush")
    assert [line for line in out.splitlines() if "bytes at" in line] == ["wrote 4096/4096 bytes at offset 0"]


def test_many_requests(capsys: pytest.CaptureFixture[str], session: Session, image: Path) -> None:
    chance = random.Random(1)
    places = chance.sample(range(1024), 300)
    done, out = said(capsys, session, *(f"aio_write -P {at % 251} {at}k 1k" for at in places), "aio_flush")
    assert all(done) and out.count("wrote 1024/1024") == 300
    data = image.read_bytes()
    for at in range(1024):
        assert data[at * 1024 : (at + 1) * 1024] == bytes([at % 251 if at in places else 65]) * 1024


def test_more_requests_than_threads_and_places() -> None:
    pool, gate, told = Background(), threading.Event(), []
    for number in range(MAX_THREADS + MAX_WAITING):
        pool.submit(gate.wait if number < MAX_THREADS else lambda: None, told.append)
    assert pool.busy and pool.deliver() and not told
    more = threading.Thread(target=pool.submit, args=(lambda: None, told.append))
    more.start()
    gate.set()
    more.join(30)
    assert not more.is_alive()
    pool.finish_all()
    assert told == [None] * (MAX_THREADS + MAX_WAITING + 1) and not pool.busy
    pool.end()


def test_what_a_request_raised_is_told() -> None:
    pool, told = Background(), []
    error = OSError(errno.ENOSPC, "full")

    def fail() -> None:
        raise error

    pool.submit(fail, told.append)
    pool.finish_all()
    assert told == [error]
    pool.end()


def test_requests_end_while_a_script_waits(image: Path) -> None:
    """What is told of them appears before the next line comes."""
    command = [sys.executable, "-m", "diskwright.cli.main", "io", "-f", "raw", str(image)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), bufsize=0
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"aio_write 0 4k\n")
        seen = b""
        while b"wrote 4096/4096 bytes at offset 0" not in seen:
            piece = process.stdout.read(4096)
            assert piece, seen
            seen += piece
        process.stdin.close()
        process.stdout.read()
        assert process.wait(30) == 0


# -- the rest --------------------------------------------------------------------------------------


def test_on_a_terminal(image: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "diskwright.cli.main", "io", "-f", "raw", str(image)]
    env = {**environment(), "TERM": "dumb"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        os.write(master, b"length\nfoo\n\nread -P 65 0 4k\nquit\n")
        seen = b""
        try:
            while piece := os.read(master, 4096):
                seen += piece
        except OSError:
            pass  # the other end was closed
        assert process.wait(30) == 1
    os.close(master)
    assert b"1 MiB\r\n" in seen and b'command "foo" not found' in seen and b"read 4096/4096 bytes" in seen
    assert seen.count(b"diskwright> ") >= 4


@pytest.mark.parametrize("command", table.COMMANDS, ids=lambda command: command.name)
def test_every_command_is_there_and_explained(command: table.Command, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import import_module

    module, _, function = command.place.partition(".")
    assert callable(getattr(import_module(f"diskwright.cli.qio.{module}"), function))
    session = Session(Secrets())
    assert execute(session, f"help {command.name}")
    assert capsys.readouterr().out.startswith(command.usage())
    session.end()


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "directsync"])
def test_writing_through(cache: str, tmp_path: Path) -> None:
    """What has been written is there after a crash: on the map as well."""
    path = str(tmp_path / "image")
    assert diskwright("create", "-q", "-f", "qcow2", path, "1M", cwd=tmp_path).code == 0
    session = Session(Secrets())
    session.open(path, Opening(format="qcow2", cache=cache))
    for line in ("write -q 0 4k", "write -qc -P 1 64k 64k", "write -qz 128k 64k", "aio_write -q 256k 4k", "aio_flush"):
        assert execute(session, line)
    (tmp_path / "copy").write_bytes((tmp_path / "image").read_bytes())  # as a crash leaves it
    session.end()
    done = diskwright("io", "-r", "-f", "qcow2", "-c", "map", "copy", cwd=tmp_path)
    held = (
        "256 KiB (0x40000) bytes     allocated" not in done.out and "192 KiB (0x30000) bytes     allocated" in done.out
    )
    assert held == (cache != "writeback"), done.out


def test_numbers_of_any_length(image: Path) -> None:
    long = "9" * 5000
    for words in (f"read 0 {long}", f"read 0x{long} 1", f"read -P {long} 0 1", f"sleep {long}", f"read 0.{long}k 1"):
        done = diskwright("io", "-f", "raw", "-c", words, str(image), cwd=image.parent)
        assert (done.code, done.err) == (1, ""), words


def test_the_largest_requests(tmp_path: Path) -> None:
    """Of two gigabytes less a sector."""
    most = 2147483136
    disk = '{"driver": "null-co", "size": "4G", "read-zeroes": "on"}'.replace(" ", "")
    words = ["-c", "read -P 0 1G 99M", "-c", f"write -z 0 {most}", "-c", "write -zn 0 4G", "-c", f"discard 0 {most}"]
    done = diskwright("io", *words, f"json:{disk}", cwd=tmp_path)
    assert done.code == 0 and done.out.count(f"{most}/{most}") == 2, done


def test_reopening_what_is_only_in_memory(capsys: pytest.CaptureFixture[str], image: Path) -> None:
    for words in (["memory:1M"], ["-s", str(image)]):
        lines = ["-c", "write -P 7 0 4k", "-c", "reopen -r", "-c", "read -P 7 0 4k"]
        done = diskwright("io", "-f", "raw", *lines, *words, cwd=image.parent)
        assert done.code == 1 and "Cannot reopen" in done.err and "Pattern" not in done.out


def test_a_failed_reopen_leaves_the_image_open(image: Path) -> None:
    lines = ["-c", "reopen -o size=3M", "-c", "read -P 65 0 4k", "-c", "write 0 4k"]
    done = diskwright("io", "-f", "raw", *lines, str(image), cwd=image.parent)
    assert done.code == 1 and "read 4096/4096" in done.out and "wrote 4096/4096" in done.out


def test_a_temporary_overlay_leaves_nothing(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    lines = ["-c", "write 0 64k", "-c", "flush", "-c", "read -P 0xcd 0 64k"]
    assert diskwright("io", "-s", "-f", "raw", *lines, str(image), cwd=tmp_path).code == 0
    assert image.read_bytes() == b"A" * (1 << 20) and not list(place.iterdir())


def test_a_map_of_many_runs(tmp_path: Path) -> None:
    """More than are asked for one by one."""
    path = str(tmp_path / "image")
    assert diskwright("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "6M", cwd=tmp_path).code == 0
    lines = (f"write -q {at * 1024} 512" for at in range(6 * 1024))
    words = [word for line in lines for word in ("-c", line)]
    done = diskwright("io", "-f", "qcow2", *words, "-c", "map", "-c", "alloc 0 6M", path, cwd=tmp_path)
    rows = done.out.splitlines()
    assert rows.pop() == "3145728/6291456 bytes allocated at offset 0 bytes"
    assert len(rows) == 2 * 6 * 1024
    assert rows[8193] == "512 bytes (0x200) bytes not allocated at offset 4 MiB (0x400200)"
    assert all(("not" in row) == bool(number % 2) for number, row in enumerate(rows))


def test_times_are_shown_in_their_form(capsys: pytest.CaptureFixture[str]) -> None:
    """As observed of qemu-io with a disk of that latency."""
    for seconds in (0.019, 1.52, 65.563, 24141.71):
        report.timing("read", seconds, 0, 4096, 4096, condensed=False)
        report.timing("read", seconds, 0, 4096, 4096, condensed=True)
    rows = [row for row in capsys.readouterr().out.splitlines() if "offset" not in row]
    assert [row.partition("; ")[2].partition(" (")[0] or row.split(",")[2] for row in rows] == [
        "00.01 sec", "0:00:00.01", "0:00:01.52", "0:00:01.52", "0:01:05.56", "0:01:05.56", "6:42:21.71", "6:42:21.71",
    ]  # fmt: skip
    assert rows[4] == "4 KiB, 1 ops; 0:01:05.56 (62.474261 bytes/sec and 0.0153 ops/sec)"
    assert rows[5] == "4096,1,0:01:05.56,62.474,0.015"
