"""Opening what is an image, refusing what is not, and the names files go by."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from diskwright.core import options as opts
from diskwright.core.permissions import READER
from diskwright.errors import OptionError, message_of
from diskwright.storage.file import FileStorage, HostDeviceStorage
from tests.conformance.storage_suite import read
from tests.storage.conftest import Opener


def test_a_missing_file_is_named(tmp_path: Path, opened: Opener) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        opened(tmp_path / "none")
    assert message_of(caught.value) == f"{tmp_path}/none: No such file or directory"


@pytest.mark.parametrize("writable", [False, True])
def test_a_directory_is_refused(tmp_path: Path, opened: Opener, writable: bool) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        opened(tmp_path, writable=writable)
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("writable", [False, True])
def test_a_fifo_is_refused_without_waiting_for_its_other_end(tmp_path: Path, opened: Opener, writable: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="Neither a regular file nor a block device") as caught:
        opened(tmp_path / "fifo", writable=writable)
    assert caught.value.errno == errno.EINVAL and caught.value.filename == str(tmp_path / "fifo")


def test_a_socket_is_refused(tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError, match="Neither a regular file nor a block device"):
            opened("socket")


def test_a_character_device_is_refused(opened: Opener) -> None:
    with pytest.raises(OSError, match="Neither a regular file nor a block device"):
        opened("/dev/zero")


def test_a_name_no_file_can_have_is_refused(opened: Opener) -> None:
    with pytest.raises(OptionError, match="NUL"):
        opened("a\0b")


def test_a_regular_file_is_no_host_device(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "file").write_bytes(bytes(512))
    with pytest.raises(OSError, match="needs a block device") as caught:
        opened(tmp_path / "file", device=True)
    assert caught.value.errno == errno.ENOTBLK


def test_refusals_leave_no_descriptor_open(tmp_path: Path, opened: Opener) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(bytes(512))
    before = os.listdir("/proc/self/fd")
    for path, device in ((tmp_path / "fifo", False), (tmp_path, False), (tmp_path / "file", True)):
        with pytest.raises(OSError):
            opened(path, writable=False, device=device)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_opening_and_closing_leaves_no_descriptor_open(tmp_path: Path, opened: Opener, cache: str) -> None:
    (tmp_path / "file").write_bytes(bytes(512))
    before = os.listdir("/proc/self/fd")
    storage = opened(tmp_path / "file", cache=cache)
    storage.writev([(100, memoryview(bytes(1000)))])
    storage.close()
    storage.close()
    assert os.listdir("/proc/self/fd") == before


def test_descriptors_are_not_inherited_and_block(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "file").write_bytes(bytes(512))
    storage = opened(tmp_path / "file")
    assert not os.get_inheritable(storage._fd)
    assert os.get_blocking(storage._fd)


def test_a_file_opened_for_reading_is_not_written(tmp_path: Path, opened: Opener) -> None:
    (tmp_path / "file").write_bytes(b"content")
    storage = opened(tmp_path / "file", writable=False)
    storage.set_access(READER)
    with pytest.raises(OSError) as caught:
        storage.writev([(0, memoryview(b"other"))])
    assert caught.value.filename == str(tmp_path / "file")
    storage.flush()
    assert read(storage, 0, 7) == b"content"


def test_names_with_and_without_prefix() -> None:
    assert FileStorage.parse_filename("file:/a/b:c") == {"filename": "/a/b:c"}
    assert FileStorage.parse_filename("/a/b:c") == {"filename": "/a/b:c"}
    assert HostDeviceStorage.parse_filename("host_device:/dev/x") == {"filename": "/dev/x"}


def test_bytes_that_are_no_text_survive_in_a_name(tmp_path: Path, opened: Opener) -> None:
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff\xfe,name")
    with open(name, "wb") as file:
        file.write(b"content")
    assert read(opened(name), 0, 7) == b"content"


def test_options_are_described_for_help() -> None:
    names = [info.name for info in opts.describe(FileStorage.options)]
    assert names == ["filename", "locking", "cache", "aio", "discard", "force-share"]
    with pytest.raises(OptionError, match="filename"):
        opts.parse(FileStorage.options, {}, owner="file")


def test_bytes_written_by_others_and_growth_by_others_are_seen(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first")
    storage = opened(path)
    assert storage.size == 5
    with path.open("ab") as other:
        other.write(b", second")
    assert storage.size == 13
    assert read(storage, 0, 13) == b"first, second"
