"""What is meant to differ from qemu-img 7.2, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.cli.matrix.twins import Pair


@dataclass(frozen=True)
class Difference:
    """``words`` is a regular expression for command lines, ``may`` are the respects in which they may differ (``code``,
    ``out``, ``err``, ``files``), ``when`` decides by the outcomes, and ``reason`` is told in docs/tools/qemu-img.md.
    ``example`` is a command line it explains."""

    reason: str
    example: str
    may: str
    words: str = ""
    when: Callable[[Pair], bool] = lambda pair: True

    def explains(self, pair: Pair) -> bool:
        line = " ".join(pair.words)
        return pair.differing() <= set(self.may.split()) and bool(re.search(self.words, line)) and self.when(pair)


def _both_fail(pair: Pair) -> bool:
    return pair.ours.code == pair.theirs.code != 0


def _only_theirs_succeeds(pair: Pair) -> bool:
    return pair.ours.code != 0 == pair.theirs.code


def _says(text: str) -> Callable[[Pair], bool]:
    """Of failures: what this program says matches."""
    return lambda pair: _both_fail(pair) and bool(re.search(text, pair.ours.err))


def _one_begins_the_other(pair: Pair) -> bool:
    """The first lines tell the same, and one of them goes on."""
    ours, theirs = (side.err.split("\n")[0].rstrip(".") for side in (pair.ours, pair.theirs))
    return _both_fail(pair) and bool(theirs) and (ours.startswith(theirs) or theirs.startswith(ours))


def _fewer_lines(pair: Pair) -> bool:
    """What this program says is the last thing of what qemu-img says."""
    return _both_fail(pair) and pair.theirs.err.endswith(pair.ours.err) and bool(pair.ours.err)


def _nothing_left(pair: Pair) -> bool:
    return _both_fail(pair) and set(pair.ours.files.items()) <= set(pair.theirs.files.items())


def _options_are_there(pair: Pair) -> bool:
    """Every option qemu-img lists is listed here too, with the type it has there."""
    ours, theirs = ({line for line in side.out.splitlines() if "=<" in line} for side in (pair.ours, pair.theirs))
    return pair.ours.code == pair.theirs.code == 0 and theirs <= ours


_FIELD: Final = (
    r"( at offset 0x[0-9a-f]+: | is not known; versions |qcow2 features that are not supported|is marked corrupt|"
    r"beyond the (file's )?end|not a LUKS header|not a qcow2 image)"
)

TABLE: Final[tuple[Difference, ...]] = (
    Difference(
        "Errors about what a damaged image holds name the field, its value and its place.",
        "info bits-60", "err", when=_says(_FIELD),
    ),
    Difference(
        "Where a header points outside its file, the image is refused; qemu-img shows it as empty.",
        "info l1-far", "code out err files", r"\bl1-far$|\bl1-far\b.*new$", _only_theirs_succeeds,
    ),
    Difference(
        "Some messages go on where qemu-img's end: with the words that would be accepted, say. And some hints that "
        "qemu-img puts on further lines are part of the first.",
        "amend -o size=x q3", "err", when=_one_begins_the_other,
    ),
    Difference(
        "Of some mistakes qemu-img tells first a general and then a particular message; here it is one.",
        "convert -l snapshot.bogus=1 snap new", "err", when=_fewer_lines,
    ),
    Difference(
        "A command whose options are wrong says nothing else before: `create` no `Formatting ...`, `-p` no progress.",
        "create -f qcow2 -o preallocation=bogus new 1M", "out err files", "^create|-p|^map",
        lambda pair: _both_fail(pair) and not pair.ours.out
        and pair.theirs.out.startswith(("Formatting ", "PROGRESS", "[")) and _nothing_left(pair),
    ),
    Difference(
        "A failing command leaves no file behind that was not there before.",
        "convert -t bogus q3 new", "err files", "^(create|convert)", _nothing_left,
    ),
    Difference(
        "Options are named as they were given, where qemu-img names some of them otherwise (`version` for `compat`).",
        "create -f qcow2 -o encrypt.format=bogus new 1M", "out err", "-o .*(compat|encrypt.format|compression_type)",
        _says("does not accept value"),
    ),
    Difference(
        "The reason of a refusal is in other words where two options of a qcow2 image contradict each other.",
        "create -f qcow2 -o compat=0.10,lazy_refcounts=on new 1M", "out err", "-o .*compat=0.10",
        _says("compatibility level 1.1 or above"),
    ),
    Difference(
        "`-o help` says the same of an option in other words, lists the options of a format's file also when the file "
        "is not named, and those only this program has.",
        "create -f luks -o help", "out", "help|[?]", _options_are_there,
    ),
    Difference(
        "`check` tells in its own words, on standard error, what it finds and repairs in detail.",
        "check -r leaks leak", "err", "^check",
        lambda pair: pair.ours.code == pair.theirs.code,
    ),
    Difference(
        "`check -r all` counts every fact it sets right, qemu-img a rebuilt refcount table as one.",
        "check -r all corrupt-refcount", "out err", "^check .*corrupt-refcount",
        lambda pair: pair.ours.code == pair.theirs.code,
    ),
    Difference(
        "`check -r leaks` goes on where qemu-img gives up because more than leaks is wrong, and tells what is.",
        "check -r leaks corrupt-refcount", "code out err", "^check -r leaks corrupt-refcount",
    ),
    Difference(
        "`check -r` repairs images of formats that qemu-img can only check.",
        "check -r all vdi", "code out err files", "^check .*-r (all|leaks) vdi$", lambda pair: pair.theirs.code == 63,
    ),
    Difference(
        "`check -r` leaves an entry that cannot be repaired as it is.",
        "check -r all corrupt-l2", "out err files", "^check .*corrupt-l2",
        lambda pair: pair.ours.code == pair.theirs.code == 2,
    ),
    Difference(
        "`check -r leaks` mends leaks only; qemu-img also takes away the marks for an unclean end and for corruption.",
        "check -r leaks dirty", "err files", "^check -r leaks (dirty|marked)",
    ),
    Difference(
        "What is wrong with a LUKS header is told before a key is asked for.",
        "check luks-cut", "err", "luks-(cut|version)", _both_fail,
    ),
    Difference(
        "`compare -s` looks at what is allocated, and not at how it is cut up within the file.",
        "compare -s qz raw", "out", "^compare -s",
    ),
    Difference(
        "`compare -T none` of a raw image whose file ends within a sector tells the first byte that differs.",
        "compare -T none odd raw", "out", "^compare -T none odd",
    ),
    Difference(
        "The commands that fail on a damaged map name the place, and are not preceded by a line of the driver's.",
        "convert corrupt-l2 new", "out err files", r"\bcorrupt-l2\b", _both_fail,
    ),
    Difference(
        "`info` shows the file's name for an image that was opened with a key, qemu-img a `json:` name.",
        "info --image-opts driver=luks,key-secret=s0,file.filename=luks", "out", "^info .*key-secret",
        lambda pair: 'image: json:{' in pair.theirs.out,
    ),
    Difference(
        "`map` reads a length that ends beyond 2^63 as to the end.",
        "map -s 1k -l 9223372036854775807 --output=json q3", "out", "^map .*9223372036854775807",
    ),
    Difference(
        "`measure` takes wrong options as every command does: with an error, and exit code 1.",
        "measure --bogus q3", "code out err", "^measure",
        lambda pair: pair.theirs.out == "the help text" and _only_theirs_succeeds(pair),
    ),
    Difference(
        "`convert -n -c` may overwrite what is there.", "convert -n -c -O qcow2 q3 q4", "code err files",
        "^convert -n -c", lambda pair: pair.ours.code == 0,
    ),
    Difference(
        "`convert -n -B` looks at the target's own backing file, and copies all when there is none; qemu-img then "
        "leaves out what the named one has.",
        "convert -n -B q3 -F qcow2 -O qcow2 over q4", "files", "^convert -n -B", lambda pair: pair.ours.code == 0,
    ),
    Difference(
        "`convert --target-is-zero -B` fails with exit code 1 (qemu-img says why, and exits with 0).",
        "convert --target-is-zero -n -B q3 q3 raw", "code", "--target-is-zero -n -B", _only_theirs_succeeds,
    ),
    Difference(
        "`convert -B` looks for the backing file before it makes the target.",
        "convert -B missing -F qcow2 -O qcow2 q3 new", "err files", "^convert -B missing", _nothing_left,
    ),
    Difference(
        "An image is never converted onto itself, and the message says so.",
        "convert -O qcow2 q3 q3", "err", "q3 q3$", _both_fail,
    ),
    Difference(
        "Sizes of 2^63 and more are refused as such; qemu-img takes some of them for negative ones.",
        "resize q3 9223372036854775808", "err files", "[0-9]{19}", _both_fail,
    ),
    Difference(
        "Hexadecimal sizes take no suffix (qemu-img accepts it with a warning).",
        "create new 0x10000k", "code out err files", "0x10000k", _only_theirs_succeeds,
    ),
    Difference(
        "`amend -o size=0` is refused; qemu-img does nothing, and says nothing.",
        "amend -o size=0 q3", "code err", "^amend .*size=0", _only_theirs_succeeds,
    ),
    Difference(
        "Options may be written with hyphens: `cluster-size`.",
        "create -f qcow2 -o cluster-size=4k new 1M", "code out err files", "-o cluster-size",
        lambda pair: pair.ours.code == 0,
    ),
    Difference(
        "`Formatting` shows a switch as `on` or `off`, however it was given.",
        "create -f qcow2 -o lazy_refcounts=yes new 1M", "out", "=yes", lambda pair: pair.ours.code == 0,
    ),
    Difference(
        "The size given twice is told before that one of them is wrong.",
        "create -f qcow2 -o size=x new 1M", "err", "^create .*size=x", _both_fail,
    ),
    Difference(
        "An unknown short option is told by itself, not by the word before it.",
        "create new -1M", "err", "-", _says("unrecognized option|missing argument"),
    ),
    Difference(
        "Options of one command are not taken by chance: of a word of an option text without a name, and of options a "
        "driver does not have, the message shows those there are.",
        "info --image-opts driver=qcow2,file.filename=q3,bogus=1", "err", "bogus=1|=1 |,bogus", _both_fail,
    ),
    Difference(
        "A driver that needs a file says so in other words, and so does a `json:` name that is none.",
        "info --image-opts driver=qcow2", "err", "driver=(qcow2|luks|raw)$|json:|nbd:", _both_fail,
    ),
    Difference(
        "Without a command there is an error even after `-T` or `--`.", "--", "code err", "^(--|-T x)$",
        _only_theirs_succeeds,
    ),
    Difference(
        "`snapshot` says why it cannot do something, not only an error's number, and names what is missing first.",
        "snapshot -c new outside", "err files", "^snapshot -[ac] ", _both_fail,
    ),
    Difference(
        "An image whose refcounts are wrong gets no snapshot.",
        "snapshot -c new corrupt-refcount", "code err files", "^snapshot -c new corrupt", _only_theirs_succeeds,
    ),
    Difference(
        "A file that holds a secret and cannot be read is named once.",
        "info --object secret,id=s,file=missing q3", "err", "secret,id=s,file=missing", _both_fail,
    ),
    Difference(
        "A name that is a link to nowhere is not created.",
        "create dangling 1M", "code err files", "^create .*dangling", _only_theirs_succeeds,
    ),
    Difference(
        "`dd` with `skip` and `count` copies `count` blocks, as both manuals say; qemu-img counts from the beginning "
        "of the source, and so copies too little.",
        "dd if=q3 of=new bs=64k skip=3 count=5", "files", "^dd .*skip=.* count=", lambda pair: pair.ours.code == 0,
    ),
    Difference(
        "`bench` of an empty image fails; qemu-img is killed by a division by zero.",
        "bench -c 5 empty", "code out err", "^bench .*empty$", lambda pair: pair.theirs.code < 0,
    ),
    Difference(
        "`bitmap -g` above 2 GiB is refused as what it is.", "bitmap --add -g 4G bm x", "err", "-g 4G", _both_fail,
    ),
    Difference(
        "`commit` looks at the chain first, and locks or warns as for reading.",
        "commit locked", "out err", "^commit .*(locked|raw|q3|qext|snap|directory)$", _both_fail,
    ),
    Difference(
        "`/dev/null` and other character devices are no images.",
        "info /dev/null", "code out err", "/dev/null", _only_theirs_succeeds,
    ),
    Difference(
        "`-f raw` of an image that another program has open in its own format is refused like without it.",
        "info -f raw locked", "code out err", "-f (raw|luks) locked",
    ),
    Difference(
        "Raw images have no backing file, which is told as such however it was asked for.",
        "create -f raw -o backing_file=q3 new 64k", "err", "backing_file", _says("Backing file not supported"),
    ),
    Difference(
        "An image in use as qcow2 and marked corrupt is refused for writing in other words.",
        "resize marked 2M", "err", r"\bmarked\b", _both_fail,
    ),
)  # fmt: skip


def expected(pair: Pair) -> Difference | None:
    """The entry that explains how the outcomes differ; None when there is none."""
    return next((difference for difference in TABLE if difference.explains(pair)), None)
