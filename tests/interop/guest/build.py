"""Builds the guest: Debian's cloud kernel and an initramfs of Python and e2fsprogs, once, into .cache/guest.

    python -m tests.interop.guest.build

Nothing is installed and nothing compiled. The kernel package is downloaded with apt-get; Python and e2fsprogs are this
machine's own, copied with the libraries they need. So this takes a Debian machine whose processor is an x86-64.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from tests.interop.guest.cpio import CpioWriter

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(HERE))), ".cache", "guest")
KERNEL = "linux-image-cloud-amd64"  # a package of no contents that depends on the current kernel
PYTHON = "/usr/bin/python3"  # the distribution's: its libraries are known to be next to it
PROGRAMS = ("/sbin/mke2fs", "/sbin/e2fsck")
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic", "8250")  # those not built in are inserted at boot
PYTHON_MODULES = (  # what agent.py and records.py import, and what Python wants for an error message
    *("__future__", "ctypes", "encodings.ascii", "errno", "fcntl", "mmap", "os", "select", "struct", "termios", "time"),
    *("traceback", "tty", "zlib"),
)
SOURCES = ("agent.py", "build.py", "cpio.py", "records.py")


class BuildError(Exception):
    """The guest can't be built; the message says what is missing."""


@dataclass(frozen=True)
class GuestFiles:
    """A built guest."""

    kernel: str
    initramfs: str
    version: str  # of the kernel package


def build() -> GuestFiles:
    """Returns the guest for this machine and these sources, building it first if need be. Raises BuildError."""
    if platform.machine() != "x86_64":
        raise BuildError(f"the guest is made for x86_64, and this machine is {platform.machine()}")
    where = os.path.join(CACHE, _key())
    os.makedirs(CACHE, exist_ok=True)
    with open(os.path.join(CACHE, "lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test workers must not build at the same time
        if not os.path.exists(where):
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                made = os.path.join(scratch, "made")
                os.mkdir(made)
                _build_into(made, scratch)
                _remove_old_builds()
                os.rename(made, where)
    with open(os.path.join(where, "manifest.json"), encoding="utf-8") as file:
        version = json.load(file)["kernel"]
    return GuestFiles(os.path.join(where, "vmlinuz"), os.path.join(where, "initramfs.gz"), version)


def _key() -> str:
    """Names what the guest is made from. The kernel's version is not in it: a newer kernel is no reason to build."""
    digest = hashlib.sha256()
    for name in SOURCES:
        with open(os.path.join(HERE, name), "rb") as file:
            digest.update(file.read())
    for path in (PYTHON, *PROGRAMS):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise BuildError(f"{path} is missing") from None
        digest.update(f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _remove_old_builds() -> None:
    """Removes what older sources made. A guest that runs has its files open, or loaded."""
    for entry in os.scandir(CACHE):
        if re.fullmatch(r"[0-9a-f]{16}", entry.name):
            shutil.rmtree(entry.path, ignore_errors=True)


def _build_into(made: str, scratch: str) -> None:
    package, version = _kernel_package()
    root = os.path.join(scratch, "kernel")
    _run("apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download", package, cwd=scratch)
    debs = [name for name in os.listdir(scratch) if name.endswith(".deb")]
    _run("dpkg-deb", "--extract", os.path.join(scratch, debs[0]), root)
    boot = os.path.join(root, "boot")
    image = next(name for name in os.listdir(boot) if name.startswith("vmlinuz"))
    shutil.copyfile(os.path.join(boot, image), os.path.join(made, "vmlinuz"))
    buffer = io.BytesIO()
    archive = CpioWriter(buffer)
    modules = _add_modules(archive, os.path.join(root, _modules_folder(root)))
    _add_system(archive)
    archive.close()
    with open(os.path.join(made, "initramfs.gz"), "wb") as file:
        file.write(gzip.compress(buffer.getvalue(), 6, mtime=0))
    with open(os.path.join(made, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump({"kernel": f"{package} {version}", "modules": modules}, file, indent=1)


def _kernel_package() -> tuple[str, str]:
    """Returns the name and version of the current cloud kernel; fetches apt's lists if it knows none."""
    for attempt in range(2):
        text = _run("apt-cache", "depends", "--no-recommends", KERNEL, check=False)
        found = re.search(r"^\s*Depends: (linux-image-\S+)", text, re.MULTILINE)
        if found:
            policy = _run("apt-cache", "policy", found[1])
            candidate = re.search(r"Candidate: (\S+)", policy)
            if candidate and candidate[1] != "(none)":
                return found[1], candidate[1]
        if attempt == 0:
            _run("apt-get", "-qq", "update")
    raise BuildError(f"apt has no package {KERNEL}")


def _modules_folder(root: str) -> str:
    """Debian moves /lib to /usr/lib; a package may use either name."""
    for lib in ("lib/modules", "usr/lib/modules"):
        folder = os.path.join(root, lib)
        if os.path.isdir(folder):
            return os.path.join(lib, os.listdir(folder)[0])
    raise BuildError("the kernel package has no modules")


def _add_modules(archive: CpioWriter, folder: str) -> list[str]:
    """Adds the wanted modules and those they depend on. Returns their names in the order of insertion."""
    files: dict[str, str] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            stem = name.partition(".ko")[0]
            if ".ko" in name:
                files[stem.replace("-", "_")] = os.path.join(parent, name)
    order: list[str] = []

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in order or name not in files:  # built in, or of another kernel version
            return
        image = _module_image(files[name])
        for needed in _needed_by(image):
            add(needed)
        if name not in order:
            order.append(name)
            archive.file(f"modules/{name}", image)

    for wanted in MODULES:
        add(wanted)
    archive.file("modules/order", "".join(f"{name}\n" for name in order).encode())
    return order


def _module_image(path: str) -> bytes:
    """Reads a module, which the package may have compressed."""
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".gz"):
        return gzip.decompress(data)
    if path.endswith(".ko"):
        return data
    raise BuildError(f"{os.path.basename(path)}: unknown compression")


def _needed_by(image: bytes) -> Iterator[str]:
    """Returns what a module's own information says it needs (depmod's tables are made only at installation)."""
    for text in re.findall(rb"\0(?:depends=|softdep=pre: )([^\0]*)", image):
        yield from re.split(r"[,\s]+", text.decode("ascii").strip()) if text else ()


def _add_system(archive: CpioWriter) -> None:
    """Adds programs, their libraries, Python, and our two files."""
    for path in ("dev", "proc", "sys", "mnt", "run", "tmp"):
        archive.directory(path)
    archive.char_device("dev/console", 5, 1)
    archive.char_device("dev/urandom", 1, 9)  # Python asks it for a seed before /dev is mounted
    archive.symlink("etc/mtab", "/proc/mounts")
    copied: set[str] = set()

    def copy(path: str, mode: int = 0o644) -> None:
        if path not in copied:
            copied.add(path)
            with open(path, "rb") as file:
                archive.file(path, file.read(), mode)

    binaries = [os.path.realpath(PYTHON)]
    for path in _python_files():
        copy(path)
        if path.endswith(".so"):
            binaries.append(path)
    for program in PROGRAMS:
        copy(program, 0o755)
        binaries.append(program)
    copy(os.path.realpath(PYTHON), 0o755)
    for binary in binaries:
        for library in _libraries(binary):
            copy(library, 0o755)
    if os.path.exists("/etc/mke2fs.conf"):
        copy("/etc/mke2fs.conf")
    for name in ("agent.py", "records.py"):
        with open(os.path.join(HERE, name), "rb") as file:
            archive.file(f"app/{name}", file.read())
    init = f"#!{os.path.realpath(PYTHON)} -IS\nimport sys\nsys.path.insert(0, '/app')\nimport agent\nagent.main()\n"
    archive.file("init", init.encode(), 0o755)
    _add_compiled(archive)


def _add_compiled(archive: CpioWriter) -> None:
    """Adds the bytecode of all Python files, which emulation would take seconds to make at every boot."""
    with tempfile.TemporaryDirectory() as scratch:
        pairs = [(path, path) for path in _python_files() if path.endswith(".py")]
        pairs += [(os.path.join(HERE, name), f"/app/{name}") for name in ("agent.py", "records.py")]
        script = (
            "import importlib.util, json, py_compile, sys\n"
            "for number, (path, shown) in enumerate(json.loads(sys.argv[1])):\n"
            "    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH\n"  # time stamps do not survive the archive
            "    py_compile.compile(path, f'{number}.pyc', dfile=shown, doraise=True, invalidation_mode=mode)\n"
            "    print(importlib.util.cache_from_source(shown))\n"
        )
        targets = _run(PYTHON, "-I", "-c", script, json.dumps(pairs), cwd=scratch).splitlines()
        for number, target in enumerate(targets):
            with open(os.path.join(scratch, f"{number}.pyc"), "rb") as file:
                archive.file(target, file.read())


def _python_files() -> list[str]:
    """Asks the distribution's Python which files it has loaded once all that the guest imports is imported."""
    script = (
        f"import sys, {', '.join(PYTHON_MODULES)}\n"
        "print('\\n'.join(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)))\n"
        "import os; print(os.__file__)"  # frozen in newer versions, yet the file is how Python finds its library
    )
    return sorted({os.path.abspath(line) for line in _run(PYTHON, "-IS", "-c", script).splitlines()})


def _libraries(binary: str) -> list[str]:
    """Returns the shared libraries a binary is loaded with, by the paths it looks for them at."""
    text = _run("ldd", binary, check=False)  # static programs make it fail, and need nothing
    return sorted(set(re.findall(r"(?:=> |^\s*)(/\S+) \(0x", text, re.MULTILINE)))


def _run(*command: str, cwd: str | None = None, check: bool = True) -> str:
    environment = dict(os.environ, LC_ALL="C.UTF-8", DEBIAN_FRONTEND="noninteractive")
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is missing: the guest can be built only on Debian") from None
    if check and done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise BuildError(f"{command[0]} failed: {last}")
    return done.stdout


def main() -> int:
    """Builds from the command line."""
    try:
        files = build()
    except BuildError as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    size = os.path.getsize(files.kernel) + os.path.getsize(files.initramfs)
    print(f"guest: {files.version}, {size >> 20} MiB in {os.path.dirname(files.kernel)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
