"""Tables of results as Markdown, which reads well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled table. The first column is text and aligned left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_line(head, widths), "| " + " | ".join(rule) + " |", *(_line(row, widths) for row in rows)]
    return f"### {title}\n\n" + "\n".join(lines) + "\n"


def number(value: float | None, *, missing: str = "-") -> str:
    """Three significant digits, thousands apart; for a rate or a duration."""
    if value is None:
        return missing
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def mebibytes(size: float | None) -> str:
    """A size given in bytes, as MiB."""
    return "-" if size is None else f"{size / (1 << 20):.1f} MiB"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    padded[0] = cells[0].ljust(widths[0])
    return "| " + " | ".join(padded) + " |"
