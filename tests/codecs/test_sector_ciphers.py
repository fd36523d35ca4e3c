"""Ciphers of sectors: published vectors, the library's own modes, and both ways of working on a run."""

from __future__ import annotations

import hashlib
import random
import threading

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from diskwright.codecs.block_ciphers import Blocks
from diskwright.codecs.sector_ciphers import FEW, PIECE, SectorCipher, sector_cipher
from diskwright.errors import UnsupportedFeature

COMBINATIONS = [
    ("aes", "xts", "plain64", "", 32),
    ("aes", "xts", "plain64", "", 48),
    ("aes", "xts", "plain64", "", 64),
    ("aes", "xts", "essiv", "sha256", 64),
    ("aes", "cbc", "essiv", "sha256", 32),
    ("aes", "cbc", "essiv", "md5", 16),
    ("aes", "cbc", "plain64be", "", 24),
    ("aes", "cbc", "plain", "", 16),
    ("aes", "ctr", "plain64", "", 32),
    ("aes", "ctr", "essiv", "sha256", 32),
    ("aes", "ecb", "null", "", 32),
    ("cast5", "cbc", "plain64", "", 16),
    ("cast5", "ctr", "plain", "", 16),
    ("camellia", "xts", "plain64", "", 64),
]


def made(cipher: str, mode: str, ivgen: str, hash: str, size: int, **more: int) -> SectorCipher:
    return sector_cipher(cipher, mode, ivgen, hash, random.Random(size).randbytes(size), **more)  # type: ignore[arg-type]


def encrypted(cipher: SectorCipher, plain: bytes, position: int) -> bytes:
    out = bytearray(len(plain))
    cipher.encrypt(memoryview(plain), memoryview(out), position)
    return bytes(out)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_run_at_once_is_its_sectors_one_by_one(combination: tuple[str, str, str, str, int], sector: int) -> None:
    cipher = made(*combination, sector=sector)
    plain = random.Random(1).randbytes((FEW + 5) * sector)
    position = 77 * sector
    whole = encrypted(cipher, plain, position)
    single = [encrypted(cipher, plain[at : at + sector], position + at) for at in range(0, len(plain), sector)]
    assert whole == b"".join(single)
    back = bytearray(whole)
    cipher.decrypt(memoryview(back), position)
    assert back == plain
    for at in range(0, len(plain), sector):
        part = bytearray(single[at // sector])
        cipher.decrypt(memoryview(part), position + at)
        assert part == plain[at : at + sector]


@pytest.mark.parametrize("mode", ["xts", "cbc"])
def test_many_pieces(mode: str) -> None:
    cipher = made("aes", mode, "plain64", "", 32)
    plain = random.Random(2).randbytes(2 * PIECE + 512 * 9)
    whole = encrypted(cipher, plain, 512)
    assert whole[PIECE : PIECE + 512] == encrypted(cipher, plain[PIECE : PIECE + 512], 512 + PIECE)
    assert whole[-512:] == encrypted(cipher, plain[-512:], 512 + len(plain) - 512)
    back = bytearray(whole)
    cipher.decrypt(memoryview(back), 512)
    assert back == plain


def test_xts_vector_of_the_standard() -> None:
    """IEEE Std 1619-2007, annex B, vector 4: a whole sector of 512 bytes, sector number 0."""
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    cipher = sector_cipher("aes", "xts", "plain64", "", key)
    out = encrypted(cipher, bytes(range(256)) * 2, 0)
    assert out[:16].hex() == "27a7479befa1d476489f308cd4cfa6e2"
    assert out[-16:].hex() == "0a282df920147beabe421ee5319d0568"


def test_a_run_that_begins_where_vectors_wrap() -> None:
    key = bytes(range(32))
    plain = bytes(64 * 512)
    wrapping = encrypted(sector_cipher("aes", "cbc", "plain", "", key), plain, ((1 << 32) - 10) * 512)
    beginning = encrypted(sector_cipher("aes", "cbc", "plain", "", key), plain, 0)
    assert wrapping[10 * 512 :] == beginning[: 54 * 512]
    longer = encrypted(sector_cipher("aes", "cbc", "plain64", "", key), plain, ((1 << 32) - 10) * 512)
    assert longer[: 10 * 512] == wrapping[: 10 * 512] and longer[10 * 512 :] != wrapping[10 * 512 :]


def test_essiv_by_hand() -> None:
    key = bytes(range(32))
    out = encrypted(sector_cipher("aes", "cbc", "essiv", "sha256", key), b"x" * 512, 5 * 512)
    salt = Cipher(algorithms.AES(hashlib.sha256(key).digest()), modes.ECB()).encryptor()
    vector = salt.update((5).to_bytes(16, "little"))
    assert out == Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor().update(b"x" * 512)


@pytest.mark.parametrize("sector", [512, 4096])
def test_xts_by_the_library(sector: int) -> None:
    key = random.Random(4).randbytes(64)
    cipher = sector_cipher("aes", "xts", "plain64", "", key, sector=sector)
    plain = random.Random(5).randbytes(40 * sector)
    out = encrypted(cipher, plain, 3 * sector)
    for index in range(40):
        tweak = ((3 + index) * sector // 512).to_bytes(16, "little")
        library = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        part = slice(index * sector, (index + 1) * sector)
        assert out[part] == library.update(plain[part])


def test_a_key_of_two_equal_halves_still_decrypts() -> None:
    """The library refuses such keys, but an image may have one."""
    cipher = sector_cipher("aes", "xts", "plain64", "", bytes(32))
    out = bytearray(encrypted(cipher, b"y" * 1024, 0))
    cipher.decrypt(memoryview(out), 0)
    assert out == b"y" * 1024


def test_many_threads_share_a_cipher() -> None:
    cipher = made("aes", "xts", "plain64", "", 64)
    plain = random.Random(6).randbytes(64 * 512)
    expected = encrypted(cipher, plain, 0)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(30):
            if encrypted(cipher, plain, 0) != expected:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("serpent", "xts", "plain64", "", bytes(64)), "serpent"),
        (("twofish", "cbc", "plain64", "", bytes(32)), "twofish"),
        (("nonesuch", "cbc", "plain64", "", bytes(32)), "nonesuch"),
        (("aes", "cbc", "plain64", "", bytes(20)), "160"),
        (("aes", "gcm", "plain64", "", bytes(32)), "gcm"),
        (("aes", "cbc", "benbi", "", bytes(32)), "benbi"),
        (("aes", "cbc", "essiv", "sha512", bytes(32)), "key size 64"),
        (("aes", "cbc", "essiv", "nonesuch", bytes(32)), "nonesuch"),
        (("cast5", "xts", "plain64", "", bytes(32)), "xts"),
    ],
)
def test_what_there_is_not_is_refused_by_name(arguments: tuple[str, str, str, str, bytes], what: str) -> None:
    with pytest.raises(UnsupportedFeature, match=what):
        sector_cipher(*arguments)


def test_nothing_shows_the_key() -> None:
    key = b"K" * 32
    for thing in (Blocks("aes", key), sector_cipher("aes", "cbc", "essiv", "sha256", key)):
        assert "KKK" not in repr(thing) and "4b4b4b" not in repr(thing)
