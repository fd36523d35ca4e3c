"""Rounds: contenders take turns, and what is compared is what happened next to each other in time.

On a machine with anything else to do, two figures taken a minute apart differ for reasons that have nothing to do
with the programs. So every round gives each contender one turn, the order moves on by one each round, and a ratio is
the median of the ratios inside the rounds, not the ratio of two medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

MAX_ROUNDS: Final = 1000


@dataclass(frozen=True)
class Sample:
    """One turn of one contender. ``value`` is a rate or a duration; ``cpu`` is CPU seconds of the contender itself
    (per request where requests are counted, else of the whole turn); ``notes`` are further figures by name."""

    value: float
    cpu: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Series:
    """A contender's turns in one configuration, one a round; ``failure`` says why it has none, or no more."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None

    @property
    def values(self) -> list[float]:
        return [sample.value for sample in self.samples]

    @property
    def median(self) -> float | None:
        """Median value, or None when it failed or never had a turn."""
        return None if self.failure or not self.samples else statistics.median(self.values)

    @property
    def cpu(self) -> float | None:
        """Median CPU seconds, where they were taken."""
        known = [sample.cpu for sample in self.samples if sample.cpu is not None]
        return None if self.failure or not known else statistics.median(known)

    def note(self, name: str) -> float | None:
        """Median of a further figure."""
        known = [sample.notes[name] for sample in self.samples if name in sample.notes]
        return None if self.failure or not known else statistics.median(known)


@dataclass(frozen=True)
class Ratio:
    """How many times one is the other: the median over the rounds, and the smallest and largest of a round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(over: Series, under: Series) -> Ratio | None:
    """Ratio of two contenders' values, round by round. None when either has no result."""
    if over.median is None or under.median is None:
        return None
    each = [a / b for a, b in zip(over.values, under.values, strict=True) if b > 0]
    if not each:
        return None
    return Ratio(statistics.median(each), min(each), max(each))


def best(series: Sequence[Series], *, highest: bool) -> Series | None:
    """The contender with the best median: the one to beat. ``highest`` for rates, not for durations."""
    known = [(one.median, one) for one in series if one.median is not None]
    if not known:
        return None
    return (max if highest else min)(known, key=lambda pair: pair[0])[1]


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields (round, name): everyone once a round, and a different one first each round."""
    for number in range(min(rounds, MAX_ROUNDS)):
        first = number % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            yield number, name


def play(
    contenders: Mapping[str, Callable[[], Sample]],
    rounds: int,
    *,
    expected: tuple[type[Exception], ...] = (Exception,),
    on_turn: Callable[[str, Sample], None] | None = None,
) -> dict[str, Series]:
    """Plays ``rounds`` rounds and returns a series each. A contender that raises is out, and its series says why;
    the others go on, and a figure made of fewer turns than theirs is never shown."""
    table = {name: Series(name) for name in contenders}
    for _, name in turns(list(contenders), rounds):
        series = table[name]
        if series.failure:
            continue
        try:
            sample = contenders[name]()
        except expected as error:
            series.failure = _one_line(error)
            continue
        series.samples.append(sample)
        if on_turn:
            on_turn(name, sample)
    return table


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:160] + " ... " + text[-230:]
