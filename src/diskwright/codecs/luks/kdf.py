"""Keys from passphrases: PBKDF2 (RFC 8018) and Argon2 (RFC 9106), with limits on what an image may make us compute."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Final

from diskwright.codecs.ivs import hasher
from diskwright.errors import LimitExceeded, UnsupportedFeature

MAX_ITERATIONS: Final = 1 << 28
"""Most PBKDF2 iterations (times hash blocks of output) that opening one image may cost, all its key slots together:
a minute or two on one core. Eight slots of two seconds each, made on the fastest cores, take a third of it."""

MAX_ARGON2_MEMORY: Final = 1 << 20
"""Most memory of one Argon2 run, in KiB: 1 GiB, the most that cryptsetup itself takes unless it is told to."""

MAX_ARGON2_WORK: Final = 1 << 27
"""Most Argon2 passes times KiB that opening one image may cost, all its key slots together."""

MAX_ARGON2_LANES: Final = 64
"""Most lanes of an Argon2 run; cryptsetup writes at most 4."""

MIN_ITERATIONS: Final = 1000
"""The fewest PBKDF2 iterations that are ever written: the LUKS1 specification's least, and QEMU's."""


class Budget:
    """What is left of the work that opening an image may cost. ``path`` is for messages."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._iterations, self._argon2 = MAX_ITERATIONS, MAX_ARGON2_WORK

    def pbkdf2(self, field: str, hash: str, iterations: int, length: int) -> None:
        """Raises LimitExceeded when that many more iterations are too many."""
        blocks = -(-length // hasher(hash)().digest_size)
        self._iterations -= iterations * blocks
        if iterations < 1 or self._iterations < 0:
            raise LimitExceeded(
                f"{self.path}: {field} asks for {iterations} PBKDF2 iterations; 1 to {MAX_ITERATIONS // blocks} are "
                "accepted, for all key slots that are tried together"
            )

    def argon2(self, field: str, passes: int, memory: int, lanes: int) -> None:
        self._argon2 -= passes * memory
        if not 1 <= lanes <= MAX_ARGON2_LANES or passes < 1 or not 8 * lanes <= memory <= MAX_ARGON2_MEMORY:
            raise LimitExceeded(
                f"{self.path}: {field} asks for Argon2 with {passes} passes over {memory} KiB in {lanes} lanes; at "
                f"most {MAX_ARGON2_MEMORY} KiB and {MAX_ARGON2_LANES} lanes are accepted"
            )
        if self._argon2 < 0:
            raise LimitExceeded(
                f"{self.path}: {field} asks for {passes} Argon2 passes over {memory} KiB; at most {MAX_ARGON2_WORK} "
                "KiB are worked through, for all key slots that are tried together"
            )


def pbkdf2(hash: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """The derived key. The caller has asked a ``Budget`` when ``iterations`` comes from an image."""
    return hashlib.pbkdf2_hmac(hasher(hash).name, secret, salt, iterations, length)


def argon2(kind: str, secret: bytes, salt: bytes, passes: int, memory: int, lanes: int, length: int) -> bytes:
    """The derived key; ``kind`` is argon2i or argon2id, ``memory`` in KiB. Raises UnsupportedFeature."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.kdf import argon2 as library
    except ImportError as error:
        raise UnsupportedFeature("Argon2 needs the package 'cryptography', version 44 or later") from error
    found = getattr(library, {"argon2id": "Argon2id", "argon2i": "Argon2i"}[kind], None)
    if found is None:
        raise UnsupportedFeature(f"This version of 'cryptography' does not have {kind}")
    try:
        made: bytes = found(salt=salt, length=length, iterations=passes, lanes=lanes, memory_cost=memory).derive(secret)
    except UnsupportedAlgorithm as error:
        raise UnsupportedFeature("The OpenSSL that 'cryptography' was built with does not have Argon2") from error
    return made


def iterations_for(hash: str, length: int, milliseconds: int, slots: int = 8) -> int:
    """How many PBKDF2 iterations take that much of this machine's processor time; at least ``MIN_ITERATIONS``, and so
    few that an image with so many ``slots`` in use can be opened."""
    count = 1 << 14
    while True:
        begin = time.thread_time_ns()
        pbkdf2(hash, b"password", b"salt" * 8, count, length)
        taken = time.thread_time_ns() - begin
        if taken >= 20_000_000 or count >= 1 << 22:
            break
        count *= 4
    blocks = -(-length // hasher(hash)().digest_size)
    most = MAX_ITERATIONS * 3 // 4 // blocks // slots  # the rest is for proving the key, once for every slot
    return min(most, max(MIN_ITERATIONS, count * milliseconds * 1_000_000 // max(taken, 1)))


ARGON2_MEMORY: Final = 32 * 1024
"""The least memory of an Argon2 run that is ever written, in KiB, and what its time is measured with."""

ARGON2_PASSES: Final = 4
"""The fewest passes that are ever written."""


def argon2_costs(kind: str, length: int, milliseconds: int) -> tuple[int, int, int]:
    """Passes, memory in KiB, and lanes that take about that much of this machine's processor time: as much memory as
    possible, and more passes only beyond ``MAX_ARGON2_MEMORY`` (or half of this machine's memory)."""
    lanes = min(4, os.cpu_count() or 1)
    begin = time.process_time_ns()
    argon2(kind, b"password", b"salt" * 8, ARGON2_PASSES, ARGON2_MEMORY, lanes, length)
    taken = max(1, time.process_time_ns() - begin)
    times = milliseconds * 1_000_000 / taken
    most = min(MAX_ARGON2_MEMORY, max(ARGON2_MEMORY, _memory() // 2))
    memory = min(most, max(ARGON2_MEMORY, int(ARGON2_MEMORY * times)))
    passes = int(ARGON2_PASSES * times * ARGON2_MEMORY / memory)
    # So that we can open what we have made with 32 slots in use.
    return max(ARGON2_PASSES, min(passes, MAX_ARGON2_WORK // 32 // memory)), memory, lanes


def _memory() -> int:
    """This machine's, in KiB; 1 GiB where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    except (ValueError, OSError, AttributeError):
        return 1 << 20
