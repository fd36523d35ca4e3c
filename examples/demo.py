"""The main job, on a disk this program builds: a real ext4 file system that is written to all the while it is mirrored.

    python examples/demo.py [--size 384M] [--format qcow2] [--keep]

It makes the file system (with mke2fs), mirrors it with ``diskwright mirror`` while four clients write records into it
over NBD, finishes in the middle of their writing, and then checks the target by means of its own: every byte against
the source, the file system with e2fsck, and every record that had been flushed before the end.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import diskwright
from diskwright.units import MiB, human_size, parse_size
from diskwright.wire.nbd import constants as nbd

BLOCK = 4096
RECORDS = 4096  # blocks of the file the clients write to
CLIENTS = 4
PACE = 0.002  # seconds a client rests between two writes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=384 * MiB, help="size of the file system (384M)")
    parser.add_argument("--format", default="qcow2", help="format of the target (qcow2)")
    parser.add_argument("--keep", action="store_true", help="keep the images, and say where they are")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="diskwright-demo-"))
    try:
        return Demo(folder, args.size, args.format).run()
    finally:
        if args.keep:
            print(f"The images are in {folder}")
        else:
            shutil.rmtree(folder)


class Demo:
    """One run in ``folder``."""

    def __init__(self, folder: Path, size: int, format_name: str) -> None:
        self.folder, self.size, self.format = folder, size, format_name
        self.source, self.target = folder / "disk.raw", folder / f"copy.{format_name}"
        self.socket = str(folder / "nbd.sock")

    def run(self) -> int:
        self.build()
        blocks = self.record_blocks()
        command = [sys.executable, "-m", "diskwright", "mirror", "-f", "raw", "-O", self.format, "--verify"]
        command += ["--speed", "100M", "--progress=json", "--serve", self.socket, str(self.source), str(self.target)]
        print(f"\n$ diskwright {' '.join(command[3:])}")
        began = time.monotonic()
        mirror = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=show_progress, args=(mirror.stderr,), daemon=True).start()
        writers = self.mirror(mirror, blocks)
        if mirror.wait() != 0:
            print("The mirror failed", file=sys.stderr)
            return 1
        for writer in writers:
            writer.join()
        written = sum(writer.writes for writer in writers)
        print(f"Written by {CLIENTS} clients meanwhile: {written} records, {sum(w.flushes for w in writers)} flushes")
        return self.verify(writers, blocks, time.monotonic() - began)

    def build(self) -> None:
        """An ext4 file system with the files of this Python's library, and one file for the records."""
        print(f"Building an ext4 file system of {human_size(self.size)} ...")
        tree = self.folder / "tree"
        tree.mkdir()
        room = self.size // 2
        for path in sorted(Path(os.__file__).parent.rglob("*")):
            if path.is_file() and not path.is_symlink() and room > path.stat().st_size:
                room -= path.stat().st_size
                copy = tree / "files" / path.relative_to(Path(os.__file__).parent)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        with open(tree / "ballast", "wb") as file:
            for _ in range(room // MiB):
                file.write(os.urandom(MiB))
        with open(tree / "records", "wb") as file:
            # Not zeros, which mke2fs would leave out: each block has to have its place.
            file.write(b"\xff" * RECORDS * BLOCK)
        self.source.touch()
        os.truncate(self.source, self.size)
        run("mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-d", str(tree), str(self.source))
        shutil.rmtree(tree)

    def record_blocks(self) -> list[int]:
        """Where on the disk, in blocks, the record file lies. Writing there changes data, never the file system."""
        blocks = [int(word) for word in run("debugfs", "-R", "blocks /records", str(self.source)).split()]
        if len(blocks) != RECORDS:
            raise SystemExit(f"the record file has {len(blocks)} blocks, not {RECORDS}")
        return blocks

    def mirror(self, process: subprocess.Popen[str], blocks: list[int]) -> list[Writer]:
        """Follows the mirror; when it is ready, lets the clients write on for a while, and asks for the end."""
        assert process.stdout is not None
        writers: list[Writer] = []
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("Serving"):
                writers = [Writer(self.socket, blocks[lane::CLIENTS], lane) for lane in range(CLIENTS)]
                for writer in writers:
                    writer.start()
            elif line.startswith("Ready"):
                time.sleep(2)
                for writer in writers:
                    writer.note_promised()
                print("^C (in the middle of their writing)")
                process.send_signal(signal.SIGINT)
        return writers

    def verify(self, writers: list[Writer], blocks: list[int], seconds: float) -> int:
        source_sum, read = digest(self.source, "raw")
        target_sum, _ = digest(self.target, self.format)
        diskwright.convert(self.target, self.folder / "check.raw")
        fsck = run("e2fsck", "-f", "-n", str(self.folder / "check.raw"))
        found, promised = check_records(self.folder / "check.raw", blocks, writers)
        equal = source_sum == target_sum
        lost = writers_error(writers)
        print(f"\nsource  sha256 {source_sum}")
        print(f"target  sha256 {target_sum}")
        print(f"{human_size(read)} compared: {'the target is exactly the source' if equal else 'THEY DIFFER'}")
        print(f"e2fsck on the target: {fsck.strip().splitlines()[-1].partition(': ')[2]}")
        print(f"records: {found} intact, all of {promised} flushed before the end among them; {seconds:.1f} s in all")
        return 0 if equal and not lost else 1


class Writer(threading.Thread):
    """A client that writes records to its own blocks, and flushes now and then, until the server goes away."""

    def __init__(self, path: str, blocks: list[int], lane: int) -> None:
        super().__init__(daemon=True)
        self.blocks, self.lane = blocks, lane
        self.writes = self.flushes = 0
        self.latest: dict[int, int] = {}  # block -> newest serial written
        self.flushed: dict[int, int] = {}  # the same, as of the last flush
        self.promised: dict[int, int] = {}  # as of the request to finish
        self.error: str | None = None
        self._lock = threading.Lock()
        self._client = Client(path)

    def run(self) -> None:
        rng = random.Random(self.lane)
        try:
            while True:
                block = rng.choice(self.blocks)
                serial = self.latest.get(block, 0) + 1
                self._client.write(block * BLOCK, record(block, serial))
                self.latest[block] = serial
                self.writes += 1
                if self.writes % 50 == 0:
                    self._client.flush()
                    self.flushes += 1
                    with self._lock:
                        self.flushed = dict(self.latest)
                time.sleep(PACE)
        except (ConnectionError, EOFError, ShutDown):
            pass  # the mirror has finished, and its server with it
        except RuntimeError as error:
            self.error = str(error)

    def note_promised(self) -> None:
        with self._lock:
            self.promised = dict(self.flushed)


class ShutDown(Exception):
    """The server serves no more requests."""


class Client:
    """As much of an NBD client as this needs: one request at a time."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._receive(18)
        self._socket.sendall(struct.pack(">I", nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES))
        data = struct.pack(">IH", 0, 0)  # the default export, nothing else asked for
        self._socket.sendall(nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, len(data)) + data)
        kind = 0
        while kind != nbd.REP_ACK:
            _, _, kind, length = nbd.OPTION_REPLY.unpack(self._receive(nbd.OPTION_REPLY.size))
            text = self._receive(length)
            if kind & nbd.REP_ERROR:
                raise RuntimeError(f"the server refused: {text.decode(errors='replace')}")
        self._cookie = 0

    def write(self, offset: int, data: bytes) -> None:
        self._request(nbd.CMD_WRITE, offset, len(data), data)

    def flush(self) -> None:
        self._request(nbd.CMD_FLUSH, 0, 0, b"")

    def _request(self, kind: int, offset: int, length: int, data: bytes) -> None:
        self._cookie += 1
        self._socket.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, kind, self._cookie, offset, length) + data)
        _, error, cookie = nbd.SIMPLE_REPLY.unpack(self._receive(nbd.SIMPLE_REPLY.size))
        if error == nbd.wire_error(errno.ESHUTDOWN):
            raise ShutDown
        if error or cookie != self._cookie:
            raise RuntimeError(f"the server answered request {self._cookie} with error {error} for request {cookie}")

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def record(block: int, serial: int) -> bytes:
    """A block that says what it is, and whether it is whole."""
    body = struct.pack("<QQ", block, serial) + random.Random(block << 32 | serial).randbytes(BLOCK - 20)
    return body + struct.pack("<I", zlib.crc32(body))


def check_records(image: Path, blocks: list[int], writers: list[Writer]) -> tuple[int, int]:
    """How many records there are, and how many had been promised. Ends the program when one is damaged or missing."""
    promised = {block: serial for writer in writers for block, serial in writer.promised.items()}
    found = 0
    with open(image, "rb") as file:
        for block in blocks:
            file.seek(block * BLOCK)
            data = file.read(BLOCK)
            serial = 0
            if data != b"\xff" * BLOCK:
                where, serial = struct.unpack_from("<QQ", data)
                if where != block or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
                    raise SystemExit(f"block {block} of the target is damaged")
                found += 1
            if serial < promised.get(block, 0):
                raise SystemExit(f"block {block}: record {promised[block]} was flushed, but {serial} is there")
    return found, len(promised)


def show_progress(stream: Iterable[str]) -> None:
    """The mirror's reports, one line each."""
    for line in stream:
        report = json.loads(line) if line.startswith("{") else None
        if report is None:
            print(line, end="", file=sys.stderr, flush=True)
        elif "offset" in report and report["length"]:
            percent = 100 * report["offset"] / report["length"]
            done, rate = human_size(report["offset"]), human_size(int(report["rate"]))
            print(f"  {percent:5.1f} %  {done} copied, {rate}/s", flush=True)


def writers_error(writers: list[Writer]) -> bool:
    for writer in writers:
        if writer.error:
            print(f"client {writer.lane}: {writer.error}", file=sys.stderr)
    return any(writer.error for writer in writers)


def digest(image: Path, format_name: str) -> tuple[str, int]:
    """SHA-256 of what a guest would read, and how many bytes that is."""
    total = hashlib.sha256()
    with diskwright.open(image, format=format_name) as disk:
        while data := disk.read(MiB):
            total.update(data)
        return total.hexdigest(), disk.size


def run(*command: str) -> str:
    """Output of a program that must succeed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
