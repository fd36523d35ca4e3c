"""Turns, medians and ratios."""

from __future__ import annotations

import itertools

import pytest
from bench.goals import Goal, nbd_goal, verdict
from bench.rounds import Ratio, Sample, Series, best, play, ratio, turns


def series(name: str, *values: float) -> Series:
    return Series(name, [Sample(value) for value in values])


def test_everybody_has_one_turn_a_round_and_another_begins_each_time() -> None:
    order = list(turns(["a", "b", "c"], 4))
    rounds = [[name for number, name in order if number == n] for n in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    ours, theirs = series("ours", 10, 40, 6), series("theirs", 5, 10, 6)
    assert ratio(ours, theirs) == Ratio(2.0, 1.0, 4.0)
    assert ours.median == 10 and theirs.median == 6  # whose ratio would be 1.67


def test_no_ratio_without_figures() -> None:
    assert ratio(series("a"), series("b", 1)) is None
    assert ratio(series("a", 1), Series("b", [Sample(1)], failure="died")) is None
    assert ratio(series("a", 1), series("b", 0)) is None


def test_the_best_is_by_median_and_never_one_that_failed() -> None:
    slow, fast = series("slow", 1, 100, 2), series("fast", 5, 6, 7)
    broken = Series("broken", [Sample(1000)], failure="wrong data")
    assert best([slow, fast, broken], highest=True) is fast
    assert best([slow, fast, broken], highest=False) is slow
    assert best([broken], highest=True) is None


def test_a_contender_that_fails_is_out_and_the_others_go_on() -> None:
    count = itertools.count()

    def flaky() -> Sample:
        if next(count) == 1:
            raise OSError("it\ndied")
        return Sample(1)

    found = play({"flaky": flaky, "steady": lambda: Sample(2)}, 3)
    assert found["flaky"].failure == "it died" and found["flaky"].median is None
    assert found["steady"].values == [2, 2, 2]
    assert next(count) == 2  # no third turn


def test_a_bug_of_the_benchmark_is_not_taken_for_a_failure() -> None:
    def wrong() -> Sample:
        raise KeyError("x")

    with pytest.raises(KeyError):
        play({"a": wrong}, 1, expected=(OSError,))


def test_goals_are_judged_by_the_median_ratio() -> None:
    assert nbd_goal(4096, 1) == Goal(1.5)
    assert nbd_goal(4096, 16) == nbd_goal(4096, 64) == Goal(2.0, ahead=True)
    assert nbd_goal(1 << 20, 4) == Goal(1.5)
    near, above = Ratio(1.99, 1.0, 9.0), Ratio(2.0, 1.0, 2.1)
    assert verdict(Goal(2.0), near, None) == ">=2: not met"
    assert verdict(Goal(2.0), above, None) == ">=2: met"
    assert verdict(Goal(2.0, ahead=True), above, Ratio(0.9, 0.9, 0.9)) == ">=2: met; ahead of nbdkit: not met"
    assert verdict(Goal(2.0), None, None) == "-"
