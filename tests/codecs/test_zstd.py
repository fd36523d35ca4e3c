"""The system's libzstd as a decoder of frames, against Python's module as the encoder."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import pytest

from diskwright.codecs.zstd import FrameDecoder, frame_decoder

K = 65536


@pytest.fixture
def decoder() -> FrameDecoder:
    found = frame_decoder()
    if found is None:
        pytest.skip("no libzstd on this system")
    return found


def packed(data: bytes) -> bytes:
    module: Any = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    return bytes(module.compress(data))


def text(seed: int, length: int = K) -> bytes:
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randrange(2, 9)) for _ in range(200)]
    return b"".join(chance.choices(words, k=length))[:length]


def fill(decoder: FrameDecoder, raw: bytes, length: int = K) -> bytes | None:
    """With guards around the target that must stay as they are."""
    room = bytearray(b"g" * (length + 128))
    done = decoder.fill(memoryview(room)[64 : 64 + length], memoryview(bytearray(raw)))
    assert room[:64] == room[-64:] == b"g" * 64
    return bytes(room[64 : 64 + length]) if done else None


def test_frames_fill_the_buffer(decoder: FrameDecoder) -> None:
    whole = text(1)
    assert fill(decoder, packed(whole)) == whole
    assert fill(decoder, packed(whole) + b"junk" * 100) == whole
    assert fill(decoder, packed(whole[:1000]) + packed(b"") + packed(whole[1000:]) + b"junk") == whole


def test_nothing_else_does(decoder: FrameDecoder) -> None:
    whole = text(2)
    raw = packed(whole)
    assert fill(decoder, raw, K - 1) is None
    assert fill(decoder, raw, K + 1) is None
    assert fill(decoder, b"") is None
    assert fill(decoder, raw, 0) is None
    assert all(fill(decoder, raw[:length]) is None for length in (1, 3, 4, 5, 12, len(raw) // 2, len(raw) - 1))
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    assert fill(decoder, skipped + raw) is None, "only frames of data: the rest is for others to judge"


def test_damage_stays_within_the_buffer(decoder: FrameDecoder) -> None:
    chance, raw = random.Random(3), packed(text(3))
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(4, len(damaged))] = chance.randrange(256)
        fill(decoder, bytes(damaged))


def test_threads_have_contexts_of_their_own(decoder: FrameDecoder) -> None:
    wholes = [text(seed) for seed in range(4)]
    raws = [packed(whole) for whole in wholes]
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(start, start + 200):
            if fill(decoder, raws[i % 4]) != wholes[i % 4]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_system_without_the_library_has_no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diskwright.codecs.zstd._LIBRARY", "libzstd-that-is-nowhere.so.1")
    frame_decoder.cache_clear()
    try:
        assert frame_decoder() is None
    finally:
        frame_decoder.cache_clear()
