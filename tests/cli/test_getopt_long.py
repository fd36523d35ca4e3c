"""Command lines as the C library reads them, and --object in its several spellings."""

from __future__ import annotations

import json

import pytest

from diskwright.cli.common import Failure
from diskwright.cli.getopt_long import OPERAND, Option, scan
from diskwright.cli.objects import Objects

OPTIONS = (
    Option("all", "a"),
    Option("bind", "b", True),
    Option("bitmap", "B", True),
    Option("bit"),
    Option("all-of-ours", "", exact=True),
)


def read(*words: str) -> list[tuple[str, str]]:
    return list(scan(words, OPTIONS, "HINT"))


@pytest.mark.parametrize(
    "words, found",
    [
        ((), []),
        (("x", "-a", "y"), [("all", ""), (OPERAND, "x"), (OPERAND, "y")]),
        (("-ab", "v"), [("all", ""), ("bind", "v")]),
        (("-abv",), [("all", ""), ("bind", "v")]),
        (("-b", "-a"), [("bind", "-a")]),
        (("-b=v",), [("bind", "=v")]),
        (("--bind=v=w", "--bind", "--all"), [("bind", "v=w"), ("bind", "--all")]),
        (("--bind=",), [("bind", "")]),
        (("--al", "--bitm=x", "--bit"), [("all", ""), ("bitmap", "x"), ("bit", "")]),
        (("-", "--", "-a", "--", "x"), [(OPERAND, word) for word in ("-", "-a", "--", "x")]),
        (("--all-of-ours",), [("all-of-ours", "")]),
    ],
)
def test_what_is_read(words: tuple[str, ...], found: list[tuple[str, str]]) -> None:
    assert read(*words) == found


@pytest.mark.parametrize(
    "words, message",
    [
        (("--bi",), "option '--bi' is ambiguous; possibilities: '--bind' '--bitmap' '--bit'"),
        (("--all-of",), "unrecognized option '--all-of'"),
        (("--none=x",), "unrecognized option '--none=x'"),
        (("--all=x",), "option '--all' doesn't allow an argument"),
        (("--bitm",), "option '--bitmap' requires an argument"),
        (("-ab",), "option requires an argument -- 'b'"),
        (("-axb",), "invalid option -- 'x'"),
    ],
)
def test_what_is_wrong(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(Failure) as caught:
        read(*words)
    assert caught.value.message == f"{message}\nHINT"


def test_options_before_a_wrong_one_are_read_first() -> None:
    found = scan(["-a", "--none"], OPTIONS, "")
    assert next(found) == ("all", "")
    with pytest.raises(Failure):
        next(found)


def test_objects_as_options_and_as_json() -> None:
    rules = {"qom-type": "authz-list", "id": "a", "rules": [{"match": "x", "policy": "allow", "format": "exact"}]}
    for text in (json.dumps(rules), "authz-list,id=a,rules.0.match=x,rules.0.policy=allow"):
        objects = Objects()
        objects.add(text)
        assert objects.authz("a")("x") and not objects.authz("a")("y")
    objects = Objects()
    objects.add('{"qom-type": "secret", "id": "s", "data": "cGFzcw==", "format": "base64"}')
    objects.add("qom-type=secret,id=t,data=a,,b")
    assert (objects.secrets.reveal("s"), objects.secrets.reveal("t")) == (b"pass", b"a,b")
    for wrong in ("secret,id=s,data=x", "authz-simple,id=s,identity=x", "secret,hush", '{"id": "u"}', "[", "{"):
        with pytest.raises(Failure) as caught:
            objects.add(wrong)
        assert "hush" not in caught.value.message
    with pytest.raises(Failure, match="is not TLS credentials"):
        objects.credentials("s", "server")
    with pytest.raises(Failure, match="No authorization object"):
        objects.authz("s")
