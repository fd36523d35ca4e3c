"""Carries out one command line twice, by qemu-img and by this program, and says what was not the same."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.matrix.images import NEEDS
from tests.cli.run import TIMEOUT, Result, qemu_img

READING = ("info", "map", "measure", "compare")
"""Commands that change nothing: both programs look at the same files. (``check`` may repair.)"""


@dataclass(frozen=True)
class Outcome:
    """What a command line led to, made comparable."""

    code: int
    out: str
    err: str
    files: dict[str, object]


@dataclass(frozen=True)
class Pair:
    """A command line, and both outcomes."""

    words: tuple[str, ...]
    ours: Outcome
    theirs: Outcome

    def differing(self) -> set[str]:
        """In which respects they differ: ``code``, ``out``, ``err``, ``files``."""
        return {
            name for name in ("code", "out", "err", "files") if getattr(self.ours, name) != getattr(self.theirs, name)
        }

    def unlucky(self) -> bool:
        """Whether qemu-img failed for the sake of something outside."""
        return _UNLUCKY in self.theirs.err

    def _sides(self) -> tuple[tuple[str, Outcome], ...]:
        return ("ours", self.ours), ("theirs", self.theirs)

    def __str__(self) -> str:
        lines = ["qemu-img " + " ".join(repr(word) if " " in word or not word else word for word in self.words)]
        for name in sorted(self.differing()):
            lines += [f"  {name}: {who:<6} {getattr(side, name)!r:.700}" for who, side in self._sides()]
        return "\n".join(lines)


def run(words: tuple[str, ...], prepared: Path, scratch: Path) -> Pair:
    """Both outcomes. ``prepared`` holds the images and stays as it is; ``scratch`` is an empty place to work in."""
    if words[:1] and (words[0] in READING or "locked" in words or not _touched(words, prepared)):
        ours, theirs = _ours(words, prepared), qemu_img(*words, cwd=prepared)
        return Pair(words, _outcome(ours, {}), _outcome(theirs, {}))
    pair = _in_two_places(words, prepared, scratch)
    for _ in range(3):
        if not pair.unlucky():
            break
        pair = _in_two_places(words, prepared, scratch)
    return pair


_UNLUCKY = "Unable to get accurate CPU usage"
"""While other processes come and go, qemu-img cannot always measure how fast it derives a key."""


def _in_two_places(words: tuple[str, ...], prepared: Path, scratch: Path) -> Pair:
    places = [scratch / "ours", scratch / "theirs"]
    for place in places:
        place.mkdir()
        _copy(prepared, place, _touched(words, prepared))
    try:
        results = [_ours(words, places[0]), qemu_img(*words, cwd=places[1])]
        facts = _facts(places)
        return Pair(words, _outcome(results[0], facts[0]), _outcome(results[1], facts[1]))
    finally:
        for place in places:
            shutil.rmtree(place)


def _ours(words: tuple[str, ...], cwd: Path) -> Result:
    """This program, called as qemu-img, within this process."""
    from diskwright.cli.main import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _called("qemu-img"):
        code = main(words)
    texts = []
    for stream in (out, err):
        stream.flush()
        raw = stream.buffer
        assert isinstance(raw, io.BytesIO)
        texts.append(raw.getvalue().decode(errors="surrogateescape"))
    return Result(code, texts[0], texts[1].replace("qemu-img: ", "PROGRAM: ").replace("'qemu-img ", "'PROGRAM "))


@contextlib.contextmanager
def _called(name: str) -> Iterator[None]:
    from diskwright.cli import faces

    before = faces.program()
    faces.put_on(name)
    try:
        yield
    finally:
        faces.put_on(before)


def _touched(words: tuple[str, ...], prepared: Path) -> list[str]:
    """The prepared files a command line names, and what those need; everything when it names a new one."""
    tokens = {token for word in words[1:] for token in re.split(r'[=,:"{}/]', word)}
    named = [name for name in sorted(os.listdir(prepared)) if name in tokens]
    return list(dict.fromkeys([*named, *(need for name in named for need in NEEDS.get(name, ()))])) or (
        ["q3"] if words and words[0] in ("create", "convert", "dd") else []
    )


def _copy(source: Path, target: Path, names: list[str]) -> None:
    if "link" in names and "q3" not in names:
        names = [*names, "q3"]
    for name in names:
        path = source / name
        if path.is_symlink():
            os.symlink(os.readlink(path), target / name)
        elif path.is_dir():
            (target / name).mkdir()
        else:
            shutil.copyfile(path, target / name)
            os.chmod(target / name, 0o644)


def _outcome(result: Result, files: dict[str, object]) -> Outcome:
    return Outcome(result.code, _plain(result.out), _plain(result.err), files)


def _plain(text: str) -> str:
    """Without what no two runs have in common: durations, the names of nodes, how often progress was shown."""
    if "\nSupported formats: " in text:
        return "the help text"
    text = re.sub(r"completed in [\d.]+ seconds", "completed in SOME seconds", text)
    text = re.sub(r"#block\d+", "NODE", text)
    text = re.sub(r"(    \([\d.]+/100%\)\r)+", "PROGRESS", text)
    text = re.sub(r"(?m)^(  [\w.-]+=<[^>]*>) +- .*$", r"\1 - WHAT FOR", text)
    return re.sub(r'("?(?:uuid|actual-size|date-sec|date-nsec)"?: )[^\n]*', r"\1SOME", text)


# -- the files that are left ---------------------------------------------------------------------


def _facts(places: list[Path]) -> list[dict[str, object]]:
    """What can be told of the files in both directories, without what is each program's own affair."""
    left, right = ({name: _file(place / name) for name in sorted(os.listdir(place))} for place in places)
    for name in left.keys() & right.keys():
        if left[name] == right[name]:
            left[name] = right[name] = "the same"
        elif isinstance(left[name], bytes) and isinstance(right[name], bytes):
            left[name], right[name] = _images(places, name)
    return [{name: _digest(value) for name, value in side.items()} for side in (left, right)]


def _digest(value: object) -> object:
    """Contents that are told of once only, so that a report stays readable."""
    return f"{len(value)} bytes, {hashlib.sha256(value).hexdigest()[:12]}" if isinstance(value, bytes) else value


def _file(path: Path) -> object:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "directory" if path.is_dir() else _stored(path)


def _stored(path: Path) -> bytes:
    """The file's length and what is not a hole in it."""
    parts = [path.stat().st_size.to_bytes(8, "big")]
    with path.open("rb") as file:
        end = 0
        while True:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return b"".join(parts)
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            data = os.pread(file.fileno(), end - begin, begin)
            if data.strip(b"\0"):
                parts += [begin.to_bytes(8, "big"), data]


def _images(places: list[Path], name: str) -> tuple[object, object]:
    """Two images that are not the same bytes may still tell and hold the same."""
    infos = [_info(place, name) for place in places]
    if infos[0] != infos[1] or infos[0] is None:
        return tuple(infos)  # type: ignore[return-value]
    if infos[0].get("encrypted"):
        return infos[0], infos[1]  # with keys of their own, what was never written is garbage, and not the same
    if infos[0].get("backing-filename", "") not in ("", *os.listdir(places[0])):
        return infos[0], infos[1]
    names = [str(place / name) for place in places]
    found = qemu_img("compare", "-f", infos[0]["format"], "-F", infos[0]["format"], *names, cwd=places[0])
    sound = [
        qemu_img("check", "-q", "-f", str(info["format"]), name, cwd=at).code
        for info, at in zip(infos, places, strict=True)
    ]
    verdict = found.out if found.code < 2 else found.err.replace(str(places[0].parent), "")
    return {"compared": verdict, "check": sound[0]}, {"compared": "Images are identical.\n", "check": sound[1]}


def _info(place: Path, name: str) -> dict[str, Any] | None:
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", name],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    if done.returncode:
        return None
    facts: dict[str, Any] = json.loads(done.stdout)
    facts.pop("actual-size", None)
    for snapshot in facts.get("snapshots", ()):
        for key in ("date-sec", "date-nsec"):
            snapshot.pop(key)
    _drop(facts, ("uuid", "iters", "master-key-iters", "key-offset", "payload-offset"))
    return facts


def _drop(value: Any, keys: tuple[str, ...]) -> None:
    if isinstance(value, dict):
        for key in keys:
            value.pop(key, None)
        for item in value.values():
            _drop(item, keys)
    elif isinstance(value, list):
        for item in value:
            _drop(item, keys)
