"""Progress reports: what each style prints, and that nobody has to listen."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time

import pytest

from diskwright.cli import progress
from diskwright.cli.progress import Amount, Reporter


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_INTERVAL", 0.01)
    monkeypatch.setattr(progress, "_JSON_INTERVAL", 0.01)


class Work:
    """1000 bytes of work, of which every look finds some more done."""

    def __init__(self) -> None:
        self.done = -100

    def measure(self) -> Amount:
        self.done = min(1000, self.done + 100)
        return Amount(self.done, 1000)

    def wait(self) -> None:
        while self.done < 1000:
            time.sleep(0.005)


def test_line_in_a_pipe_is_what_qemu_img_prints(capsys: pytest.CaptureFixture[str]) -> None:
    work = Work()
    with Reporter("line", work.measure, phase="copy") as reporter:
        work.wait()
    reporter.end_line()
    shown = capsys.readouterr()
    assert re.fullmatch(r"(    \(\d{1,3}\.\d\d/100%\)\r)+\n", shown.out)
    assert shown.out.startswith("    (0.00/100%)\r")
    assert shown.out.endswith("    (100.00/100%)\r\n")
    assert shown.err == ""


def test_line_on_a_terminal_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    work = Work()
    with Reporter("line", work.measure, phase="copy"):
        work.wait()
    lines = terminal.getvalue().split("\r")
    assert any(re.match(r"    \(\d+\.\d\d/100%\)  [\d.]+ [KMG]?i?B/s  \d+:\d\d left *$", line) for line in lines)
    assert len({len(line) for line in lines if line}) == 1  # each covers the one before


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    work = Work()
    with Reporter("json", work.measure, phase="convert") as reporter:
        work.wait()
    reporter.end_line()
    shown = capsys.readouterr()
    assert shown.out == ""
    rows = [json.loads(line) for line in shown.err.splitlines()]
    assert [set(row) for row in rows] == [{"offset", "length", "rate", "eta", "phase"}] * len(rows)
    offsets = [row["offset"] for row in rows]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == 1000
    assert rows[0]["eta"] is None and rows[-1]["eta"] == 0.0
    assert all(row["length"] == 1000 and row["phase"] == "convert" and row["rate"] >= 0 for row in rows)


def test_silence_until_a_signal_asks(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Reporter(None, lambda: Amount(1, 4), phase="copy") as reporter:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
    reporter.end_line()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "    (25.00/100%)\n")
    assert signal.getsignal(signal.SIGUSR1) is before


def test_nothing_to_do_is_done() -> None:
    assert Amount(0, 0).percent == 100.0


def test_a_reader_that_goes_away_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    work = Work()
    with Reporter("line", work.measure, phase="copy") as reporter:
        for _ in range(20):
            work.measure()
    assert reporter.style is None
    assert work.done == 1000


def test_the_reporting_thread_ends_with_the_work() -> None:
    reporter = Reporter("json", lambda: Amount(0, 1), phase="copy")
    with pytest.raises(KeyError), reporter:
        raise KeyError("the work failed")
    assert reporter._thread is not None and not reporter._thread.is_alive()
