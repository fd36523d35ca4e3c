"""Images with features mixed at random, operated on at random: by this project and by QEMU's programs in turn, beside
a model of what must be read."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import diskwright
from diskwright.core import bitmaps, snapshots
from diskwright.core.disk import Disk
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.secrets import Secrets
from diskwright.errors import LimitExceeded
from tests.formats.luks.peers import PASSPHRASE, run, secret_file

SECRETS = {"sec0": PASSPHRASE}
SECTOR = 512
MOST = 6 << 20
"""Bytes of a disk at most, but for three large clusters."""


@dataclass
class Bitmap:
    granularity: int
    enabled: bool = True
    dirty: set[int] = field(default_factory=set)

    def mark(self, offset: int, length: int) -> None:
        if self.enabled:
            self.dirty |= set(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))


class Mix:
    """One image, its model, and what may be done to both. ``log`` is what has been done, for messages."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.path = folder / "image.qcow2"
        self.folder = folder
        self.log: list[str] = [f"seed {seed}"]
        self.options = self._choose()
        self.cluster_size = int(str(self.options["cluster_size"]))
        self.v2 = self.options.get("compat") == "0.10"
        self.apart = "data_file" in self.options
        self.encrypted = "encrypt.format" in self.options
        self.extended = "extended_l2" in self.options
        self.unit = self.cluster_size // 32 if self.extended else self.cluster_size
        self.below = self._make_backing()
        self.size = self._any_size()
        self.model = bytearray(self.below[: self.size].ljust(self.size, b"\0"))
        self.kept: dict[str, bytes] = {}
        self.bitmaps: dict[str, Bitmap] = {}
        self.exact = True
        """Whether nobody has set bits of bitmaps but this project."""
        self.passes = True
        """Whether the file is told of discards."""
        self._count = 0

    # -- making ----------------------------------------------------------------------------------

    def _choose(self) -> dict[str, object]:
        rng = self.rng
        chosen: dict[str, object] = {"cluster_size": 1 << rng.choice((9, 10, 12, 14, 15, 16, 16, 18, 21))}
        cluster_size = int(str(chosen["cluster_size"]))
        if rng.random() < 0.15:
            chosen["compat"] = "0.10"
        else:
            if rng.random() < 0.4:
                chosen["refcount_bits"] = 1 << rng.randrange(7)
            if cluster_size >= 16384 and rng.random() < 0.5:
                chosen["extended_l2"] = True
            if rng.random() < 0.2:
                chosen["data_file"] = str(self.folder / "data")
                if rng.random() < 0.4:
                    chosen["data_file_raw"] = True
            if rng.random() < 0.3:
                chosen["compression_type"] = "zstd"
            if rng.random() < 0.2:
                chosen["lazy_refcounts"] = True
        if rng.random() < 0.25 and "data_file" not in chosen:
            chosen["encrypt.format"] = "luks" if rng.random() < 0.8 else "aes"
            chosen["encrypt.key-secret"] = "sec0"
        if "data_file_raw" not in chosen and rng.random() < 0.4:
            chosen["backing_file"] = str(self.folder / "below")
            chosen["backing_fmt"] = rng.choice(("raw", "qcow2"))
        if rng.random() < 0.25 and ("backing_file" not in chosen or "extended_l2" in chosen):
            chosen["preallocation"] = rng.choice(("metadata", "falloc", "full"))
        return chosen

    def _any_size(self) -> int:
        most = max(3 * self.cluster_size, min(MOST, 100 * self.cluster_size))
        return self.rng.randrange(1, most // SECTOR) * SECTOR

    def _make_backing(self) -> bytes:
        if "backing_file" not in self.options:
            return b""
        data = bytearray(self._any_size())
        for _ in range(6):
            offset, length = self.rng.randrange(len(data)), self.rng.randrange(100_000)
            data[offset : offset + length] = self.rng.randbytes(len(data[offset : offset + length]))
        plain = self.folder / "below.raw"
        plain.write_bytes(data)
        fmt = str(self.options["backing_fmt"])
        run("qemu-img", "convert", "-f", "raw", "-O", fmt, str(plain), str(self.options["backing_file"]))
        plain.unlink()
        return bytes(data)

    def create(self, ours: bool) -> bool:
        """Makes the image; false when it cannot be made so, by either."""
        self.log.append(f"{'ours' if ours else 'qemu'}: create {self.size} {self.options}")
        chosen = dict(self.options)
        if chosen.get("encrypt.format") == "luks":
            chosen["encrypt.iter-time"] = 1 if ours else 10
        if ours:
            diskwright.create(self.path, "qcow2", self.size, secrets=SECRETS, **chosen)
            self._look()
            return True
        text = ",".join(f"{name}={_text(value)}" for name, value in chosen.items())
        words = ("qemu-img", "create", "-q", *self._object(), "-f", "qcow2", "-o", text, str(self.path), str(self.size))
        done = run(*words, check=False)
        # qemu-img measures the processor's time, and gives up where the clock is too coarse.
        assert done.returncode == 0 or "CPU usage" in done.stderr, self.told(done.stderr)
        if done.returncode == 0:
            self._look()
        return done.returncode == 0

    def _look(self) -> None:
        """What was taken in advance reads as anything in a new image that is encrypted."""
        if self.encrypted and "preallocation" in self.options:
            with self.opened(writable=False) as disk:
                self.model[:] = disk.pread(0, self.size)

    # -- operations by this project --------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, *, writable: bool = True, **more: object) -> Iterator[Disk]:
        graph = Graph(OpenGate(), Secrets(SECRETS))
        options: dict[str, object] = {"driver": "qcow2", "file.filename": str(self.path), **more}
        if self.encrypted:
            options["encrypt.key-secret"] = "sec0"
        try:
            yield graph.disk(graph.open(options, writable=writable))
        finally:
            graph.close()

    def ours(self, steps: int) -> None:
        """A session of our own."""
        rng = self.rng
        more: dict[str, object] = {}
        if rng.random() < 0.3 and not self.v2:
            more["discard-no-unref"] = True
        for name in ("pass-discard-request", "pass-discard-snapshot", "pass-discard-other"):
            if rng.random() < 0.2:
                more[name] = rng.random() < 0.5
        if rng.random() < 0.3:
            more["cache-size"] = 4 * self.cluster_size
        if rng.random() < 0.3:
            more["detect-zeroes"] = rng.choice(("on", "unmap"))
        self.passes = bool(more.get("pass-discard-request", True))
        self.log.append(f"ours: open {more}")
        with self.opened(**more) as disk:
            for _ in range(steps):
                self._step(disk)
            assert disk.pread(0, self.size) == self.model, self.told()
            self._judge_bitmaps(disk)

    def _step(self, disk: Disk) -> None:
        actions: list[tuple[int, Callable[[Disk], None]]] = [
            (10, self._write), (4, self._zero), (4, self._discard), (1, self._resize), (1, self._flush),
        ]  # fmt: skip
        if not self.apart:
            actions += [(4, self._compress), (2, self._snapshot)]
        if not self.v2:
            actions += [(1, self._bitmap)]
        weights = [weight for weight, _ in actions]
        self.rng.choices([action for _, action in actions], weights)[0](disk)

    def _range(self, *, whole: bool | None = None) -> tuple[int, int]:
        """A range of the disk, made of whole clusters perhaps (``whole``), but for the disk's end."""
        rng, unit = self.rng, self.cluster_size
        offset = rng.randrange(self.size)
        length = int(math.exp(rng.uniform(0, math.log(min(self.size, max(8 * unit, 65536))))))
        if whole or (whole is None and rng.random() < 0.4):
            unit = unit if whole or rng.random() < 0.5 else max(SECTOR, self.unit)
            offset -= offset % unit
            length += -length % unit
        return offset, max(1, min(length, self.size - offset))

    def _data(self, length: int) -> bytes:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            return rng.randbytes(length)
        if kind == 1:
            return bytes(length)
        return (rng.randbytes(rng.randrange(1, 200)) * length)[:length]

    def _done(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        self._mark(offset, len(data))

    def _mark(self, offset: int, length: int) -> None:
        for bitmap in self.bitmaps.values():
            bitmap.mark(offset, length)

    def _write(self, disk: Disk) -> None:
        offset, length = self._range()
        data = self._data(length)
        self.log.append(f"write {offset} {length}")
        disk.pwrite(offset, data)
        self._done(offset, data)

    def _zero(self, disk: Disk) -> None:
        offset, length = self._range()
        unmap = self.rng.random() < 0.5
        self.log.append(f"zero {offset} {length} unmap={unmap}")
        disk.zero(offset, length, unmap=unmap)
        self._done(offset, bytes(length))

    def _discard(self, disk: Disk) -> None:
        offset, length = self._range()
        self.log.append(f"discard {offset} {length}")
        disk.trim(offset, length)
        self._after_discard(offset, length, disk.pread(offset, length), self.unit)

    def _after_discard(self, offset: int, length: int, found: bytes, unit: int) -> None:
        """Every byte is what it was, or zero; whole units are zero where the map can say so."""
        old = self.model[offset : offset + length]
        if found != old:
            for at in range(0, length, 256):
                one, two = found[at : at + 256], old[at : at + 256]
                if one != two and any(one):
                    assert all(a in (0, b) for a, b in zip(one, two, strict=True)), self.told()
        start, end = offset + -offset % self.cluster_size, offset + length
        if end < self.size:
            end -= end % self.cluster_size
        # A raw data file reads as the disk does, so that without its leave nothing changes.
        stays = (self.v2 and self.below) or (self.options.get("data_file_raw") and not self.passes)
        if start < end and not stays:
            assert not any(found[start - offset : end - offset]), self.told()
        self._done(offset, found)

    def _compress(self, disk: Disk) -> None:
        offset, length = self._range(whole=True)
        data = self._data(length)
        self.log.append(f"compress {offset} {length}")
        with disk.request():
            disk.node.write_compressed([(offset, memoryview(data))])
        self._done(offset, data)

    def _flush(self, disk: Disk) -> None:
        self.log.append("flush")
        disk.flush()

    def _resize(self, disk: Disk) -> None:
        size = self._any_size()
        if self.v2 and self.kept:
            return
        grows = size > self.size
        taken = self.rng.choice(("off", "off", "metadata", "falloc", "full")) if grows else "off"
        if taken != "off" and self.below and not self.extended and size > self.size:
            taken = "off"
        self.log.append(f"resize {size} {taken}")
        with disk.graph.drained():
            disk.node.resize(size, preallocation=taken)
        self._resized(size)

    def _resized(self, size: int) -> None:
        if size < self.size:
            del self.model[size:]
        else:
            self.model.extend(bytes(size - self.size))
        self.size = size
        for bitmap in self.bitmaps.values():
            bitmap.dirty = {bit for bit in bitmap.dirty if bit * bitmap.granularity < size}

    def _name(self) -> str:
        self._count += 1
        return f"name{self._count}"

    def _snapshot(self, disk: Disk) -> None:
        rng, node = self.rng, disk.node
        if self.options.get("refcount_bits") == 1:
            return
        action = rng.choice(("create", "create", "apply", "delete"))
        with disk.graph.drained():
            if action == "create":
                if len(self.kept) < 3:
                    name = self._name()
                    self.log.append(f"snapshot -c {name}")
                    try:
                        snapshots.create(node, name)
                    except LimitExceeded:  # compressed clusters share one, and are counted each
                        assert int(str(self.options.get("refcount_bits", 16))) < 16, self.told()
                        return
                    self.kept[name] = bytes(self.model)
                return
            if not self.kept or (action == "apply" and self.bitmaps):
                return
            name = rng.choice(list(self.kept))
            self.log.append(f"snapshot {action} {name}")
            info = snapshots.find(snapshots.list_of(node), name=name)
            if action == "apply":
                snapshots.apply(node, info.id)
                self.model = bytearray(self.kept[name])
                self.size = len(self.model)
            else:
                snapshots.delete(node, info.id)
                del self.kept[name]

    def _bitmap(self, disk: Disk) -> None:
        rng, node = self.rng, disk.node
        action = rng.choice(("add", "add", "remove", "clear", "enable", "disable"))
        if action == "add":
            if len(self.bitmaps) < 3:
                name, granularity, enabled = self._name(), 1 << rng.randrange(9, 18), rng.random() < 0.8
                self.log.append(f"bitmap --add {name} {granularity} {enabled}")
                bitmaps.add(node, name, granularity, persistent=True, enabled=enabled)
                self.bitmaps[name] = Bitmap(granularity, enabled)
            return
        if not self.bitmaps:
            return
        name = rng.choice(list(self.bitmaps))
        self.log.append(f"bitmap --{action} {name}")
        getattr(bitmaps, action)(node, name)
        self._bitmap_done(action, name)

    def _bitmap_done(self, action: str, name: str) -> None:
        bitmap = self.bitmaps[name]
        if action == "remove":
            del self.bitmaps[name]
        elif action == "clear":
            bitmap.dirty.clear()
        else:
            bitmap.enabled = action == "enable"

    def _judge_bitmaps(self, disk: Disk) -> None:
        found = {bitmap.name: bitmap for bitmap in bitmaps.named(disk.node)}
        assert set(found) == set(self.bitmaps), self.told()
        for name, wanted in self.bitmaps.items():
            bitmap = found[name]
            assert not bitmap.inconsistent and bitmap.enabled is wanted.enabled, self.told()
            dirty = {bit for bit in range(-(-self.size // wanted.granularity)) if bitmap.get(bit * wanted.granularity)}
            right = dirty == wanted.dirty if self.exact else dirty >= wanted.dirty
            assert right, self.told(f"{name}: {dirty ^ wanted.dirty}")

    # -- operations by QEMU ----------------------------------------------------------------------

    def _object(self) -> tuple[str, ...]:
        return ("--object", f"secret,id=sec0,file={secret_file(self.folder)}") if self.encrypted else ()

    def image(self) -> tuple[str, ...]:
        more = ",encrypt.key-secret=sec0" if self.encrypted else ""
        return (*self._object(), "--image-opts", f"driver=qcow2,file.filename={self.path}{more}")

    def qemu(self, steps: int) -> None:
        """A session of qemu-io, with qemu-img before it perhaps."""
        rng = self.rng
        self.exact = False
        if rng.random() < 0.5 and not self.apart and int(str(self.options.get("refcount_bits", 16))) >= 16:
            self._qemu_snapshot()
        if rng.random() < 0.3 and not self.v2:
            self._qemu_bitmap()
        # Growing writes zeros over what the backing file has, which takes version 3.
        if rng.random() < 0.3 and not (self.v2 and (self.kept or self.below)):
            size = self._any_size()
            self.log.append(f"qemu: resize {size}")
            done = run("qemu-img", "resize", "-q", "--shrink", *self.image(), str(size), check=False)
            if done.returncode:  # it cannot zero subclusters of a compressed cluster
                assert self.extended and "Operation not supported" in done.stderr, self.told(done.stderr)
            else:
                self._resized(size)
        self.compressed = False
        commands = [command for _ in range(steps) for command in self._qemu_step()]
        words = [word for command in commands for word in ("-c", command)]
        self.log += [f"qemu: {command}" for command in commands]
        out = run("qemu-io", *words, *self.image())
        assert "failed" not in out.stdout + out.stderr, self.told(out.stdout + out.stderr)

    def _qemu_step(self) -> list[str]:
        kinds = ("write", "zero", "unmap", "discard", "compress")
        kind = self.rng.choices(kinds, (5, 2, 2, 2, 0 if self.apart else 2))[0]
        offset, length = self._range(whole=kind in ("discard", "compress"))
        if kind == "discard":
            if offset + length < self.size:
                length -= length % self.cluster_size
            if not length or (self.v2 and self.below):
                return []
            self._done(offset, bytes(length))
            return [f"discard {offset} {length}"]
        before = []
        if kind == "compress":
            # It writes single clusters so, and only where there is nothing; with several in one session it may end
            # with a wrong copied flag (7.2).
            if self.compressed or (self.v2 and self.below):
                return []
            self.compressed = True
            length = min(self.cluster_size, length)
            before = [f"discard {offset} {length}"]
        byte = 0 if kind in ("zero", "unmap") else self.rng.randrange(1, 256)
        self._done(offset, bytes([byte]) * length)
        how = {"zero": "-z", "unmap": "-z -u", "compress": f"-c -P {byte}"}.get(kind, f"-P {byte}")
        return [*before, f"write {how} {offset} {length}"]

    def _qemu_snapshot(self) -> None:
        action = self.rng.choice(("-c", "-a", "-d")) if self.kept else "-c"
        if action == "-a" and self.bitmaps:
            return
        name = self._name() if action == "-c" else self.rng.choice(list(self.kept))
        self.log.append(f"qemu: snapshot {action} {name}")
        run("qemu-img", "snapshot", *self._object(), action, name, *self.image()[len(self._object()) :])
        if action == "-c":
            self.kept[name] = bytes(self.model)
        elif action == "-a":
            self.model = bytearray(self.kept[name])
            self.size = len(self.model)
        else:
            del self.kept[name]

    def _qemu_bitmap(self) -> None:
        action = self.rng.choice(("remove", "clear", "enable", "disable")) if self.bitmaps else "add"
        name = self._name() if action == "add" else self.rng.choice(list(self.bitmaps))
        self.log.append(f"qemu: bitmap --{action} {name}")
        run("qemu-img", "bitmap", f"--{action}", *self.image(), name)
        if action == "add":
            self.bitmaps[name] = Bitmap(min(max(self.cluster_size, 4096), 65536))
        else:
            self._bitmap_done(action, name)

    # -- judging ---------------------------------------------------------------------------------

    def judge(self) -> None:
        """Both programs find the image sound and read from it what the model has."""
        done = run("qemu-img", "check", *self.image(), check=False)
        assert done.returncode == 0, self.told(done.stdout + done.stderr)
        report = diskwright.check(self.path)
        assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), self.told(str(report.messages))
        out = self.folder / "read.raw"
        run("qemu-img", "convert", *self.image(), "-O", "raw", str(out))
        assert out.read_bytes() == self.model, self.told("qemu-img reads otherwise")
        out.unlink()
        if self.options.get("data_file_raw"):
            assert (self.folder / "data").read_bytes()[: self.size] == self.model, self.told("the raw data file")
        with self.opened(writable=False) as disk:
            assert disk.size == self.size and disk.pread(0, self.size) == self.model, self.told()
            self._judge_bitmaps(disk)
            listed = {info.name for info in snapshots.list_of(disk.node)} if not self.apart else set()
        assert listed == set(self.kept), self.told()
        for name, data in self.kept.items():
            with self.opened(writable=False, **{"snapshot-name": name}) as disk:
                assert disk.size == len(data) and disk.pread(0, disk.size) == data, self.told(name)

    def told(self, more: str = "") -> str:
        return "\n".join([*self.log, more])


def _text(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
