"""blkdebug: configuration, rules, limits, breakpoints."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.core.driver import Segments, Storage
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.core.permissions import READER, WRITER
from diskwright.errors import DiskwrightError, GraphError, LimitExceeded, OptionError
from diskwright.filters.blkdebug.config import MAX_BYTES, read_config
from diskwright.filters.blkdebug.driver import Blkdebug
from diskwright.filters.blkdebug.rules import InjectError, Rules, SetState
from diskwright.units import KiB
from tests.filters.opening import memory, opened, over_memory
from tests.peers.qemu_img import qemu_img


def debug(**options: object) -> tuple[Graph, FilterNode]:
    return over_memory("blkdebug", role="image", **options)


def rules_of(node: FilterNode) -> Rules:
    assert isinstance(node.filter, Blkdebug)
    return node.filter.rules


def failing(node: FilterNode, what: str = "read", offset: int = 0, length: int = 512) -> int | None:
    """The error number of one request."""
    try:
        if what == "read":
            node.pread(offset, length)
        elif what == "write":
            node.pwrite(offset, bytes(length))
        elif what == "zero":
            node.write_zeros(offset, length)
        elif what == "discard":
            node.discard(offset, length)
        else:
            node.flush()
    except OSError as error:
        return error.errno
    return None


# -- rules -------------------------------------------------------------------------------------------


def test_an_error_stays_until_its_rule_is_used_up() -> None:
    graph, node = debug(inject_error=[{"event": "l2_load", "errno": 28, "once": True}])
    assert failing(node) is None
    rules_of(node).event("l2_load")
    assert failing(node) == 28
    assert failing(node) is None
    rules_of(node).event("l2_load")
    assert failing(node) is None, "a rule that was used up is gone"
    graph.close()


def test_an_error_without_once_fails_every_request() -> None:
    graph, node = debug(inject_error=[{"event": "none"}])
    assert [failing(node, what) for what in ("read", "write", "zero", "discard", "flush")] == [errno.EIO] * 5
    graph.close()


@pytest.mark.parametrize("kind", ["read", "write", "write-zeroes", "discard", "flush"])
def test_an_error_for_one_kind_of_requests(kind: str) -> None:
    graph, node = debug(inject_error=[{"event": "none", "iotype": kind}])
    words = {"read": "read", "write": "write", "write-zeroes": "zero", "discard": "discard", "flush": "flush"}
    for each, what in words.items():
        assert failing(node, what) == (errno.EIO if each == kind else None)
    graph.close()


def test_block_status_fails_only_when_it_is_named() -> None:
    graph, node = debug(inject_error=[{"event": "none", "iotype": "block-status"}])
    assert failing(node) is None
    with pytest.raises(OSError):
        node.extents(0, 512)
    graph.close()


@pytest.mark.parametrize(
    ("offset", "length", "fails"),
    [(1024, 512, True), (1025, 1, False), (1024, 1, True), (0, 1024, False), (0, 1025, True), (1536, 512, False)],
)
def test_an_error_at_a_sector_is_where_its_first_byte_is(offset: int, length: int, fails: bool) -> None:
    graph, node = debug(inject_error=[{"event": "none", "sector": 2}])
    assert (failing(node, "read", offset, length) is not None) is fails
    assert failing(node, "flush") is None, "a flush is at no sector"
    graph.close()


def test_states() -> None:
    graph, node = debug(
        inject_error=[{"event": "read_aio", "state": 2, "errno": 5}, {"event": "read_aio", "state": 1, "errno": 6}],
        set_state=[
            {"event": "write_aio", "state": 1, "new-state": 2},
            {"event": "write_aio", "new_state": 3},
        ],
    )
    rules = rules_of(node)
    rules.event("read_aio")
    assert failing(node) == 6
    rules.event("write_aio")
    assert rules.state == 2, "the first rule that applies"
    assert failing(node) == 6, "an event without errors changes none"
    rules.event("read_aio")
    assert failing(node) == 5
    rules.event("write_aio")
    assert rules.state == 3
    graph.close()


def test_of_several_errors_the_first_counts() -> None:
    graph, node = debug(inject_error=[{"event": "none", "errno": 5, "once": True}, {"event": "none", "errno": 6}])
    assert [failing(node) for _ in range(3)] == [5, 6, 6]
    graph.close()


def test_an_error_number_of_zero_is_none() -> None:
    graph, node = debug(inject_error=[{"event": "none", "errno": 0}])
    assert failing(node) is None
    graph.close()


# -- configuration files ---------------------------------------------------------------------------


def test_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(
        '# comment\n\n[inject-error "name"]\n  event = "l2_load"\nerrno = "0x1c"\nonce="on"\nsector = "7"\n'
        '[set-state]\nevent = "none"\nstate = "4"\nnew-state = "5"\n[inject-error]\r\nevent = "none"\r\n'
    )
    errors, changes = read_config(str(path))
    assert errors == [
        InjectError(event="l2_load", errno=28, once=True, sector=7),
        InjectError(event="none"),
    ]
    assert changes == [SetState(event="none", state=4, new_state=5)]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[inject-error]\nevent = "foo"\n', 2, "foo"),
        ('[inject-error]\nerrno = "5"\n', 1, "Missing event"),
        ('[inject-error]\nevent = "none"\n\nerrno = "five"\n', 4, "errno"),
        ('[inject-error]\nevent = "none"\nonce = "maybe"\n', 3, "once"),
        ('[inject-error]\nevent = "none"\niotype = "erase"\n', 3, "erase"),
        ('[inject-error]\nevent = "none"\nsector = "1k"\n', 3, "sector"),
        ('[inject-error]\nevent = "none"\nnew_state = "1"\n', 3, "new_state"),
        ('[set-state]\nevent = "none"\nerrno = "1"\n', 3, "errno"),
        ("[explode]\n", 1, "explode"),
        ('event = "none"\n', 1, "group"),
        ("\n\nrubbish\n", 3, "neither"),
        ('[inject-error\nevent = "none"\n', 1, "neither"),
        ("[inject-error]\nevent = none\n", 2, "neither"),
        ('[inject-error]\nevent = "none\n', 2, "neither"),
        ("[inject-error]\n\x00\xff\x1b[31m\n", 2, "neither"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        read_config(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ") and what in message
    assert "\n" not in message and message.isprintable()


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        read_config(str(tmp_path / "none"))
    assert caught.value.errno == errno.ENOENT and "blkdebug config" in str(caught.value)
    (tmp_path / "long").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(OptionError, match="longest"):
        read_config(str(tmp_path / "long"))


@given(st.binary(max_size=200))
def test_any_bytes_give_rules_or_one_line(data: bytes) -> None:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    try:
        read_config(f"/proc/self/fd/{read}")
    except OptionError as error:
        assert "\n" not in str(error)
    finally:
        os.close(read)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"align": 3}, "align 3"),
        ({"align": 4096, "max-transfer": 512}, "max-transfer 512"),
        ({"max-write-zero": 1000, "opt-write-zero": 512}, "max-write-zero"),
        ({"align": 512, "opt-discard": 777}, "opt-discard 777"),
        ({"max-discard": 1 << 31}, "max-discard"),
        ({"align": 1 << 40}, "align"),
        ({"inject-error": [{"event": "foo"}]}, "foo"),
        ({"inject-error": [{"errno": 5}]}, "event"),
        ({"inject-error.0.event": "none", "inject-error.2.event": "none"}, "Unused option '2'"),
        ({"inject-error.a.event": "none"}, "Unused option 'a'"),
        ({"inject-error": "none"}, "list"),
        ({"take-child-perms": ["everything"]}, "everything"),
        ({"foo": 1}, "foo"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        opened({"driver": "blkdebug", "image": memory(4096), **options})


def test_no_image() -> None:
    with pytest.raises(OptionError, match='must be specified for "image"'):
        opened({"driver": "blkdebug"})


# -- names and children ------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "1M")
    return path


def tree(spec: object, **options: object) -> list[str]:
    """The drivers from the root down."""
    graph = Graph(OpenGate())
    node = graph.open(spec, **options)  # type: ignore[arg-type]
    drivers = [node.driver_name]
    while node.file is not None:
        node = node.file
        drivers.append(node.driver_name)
    graph.close()
    return drivers


def test_by_name_it_is_bytes_in_which_a_format_is_looked_for(tmp_path: Path, image: Path) -> None:
    config = tmp_path / "config"
    config.write_text('[set-state]\nevent = "none"\nnew_state = "7"\n')
    assert tree(f"blkdebug:{config}:{image}") == ["qcow2", "blkdebug", "file"]
    assert tree(f"blkdebug::blkdebug::{image}") == ["qcow2", "blkdebug", "blkdebug", "file"]
    assert tree(f"blkdebug::{image}", driver="raw") == ["raw", "blkdebug", "file"]
    assert tree(f"blkdebug::{image}", driver="blkdebug") == ["blkdebug", "file"]
    assert tree({"driver": "qcow2", "file.driver": "blkdebug", "file.image.filename": str(image)}) == [
        "qcow2", "blkdebug", "file",
    ]  # fmt: skip
    assert tree(f'json:{{"driver": "blkdebug", "image": {{"driver": "file", "filename": "{image}"}}}}') == [
        "blkdebug", "file",
    ]  # fmt: skip


def test_as_the_root_its_image_is_bytes_unless_a_format_is_named(image: Path) -> None:
    assert tree({"driver": "blkdebug", "image.filename": str(image)}) == ["blkdebug", "file"]
    assert tree({"driver": "blkdebug", "filename": str(image)}) == ["blkdebug", "file"]
    named = {"driver": "blkdebug", "image.driver": "qcow2", "image.file.filename": str(image)}
    assert tree(named) == ["blkdebug", "qcow2", "file"]


def test_a_child_by_node_name(image: Path) -> None:
    graph = Graph(OpenGate())
    below = graph.open({"driver": "file", "filename": str(image), "node-name": "below"}, writable=True)
    node = graph.open({"driver": "blkdebug", "image": "below"}, writable=True)
    assert node.children() == {"image": below}
    graph.release(below)
    assert node.pread(0, 4) == b"QFI\xfb"
    graph.close()


@pytest.mark.parametrize("name", ["blkdebug:image", "blkdebug:"])
def test_a_name_without_an_image(name: str) -> None:
    with pytest.raises(OptionError, match="requires both"):
        tree(name)


def test_names_within_names_are_bounded(image: Path) -> None:
    with pytest.raises(LimitExceeded, match="nested"):
        tree("blkdebug::" * 400 + str(image))
    nested: dict[str, object] = {"filename": str(image)}
    for _ in range(200):
        nested = {"driver": "blkdebug", "image": nested}
    with pytest.raises(LimitExceeded, match="nested"):
        tree(nested)


def test_nothing_is_left_open_after_an_error(image: Path) -> None:
    graph = Graph(OpenGate())
    with pytest.raises(DiskwrightError):
        graph.open({"driver": "blkdebug", "image.filename": str(image), "align": 3})
    assert graph.nodes() == []
    graph.close()


def test_an_image_cannot_send_us_through_a_filter(tmp_path: Path, image: Path) -> None:
    """A backing file's name is somebody else's; only the user's own names may use any driver."""
    above = tmp_path / "above"
    qemu_img(
        "create", "-q", "-u", "-f", "qcow2", "-b", f"blkdebug:/etc/shadow:{image}", "-F", "qcow2", str(above), "1M"
    )
    graph = Graph()
    with pytest.raises(DiskwrightError, match="not a file in the image's own directory"):
        graph.open(str(above))
    graph.close()


# -- permissions -----------------------------------------------------------------------------------


def test_permissions_taken_of_the_child(image: Path) -> None:
    graph = Graph(OpenGate())
    graph.open({"driver": "file", "filename": str(image), "node-name": "below"}, writable=True)
    above = graph.open({"driver": "blkdebug", "image": "below", "take-child-perms": ["write"]}, writable=True)
    graph.disk(above).close()  # what the filter does is done for its own users
    with pytest.raises(GraphError, match="'write'"):
        graph.disk(graph.node("below"), READER)
    graph.close()


def test_permissions_left_to_nobody_else(image: Path) -> None:
    graph = Graph(OpenGate())
    graph.open({"driver": "file", "filename": str(image), "node-name": "below"}, writable=True)
    options = {"driver": "blkdebug", "image": "below", "unshare-child-perms": ["consistent-read"]}
    above = graph.open(options, writable=True)
    graph.disk(above, WRITER).close()
    with pytest.raises(GraphError, match="consistent read"):
        graph.disk(graph.node("below"), READER)
    graph.release(above)
    graph.disk(graph.node("below"), READER).close()
    graph.close()


# -- limits ----------------------------------------------------------------------------------------


class Seen:
    """What comes to a storage."""

    def __init__(self, storage: Storage) -> None:
        self.requests: list[tuple[str, int, int]] = []
        for name in ("readv", "writev"):
            setattr(storage, name, self._segments(name, getattr(storage, name)))
        for name in ("write_zeros", "discard"):
            setattr(storage, name, self._range(name, getattr(storage, name)))

    def _segments(self, name: str, inner: object) -> object:
        def call(segments: Segments, **more: object) -> None:
            self.requests += [(name, offset, len(buffer)) for offset, buffer in segments]
            inner(segments, **more)  # type: ignore[operator]

        return call

    def _range(self, name: str, inner: object) -> object:
        def call(offset: int, length: int, **more: object) -> None:
            self.requests.append((name, offset, length))
            inner(offset, length, **more)  # type: ignore[operator]

        return call


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[tuple[FilterNode, Seen]]:
    graph, node = debug(**request.param)
    storage = node.child.storage  # type: ignore[attr-defined]
    seen = Seen(storage)
    node.child.readv = storage.readv  # type: ignore[method-assign]
    yield node, seen
    graph.close()


@pytest.mark.parametrize("limited", [{"align": 4096, "max_transfer": 8192}], indirect=True)
def test_requests_are_padded_and_cut(limited: tuple[FilterNode, Seen]) -> None:
    node, seen = limited
    node.pwrite(0, bytes(range(256)) * 128)
    seen.requests.clear()
    node.pwrite(5000, b"x" * 20000)
    assert node.pread(4999, 20002) == bytes([4999 % 256]) + b"x" * 20000 + bytes([25000 % 256])
    assert all(offset % 4096 == 0 and length % 4096 == 0 and length <= 8192 for _, offset, length in seen.requests)
    node.pwrite(7, b"y")
    assert node.pread(0, 12) == bytes(range(7)) + b"y" + bytes(range(8, 12))


@pytest.mark.parametrize("limited", [{"align": 512, "opt_write_zero": 4096, "max_write_zero": 8192}], indirect=True)
def test_zeroing_in_units(limited: tuple[FilterNode, Seen]) -> None:
    node, seen = limited
    node.pwrite(0, b"x" * 65536)
    seen.requests.clear()
    node.write_zeros(1000, 30000)
    assert [each[1:] for each in seen.requests if each[0] == "write_zeros"] == [
        (4096, 8192), (12288, 8192), (20480, 8192),
    ]  # fmt: skip
    assert node.pread(0, 65536) == b"x" * 1000 + bytes(30000) + b"x" * (65536 - 31000)


@pytest.mark.parametrize("limited", [{"opt_discard": 4096, "max_discard": 4096}], indirect=True)
def test_discards_in_units(limited: tuple[FilterNode, Seen]) -> None:
    node, seen = limited
    node.discard(100, 12000 - 100)
    node.discard(100, 50)
    assert seen.requests == [("discard", 4096, 4096)], "what is left of it at both ends is less than a unit"


def test_an_unaligned_end() -> None:
    graph, node = over_memory("blkdebug", size=10000, role="image", align=4096)
    node.pwrite(9990, b"0123456789")
    assert node.pread(9000, 1000) == bytes(990) + b"0123456789" and node.size == 10000
    graph.close()


def test_writes_of_parts_of_one_unit_do_not_undo_each_other() -> None:
    graph, node = debug(align=4096)
    threads = [
        threading.Thread(target=lambda i=i: [node.pwrite(n * 64 + i * 8, bytes([i]) * 8) for n in range(64)])  # type: ignore[misc]
        for i in range(1, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.pread(0, 4096) == b"".join(bytes([i]) * 8 for i in range(8)) * 64
    graph.close()


# -- breakpoints -----------------------------------------------------------------------------------


def _suspended(rules: Rules, tag: str) -> None:
    while not rules.is_suspended(tag):
        threading.Event().wait(0.001)


def test_a_request_waits_until_it_is_resumed(tmp_path: Path, image: Path) -> None:
    graph = Graph(OpenGate())
    node = graph.open(f"blkdebug::{image}", writable=True)
    rules = rules_of(node.file)  # type: ignore[arg-type]
    rules.breakpoint("write_aio", "A")
    thread = threading.Thread(target=lambda: node.pwrite(0, b"x" * 65536))
    thread.start()
    _suspended(rules, "A")
    node.pread(512 * KiB, 512)  # others go on
    assert thread.is_alive()
    rules.resume("A")
    thread.join()
    assert node.pread(0, 1) == b"x" and not rules.is_suspended("A")
    node.pwrite(65536, b"y" * 65536)  # a breakpoint is for one request
    graph.close()


def test_tags_and_events_that_are_not_there() -> None:
    graph, node = debug()
    rules = rules_of(node)
    for call in (
        lambda: rules.breakpoint("rubbish", "A"),
        lambda: rules.resume("A"),
        lambda: rules.remove_breakpoint("A"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENOENT
    rules.breakpoint("pwritev", "A")
    rules.remove_breakpoint("A")
    assert failing(node, "write") is None
    graph.close()


def test_closing_lets_everybody_go() -> None:
    graph, node = debug()
    rules = rules_of(node)
    rules.breakpoint("pwritev", "A")
    thread = threading.Thread(target=lambda: failing(node, "write"))
    thread.start()
    _suspended(rules, "A")
    rules.resume_all()
    thread.join()
    graph.close()


def test_removing_a_breakpoint_resumes_its_request() -> None:
    graph, node = debug()
    rules = rules_of(node)
    rules.breakpoint("pwritev", "A")
    thread = threading.Thread(target=lambda: failing(node, "write"))
    thread.start()
    _suspended(rules, "A")
    with pytest.raises(OSError, match="no breakpoint"):  # that is gone; its request is let go nevertheless
        rules.remove_breakpoint("A")
    thread.join()
    graph.close()
