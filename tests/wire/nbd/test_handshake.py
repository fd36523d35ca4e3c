"""The server's handshake as bytes: what it answers, however its client's bytes are cut or damaged."""

from __future__ import annotations

from struct import pack, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.errors import ProtocolError
from diskwright.wire.nbd.handshake import CLOSED, OPTIONS, SECURING, TRANSMISSION, ExportInfo, ServerHandshake, Tls

# Numbers of the protocol document, written out: the tests must not share a mistake with the code.
IHAVEOPT = 0x49484156454F5054
REPLY = 0x3E889045565A9
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, UNKNOWN = (0x80000000 + n for n in (1, 2, 3, 6))
DF = 0x80

EXPORTS = {"": ExportInfo(1 << 20, 0x0D), "disk": ExportInfo(4096, 0x03, "a disk", 1, 65536)}


def option(number: int, data: bytes = b"") -> bytes:
    return pack(">QII", IHAVEOPT, number, len(data)) + data


def name_and(name: str, *numbers: int) -> bytes:
    encoded = name.encode()
    return pack(f">I{len(encoded)}sH{len(numbers)}H", len(encoded), encoded, len(numbers), *numbers)


def meta(name: str, *queries: str) -> bytes:
    out = pack(">I", len(name)) + name.encode() + pack(">I", len(queries))
    return out + b"".join(pack(">I", len(query)) + query.encode() for query in queries)


def replies(out: bytes) -> list[tuple[int, int, bytes]]:
    """``(option, type, data)`` of option replies; fails unless they fill ``out`` exactly."""
    found = []
    at = 0
    while at < len(out):
        magic, number, kind, length = unpack_from(">QIII", out, at)
        assert magic == REPLY
        found.append((number, kind, out[at + 20 : at + 20 + length]))
        assert len(found[-1][2]) == length
        at += 20 + length
    return found


def begun(flags: int = 3) -> ServerHandshake:
    shake = ServerHandshake(EXPORTS)
    assert shake.greeting() == b"NBDMAGICIHAVEOPT\0\3"
    assert shake.feed(pack(">I", flags)) == b""
    return shake


def kinds(out: bytes) -> list[tuple[int, int]]:
    return [(number, kind) for number, kind, _ in replies(out)]


def test_go_tells_size_and_flags_and_enters() -> None:
    shake = begun()
    answer = replies(shake.feed(option(GO, name_and("disk"))))
    infos = {unpack_from(">H", data)[0]: data for _, kind, data in answer if kind == REP_INFO}
    assert infos[0] == pack(">HQH", 0, 4096, 0x03)
    assert infos[3] == pack(">HIII", 3, 1, 65536, 32 << 20)
    assert answer[-1][:2] == (GO, ACK)
    assert shake.state == TRANSMISSION and shake.chosen is not None
    assert (shake.chosen.name, shake.chosen.structured, shake.chosen.contexts) == ("disk", False, ())


def test_info_tells_the_same_and_stays() -> None:
    shake = begun()
    told = replies(shake.feed(option(INFO, name_and("disk", 1, 2))))
    infos = {unpack_from(">H", data)[0]: data[2:] for _, kind, data in told if kind == REP_INFO}
    assert infos[1] == b"disk" and infos[2] == b"a disk"
    assert shake.state == OPTIONS and shake.chosen is None
    assert kinds(shake.feed(option(GO, name_and("disk"))))[-1] == (GO, ACK)


def test_an_unknown_export_is_refused_and_another_may_be_tried() -> None:
    shake = begun()
    assert kinds(shake.feed(option(GO, name_and("no such")))) == [(GO, UNKNOWN)]
    assert kinds(shake.feed(option(INFO, name_and("no such")))) == [(INFO, UNKNOWN)]
    assert kinds(shake.feed(option(SET_META, meta("")))) == [(SET_META, INVALID)]
    shake.feed(option(STRUCTURED))
    assert kinds(shake.feed(option(SET_META, meta("no such", "base:allocation")))) == [(SET_META, UNKNOWN)]
    assert shake.state == OPTIONS


@pytest.mark.parametrize("flags, zeros", [(3, 0), (1, 124), (0, 124)])
def test_export_name_with_and_without_zeroes(flags: int, zeros: int) -> None:
    shake = begun(flags)
    assert shake.feed(option(EXPORT_NAME, b"disk")) == pack(">QH", 4096, 3) + bytes(zeros)
    assert shake.state == TRANSMISSION


def test_export_name_of_nothing_closes() -> None:
    shake = begun()
    assert shake.feed(option(EXPORT_NAME, b"no such")) == b""
    assert shake.state == CLOSED and shake.chosen is None


def test_structured_replies_offer_df() -> None:
    shake = begun()
    assert replies(shake.feed(option(STRUCTURED))) == [(STRUCTURED, ACK, b"")]
    shake.feed(option(STRUCTURED, b"x"))
    answer = replies(shake.feed(option(GO, name_and(""))))
    assert (GO, REP_INFO, pack(">HQH", 0, 1 << 20, 0x0D | DF)) in answer
    assert shake.chosen is not None and shake.chosen.structured


def test_list_abort_tls_and_unknown_options() -> None:
    shake = begun()
    listed = replies(shake.feed(option(LIST)))
    assert listed == [(LIST, SERVER, bytes(4)), (LIST, SERVER, b"\0\0\0\4diska disk"), (LIST, ACK, b"")]
    assert kinds(shake.feed(option(LIST, b"x"))) == [(LIST, INVALID)]
    assert kinds(shake.feed(option(STARTTLS))) == [(STARTTLS, POLICY)]
    assert kinds(shake.feed(option(4711, b"data"))) == [(4711, UNSUP)]
    assert kinds(shake.feed(option(ABORT))) == [(ABORT, ACK)]
    assert shake.state == CLOSED


@pytest.mark.parametrize(
    "queries, listed, chosen",
    [
        ((), 1, 0),
        (("base:",), 1, 0),
        (("base:allocation",), 1, 1),
        (("other:x",), 0, 0),
        (("x:", "base:allocation"), 1, 1),
    ],
)
def test_meta_contexts_listed_and_set(queries: tuple[str, ...], listed: int, chosen: int) -> None:
    shake = begun()
    shake.feed(option(STRUCTURED))
    expected = [(META, b"\0\0\0\0base:allocation")] * listed + [(ACK, b"")]
    assert [reply[1:] for reply in replies(shake.feed(option(LIST_META, meta("disk", *queries))))] == expected
    answer = replies(shake.feed(option(SET_META, meta("disk", *queries))))
    assert [kind for _, kind, _ in answer] == [META] * chosen + [ACK]
    assert all(unpack_from(">I", data)[0] for _, kind, data in answer if kind == META)
    shake.feed(option(GO, name_and("disk")))
    assert shake.chosen is not None and bool(shake.chosen.contexts) == bool(chosen)


@pytest.mark.parametrize(
    "later",
    [
        option(SET_META, meta("disk", "other:x")),
        option(SET_META, meta("no such", "base:allocation")),  # failing clears it as well
        option(SET_META, meta("disk", "base:allocation")[:-1]),
        option(SET_META, meta("", "base:allocation")),  # valid for that export only
    ],
)
def test_a_later_set_replaces_the_contexts(later: bytes) -> None:
    shake = begun()
    shake.feed(option(STRUCTURED) + option(SET_META, meta("disk", "base:allocation")) + later)
    shake.feed(option(GO, name_and("disk")))
    assert shake.chosen is not None and not shake.chosen.contexts


def test_listing_does_not_change_what_is_set() -> None:
    shake = begun()
    shake.feed(option(STRUCTURED) + option(SET_META, meta("disk", "base:allocation")))
    shake.feed(option(LIST_META, meta("disk", "other:x")) + option(GO, name_and("disk")))
    assert shake.chosen is not None and shake.chosen.contexts


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\1", pack(">IH", 5, 0), name_and("disk")[:-1], name_and("disk") + b"x", pack(">IH", 0, 2) + b"\0\0"],
)
def test_malformed_info_is_refused(number: int, data: bytes) -> None:
    shake = begun()
    assert kinds(shake.feed(option(number, data))) == [(number, INVALID)]
    assert shake.state == OPTIONS


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(4),
        pack(">II", 0, 1),
        pack(">II", 0, 0xFFFFFFFF),
        meta("disk", "a")[:-1],
        meta("disk") + b"x",
        b"\xff" * 8,
    ],
)
def test_malformed_meta_queries_are_refused(data: bytes) -> None:
    shake = begun()
    shake.feed(option(STRUCTURED))
    assert kinds(shake.feed(option(SET_META, data))) == [(SET_META, INVALID)]


@pytest.mark.parametrize("data", [pack(">I", 4), pack(">I", 0x10003)])
def test_unknown_client_flags_end_it(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="client flags"):
        ServerHandshake(EXPORTS).feed(data)


def test_limits_of_a_handshake() -> None:
    with pytest.raises(ProtocolError, match="magic"):
        begun().feed(pack(">QII", IHAVEOPT + 1, LIST, 0))
    with pytest.raises(ProtocolError, match="bytes of data"):
        begun().feed(pack(">QII", IHAVEOPT, LIST, 0xFFFFFFFF))
    with pytest.raises(ProtocolError, match="more than 64 options"):
        begun().feed(option(LIST) * 65)


WHOLE = b"".join(
    (
        pack(">I", 3),
        option(STRUCTURED),
        option(LIST),
        option(4711, b"what is this"),
        option(LIST_META, meta("disk")),
        option(SET_META, meta("disk", "base:allocation", "x:y")),
        option(INFO, name_and("disk", 0, 1, 2, 3)),
        option(GO, name_and("disk", 3)),
    )
)
REQUEST = b"\x25\x60\x95\x13 the first request"


def test_cut_at_every_byte_it_says_the_same() -> None:
    expected = ServerHandshake(EXPORTS).feed(WHOLE)
    replies(expected)
    for cut in range(1, len(WHOLE)):
        shake = ServerHandshake(EXPORTS)
        assert shake.feed(WHOLE[:cut]) + shake.feed(WHOLE[cut:] + REQUEST) == expected
        assert shake.state == TRANSMISSION and shake.rest == REQUEST
    shake = ServerHandshake(EXPORTS)
    assert b"".join(shake.feed(bytes([byte])) for byte in WHOLE) == expected


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=4), st.integers(1, 60)
)
def test_damaged_bytes_give_refusals_or_protocol_errors(damage: list[tuple[int, int]], step: int) -> None:
    data = bytearray(WHOLE)
    for at, change in damage:
        data[at] ^= change
    _feed_in_steps(bytes(data), step)


@given(st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=80)), max_size=80), st.integers(1, 500))
def test_any_options_give_refusals_or_protocol_errors(options: list[tuple[int, bytes]], step: int) -> None:
    _feed_in_steps(pack(">I", 3) + b"".join(option(number, data) for number, data in options), step)


def _feed_in_steps(data: bytes, step: int) -> None:
    """What is said stays in proportion, well formed, and nothing but ProtocolError comes out."""
    shake = ServerHandshake(EXPORTS)
    said = 0
    try:
        for at in range(0, len(data), step):
            answer = shake.feed(data[at : at + step])
            said += len(answer)
    except ProtocolError:
        pass
    assert said < 64 * 1024
    if shake.state == TRANSMISSION:
        assert shake.chosen is not None and shake.chosen.name in EXPORTS


TLS_REQD = 0x80000005
CONTEXTS = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:a:b")
RICH = {"": ExportInfo(1 << 20, 0x0D, contexts=CONTEXTS)}


@pytest.mark.parametrize(
    "queries, listed, chosen",
    [
        ((), [0, 1, 2, 3], []),
        (("base:",), [0], []),
        (("qemu:",), [1, 2, 3], []),
        (("qemu:dirty-bitmap:",), [2, 3], []),
        (("qemu:dirty-bitmap:a",), [2], [2]),
        (("qemu:dirty-bitmap:a:",), [], []),
        (("qemu:dirty-bitmap:a:b", "base:allocation", "base:allocation"), [0, 3], [0, 3]),
        (("qemu:allocation-depth", "qemu:nothing", "nonsense", ""), [1], [1]),
    ],
)
def test_contexts_of_several_namespaces(queries: tuple[str, ...], listed: list[int], chosen: list[int]) -> None:
    shake = ServerHandshake(RICH)
    shake.feed(pack(">I", 3) + option(STRUCTURED))
    answer = replies(shake.feed(option(LIST_META, meta("", *queries))))
    assert [data[4:].decode() for _, kind, data in answer if kind == META] == [CONTEXTS[n] for n in listed]
    answer = replies(shake.feed(option(SET_META, meta("", *queries))))
    ids = {data[4:].decode(): unpack_from(">I", data)[0] for _, kind, data in answer if kind == META}
    assert ids == {CONTEXTS[n]: n + 1 for n in chosen}
    shake.feed(option(GO, name_and("")))
    assert shake.chosen is not None and shake.chosen.contexts == tuple(CONTEXTS[n] for n in chosen)


def test_nothing_but_tls_is_told_where_it_is_required() -> None:
    shake = ServerHandshake(EXPORTS, Tls.REQUIRED)
    shake.feed(pack(">I", 3))
    for number in (LIST, INFO, GO, STRUCTURED, LIST_META, SET_META, 4711):
        assert kinds(shake.feed(option(number, name_and("")))) == [(number, TLS_REQD)]
    assert kinds(shake.feed(option(STARTTLS, b"x"))) == [(STARTTLS, INVALID)]
    assert kinds(shake.feed(option(STARTTLS))) == [(STARTTLS, ACK)]
    assert shake.state == SECURING
    shake.secured()
    assert kinds(shake.feed(option(STARTTLS))) == [(STARTTLS, INVALID)]
    assert kinds(shake.feed(option(LIST))) == [(LIST, SERVER), (LIST, SERVER), (LIST, ACK)]
    shake.feed(option(GO, name_and("disk")))
    assert shake.state == TRANSMISSION


def test_the_old_way_in_is_shut_where_tls_is_required() -> None:
    shake = ServerHandshake(EXPORTS, Tls.REQUIRED)
    assert shake.feed(pack(">I", 3) + option(EXPORT_NAME)) == b""
    assert shake.state == CLOSED and shake.chosen is None


def test_abort_needs_no_tls() -> None:
    shake = ServerHandshake(EXPORTS, Tls.REQUIRED)
    shake.feed(pack(">I", 3))
    assert kinds(shake.feed(option(ABORT))) == [(ABORT, ACK)]


def test_tls_forgets_what_was_agreed_before() -> None:
    shake = ServerHandshake(EXPORTS, Tls.OPTIONAL)
    shake.feed(pack(">I", 3) + option(STRUCTURED) + option(SET_META, meta("disk", "base:allocation")))
    shake.feed(option(STARTTLS))
    shake.secured()
    shake.feed(option(GO, name_and("disk")))
    assert shake.chosen is not None and not shake.chosen.structured and not shake.chosen.contexts


def test_optional_tls_may_be_left_out() -> None:
    shake = ServerHandshake(EXPORTS, Tls.OPTIONAL)
    shake.feed(pack(">I", 3) + option(GO, name_and("disk")))
    assert shake.state == TRANSMISSION


def test_bytes_behind_starttls_are_not_taken_for_what_came_through_it() -> None:
    for more in (option(LIST), b"\0"):
        shake = ServerHandshake(EXPORTS, Tls.OPTIONAL)
        shake.feed(pack(">I", 3))
        with pytest.raises(ProtocolError, match="between STARTTLS and its answer"):
            shake.feed(option(STARTTLS) + more)
