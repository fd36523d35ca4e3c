"""Encryption of disk sectors: XTS (IEEE Std 1619), CBC, CTR and ECB (NIST SP 800-38A) over any block cipher.

A request of many sectors is worked on as a whole: the block cipher is called once for all of a piece's blocks, and
what a mode adds (tweaks, chaining, counters) is computed for all sectors at once in NumPy arrays. Requests of
few sectors go to the library's own modes, one call a sector, which is quicker there and needs no NumPy.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from diskwright.codecs.block_ciphers import Blocks
from diskwright.codecs.ivs import Ivs, make_ivs
from diskwright.errors import UnsupportedFeature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

FEW: Final = 16
"""Up to this many sectors one call a sector is quicker than arrays are (measured: the two meet at 8 KiB)."""

PIECE: Final = 256 * 1024
"""Bytes worked on at once: what a core's second-level cache holds with two buffers of that size beside it."""

MODES: Final = ("xts", "cbc", "ctr", "ecb")


class SectorCipher(ABC):
    """Encrypts and decrypts whole sectors. Thread-safe. Positions and lengths are multiples of ``sector`` bytes.

    Vectors are numbered in units of 512 bytes from ``position`` 0 on, or, with ``iv_per_sector``, in sectors;
    the number at ``position`` 0 is ``first``.
    """

    def __init__(self, blocks: Blocks, ivs: Ivs, sector: int, *, iv_per_sector: bool = False, first: int = 0) -> None:
        self._first = first
        self._blocks, self._ivs, self.sector = blocks, ivs, sector
        self._step = 1 if iv_per_sector else sector // 512
        self._unit = sector if iv_per_sector else 512
        # Encrypting CBC, a call has a block of every sector: with few sectors there is too little in it.
        self._piece = PIECE * sector // 512 if isinstance(self, Cbc) else PIECE

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._blocks.name}>"

    def encrypt(self, source: memoryview, into: memoryview, position: int) -> None:
        """The sectors of ``source``, which begin at ``position``, go encrypted into ``into``, which is as long."""
        for start in range(0, len(source), self._piece):
            part = source[start : start + self._piece]
            self._work(part, into[start : start + len(part)], position + start, True)

    def decrypt(self, buffer: memoryview, position: int) -> None:
        """Decrypts the sectors in ``buffer``, which begin at ``position``, where they are."""
        for start in range(0, len(buffer), self._piece):
            part = buffer[start : start + self._piece]
            self._work(part, part, position + start, False)

    def _work(self, source: memoryview, into: memoryview, position: int, encrypt: bool) -> None:
        count = len(source) // self.sector
        vectors = self._ivs.run(self._first + position // self._unit, count, self._step)
        if count <= FEW:
            self._few(source, into, vectors, encrypt)
        else:
            self._many(source, into, vectors, encrypt)

    def _few(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        length, sector = self._ivs.length, self.sector
        for index in range(len(source) // sector):
            cipher = self._blocks.native(self._native_mode(vectors[index * length : (index + 1) * length]))
            context = cipher.encryptor() if encrypt else cipher.decryptor()
            at = index * sector
            into[at : at + sector] = context.update(source[at : at + sector])

    @abstractmethod
    def _native_mode(self, vector: bytes) -> object:
        """The library's mode object for one sector."""

    @abstractmethod
    def _many(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None: ...

    def _words(self, buffer: memoryview | bytes) -> Words:
        """``buffer`` as an array of (sector, block, 64-bit word)."""
        import numpy as np

        width = self._blocks.block // 8
        return np.frombuffer(buffer, np.uint64).reshape(-1, self.sector // self._blocks.block, width)

    def _all_blocks(self, source: Words, encrypt: bool) -> Words:
        """Every block by itself, in an array that is this thread's until its next call."""
        out = _scratch("out", source.size + 2)
        into = self._blocks.encrypt_into if encrypt else self._blocks.decrypt_into
        into(_bytes_of(source), _bytes_of(out))
        return out[: source.size].reshape(source.shape)


class Xts(SectorCipher):
    """XTS. ``tweaks`` is the cipher under the key's second half, which encrypts the vectors."""

    def __init__(self, blocks: Blocks, tweaks: Blocks, ivs: Ivs, sector: int, key: bytes, **more: Any) -> None:
        super().__init__(blocks, ivs, sector, **more)
        half = len(key) // 2
        self._tweaks = tweaks
        self._native: Any = None
        # The library has XTS for these only, and refuses keys whose halves are equal.
        if blocks.name == "aes" and half in (16, 32) and key[:half] != key[half:]:
            from diskwright.codecs.block_ciphers import primitive

            self._native = _XtsOfLibrary(key, primitive)

    def _native_mode(self, vector: bytes) -> object:
        raise NotImplementedError

    def _few(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        if self._native is None:
            return self._many(source, into, vectors, encrypt)
        sector = self.sector
        for at in range(0, len(source), sector):
            vector = vectors[at // sector * 16 : at // sector * 16 + 16]
            into[at : at + sector] = self._native.run(vector, source[at : at + sector], encrypt)
        return None

    def _many(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        import numpy as np

        words = self._words(source)
        tweaks = self._expand(words.shape[0], words.shape[1], self._tweaks.encrypt(vectors))
        whitened = _scratch("in", words.size).reshape(words.shape)
        done = self._all_blocks(np.bitwise_xor(words, tweaks, out=whitened), encrypt)
        np.bitwise_xor(done, tweaks, out=self._words(into))

    @staticmethod
    def _expand(sectors: int, blocks: int, first: bytes) -> Words:
        """The tweaks of every block: each is the one before times x in GF(2^128), reduced by x^7 + x^2 + x + 1.

        Columns are made by doubling: those that are known, times x to their number, are as many more. A shift
        by m bits pushes the top m bits out; the polynomial folds them in again at the bottom.
        """
        import numpy as np

        tweaks = _scratch("tweaks", sectors * blocks * 2).reshape(sectors, blocks, 2)
        tweaks[:, 0] = np.frombuffer(first, np.uint64).reshape(sectors, 2)
        known = 1
        while known < blocks:
            step = min(known, 32, blocks - known)  # from 57 on the folded bits would no longer fit into a word
            shift = np.uint64(min(known, 32))
            begin = known - int(shift)
            low, high = tweaks[:, begin : begin + step, 0], tweaks[:, begin : begin + step, 1]
            out = high >> (np.uint64(64) - shift)
            fold = out ^ out << np.uint64(1) ^ out << np.uint64(2) ^ out << np.uint64(7)
            tweaks[:, known : known + step, 1] = high << shift | low >> (np.uint64(64) - shift)
            tweaks[:, known : known + step, 0] = low << shift ^ fold
            known += step
        return tweaks


class _XtsOfLibrary:
    """The library's own XTS, one sector a call."""

    def __init__(self, key: bytes, primitive: Any) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        self._cipher, self._mode, self._primitive = Cipher, modes.XTS, primitive("aes", key[: len(key) // 2])
        self._primitive = type(self._primitive)(key)

    def run(self, vector: bytes, source: memoryview, encrypt: bool) -> bytes:
        cipher = self._cipher(self._primitive, self._mode(vector))
        context = cipher.encryptor() if encrypt else cipher.decryptor()
        return bytes(context.update(source))


class Cbc(SectorCipher):
    """CBC: decrypting, every block needs only the one before as it was; encrypting, the first blocks of
    all sectors go together, then the second ones, and so on."""

    def _native_mode(self, vector: bytes) -> object:
        from cryptography.hazmat.primitives.ciphers import modes

        return modes.CBC(vector)

    def _many(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        import numpy as np

        words, width = self._words(source), self._blocks.block // 8
        first = np.frombuffer(vectors, np.uint64).reshape(-1, width)
        if encrypt:
            self._words(into)[:] = self._chain(words, first)
            return
        plain = self._all_blocks(words, False)
        plain[:, 1:] ^= words[:, :-1]
        plain[:, 0] ^= first
        self._words(into)[:] = plain

    def _chain(self, words: Words, before: Words) -> Words:
        sectors, blocks, width = words.shape
        columns = _scratch("in", words.size).reshape(blocks, sectors, width)
        columns[:] = words.transpose(1, 0, 2)
        flat = _scratch("out", words.size + 2)
        out = flat[: words.size].reshape(blocks, sectors, width)
        room, size = _bytes_of(flat), sectors * width * 8
        encrypt_into = self._blocks.encrypt_into
        for column in range(blocks):
            columns[column] ^= before
            encrypt_into(_bytes_of(columns[column]), room[column * size : (column + 1) * size + 16])
            before = out[column]
        return out.transpose(1, 0, 2)


class Ctr(SectorCipher):
    """CTR: a sector's vector is the first counter, big-endian."""

    def _native_mode(self, vector: bytes) -> object:
        from cryptography.hazmat.primitives.ciphers import modes

        return modes.CTR(vector)

    def _few(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        self._many(source, into, vectors, encrypt)  # the library has CTR for some ciphers only

    def _many(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        import numpy as np

        words, width = self._words(source), self._blocks.block // 8
        sectors, blocks, _ = words.shape
        start = np.frombuffer(vectors, ">u8").astype(np.uint64).reshape(sectors, 1, width)
        counters = np.broadcast_to(start, words.shape).copy()
        counters[:, :, -1] += np.arange(blocks, dtype=np.uint64)
        if width == 2:
            counters[:, :, 0] += counters[:, :, 1] < start[:, :, 1]  # the carry
        stream = self._all_blocks(counters.astype(">u8").view(np.uint64), True)
        np.bitwise_xor(words, stream, out=self._words(into))


class Ecb(SectorCipher):
    """ECB: no chaining at all; equal blocks stay equal, so only old images have it."""

    def _native_mode(self, vector: bytes) -> object:
        from cryptography.hazmat.primitives.ciphers import modes

        return modes.ECB()

    def _few(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        into[:] = self._blocks.encrypt(source) if encrypt else self._blocks.decrypt(source)

    def _many(self, source: memoryview, into: memoryview, vectors: bytes, encrypt: bool) -> None:
        self._words(into)[:] = self._all_blocks(self._words(source), encrypt)


def sector_cipher(
    cipher: str,
    mode: str,
    ivgen: str,
    ivhash: str,
    key: bytes,
    *,
    sector: int = 512,
    iv_per_sector: bool = False,
    first: int = 0,
) -> SectorCipher:
    """The cipher of sectors that LUKS writes as ``cipher``-``mode``-``ivgen``:``ivhash``. The rest: ``SectorCipher``.

    Raises UnsupportedFeature for names, key lengths and combinations that there are not.
    """
    if mode == "xts":
        half = len(key) // 2
        blocks = Blocks(cipher, key[:half])
        if blocks.block != 16:
            raise UnsupportedFeature("Unsupported cipher mode xts")
        ivs = make_ivs(ivgen, ivhash, 16, cipher, key)
        return Xts(blocks, Blocks(cipher, key[half:]), ivs, sector, key, iv_per_sector=iv_per_sector, first=first)
    kinds: dict[str, type[SectorCipher]] = {"cbc": Cbc, "ctr": Ctr, "ecb": Ecb}
    if mode not in kinds:
        raise UnsupportedFeature(f"The cipher mode '{mode}' is not known; {', '.join(MODES)} are")
    blocks = Blocks(cipher, key)
    ivs = make_ivs(ivgen, ivhash, blocks.block, cipher, key)
    return kinds[mode](blocks, ivs, sector, iv_per_sector=iv_per_sector, first=first)


_arrays = threading.local()


def _scratch(use: str, count: int) -> Words:
    """An array of ``count`` words for one ``use``, the same one for every call of a thread: fresh memory of this size
    comes from the kernel page by page, which takes as long as the encryption. What the library writes to needs two
    words more than it fills."""
    import numpy as np

    found: Words | None = getattr(_arrays, use, None)
    if found is None or found.size < count:
        found = np.empty(max(count, PIECE // 8 + 2), np.uint64)
        setattr(_arrays, use, found)
    return found[:count]


def _bytes_of(words: Words) -> memoryview:
    return words.data.cast("B")
