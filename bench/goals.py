"""What Diskwright sets out to reach, and whether it did. A goal is a ratio; whoever misses one is told so."""

from __future__ import annotations

from dataclasses import dataclass

from bench.rounds import Ratio


@dataclass(frozen=True)
class Goal:
    """At least ``least`` times as fast as the better qemu-nbd, and ``ahead`` of nbdkit where it says so."""

    least: float
    ahead: bool = False


def nbd_goal(block: int, depth: int) -> Goal:
    """The goal for requests of ``block`` bytes at a queue depth."""
    if block >= 1 << 20:
        return Goal(1.5)
    return Goal(2.0, ahead=True) if depth >= 16 else Goal(1.5)


def verdict(goal: Goal, to_qemu: Ratio | None, to_nbdkit: Ratio | None) -> str:
    """``met`` or ``not met`` and what the goal was; ``-`` without a figure."""
    if to_qemu is None:
        return "-"
    met = to_qemu.median >= goal.least
    text = f">={goal.least:g}: {'met' if met else 'not met'}"
    if goal.ahead and to_nbdkit is not None:
        text += f"; ahead of nbdkit: {'met' if to_nbdkit.median > 1 else 'not met'}"
    return text
