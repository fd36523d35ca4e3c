#!/usr/bin/env python3
"""Gets a Debian machine ready: distribution packages, a virtual environment in .venv, the test guest in .cache.

    python3 tools/setup.py [runtime|demo|test|bench]

``make`` calls it before everything; when nothing is missing it takes a fraction of a second and says nothing. What it
runs is logged in .cache/setup.log. This file uses the standard library only and runs on Python 3.8, so that an old
one gets a message and not a traceback.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(ROOT, ".cache")
LOG = os.path.join(CACHE, "setup.log")
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "setup.json")

OLDEST = (3, 11)  # as pyproject.toml's requires-python
NEWEST_TRIED = 16  # python3.N are looked for from here down
LOG_LINES_SHOWN = 25
LOG_LIMIT = 1 << 20  # bytes; a longer log starts anew
APT_LOCK_WAIT = 300  # seconds to wait while another program holds dpkg's lock

# What has to be there, and the package that brings it if it is not: a program, or a file by its path.
FILE_SYSTEM = (("mke2fs", "e2fsprogs"), ("e2fsck", "e2fsprogs"), ("debugfs", "e2fsprogs"))
PEERS = (
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("nbdkit", "nbdkit"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("fio", "fio"),
    ("/usr/bin/python3", "python3"),  # the one that python3-libnbd is for
    ("/usr/lib/python3/dist-packages/nbd.py", "python3-libnbd"),
)
TESTS = (
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("losetup", "mount"),
    ("bash", "bash"),
    ("zsh", "zsh"),
    ("groff", "groff-base"),
    ("bximage", "bximage"),
    ("create_compressed_fs", "cloop-utils"),
    ("cryptsetup", "cryptsetup-bin"),
    ("dmg2img", "dmg2img"),
    ("7zz", "7zip"),
    ("img2simg", "android-sdk-libsparse-utils"),
)
NEEDS: dict[str, tuple[tuple[str, str], ...]] = {
    "runtime": (),
    "demo": FILE_SYSTEM,
    "test": FILE_SYSTEM + PEERS + TESTS,
    "bench": FILE_SYSTEM + PEERS,
}
EXTRAS: dict[str, tuple[str, ...]] = {"runtime": (), "demo": (), "test": ("dev",), "bench": ()}


class SetupError(Exception):
    """Something is missing that can't be had; the message is one line."""


def main() -> int:
    """Makes the machine ready for the purpose named on the command line."""
    purpose = sys.argv[1] if len(sys.argv) > 1 else "runtime"
    if purpose not in NEEDS or len(sys.argv) > 2:
        print("usage: setup.py [{}]".format("|".join(NEEDS)), file=sys.stderr)
        return 2
    os.makedirs(CACHE, exist_ok=True)
    began = time.monotonic()
    try:
        with open(os.path.join(CACHE, "setup.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(LOG) and os.path.getsize(LOG) > LOG_LIMIT:
                os.unlink(LOG)
            changed = set_up(purpose)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if changed:
        say(f"ready for {purpose} after {time.monotonic() - began:.0f} s")
    return 0


def set_up(purpose: str) -> bool:
    """Returns whether anything had to be done."""
    packages = missing_packages(NEEDS[purpose])
    ready = environment_is_ready(EXTRAS[purpose])
    if not ready:
        python, version = find_python()
        if logged([python, "-c", "import ensurepip, venv"]) != 0:
            packages.append("python{}.{}-venv".format(*version))
    changed = install_packages(packages)
    if not ready:
        make_environment(python, EXTRAS[purpose])
        changed = True
    if purpose == "test" and os.uname().machine == "x86_64":
        built = os.path.join(CACHE, "guest")
        before = listing(built)
        run([VENV_PYTHON, "-m", "tests.interop.guest.build"], "the test guest can't be built")
        changed = changed or listing(built) != before
    return changed


def missing_packages(needs: tuple[tuple[str, str], ...]) -> list[str]:
    """Returns the packages of those needs that are not met, each once."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"
    missing: list[str] = []
    for need, package in needs:
        there = os.path.exists(need) if need.startswith("/") else shutil.which(need, path=path)
        if not there and package not in missing:
            missing.append(package)
    return missing


def install_packages(packages: list[str]) -> bool:
    """Installs packages of the distribution. Returns whether there were any."""
    if not packages:
        return False
    names = " ".join(packages)
    if shutil.which("apt-get") is None:
        raise SetupError(f"not a Debian machine: install what Debian calls {names}")
    prefix: list[str] = []
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            raise SetupError(f"run as root, or install sudo, to install: {names}")
        prefix = ["sudo"] if sys.stdin is not None and sys.stdin.isatty() else ["sudo", "-n"]
    say(f"installing {names}")
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1", "apt-get", "-q"]
    apt += ["-o", f"DPkg::Lock::Timeout={APT_LOCK_WAIT}"]
    install = [*apt, "install", "-y", "--no-install-recommends", *packages]
    if logged(install) != 0:  # mostly because the package lists are absent or old
        run([*apt, "update"], "apt-get update failed")
        run(install, f"these packages can't be installed: {names}")
    return True


def environment_is_ready(extras: tuple[str, ...]) -> bool:
    """True when .venv was made by this script, from this pyproject.toml, here, with at least these extras."""
    try:
        with open(STAMP) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return False
    return stamp.get("key") == key() and set(extras) <= set(stamp.get("extras", ())) and os.path.exists(VENV_PYTHON)


def key() -> str:
    """Names what an environment depends on. The place is part of it: an environment can't be moved."""
    digest = hashlib.sha256(ROOT.encode())
    for name in ("pyproject.toml", os.path.join("tools", "setup.py")):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def make_environment(python: str, extras: tuple[str, ...]) -> None:
    """Makes .venv anew and installs the project into it, editable."""
    if os.path.exists(STAMP):  # extras that were asked for before stay
        try:
            with open(STAMP) as file:
                extras = tuple(sorted({*extras, *json.load(file).get("extras", ())}))
        except ValueError:
            pass
    say(f"making .venv with {python}")
    run([python, "-m", "venv", "--clear", VENV], "the virtual environment can't be made")
    project = ROOT + ("[{}]".format(",".join(extras)) if extras else "")
    pip = [VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    run([*pip, "--editable", project], "pip can't install the project's dependencies")
    with open(STAMP + ".new", "w") as file:
        json.dump({"key": key(), "extras": list(extras)}, file)
    os.replace(STAMP + ".new", STAMP)


def find_python() -> tuple[str, tuple[int, int]]:
    """Returns the path and version of a Python that is new enough: the one running if it is."""
    # Real paths: the one running may be .venv's own, which is about to be made anew.
    if sys.version_info[:2] >= OLDEST:
        return os.path.realpath(sys.executable), sys.version_info[:2]
    names = ["python3"] + [f"python3.{minor}" for minor in range(NEWEST_TRIED, OLDEST[1] - 1, -1)]
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        # Asked, not believed: a version manager's stand-in may be there for a version that is not.
        question = "import sys; print(sys.version_info[0], sys.version_info[1])"
        done = subprocess.run([path, "-c", question], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        words = done.stdout.split()
        if done.returncode == 0 and len(words) == 2 and (int(words[0]), int(words[1])) >= OLDEST:
            return os.path.realpath(path), (int(words[0]), int(words[1]))
    found = "{}.{}".format(*sys.version_info[:2])
    raise SetupError("Python {}.{} or newer is needed; the newest found is {}".format(*OLDEST, found))


def listing(folder: str) -> list[str]:
    """Returns the names in a folder; none if it is not there."""
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def say(text: str) -> None:
    """Prints a line at once: the next step may take a minute."""
    print("setup: " + text, flush=True)


def run(command: list[str], problem: str) -> None:
    """Runs a command with its output in the log. When it fails, shows the log's end and raises SetupError."""
    if logged(command) != 0:
        with open(LOG, errors="replace") as file:
            lines = file.readlines()
        begin = max(number for number, line in enumerate(lines) if line.startswith("$ "))
        sys.stderr.write("".join(lines[begin:][-LOG_LINES_SHOWN:]))
        raise SetupError(f"{problem} (all of it: {os.path.relpath(LOG)})")


def logged(command: list[str]) -> int:
    """Runs a command with its output added to the log. Returns its exit status."""
    with open(LOG, "a") as log:
        log.write("$ {}\n".format(" ".join(shlex.quote(word) for word in command)))
        log.flush()
        try:
            return subprocess.call(command, cwd=ROOT, stdin=None, stdout=log, stderr=log)
        except OSError as error:
            log.write(f"{error}\n")
            return 127


if __name__ == "__main__":
    sys.exit(main())
