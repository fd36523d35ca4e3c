"""CipheredNode: sub-sector writes beside others, and failures half way, on a format of a few lines."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from diskwright.core.ciphered import CipheredNode
from diskwright.core.driver import FilePlace, Format, OpenContext
from diskwright.core.node import Node, StorageNode
from diskwright.extents import DATA, Extent
from tests.core.ram import Ram

START = 4096


class Xor:
    """Sees to it that only whole sectors come, and ciphers by position."""

    def __init__(self, sector: int) -> None:
        self.sector = sector

    def encrypt(self, source: memoryview, into: memoryview, position: int) -> None:
        assert position % self.sector == 0 and len(source) % self.sector == 0 and len(into) == len(source)
        into[:] = bytes(byte ^ (((position + at) // self.sector + 1) & 0xFF) for at, byte in enumerate(source))

    def decrypt(self, buffer: memoryview, position: int) -> None:
        self.encrypt(memoryview(bytes(buffer)), buffer, position)


class Straight(Format):
    name = "straight"
    cluster_size = 1

    def __init__(self, file: Node, size: int, sector: int, by_place: bool) -> None:
        self.children, self.size, self.cipher, self.cipher_by_place = (file,), size, Xor(sector), by_place

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Straight:
        raise NotImplementedError

    def extent_at(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, DATA, offset + START)

    def in_place(self, offset: int, length: int) -> int:
        return offset + START


def node_of(sector: int = 512, by_place: bool = False, size: int = 65536) -> tuple[CipheredNode, Ram]:
    ram = Ram(START + size)
    return CipheredNode("top", Straight(StorageNode("file", ram, True), size, sector, by_place), True), ram


@pytest.mark.parametrize("by_place", [False, True])
@pytest.mark.parametrize("sector", [512, 4096])
def test_any_request_is_as_on_plain_bytes(sector: int, by_place: bool) -> None:
    node, ram = node_of(sector, by_place)
    node.pwrite(0, bytes(65536))
    model = bytearray(65536)
    rng = random.Random(sector)
    for _ in range(150):
        offset = rng.randrange(65536)
        length = min(65536 - offset, rng.choice((1, 511, 512, 513, 4096, 9999)))
        data = rng.randbytes(length)
        if rng.randrange(3):
            node.pwrite(offset, data)
        else:
            data = bytes(length)
            node.write_zeros(offset, length)
        model[offset : offset + length] = data
        at = rng.randrange(65536)
        assert node.pread(at, min(3000, 65536 - at)) == model[at : at + 3000]
    assert node.pread(0, 65536) == model != ram.data[START:]


def test_segments_of_one_call_land_in_order() -> None:
    node, _ = node_of()
    node.pwrite(0, bytes(4096))
    first, second, third = (memoryview(letter * length) for letter, length in ((b"a", 1024), (b"b", 100), (b"c", 512)))
    node.writev([(0, first), (500, second), (512, third)])
    assert node.pread(0, 1100) == b"a" * 500 + b"b" * 12 + b"c" * 512 + bytes(76)
    buffers = [bytearray(10), bytearray(512), bytearray(1)]
    node.readv([(495, memoryview(buffers[0])), (512, memoryview(buffers[1])), (1023, memoryview(buffers[2]))])
    assert [bytes(buffer) for buffer in buffers] == [b"a" * 5 + b"b" * 5, b"c" * 512, b"c"]


def test_the_callers_buffer_stays_as_it_was() -> None:
    node, _ = node_of()
    data = bytearray(b"mine" * 256)
    node.writev([(512, memoryview(data))])
    assert data == b"mine" * 256


class Slow(Ram):
    """Holds reads at a gate."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.entered, self.go = threading.Event(), threading.Event()
        self.holding = False

    def readv(self, segments: Any, *, nowait: bool = False) -> None:
        super().readv(segments)
        if self.holding:
            self.entered.set()
            assert self.go.wait(30)


@pytest.mark.parametrize("how", ["part", "sector", "zeros"])
def test_a_write_waits_while_a_sector_is_being_put_together(how: str) -> None:
    ram = Slow(START + 65536)
    node = CipheredNode("top", Straight(StorageNode("file", ram, True), 65536, 512, False), True)
    node.pwrite(0, b"o" * 1024)
    ram.holding = True
    first = threading.Thread(target=node.pwrite, args=(10, b"x"))  # has read the sector's old bytes, and waits
    first.start()
    assert ram.entered.wait(30)
    ram.holding = False
    work = {
        "part": lambda: node.pwrite(20, b"y"),
        "sector": lambda: node.pwrite(0, b"y" * 512),
        "zeros": lambda: node.write_zeros(0, 512),
    }[how]
    second = threading.Thread(target=work)
    second.start()
    node.pwrite(512, b"n" * 512)  # another sector is not held up
    second.join(0.1)
    assert second.is_alive()
    ram.go.set()
    first.join(30)
    second.join(30)
    expected = {"part": b"o" * 10 + b"x" + b"o" * 9 + b"y" + b"o" * 491, "sector": b"y" * 512, "zeros": bytes(512)}[how]
    assert node.pread(0, 1024) == expected + b"n" * 512


def test_a_failed_write_lets_others_go_on() -> None:
    node, ram = node_of()
    for offset, length in ((0, 512), (5, 10)):
        ram.fail_writes = 5
        with pytest.raises(OSError, match="made to fail"):
            node.pwrite(offset, b"z" * length)
        ram.fail_writes = 0
        node.pwrite(offset, b"z" * length)
        assert node.pread(offset, length) == b"z" * length


def test_the_kernel_gets_nothing() -> None:
    node, _ = node_of()
    assert node.place(0, 512) is None
    with pytest.raises(OSError, match="cannot be copied"):
        node.copy_from(0, FilePlace(0, 0, 512))
    with pytest.raises(OSError, match="Fast zeroing"):
        node.write_zeros(0, 512, fast=True)
