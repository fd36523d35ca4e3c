"""Progress of a long command: as a line on a terminal, as qemu-img's ``-p`` prints it, or as JSON lines."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from diskwright.cli.faces import OWN_NAME, program

if TYPE_CHECKING:
    import argparse

_LINE_INTERVAL: Final = 0.25
"""Seconds between updates of a line a person reads: faster than this nobody can."""
_JSON_INTERVAL: Final = 1.0
"""Seconds between JSON lines: what a program polls at, and an hour of it stays below half a megabyte."""
_PATIENCE: Final = 1.0
"""Seconds after which progress that nobody asked for is shown on a terminal: shorter commands just end."""
_WINDOW: Final = 10
"""How many updates the rate is taken over: long enough to be steady, short enough to notice a change."""


class Amount(NamedTuple):
    """How much of a phase is done, in bytes."""

    done: int
    total: int

    @property
    def percent(self) -> float:
        return 100.0 * self.done / self.total if self.total else 100.0


class Reporter:
    """Reports ``measure()`` from a thread of its own, so that the work itself is never held up by it.

    ``style`` is None (say nothing unless SIGUSR1 asks), ``line`` or ``json``. A reader that goes away ends
    the reports, never the work. What ends within ``patience`` seconds is not reported at all.
    """

    def __init__(self, style: str | None, measure: Callable[[], Amount], *, phase: str, patience: float = 0.0) -> None:
        self.style, self.measure, self.phase, self.patience = style, measure, phase, patience
        self._shown = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: list[tuple[float, int]] = []
        self._serial = threading.Lock()
        self._old_handler: object = None

    @classmethod
    def of(cls, args: argparse.Namespace, measure: Callable[[], Amount], *, phase: str) -> Self:
        """The reports a command line asks for: ``--progress=json``, else ``-p`` unless ``-q``. On a terminal those of a
        command that takes its time are shown unasked, where nothing else is printed there for a program."""
        if args.progress == "json":
            return cls("json", measure, phase=phase)
        if args.quiet or args.show_progress:
            return cls(None if args.quiet else "line", measure, phase=phase)
        unasked = args.progress is None and getattr(args, "output", "human") != "json"
        if unasked and program() == OWN_NAME and sys.stdout.isatty():
            return cls("line", measure, phase=phase, patience=_PATIENCE)
        return cls(None, measure, phase=phase)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGUSR1, self._on_signal)
        if self.style is not None:
            if not self.patience:
                self._report()
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._old_handler is not None:
            signal.signal(signal.SIGUSR1, self._old_handler)  # type: ignore[arg-type]
        if self.style is not None and (self._shown or not self.patience):
            self._report()
        if error is not None:
            self.end_line()  # so that what went wrong gets a line of its own

    def end_line(self) -> None:
        """Leaves the line that was written over again and again; call it after the result was printed."""
        if self.style == "line" and self._shown:
            self._write(sys.stdout, "\n")

    def _run(self) -> None:
        if self.patience and self._stop.wait(self.patience):
            return
        interval = _JSON_INTERVAL if self.style == "json" else _LINE_INTERVAL
        while not self._stop.wait(interval):
            self._report()

    def _report(self) -> None:
        with self._serial:
            self._shown = True
            amount = self.measure()
            rate, eta = self._rate(amount)
            if self.style == "json":
                self._write(sys.stderr, _json(amount, rate, eta, self.phase))
            elif self.style == "line":
                self._write(sys.stdout, _line(amount, rate, eta, terminal=sys.stdout.isatty()))

    def _rate(self, amount: Amount) -> tuple[float, float | None]:
        """Bytes a second over the last updates, and the seconds that are left at that rate (None: no telling)."""
        now = time.monotonic()
        self._seen.append((now, amount.done))
        del self._seen[:-_WINDOW]
        then, before = self._seen[0]
        elapsed = now - then
        rate = max(0.0, (amount.done - before) / elapsed) if elapsed > 0 else 0.0
        left = amount.total - amount.done
        if left <= 0:
            return rate, 0.0
        return rate, left / rate if rate > 0 else None

    def _write(self, stream: object, text: str) -> None:
        try:
            print(text, end="", file=stream, flush=True)  # type: ignore[call-overload]
        except (OSError, ValueError):
            self.style = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Not through _report: this may have interrupted it.
        self._write(sys.stderr, f"    ({self.measure().percent:3.2f}/100%)\n")


def _json(amount: Amount, rate: float, eta: float | None, phase: str) -> str:
    left = "null" if eta is None else f"{eta:.1f}"
    return (
        f'{{"offset": {amount.done}, "length": {amount.total}, "rate": {rate:.0f}, "eta": {left}, '
        f'"phase": "{phase}"}}\n'
    )


def _line(amount: Amount, rate: float, eta: float | None, *, terminal: bool) -> str:
    """What qemu-img's ``-p`` prints; on a terminal, where no program reads it, rate and time left too."""
    text = f"    ({amount.percent:3.2f}/100%)"
    if not terminal:
        return text + "\r"
    from diskwright.units import human_size

    more = f"  {human_size(int(rate))}/s" if rate else ""
    if eta:
        minutes, seconds = divmod(round(eta), 60)
        hours, minutes = divmod(minutes, 60)
        more += f"  {hours}:{minutes:02}:{seconds:02} left" if hours else f"  {minutes}:{seconds:02} left"
    return f"{(text + more):<60}\r"
