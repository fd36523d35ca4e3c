"""``diskwright io``, and ``qemu-io``: reads, writes and examines a disk by typed commands."""

from __future__ import annotations

from collections.abc import Sequence

SUMMARY = "read, write and examine a disk by typed commands, as qemu-io does"


def main(words: Sequence[str]) -> int:
    from diskwright.cli.qio.console import run

    return run(words)
