"""The client's side of the handshake: against this package's own server side, and against servers that lie."""

from __future__ import annotations

import itertools
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.errors import ProtocolError
from diskwright.wire.nbd import client
from diskwright.wire.nbd.handshake import ExportInfo, ServerHandshake, Tls

MAGIC = 0x3E889045565A9
LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META = 3, 5, 6, 7, 8, 9
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERROR = 0x80000000

EXPORTS = {
    "": ExportInfo(1 << 20, 0x0D),
    "dïsk": ExportInfo(4096, 0x03, "a disk", 512, 65536, ("base:allocation", "qemu:dirty-bitmap:b")),
}


def over(server: ServerHandshake) -> client.Ask:
    """Asks ``server`` directly."""
    incoming = client.Incoming()
    incoming.feed(server.greeting())
    greeting = incoming.greeting()
    assert greeting == client.Greeting(True, True)
    assert server.feed(client.client_flags(greeting)) == b""

    def ask(number: int, data: bytes) -> client.Answer:
        incoming.feed(server.feed(client.option(number, data)))
        return collected(incoming, number)

    return ask


def collected(incoming: client.Incoming, number: int) -> client.Answer:
    collector = client.Collector(number)
    while True:
        reply = incoming.reply()
        assert reply is not None, "the answer is not whole"
        answer = collector.add(reply)
        if answer is not None:
            assert incoming.rest == b""
            return answer


def saying(*replies: bytes) -> client.Ask:
    """A server that says this to whatever it is asked."""

    def ask(number: int, data: bytes) -> client.Answer:
        incoming = client.Incoming()
        incoming.feed(b"".join(replies))
        return collected(incoming, number)

    return ask


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return pack(">QIII", MAGIC, number, kind, len(data)) + data


def test_all_questions_are_answered() -> None:
    ask = over(ServerHandshake(EXPORTS))
    assert client.list_exports(ask) == [("", ""), ("dïsk", "a disk")]
    with pytest.raises(client.Refused, match="takes it for invalid"):
        client.meta_contexts(ask, "dïsk")  # before structured replies
    assert client.structured_replies(ask)
    found = client.info(ask, "dïsk", (1, 2, 3))
    assert (found.size, found.flags, found.name, found.description) == (4096, 0x83, "dïsk", "a disk")
    assert (found.minimum_block, found.preferred_block, found.maximum_block) == (512, 65536, 32 << 20)
    assert client.meta_contexts(ask, "dïsk") == {"base:allocation": 0, "qemu:dirty-bitmap:b": 0}
    assert client.meta_contexts(ask, "dïsk", ["qemu:"]) == {"qemu:dirty-bitmap:b": 0}
    assert client.meta_contexts(ask, "dïsk", ["qemu:dirty-bitmap:b"], choose=True) == {"qemu:dirty-bitmap:b": 2}
    with pytest.raises(client.Refused, match="no such export") as refused:
        client.info(ask, "other")
    assert refused.value.kind == ERROR + 6 and "other" in refused.value.said
    with pytest.raises(client.Refused, match="policy"):
        client.start_tls(ask)


def test_go_enters() -> None:
    server = ServerHandshake(EXPORTS)
    assert client.info(over(server), "", go=True).size == 1 << 20
    assert server.chosen is not None and server.chosen.name == ""


def test_tls_first_where_it_is_required() -> None:
    server = ServerHandshake(EXPORTS, Tls.REQUIRED)
    ask = over(server)
    with pytest.raises(client.Refused, match="wants TLS first"):
        client.list_exports(ask)
    client.start_tls(ask)
    server.secured()
    assert len(client.list_exports(ask)) == 2


def test_greetings_of_old_servers() -> None:
    incoming = client.Incoming()
    incoming.feed(b"NBDMAGIC" + pack(">QQI", 0x00420281861253, 1 << 30, 0x10003) + bytes(124) + b"more")
    greeting = incoming.greeting()
    assert greeting is not None and greeting.old is not None
    assert (greeting.old.size, greeting.old.flags, incoming.rest) == (1 << 30, 3, b"more")
    incoming = client.Incoming()
    incoming.feed(b"NBDMAGICIHAVEOPT\0\0")
    assert incoming.greeting() == client.Greeting(False, False)
    for no_zeroes, length in ((True, 0), (False, 124)):
        incoming = client.Incoming()
        incoming.feed(pack(">QH", 77, 5) + bytes(length)[:-1])
        assert no_zeroes or incoming.export(no_zeroes) is None
        incoming.feed(b"\0" * (not no_zeroes))
        found = incoming.export(no_zeroes)
        assert found is not None and (found.size, found.flags) == (77, 5)


@pytest.mark.parametrize("first", [b"SSH-2.0-OpenSSH_9", b"NBDMAGIC" + b"garbage!" + bytes(2)])
def test_no_nbd_server(first: bytes) -> None:
    incoming = client.Incoming()
    incoming.feed(first)
    with pytest.raises(ProtocolError):
        incoming.greeting()


def info(kind: int, body: bytes) -> bytes:
    return reply(INFO, REP_INFO, pack(">H", kind) + body)


SIZE = info(0, pack(">QH", 4096, 1))


@pytest.mark.parametrize(
    "said, match",
    [
        ([reply(GO, ACK)], "answered option 7 when 6 was asked"),
        ([reply(INFO, ACK)], "did not tell the size"),
        ([info(0, b"x"), reply(INFO, ACK)], "3 bytes, not 12"),
        ([SIZE, reply(INFO, META, b"\0\0"), reply(INFO, ACK)], "reply type 4"),
        ([SIZE, reply(INFO, REP_INFO, b"\0"), reply(INFO, ACK)], "reply type 3"),
        ([SIZE, info(3, pack(">III", 3, 4096, 1 << 20)), reply(INFO, ACK)], "minimum block size is 3"),
        ([SIZE, info(3, pack(">III", 0, 4096, 1 << 20)), reply(INFO, ACK)], "minimum block size is 0"),
        ([SIZE, info(3, pack(">III", 512, 256, 1 << 20)), reply(INFO, ACK)], "preferred block size is 256"),
        ([SIZE, info(3, pack(">III", 512, 4096, 1000)), reply(INFO, ACK)], "maximum block size is 1000"),
        ([SIZE, info(3, b"short"), reply(INFO, ACK)], "7 bytes, not 14"),
        ([SIZE, info(2, b"x" * 5000), reply(INFO, ACK)], "string of 5000 bytes"),
        ([SIZE, info(99, b"unknown"), reply(INFO, ERROR + 1, b"no")], "does not know it: no"),
        ([pack(">QIII", 1, INFO, ACK, 0)], "reply magic is 0x1"),
        ([pack(">QIII", MAGIC, INFO, ACK, 1 << 30)], "1073741824 bytes, more than"),
    ],
)
def test_lies_about_an_export(said: list[bytes], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        client.info(saying(*said), "x")


@pytest.mark.parametrize(
    "said, match",
    [
        (reply(LIST, SERVER, b"\0\0"), "cut off"),
        (reply(LIST, SERVER, pack(">I", 5) + b"1234"), "has 5 bytes, of 4 sent"),
        (reply(LIST, SERVER, pack(">I", 5000) + bytes(5000)), "has 5000 bytes"),
        (reply(LIST, META, b"1234a"), "reply type 4"),
    ],
)
def test_lies_in_a_list(said: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        client.list_exports(saying(said, reply(LIST, ACK)))


def test_lies_about_contexts() -> None:
    for said in (reply(LIST_META, META, b"1234"), reply(LIST_META, SERVER, b"12345")):
        with pytest.raises(ProtocolError, match="metadata contexts"):
            client.meta_contexts(saying(said, reply(LIST_META, ACK)), "")


def test_a_list_without_end_is_cut_off() -> None:
    collector = client.Collector(LIST)
    one = client.Reply(LIST, SERVER, b"\0\0\0\0")
    for _ in range(client.MAX_REPLIES):
        assert collector.add(one) is None
    with pytest.raises(ProtocolError, match="more than 16384 replies"):
        collector.add(one)


def test_unknown_information_and_odd_names_are_borne() -> None:
    said = (SIZE, info(99, b"whatever"), info(1, b"\xff\xfe"), reply(INFO, ACK))
    found = client.info(saying(*said), "x")
    assert found.size == 4096 and found.name is not None
    assert found.name.encode("utf-8", "surrogateescape") == b"\xff\xfe"


@given(st.binary(max_size=300), st.lists(st.integers(0, 299), max_size=8))
def test_any_bytes_in_any_pieces_end_in_a_reply_or_an_error(data: bytes, cuts: list[int]) -> None:
    """However a server's bytes are cut, the same comes out; and nothing but ProtocolError is raised."""
    data = b"NBDMAGICIHAVEOPT\0\3" + reply(LIST, SERVER, b"\0\0\0\1a") + data

    def outcome(pieces: list[bytes]) -> list[object]:
        incoming, seen = client.Incoming(), []
        greeted = False
        try:
            for piece in pieces:
                incoming.feed(piece)
                if not greeted:
                    greeting = incoming.greeting()
                    greeted = greeting is not None
                    seen += [greeting] if greeted else []
                while greeted and (found := incoming.reply()) is not None:
                    seen.append(found)
        except ProtocolError as error:
            seen.append(str(error))
        return seen

    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert outcome([data[a:b] for a, b in itertools.pairwise(edges)]) == outcome([data])
