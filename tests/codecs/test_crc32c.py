"""CRC-32C: the published values, and both ways to it."""

from __future__ import annotations

import random

import pytest

from diskwright.codecs import crc32c as module
from diskwright.codecs.crc32c import crc32c


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next two: RFC 7143, A.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(data: bytes, value: int) -> None:
    assert crc32c(data) == value


def slowly(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("length", [1, 63, 2047, 2048, 2049, 4096, 65536, 100_003])
@pytest.mark.parametrize("zeros", [0, 1, 5000])
def test_both_ways_give_what_the_definition_does(length: int, zeros: int) -> None:
    data = random.Random(length).randbytes(length - 1) + b"x" + bytes(zeros)
    assert crc32c(data) == slowly(data)


def test_long_input_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(5).randbytes((1 << 20) + 3)
    whole = crc32c(data)
    assert crc32c(data[700_000:], crc32c(data[:700_000])) == whole
    monkeypatch.setattr(module, "_SHORT", 1 << 40)
    monkeypatch.setattr(module, "_LONG", 1 << 40)
    assert crc32c(data) == whole
