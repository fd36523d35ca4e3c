"""The whole user space of the guest: process 1, in Python, with records.py beside it. It never runs on the host.

The kernel command line carries the settings (``dw.NAME=VALUE``), the second serial port the conversation. The guest
says one line an event, the first word being its kind; README.md lists them. It listens for ``stop``, ``pause``, ``go``,
``trim`` and ``check``, each on a line. When it is through it powers the machine off; an exception that nobody caught
ends process 1, the kernel panics, and QEMU exits: a run that went wrong can only look wrong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
import termios
import time
import tty

import records  # beside this file in the guest

LIBC = ctypes.CDLL(None, use_errno=True)
SYS_INIT_MODULE = 175  # x86-64
MS_RELATIME = 1 << 21
POWER_OFF = 0x4321FEDC
FITRIM = 0xC0185879
DISK = "/dev/vda"
FILES = "/mnt"
DISK_WAIT = 30.0  # seconds until the disk must have shown up


def call(name: str, *arguments: object) -> None:
    """Calls a function of libc that returns -1 and sets errno when it fails."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, options: str = "") -> None:
    """Mounts ``source`` on ``target``."""
    call("mount", source.encode(), target.encode(), kind.encode(), MS_RELATIME, options.encode())


def read_text(path: str) -> str:
    """Returns a small file of /proc or /sys, stripped."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


class Talk:
    """The serial line to the host: lines out, commands in."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd, termios.TCSANOW)
        self._pending = b""

    def say(self, line: str) -> None:
        """Sends one line."""
        data = line.encode() + b"\n"
        while data:
            data = data[os.write(self.fd, data) :]

    def heard(self, timeout: float = 0.0) -> list[str]:
        """Returns the commands that have arrived, waiting at most ``timeout`` seconds for the first."""
        while select.select([self.fd], [], [], timeout)[0]:
            self._pending += os.read(self.fd, 256)
            timeout = 0.0
        *lines, self._pending = self._pending.split(b"\n")
        return [line.decode().strip() for line in lines]


def load_modules() -> None:
    """Inserts the kernel modules in the order the builder found."""
    with open("/modules/order", encoding="utf-8") as file:
        names = file.read().split()
    for name in names:
        with open("/modules/" + name, "rb") as file:
            image = file.read()
        if LIBC.syscall(SYS_INIT_MODULE, image, ctypes.c_ulong(len(image)), b"") == -1:
            number = ctypes.get_errno()
            if number != errno.EEXIST:
                raise OSError(number, f"module {name}: {os.strerror(number)}")


def settings() -> dict[str, str]:
    """Returns the dw.* words of the kernel command line."""
    words = [word.partition("=") for word in read_text("/proc/cmdline").split()]
    return {name[3:]: value for name, _, value in words if name.startswith("dw.")}


def execute(*arguments: str) -> int:
    """Runs a program and returns its exit status."""
    pid = os.posix_spawn(arguments[0], arguments, {"PATH": "/sbin"})
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Workload:
    """Writes the records of a plan, acknowledges what has been flushed, checks all of it when asked."""

    def __init__(self, talk: Talk, path: str, direct: bool, plan: records.Plan, acked: int) -> None:
        self.talk, self.path, self.direct, self.plan = talk, path, direct, plan
        self.acked = acked  # what must be on the disk: told by the host at first, then known at first hand
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o644)
        self.buffer = mmap.mmap(-1, records.MAX_BLOCK)  # page-aligned, as O_DIRECT needs
        self.next = 1
        self.batches = 0
        self.worst = 0.0

    def begin(self) -> None:
        """Finds where an earlier run stopped, or writes the header of a new one."""
        with open(self.path, "rb", buffering=0) as file:
            found = records.Plan.parse(file.read(512))
        if found is None:
            if not self.direct:
                os.ftruncate(self.fd, self.plan.length)
            self.put(0, self.plan.header())
            os.fsync(self.fd)
        else:
            self.plan = found
            newest = self.check().newest
            # The last batch may lack some of its records: it is written again, so that the barrier holds.
            self.next = self.plan.batch_start(newest) if newest else 1
        if self.plan.churn:
            os.makedirs(FILES + "/churn", exist_ok=True)
        self.talk.say(f"ready next={self.next}")

    def put(self, offset: int, data: bytes) -> None:
        """Writes one block."""
        self.buffer[: len(data)] = data
        with memoryview(self.buffer) as whole, whole[: len(data)] as view:
            if os.pwrite(self.fd, view, offset) != len(data):
                raise OSError(errno.EIO, "short write")

    def batch(self) -> None:
        """Writes and flushes one batch, then acknowledges it."""
        began = time.monotonic()
        plan = self.plan
        self.churn(self.next // plan.batch + 1)
        for sequence in range(self.next, self.next + plan.batch):
            self.put(plan.offset(plan.slot(sequence)), plan.record(sequence))
        os.fdatasync(self.fd)
        self.acked = self.next + plan.batch - 1
        self.next = self.acked + 1
        self.batches += 1
        took = time.monotonic() - began
        self.worst = max(self.worst, took)
        self.talk.say(f"ack {self.acked} ms={took * 1000:.1f}")

    def churn(self, number: int) -> None:
        """Makes the file of a batch and removes the one that is CHURN_KEPT older, which the mount turns to discards."""
        made = self.plan.churn_file(number)
        if made is None:
            return
        path = f"{FILES}/churn/{made[0]}"
        try:
            with open(path, "rb") as file:
                if file.read() == made[1]:
                    return  # made, and maybe acknowledged, by the run before: to truncate it would be to lose it
        except FileNotFoundError:
            pass
        with open(path, "wb") as file:
            file.write(made[1])
            file.flush()
            os.fsync(file.fileno())
        old = self.plan.churn_file(number - records.CHURN_KEPT * self.plan.churn)
        if old and number > records.CHURN_KEPT * self.plan.churn and os.path.exists(f"{FILES}/churn/{old[0]}"):
            os.unlink(f"{FILES}/churn/{old[0]}")

    def check(self) -> records.Report:
        """Reads everything back from the disk, past the page cache, and says what was found."""
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w", encoding="utf-8") as file:
            file.write("3")
        report = records.verify_file(self.path, acked=self.acked, ordered=self.direct)
        if self.plan.churn:
            records.verify_churn(FILES + "/churn", self.plan, report)
        self.talk.say(f"{'verified' if report.ok else 'damaged'} {report}")
        return report

    def run(self, pace: float, limit: float) -> None:
        """Writes batches until the host says stop, or for ``limit`` seconds; ``pace`` seconds pass between two."""
        end = time.monotonic() + limit
        paused = False
        while time.monotonic() < end:
            for command in self.talk.heard(0.05 if paused else 0.0):
                if command == "stop":
                    return
                if command == "check":
                    self.check()
                elif command == "trim":
                    self.trim()
                elif command in ("pause", "go"):
                    paused = command == "pause"
                    self.talk.say("paused" if paused else "going")
                else:
                    self.talk.say(f"error unknown command {command!r}")
            if not paused:
                self.batch()
                time.sleep(pace)

    def trim(self) -> None:
        """Discards all free space of the file system."""
        fd = os.open(FILES, os.O_RDONLY)
        try:
            answer = fcntl.ioctl(fd, FITRIM, struct.pack("<QQQ", 0, (1 << 64) - 1, 0))
            self.talk.say(f"trimmed bytes={struct.unpack('<QQQ', answer)[1]}")
        finally:
            os.close(fd)


def wait_for_disk(talk: Talk) -> None:
    """Waits until the disk is there, and says what the guest makes of it."""
    end = time.monotonic() + DISK_WAIT
    while not os.path.exists(DISK):
        if time.monotonic() > end:
            raise OSError(errno.ENODEV, f"{DISK} did not appear")
        time.sleep(0.02)
    queue = "/sys/block/vda/queue/"
    words = {
        "bytes": int(read_text("/sys/block/vda/size")) * 512,
        "sector": read_text(queue + "logical_block_size"),
        "cache": read_text(queue + "write_cache").replace(" ", "-"),
        "discard": read_text(queue + "discard_max_bytes"),
    }
    talk.say("disk " + " ".join(f"{name}={value}" for name, value in words.items()))


def has_ext4() -> bool:
    """True when the disk has the magic of an ext file system."""
    with open(DISK, "rb") as file:
        file.seek(1024 + 56)
        return file.read(2) == b"\x53\xef"


def session(talk: Talk, options: dict[str, str]) -> int:
    """One life of the guest. Returns its result: 0 when nothing is wrong."""
    files = options["mode"] == "ext4"
    if files:
        if not has_ext4():
            extra = "lazy_itable_init=0,lazy_journal_init=0"
            if execute("/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", extra, DISK):
                raise OSError(errno.EIO, "mke2fs failed")
            talk.say("formatted")
        mount(DISK, FILES, "ext4", "discard,errors=remount-ro")
        talk.say("mounted")
    churn = int(options["churn"]) if files else 0
    plan = records.Plan(int(options["slots"]), int(options["batch"]), int(options["seed"]), churn=churn)
    work = Workload(talk, FILES + "/records" if files else DISK, not files, plan, int(options["acked"]))
    if options["action"] == "run":
        work.begin()
        work.run(float(options["pace"]), float(options["limit"]))
        talk.say(f"wrote batches={work.batches} records={work.batches * plan.batch} worst_ms={work.worst * 1000:.1f}")
        good = work.check().ok
    else:
        with open(work.path, "rb", buffering=0) as file:
            work.plan = records.Plan.parse(file.read(512)) or plan
        good = work.check().ok
    os.close(work.fd)
    if files:
        call("umount", FILES.encode())
        status = execute("/sbin/e2fsck", "-f", "-n", DISK)
        talk.say(f"fsck status={status}")
        good = good and status == 0
    return 0 if good else 1


def main() -> None:
    """Boots, runs the session, powers off."""
    for kind, target in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
        mount(kind, target, kind)
    talk = Talk("/dev/ttyS1")
    talk.say(f"boot kernel={read_text('/proc/sys/kernel/osrelease')} uptime={read_text('/proc/uptime').split()[0]}")
    result = 1
    try:
        load_modules()
        wait_for_disk(talk)
        result = session(talk, settings())
    except (OSError, records.Damaged) as error:
        talk.say(f"error {error}")
    talk.say(f"done result={result}")
    termios.tcdrain(talk.fd)
    call("reboot", POWER_OFF)
