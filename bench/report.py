"""Collects what a run finds: tables for people, figures for programs, failures for both."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

SCHEMA: Final = 1
"""Version of the JSON's structure; it changes when a reader would have to."""

_BEGAN: Final = time.monotonic()


@dataclass
class Report:
    """Tables are printed as they come, so that a run that is broken off has not been in vain."""

    machine: dict[str, str]
    options: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def table(self, text: str) -> None:
        """Prints a table."""
        print(text, flush=True)

    def add(self, part: str, figures: Any) -> None:
        """Keeps a part's figures for the JSON."""
        self.results[part] = figures

    def failure(self, where: str, who: str, error: object) -> None:
        """Notes that a contender failed: its figures are missing from there on."""
        text = f"{where}: {who}: {' '.join(str(error).split()) or type(error).__name__}"
        self.failures.append(text)
        say("FAILED " + text)

    def write_json(self, path: str) -> None:
        """Writes all figures, every round of them."""
        whole = {
            "schema": SCHEMA,
            "machine": self.machine,
            "options": self.options,
            "results": self.results,
            "failures": self.failures,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
            file.write("\n")


def say(text: str) -> None:
    """What is going on, on standard error, with the minutes and seconds since the start."""
    past = int(time.monotonic() - _BEGAN)
    print(f"[{past // 60:2}:{past % 60:02}] {text}", file=sys.stderr, flush=True)
