"""The format that docs/adding-a-driver.md shows, taken from that page."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diskwright.core import registry
from tests.conformance.format_suite import FormatConformance
from tests.formats.campaign import Campaign

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-driver.md"


def drivers() -> Any:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert code.count("\n") < 100
    module: Any = ModuleType("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "toy", module)  # dataclasses want to find it
        exec(compile(code, str(PAGE), "exec"), vars(module))
    return module.DRIVERS


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for driver in drivers():
            patch.setitem(registry._known, driver.name, driver)
        yield


class TestToy(FormatConformance):
    format_name = "toy"
    can_check = False
    can_grow = False
    model_examples = 10


class TestToyCampaign(Campaign):
    format_name = "toy"
    structures = ((0, 16), (16, 64))

    @pytest.mark.skip(reason="QEMU does not know it")
    def test_both_read_what_the_other_wrote(self) -> None:  # type: ignore[override]
        raise NotImplementedError

    test_damage_ends_in_an_answer_or_an_error = None  # it runs in a process of its own, where there is no such driver
