"""Sizes and typed options: what is accepted, what is refused, and that the refusal says why."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.core import options as opts
from diskwright.core.options import BOOL, INT, SIZE, STR, OneOf, option
from diskwright.errors import OptionError
from diskwright.units import align_down, align_up, human_size, is_power_of_two, parse_size


@dataclass(frozen=True, kw_only=True)
class Example:
    filename: str = option(STR, "where it is")
    cluster_size: int = option(SIZE, "unit", default=65536)
    lazy: bool = option(BOOL, "late", default=False)
    count: int = option(INT, "how many", default=3)
    mode: str = option(OneOf("off", "full"), "how", default="off")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("512b", 512),
        ("1k", 1024),
        ("1.5M", 1572864),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
        ("7E", 7 << 60),
        ("1.M", 1 << 20),
        ("0x10", 16),
        (" +5", 5),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1x", "1..2k", "1.5", "0x", "0x1k", "9E", "1kk", "\u0661", "1.²k"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="ize"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1 << 30, "1 GiB"),
        (200704, "196 KiB"),
        (1000 * 1024, "0.977 MiB"),
        (3 << 39, "1.5 TiB"),
    ],
)
def test_human_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


@given(st.integers(0, 1 << 62), st.sampled_from([1, 512, 4096, 65536, 3]))
def test_alignment(value: int, unit: int) -> None:
    assert align_down(value, unit) <= value <= align_up(value, unit) < align_down(value, unit) + 2 * unit
    assert align_up(value, unit) % unit == 0 == align_down(value, unit) % unit


def test_power_of_two() -> None:
    assert [n for n in range(-2, 20) if is_power_of_two(n)] == [1, 2, 4, 8, 16]


def test_options_are_parsed_by_type() -> None:
    values = {"filename": "a", "cluster-size": "2M", "lazy": "on", "count": "0x10", "mode": "full"}
    assert opts.parse(Example, values, owner="x") == Example(
        filename="a", cluster_size=2 << 20, lazy=True, count=16, mode="full"
    )
    assert opts.parse(Example, {"filename": "a", "cluster_size": 512}, owner="x").cluster_size == 512


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "filename"),
        ({"filename": 7}, "filename"),
        ({"filename": "a", "nope": "1"}, "nope"),
        ({"filename": "a", "lazy": "perhaps"}, "lazy"),
        ({"filename": "a", "count": "many"}, "count"),
        ({"filename": "a", "count": True}, "count"),
        ({"filename": "a", "mode": "half"}, "off, full"),
        ({"filename": "a", "cluster-size": -5}, "cluster-size"),
        ({"filename": "a", "cluster-size": 512, "cluster_size": 512}, "twice"),
    ],
)
def test_bad_options_say_which(values: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        opts.parse(Example, values, owner="x")


def test_describe_gives_the_names_users_write() -> None:
    infos = opts.describe(Example)
    assert [info.name for info in infos] == ["filename", "cluster-size", "lazy", "count", "mode"]
    assert [info.required for info in infos] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [("a=1,b=2", {"a": "1", "b": "2"}), ("f=x,,y,g", {"f": "x,y", "g": "on"}), ("", {}), ("a=b=c", {"a": "b=c"})],
)
def test_pairs(text: str, pairs: dict[str, str]) -> None:
    assert opts.split_pairs(text) == pairs


def test_pairs_need_names() -> None:
    with pytest.raises(OptionError):
        opts.split_pairs("=x")
