"""Every command line of the matrix, by both programs; and that what is said of the matrix is true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.matrix import cases, images, twins
from tests.cli.matrix.differences import TABLE, Difference, expected
from tests.cli.run import needs_qemu, needs_same_texts

ROOT = Path(__file__).parents[2]

CHUNK = 60
"""Command lines in one test: enough that preparing is cheap, few enough that two workers end together."""

CHUNKS = [
    pytest.param(lines[start : start + CHUNK], id=f"{group}-{start // CHUNK}")
    for group, lines in cases.groups().items()
    for start in range(0, len(lines), CHUNK)
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("matrix")
    images.prepare(directory)
    with images.in_use(directory):
        yield directory


@needs_qemu
@needs_same_texts
@pytest.mark.parametrize("lines", CHUNKS)
def test_both_programs_do_the_same(lines: tuple[tuple[str, ...], ...], prepared: Path, tmp_path: Path) -> None:
    pairs = [twins.run(words, prepared, tmp_path) for words in lines]
    apart = [pair for pair in pairs if pair.differing() and not pair.unlucky() and expected(pair) is None]
    assert not apart, "\n" + "\n".join(map(str, apart))


@needs_qemu
@needs_same_texts
@pytest.mark.parametrize("difference", TABLE, ids=lambda difference: difference.example)
def test_each_difference_is_still_one(difference: Difference, prepared: Path, tmp_path: Path) -> None:
    """An entry whose example behaves alike, or is explained by another entry, has had its day."""
    pair = twins.run(cases.words_of(difference.example), prepared, tmp_path)
    assert pair.differing(), pair
    assert difference.explains(pair), pair


def test_the_documentation_lists_all_differences() -> None:
    told = " ".join((ROOT / "docs/tools/qemu-img.md").read_text().split())
    missing = [difference.reason for difference in TABLE if " ".join(difference.reason.split()) not in told]
    assert not missing, missing


def test_the_readme_does_not_boast() -> None:
    text = (ROOT / "README.md").read_text()
    (claimed,) = re.findall(r"([\d,]+) command lines", text)
    assert int(claimed.replace(",", "")) <= len(cases.every())


def test_no_command_line_is_counted_twice() -> None:
    lines = cases.every()
    assert len(set(lines)) == len(lines)
