"""JSON as qemu-img lays it out, and nested facts as text."""

from __future__ import annotations

import json

import pytest

from diskwright.cli.output import indented, json_text


def test_layout() -> None:
    value = {"a": 1, "b": [{"c": "x"}, {"d": None}], "e": {"f": True}}
    assert json_text(value) == (
        '{\n    "a": 1,\n    "b": [\n        {\n            "c": "x"\n        },\n        {\n            "d": null\n'
        '        }\n    ],\n    "e": {\n        "f": true\n    }\n}'
    )


@pytest.mark.parametrize("text", ["plain", 'quote" and \\', "\x00\x1f\x7f", "\b\f\n\r\t", "é€", "😀", "\ue000\uffff"])
def test_any_text_is_ascii_and_comes_back(text: str) -> None:
    written = json_text({text: text})
    assert written.isascii()
    assert json.loads(written) == {text: text}


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert json_text("a\udcffb") == '"a\\uFFFDb"'


def test_escapes_are_qemus() -> None:
    assert json_text('é\t"\\\x7f\x01😀') == '"\\u00E9\\t\\"\\\\\\u007F\\u0001\\uD83D\\uDE00"'


def test_what_has_no_place_in_json_is_a_bug_not_a_guess() -> None:
    with pytest.raises(TypeError):
        json_text(1.5)


def test_nested_facts_as_text() -> None:
    facts = {"lazy-refcounts": False, "list": ["x", {"key-offset": 7}], "inner": {"name": "n"}, "empty": ""}
    assert indented(facts, 1) == [
        "    lazy refcounts: false",
        "    list:",
        "        [0]: x",
        "        [1]:",
        "            key offset: 7",
        "    inner:",
        "        name: n",
        "    empty: ",
    ]
