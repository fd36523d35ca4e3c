"""The initramfs writer. Its real reader, the kernel, is asked by test_guest_harness.py."""

from __future__ import annotations

import io
import stat

from tests.interop.guest.cpio import CpioWriter


def entries(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Reads an archive back: mode, contents and device of each name, in order."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    offset = 0
    while "TRAILER!!!" not in found:
        assert offset % 4 == 0 and data[offset : offset + 6] == b"070701"
        fields = [int(data[offset + 6 + 8 * n : offset + 14 + 8 * n], 16) for n in range(13)]
        name = data[offset + 110 : offset + 110 + fields[11] - 1].decode()
        assert name not in found and data[offset + 109 + fields[11]] == 0
        offset = -(-(offset + 110 + fields[11]) // 4) * 4
        found[name] = (fields[1], data[offset : offset + fields[6]], (fields[9], fields[10]))
        offset = -(-(offset + fields[6]) // 4) * 4
    assert offset == len(data)
    return found


def test_what_is_written_can_be_read() -> None:
    buffer = io.BytesIO()
    writer = CpioWriter(buffer)
    writer.file("/a/b/c.txt", b"hello", 0o640)
    writer.file("a/program", bytes(4097), 0o755)
    writer.symlink("a/link", "b/c.txt")
    writer.directory("empty")
    writer.directory("a")
    writer.char_device("dev/console", 5, 1)
    writer.close()
    found = entries(buffer.getvalue())
    # Parents come before what is in them, as the kernel wants it, and only once.
    assert list(found) == ["a", "a/b", "a/b/c.txt", "a/program", "a/link", "empty", "dev", "dev/console", "TRAILER!!!"]
    assert found["a/b/c.txt"] == (stat.S_IFREG | 0o640, b"hello", (0, 0))
    assert found["a/program"] == (stat.S_IFREG | 0o755, bytes(4097), (0, 0))
    assert found["a/link"] == (stat.S_IFLNK | 0o777, b"b/c.txt", (0, 0))
    assert found["empty"][0] == stat.S_IFDIR | 0o755
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
