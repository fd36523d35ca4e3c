"""The command lines: for each subcommand every kind of image, every option, and everything that can be wrong with them.

Words are split at spaces; ``~`` stands for a space within a word, and ``''`` for an empty word.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

from tests.cli.matrix.images import DAMAGED, OTHERS, SECRET, SOUND

ALL: Final = (*SOUND, *DAMAGED, *OTHERS)
WRITABLE: Final = ("raw", "q3", "q2", "qext", "q512", "qz", "over", "snap", "bm", "outside")

FORMATS: Final = {
    "raw": "raw", "empty": "raw", "odd": "raw", "luks": "luks", "text": "raw", "short": "raw", "luks-cut": "luks",
    "luks-version": "luks", "vdi": "vdi",
}  # fmt: skip
"""The formats that are not qcow2."""

LONG: Final = {
    "amend": ("object", "image-opts", "force", "help"),
    "bench": ("flush-interval", "pattern", "no-drain", "image-opts", "force-share", "help"),
    "bitmap": ("add", "remove", "clear", "enable", "disable", "merge", "object", "image-opts", "source-file",
               "source-format", "granularity", "help"),
    "check": ("format", "repair", "output", "object", "image-opts", "force-share", "help"),
    "commit": ("object", "image-opts", "help"),
    "compare": ("object", "image-opts", "force-share", "help"),
    "convert": ("object", "image-opts", "force-share", "target-image-opts", "salvage", "target-is-zero", "bitmaps",
                "skip-broken-bitmaps", "source-image-opts", "help"),
    "create": ("object", "backing-format", "help"),
    "dd": ("object", "image-opts", "force-share", "help"),
    "info": ("format", "output", "backing-chain", "object", "image-opts", "force-share", "help"),
    "map": ("format", "output", "object", "image-opts", "force-share", "start-offset", "max-length", "help"),
    "measure": ("object", "image-opts", "output", "size", "force-share", "help"),
    "rebase": ("object", "image-opts", "force-share", "help"),
    "resize": ("object", "image-opts", "preallocation", "shrink", "help"),
    "snapshot": ("object", "image-opts", "force-share", "help"),
}  # fmt: skip

OPERANDS: Final = {
    "amend": "-o lazy_refcounts=on q3", "bench": "-c 1 q3", "bitmap": "--add q3 b", "check": "q3", "commit": "-d over",
    "compare": "q3 qext", "convert": "q3 new", "create": "new 1M", "dd": "if=q3 of=new", "info": "q3", "map": "q3",
    "measure": "q3", "rebase": "-u -b q3 -F qcow2 over", "resize": "q3 2M", "snapshot": "-l snap",
}  # fmt: skip
"""Of each subcommand something that works."""

SHORT: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0"


def words_of(line: str) -> tuple[str, ...]:
    """A command line in words."""
    return tuple("" if word == "''" else word.replace("~", " ") for word in line.split())


@cache
def groups() -> dict[str, tuple[tuple[str, ...], ...]]:
    """All command lines, each once, by the group that makes them."""
    made: dict[str, tuple[tuple[str, ...], ...]] = {}
    seen: set[tuple[str, ...]] = set()
    for name, lines in _GROUPS.items():
        mine = [words_of(line) for line in lines()]
        made[name] = tuple(words for words in dict.fromkeys(mine) if words not in seen)
        seen.update(mine)
    return made


def every() -> list[tuple[str, ...]]:
    return [words for group in groups().values() for words in group]


# -- reading -------------------------------------------------------------------------------------


def _info() -> Iterator[str]:
    for name in (*ALL, "locked", "names-itself"):  # of other commands with the last qemu-img never comes to an end
        yield f"info {name}"
        yield f"info --output=json {name}"
        yield f"info --backing-chain {name}"
        yield f"info --output=json --backing-chain {name}"
        yield f"info -U -f {FORMATS.get(name, 'qcow2')} {name}"
        yield f"info -f raw {name}"
        yield f"info -f luks {name}"
    yield from _named("info", "q3", "over2", "luks", "missing")
    yield from ("info --output=yaml q3", "info --output= q3", "info --output json q3", "info -f bogus q3",
                "info -fqcow2 q3",
                "info -f '' q3", "info --format qcow2 q3", "info --output human -U over2", "info q3 raw", "info -- q3",
                "info -f qcow2 -f raw q3", "info ''", "info -", "info /dev/null", "info nbd:nowhere", "info foo:bar",
                "info ./q3", "info ../missing", "info -f file q3", "info --image-opts driver=file,filename=q3",
                f"info --object {SECRET} --image-opts driver=luks,key-secret=s0,file.filename=luks",
                f"info --object {SECRET} --image-opts encrypt.format=luks,encrypt.key-secret=s0,file.filename=qluks",
                "info --object secret,id=s0,data=wrong --image-opts driver=luks,key-secret=s0,file.filename=luks",
                "info --image-opts driver=luks,key-secret=s0,file.filename=luks", "info --object secret q3",
                "info --object secret,id=s0 q3", "info --object secret,data=x q3", "info --object bogus,id=s q3",
                "info --object '' q3", "info --object secret,id=s,file=missing q3",
                "info --object secret,id=s,data=x,bogus=1 q3",
                "info --object secret,id=s,data=x,format=bogus q3", "info --object secret,id=s,data=x,file=q3 q3",
                f"info --object {SECRET} --object {SECRET} q3")  # fmt: skip


def _named(command: str, *names: str) -> Iterator[str]:
    """The ways to name an image."""
    for name in names:
        driver = FORMATS.get(name, "qcow2")
        yield f"{command} --image-opts driver={driver},file.filename={name}"
        yield f"{command} --image-opts driver={driver},file.driver=file,file.filename={name}"
        yield f"{command} --image-opts -f {driver} file.filename={name}"
        yield f"{command} --image-opts file.filename={name}"
        yield f"{command} --image-opts {name}"
        yield f"{command} --image-opts driver={driver},file.filename={name},bogus=1"
        yield f"{command} --image-opts driver=bogus,file.filename={name}"
        yield f"{command} --image-opts driver={driver}"
        yield f'{command} json:{{"driver":"{driver}","file":{{"driver":"file","filename":"{name}"}}}}'
        yield f'{command} json:{{"file":{{"driver":"file","filename":"{name}"}}}}'
        yield f'{command} json:{{"driver":"{driver}","file.filename":"{name}"}}'
        yield f'{command} -f {driver} json:{{"driver":"{driver}","file.filename":"{name}"}}'
        yield f'{command} json:{{"driver":"{driver}"'
        yield f"{command} json:[]"
        yield f"{command} file:{name}"
        yield f"{command} ./{name}"


def _check() -> Iterator[str]:
    for name in (*ALL, "locked"):
        for options in (
            "",
            "--output=json ",
            "-r leaks ",
            "-r all ",
            "-q -U ",
            f"-f {FORMATS.get(name, 'qcow2')} -T none ",
        ):
            yield f"check {options}{name}"
    for name in DAMAGED:
        yield f"check --output=json -r all {name}"
        yield f"check -q -r all {name}"
    yield from _named("check", "q3", "leak")
    yield from ("check -r bogus q3", "check -r '' q3", "check -r all -U leak", "check -T bogus q3",
                "check --repair=leaks leak",
                "check --output=bogus q3", "check -f raw leak", "check -r leaks -q leak")  # fmt: skip


def _map() -> Iterator[str]:
    for name in (*SOUND, "odd", "short", "text", "directory", "missing", "link", "corrupt-l2", "l1-far", "locked"):
        yield f"map {name}"
        yield f"map --output=json {name}"
        yield f"map --output=json -U --start-offset=64k {name}"
        yield f"map --output=json --start-offset=70000 --max-length=100000 {name}"
    yield from _named("map", "q3", "over2")
    yield from ("map --start-offset=x q3", "map --max-length=x q3", "map -s 1M q3", "map -s 2M --output=json q3",
                "map -l 0 --output=json q3", "map -l 512 q3", "map --output=bogus q3", "map -s -1 q3", "map -f raw q3",
                "map -s 9E q3", "map -s 1 -l 1 --output=json q3",
                "map -s 1k -l 9223372036854775807 --output=json q3")  # fmt: skip


def _measure() -> Iterator[str]:
    for name in (*SOUND, "odd", "directory", "missing"):
        for options in ("", "-O qcow2 ", "-O qcow2 --output=json ", "-O qcow2 -o cluster_size=4k,extended_l2=off "):
            yield f"measure {options}{name}"
    for size in ("0", "1", "511", "512", "1M", "1T", "1.5G", "7E", "x", "-1", "''", "8E", "1025"):
        yield f"measure --size {size}"
        yield f"measure -O qcow2 --output=json --size {size}"
    for option in ("cluster_size=512", "cluster_size=2M", "cluster_size=3k", "refcount_bits=1", "refcount_bits=64",
                   "preallocation=metadata", "preallocation=full", "preallocation=falloc", "compat=0.10",
                   "extended_l2=on",
                   "extended_l2=on,cluster_size=128k", "lazy_refcounts=on", "backing_file=raw,backing_fmt=raw",
                   "bogus=1",
                   "compression_type=zstd", "data_file=x", "size=5M", "cluster_size=x", "help"):  # fmt: skip
        yield f"measure -O qcow2 --size 10G -o {option}"
    yield from _named("measure", "q3")
    yield from ("measure", "measure -O luks --size 1M",
                f"measure --object {SECRET} -O luks -o key-secret=s0 --size 1M",
                "measure -O bogus --size 1M", "measure --size 1M q3",
                "measure q3 raw",
                "measure --image-opts", "measure -f raw", "measure -l one", "measure -l one snap",
                "measure -l nosuch snap",
                "measure -O qcow2 -l two snap", "measure -l snapshot.name=one snap", "measure -O file --size 1M",
                "measure --output=bogus --size 1M", "measure -U q3", "measure -l one raw", "measure -O qcow2 -U over2",
                "measure -f raw -O qcow2 q3", "measure -O raw -o preallocation=off --size 1M")  # fmt: skip


def _compare() -> Iterator[str]:
    names = ("raw", "q3", "qext", "qz", "q2", "over", "q4", "empty", "odd", "luks", "missing", "directory")
    for left in names:
        for right in names[:8]:
            yield f"compare {left} {right}"
    for left, right in (("raw", "q3"), ("q3", "q4"), ("qz", "raw"), ("q3", "over"), ("odd", "raw"), ("q2", "q1bit")):
        for options in ("-s", "-q", "-p", "-p -q", "-s -q", "-U", "-T none", "-f raw", "-F raw", "-f qcow2 -F raw"):
            yield f"compare {options} {left} {right}"
    yield from ("compare -T bogus raw q3", "compare q3", "compare", "compare q3 raw q2", "compare -f bogus q3 raw",
                "compare -F bogus q3 raw",
                "compare --image-opts driver=qcow2,file.filename=q3 driver=raw,file.filename=raw",
                "compare --image-opts -f qcow2 file.filename=q3 file.filename=raw", "compare locked q3",
                "compare q3 locked",
                "compare orphan q3", "compare over2 over", "compare -s over2 over",
                "compare q3 corrupt-l2")  # fmt: skip


# -- making --------------------------------------------------------------------------------------

_CREATE_OPTIONS: Final = (
    "cluster_size=512", "cluster_size=1k", "cluster_size=2M", "cluster_size=4M", "cluster_size=100", "cluster_size=3k",
    "cluster_size=0", "cluster_size=x", "cluster_size=-1", "cluster_size=65536", "cluster_size=64K",
    "cluster_size=1.5k",
    "compat=0.10", "compat=1.1", "compat=v2", "compat=v3", "compat=2.0", "compat=", "compat",
    "refcount_bits=1", "refcount_bits=2", "refcount_bits=16", "refcount_bits=64", "refcount_bits=3",
    "refcount_bits=128",
    "refcount_bits=0", "refcount_bits=x", "compat=0.10,refcount_bits=8", "lazy_refcounts=on", "lazy_refcounts=yes",
    "lazy_refcounts=off", "lazy_refcounts=maybe", "lazy_refcounts", "compat=0.10,lazy_refcounts=on",
    "preallocation=off", "preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=bogus",
    "extended_l2=on", "extended_l2=on,cluster_size=8k", "extended_l2=on,cluster_size=16k", "extended_l2=on,compat=0.10",
    "compression_type=zlib", "compression_type=zstd", "compression_type=lzma", "compression_type=zstd,compat=0.10",
    "data_file=new.data", "data_file=new.data,data_file_raw=on", "data_file_raw=on", "data_file=new.data,compat=0.10",
    "encryption=off", "size=2M", "size=x", "bogus=1", "bogus", "=1", "backing_file=q3",
    "backing_file=q3,backing_fmt=qcow2",
    "backing_file=missing,backing_fmt=qcow2", "backing_file=raw,backing_fmt=raw,cluster_size=4k", "backing_fmt=raw",
    "backing_file=q3,backing_fmt=bogus", "nocow=on", "nocow=off", "extent_size_hint=1M", "extent_size_hint=0", "help",
    "?",
    "cluster_size=4k,help", "cluster_size=4k,cluster_size=8k", "cluster-size=4k", "encrypt.format=bogus",
    "encrypt.format=luks", "encryption=on", "encrypt.format=luks,encrypt.key-secret=nosuch", "cluster_size=4k,",
    ",cluster_size=4k",
    "cluster_size=4k,,lazy_refcounts=on", "backing_file=a,,b,backing_fmt=raw",
)  # fmt: skip

_SIZES: Final = (
    "0", "1", "511", "512", "513", "1000", "65535", "1k", "1K", "1M", "1m", "1G", "1T", "1.5G", "1.5k", "1.5", "0.5M",
    "1b",
    "1B", "0x10000", "0x10000k", "1E", "7E", "8E", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "x",
    "1x", "1kk", "+1M", "-1M", "1KiB", "1~", "~1", "1e3", "''", "0x", "nan", "1P", ".5M", "1.M",
)  # fmt: skip


_ENCRYPT: Final = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"


def _create() -> Iterator[str]:
    for size in _SIZES:
        if size not in ("1T", "1E", "1P", "7E"):
            yield f"create new {size}"
        if size not in ("1E", "7E", "1P"):
            yield f"create -f qcow2 new {size}"
    for option in _CREATE_OPTIONS:
        yield f"create -f qcow2 -o {option} new 1M"
    for option in ("preallocation=off", "preallocation=falloc", "preallocation=full", "preallocation=metadata",
                   "size=1M",
                   "nocow=on", "bogus=1", "help", "cluster_size=4k", "backing_file=q3",
                   "extent_size_hint=1M"):  # fmt: skip
        yield f"create -f raw -o {option} new 64k"
        yield f"create -o {option} new"
    for option in ("cipher-alg=bogus", "help", "iter-time=x", "bogus=1", "key-secret=nosuch",
                   "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,iter-time=10"):  # fmt: skip
        yield f"create -f luks --object {SECRET} -o key-secret=s0,{option} new 1M"
    for option in ("preallocation=metadata", "preallocation=off", "preallocation=full", "static=on", "bogus=1", "help",
                   "cluster_size=4k", "backing_file=q3", "size=x"):  # fmt: skip
        yield f"create -f vdi -o {option} new 1M"
    for size in ("0", "1", "1000", "1M", "1500k", "1T", "1G"):
        yield f"create -f vdi new {size}"
    yield from (f"create -f luks --object {SECRET} new 1M", "create -f luks new 1M", "create -f luks -o help",
                f"create -f qcow2 --object {SECRET} -o {_ENCRYPT} new 1M",
                f"create -f qcow2 --object {SECRET} -o encrypt.format=aes,encrypt.key-secret=s0 new 1M",
                )  # fmt: skip
    for backing in ("q3", "raw", "over", "missing", "directory", "text", "luks", "''", "q4", "empty", "odd", "new"):
        for options in ("", "-F qcow2 ", "-F raw ", "-u -F qcow2 "):
            yield f"create -f qcow2 {options}-b {backing} new"
        yield f"create -f qcow2 -F qcow2 -b {backing} new 2M"
    yield from ("create -f raw -b q3 new 1M", "create -f qcow2 -u -b missing new",
                "create -f qcow2 -u -b missing new 1M",
                "create -f qcow2 -F bogus -b q3 new", "create -f bogus new 1M", "create -f file new 1M",
                "create -f qcow2 new",
                "create -f '' new 1M", "create -f nbd new 1M", "create -f vvfat new 1M",
                "create new", "create", "create -f qcow2", "create new 1M 2M", "create -q new 1M",
                "create -q -f qcow2 new 1M",
                "create q3 1M", "create -f qcow2 q3 1M", "create -f qcow2 raw 64k", "create -f qcow2 locked 1M",
                "create locked 1M",
                "create -f qcow2 directory 1M", "create directory/new 1M", "create -f qcow2 missing/new 1M",
                "create raw/new 1M", "create -f qcow2 dangling 1M", "create dangling 1M", "create -f qcow2 link 1M",
                "create -f qcow2 -o size=1M new 2M", "create -f qcow2 -o size=1M new", "create -o help",
                "create -f qcow2 -o help",
                "create -f qcow2 -o help new", "create -f bogus -o help", "create -f qcow2 -o '' new 1M",
                "create -f qcow2 -o cluster_size=4k -o lazy_refcounts=on new 1M", "create -f qcow2 '' 1M",
                "create -f qcow2 -o cluster_size=4k, -o lazy_refcounts=on new 1M", "create -f qcow2 -b q3 -F qcow2 q3",
                "create -f qcow2 file:new 1M", "create foo:new 1M", "create ./new 1M", "create -f qcow2 -- -new 1M",
                "create -fqcow2 -ocluster_size=4k new 1M", "create -qf qcow2 new 1M", "create new -f qcow2 1M -q",
                "create --backing-format=qcow2 -b q3 -f qcow2 new", "create -f qcow2 -b over -F qcow2 -u new",
                'create -f qcow2 -F qcow2 -b json:{"driver":"qcow2","file":{"driver":"file","filename":"q3"}} new',
                )  # fmt: skip


def _convert() -> Iterator[str]:
    for name in (*SOUND, *DAMAGED, "missing", "directory", "locked", "link"):
        yield f"convert {name} new"
        yield f"convert -O qcow2 {name} new"
        yield f"convert -O vdi {name} new"
    for name in ("raw", "q3", "qext", "qz", "over", "snap"):
        for options in ("-c", "-o cluster_size=4k", "-o compat=0.10", "-o extended_l2=on", "-S 0", "-S 64k",
                        "-W -m 4", "-m 1",
                        "-t none -T none", "-o preallocation=metadata", "-o preallocation=full",
                        "-c -o compression_type=zstd",
                        "-o lazy_refcounts=on,refcount_bits=64", "-p", "-q -p", "-U", "-C", "-r 100M",
                        "-o data_file=new.data,data_file_raw=on"):  # fmt: skip
            yield f"convert -O qcow2 {options} {name} new"
        for options in ("-f raw", "-S 0", "-S 4k", "-p", "-o preallocation=full", "-C"):
            yield f"convert -O raw {options} {name} new"
        yield f"convert -O qcow2 -n {name} q4"
        yield f"convert -O raw -n {name} raw"
        yield f"convert -n -O qcow2 --target-is-zero {name} qpre"
        yield f"convert -O qcow2 -B q3 -F qcow2 {name} new"
        yield f"convert -O qcow2 {name} q4 new"
    yield from _named("convert", "q3")
    for line in ("q3", "", "-O bogus q3 new", "-f bogus q3 new", "-O qcow2 -o bogus=1 q3 new",
                 "-O qcow2 -o help q3 new",
                 "-O qcow2 -o help", "-o help", "-O bogus -o help q3 new", "-c q3 new", "-O raw -c q3 new",
                 "-n q3 missing",
                 "-n q3 empty", "-n -O qcow2 q4 q3", "-n -o cluster_size=4k q3 raw", "--target-is-zero q3 new",
                 "--target-is-zero -n -B q3 q3 raw", "--target-image-opts q3 driver=raw,file.filename=raw",
                 "--target-image-opts -n q3 driver=raw,file.filename=raw",
                 "--target-image-opts -n -O raw q3 driver=raw,file.filename=raw", "--target-image-opts -n q3 raw",
                 "--target-image-opts -n --image-opts driver=qcow2,file.filename=q3 driver=qcow2,file.filename=q4",
                 "-S x q3 new", "-S 100 q3 new", "-S 1000 q3 new", "-S 17M q3 new", "-S 1G q3 new", "-S -1 q3 new",
                 "-m 0 q3 new",
                 "-m 17 q3 new", "-m x q3 new", "-m 16 q3 new", "-r x q3 new", "-t bogus q3 new", "-T bogus q3 new",
                 "-l one snap new", "-l nosuch snap new", "-l snapshot.name=two snap new", "-l snapshot.id=1 snap new",
                 "-l snapshot.bogus=1 snap new", "-l one raw new", "-l one snap q3 new", "-l 2 -O qcow2 snap new",
                 "-C -c -O qcow2 q3 new", "-C -S 4k q3 new", "--bitmaps -O qcow2 bm new", "--bitmaps bm new",
                 "--bitmaps raw new",
                 "--bitmaps -O qcow2 q3 new", "--bitmaps -O qcow2 -o compat=0.10 bm new",
                 "--skip-broken-bitmaps q3 new",
                 "--bitmaps --skip-broken-bitmaps -O qcow2 bm new", "--bitmaps -O qcow2 bm bm new",
                 "--bitmaps -n -O qcow2 bm q4",
                 "--salvage q3 new", "--salvage -O qcow2 q3 new", "--salvage -C q3 new", "--salvage -q raw new",
                 "--salvage -f raw odd new", "-B missing -F qcow2 -O qcow2 q3 new", "-B q3 -O qcow2 q3 new",
                 "-B q3 -F qcow2 q3 new", "-B q3 -F qcow2 -O qcow2 q3 q4 new", "-F qcow2 -O qcow2 q3 new",
                 "-o backing_file=q3,backing_fmt=qcow2 -O qcow2 over new", "-o backing_file=q3 -O qcow2 over new",
                 "-O qcow2 q3 directory", "q3 directory/new", "q3 missing/new", "-O qcow2 q3 q3", "q3 locked",
                 "-n q3 locked",
                 "-O qcow2 q3 locked", "q3 raw odd new", "-O qcow2 odd raw new", "missing q3 new", "q3 missing new",
                 "-o size=4M -O qcow2 q3 new", "-O qcow2 -o preallocation=bogus q3 new", "-O qcow2 -o '' q3 new",
                 "-O qcow2 -o cluster_size=4k -o compat=0.10 q3 new", "-O qcow2 -o cluster_size=4k, q3 new",
                 "-c -O qcow2 -o preallocation=full q3 new", "-O luks q3 new", "-n -c -O qcow2 q3 q4", "q3 ''",
                 "'' new",
                 "--image-opts -f qcow2 driver=qcow2,file.filename=q3 new", "-O file q3 new",
                 "-f raw -O qcow2 luks new",
                 "--source-image-opts q3 new", "-O qcow2 --target-image-opts q3 new",
                 "-n -B q3 -F qcow2 -O qcow2 over q4",
                 f"--object {SECRET} --image-opts driver=luks,key-secret=s0,file.filename=luks new",
                 f"--object {SECRET} -O luks -o key-secret=s0,iter-time=10 raw new",
                 f"--object {SECRET} -O qcow2 -o {_ENCRYPT} raw new",
                 f"--object {SECRET} -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s0 raw new"):  # fmt: skip
        yield f"convert {line}"


def _dd() -> Iterator[str]:
    for name in ("raw", "q3", "qext", "over", "odd", "empty", "snap", "missing", "directory"):
        for rest in (
            "",
            " bs=4k",
            " bs=64k count=3",
            " bs=1000 count=100",
            " skip=100",
            " bs=64k skip=3",
            " count=0",
            " skip=9999",
            " bs=64k skip=3 count=5",
        ):
            yield f"dd if={name} of=new{rest}"
        yield f"dd -O qcow2 if={name} of=new bs=32k count=2"
    for line in ("", "if=q3", "of=new", "if=q3 of=new bs=0", "if=q3 of=new bs=x", "if=q3 of=new bs=-1",
                 "if=q3 of=new bs=3G",
                 "if=q3 of=new count=x", "if=q3 of=new count=-1", "if=q3 of=new skip=x", "if=q3 of=new bogus=1",
                 "if=q3 of=new bogus",
                 "q3 new", "-f raw if=q3 of=new", "-f bogus if=q3 of=new", "-O bogus if=q3 of=new", "-U if=q3 of=new",
                 "if= of=new",
                 "--image-opts if=driver=qcow2,file.filename=q3 of=new",
                 "-f qcow2 --image-opts if=driver=qcow2,file.filename=q3 of=new",
                 "if=q3 of=missing/new", "if=q3 of=directory", "-O file if=q3 of=new", "-O luks if=q3 of=new",
                 "if=q3 if=raw of=new",
                 "bs=1M if=q3 of=new", "if=q3 of=new bs=1M bs=512 count=1", "-n if=q3 of=new", "if=q3 of=",
                 "if=locked of=new"):  # fmt: skip
        yield f"dd {line}"


# -- changing ------------------------------------------------------------------------------------


def _resize() -> Iterator[str]:
    for name in (*WRITABLE, "q1bit", "qpre", "qzstd"):
        for size in ("2M", "+512k", "-512k", "1M"):
            yield f"resize {'-f raw ' if name == 'raw' else ''}{name} {size}"
        yield f"resize --shrink {'-f raw ' if name == 'raw' else ''}{name} 512k"
    for name in ("raw", "q3", "over", "qext"):
        for mode in ("off", "metadata", "falloc", "full", "bogus", ""):
            yield f"resize -f {FORMATS.get(name, 'qcow2')} --preallocation={mode} {name} 2M"
    for size in _SIZES:
        if size not in ("7E", "1E", "8E", "1P"):
            yield f"resize q3 {size}"
    for line in ("", "q3", "2M", "q3 2M 3M", "missing 2M", "directory 2M", "locked 2M", "-f bogus q3 2M",
                 "-f raw q3 2M",
                 "-q q3 2M", "q3 0", "--shrink q3 0", "--shrink q3 -2M",
                 "--image-opts driver=qcow2,file.filename=q3 2M",
                 "--image-opts -f qcow2 file.filename=q3 2M", "-- q3 2M", "--shrink -- q3 -512k", "q3 +0", "q3 +",
                 "q3 -",
                 "luks 2M", "orphan 2M", "dirty 2M", "marked 2M", "leak 2M", "version-9 2M", "text 1k", "empty 1M",
                 "link 2M",
                 "--preallocation=full --shrink q3 512k", "q3 1025", "-f raw odd 100000", "-p q3 2M",
                 "q3 --shrink"):  # fmt: skip
        yield f"resize {line}"


def _snapshot() -> Iterator[str]:
    for name in ALL:
        yield f"snapshot -l {name}"
        yield f"snapshot -c new {name}"
    for name in WRITABLE:
        yield f"snapshot -a nosuch {name}"
        yield f"snapshot -d nosuch {name}"
    for line in ("", "snap", "-l", "-c", "-c x", "-a one snap", "-a two snap", "-a 1 snap", "-d one snap",
                 "-d 2 snap", "-d two snap",
                 "-a one -d one snap", "-l -c x snap", "-c x -c y snap", "-l -l snap", "-q -l snap", "-q -c x snap",
                 "-U -l snap",
                 "-U -c x snap", "-c '' snap", "-c one snap", "-l snap q3", "-l locked", "-c x locked",
                 "-l -U locked", "-c 7 snap",
                 "--image-opts -l driver=qcow2,file.filename=snap", "--image-opts -c x driver=qcow2,file.filename=snap",
                 "--image-opts -l file.filename=raw", "-b snap", "-l -f qcow2 snap", "-a '' snap",
                 "-d '' snap"):  # fmt: skip
        yield f"snapshot {line}"


def _bitmap() -> Iterator[str]:
    for name in (*SOUND, "missing", "directory", "marked", "dirty"):
        yield f"bitmap --add {name} new"
        yield f"bitmap --remove {name} b0"
    for line in ("", "bm", "bm b0", "--add", "--add bm", "--add bm b0", "--add bm ''", "--add -g 4k bm x",
                 "--add -g 3k bm x",
                 "--add -g 0 bm x", "--add -g 256 bm x", "--add -g 512 bm x", "--add -g 2G bm x", "--add -g 4G bm x",
                 "--add -g x bm x", "--add -g -1 bm x", "-g 4k --remove bm b0", "--clear bm b0", "--clear bm nosuch",
                 "--enable bm b1", "--enable bm b0", "--disable bm b0", "--disable bm b1", "--remove bm nosuch",
                 "--merge b1 bm b0", "--merge b0 bm b1", "--merge nosuch bm b0", "--merge b0 bm nosuch",
                 "--merge b0 bm b0",
                 "--add --merge b0 bm x", "--add --disable bm x", "--add --enable --clear --disable --remove bm x",
                 "--remove --remove bm b0", "-b bm -F qcow2 --merge b0 q4 x", "-b bm -F qcow2 --add --merge b0 q3 x",
                 "-b bm --add --merge b0 --merge b1 q3 x", "-b missing --add --merge b0 q3 x",
                 "-b raw --add --merge b0 q3 x",
                 "-b bm --add q3 x", "-F qcow2 --add q3 x", "--add bm x y", "-f raw --add bm x", "-f bogus --add bm x",
                 "--image-opts --add driver=qcow2,file.filename=bm x", "--image-opts -f qcow2 --add file.filename=bm x",
                 "--merge", "--bogus bm b0", "--add locked x", "-U --add bm x", "--add -q bm x",
                 "--source-file bm --merge b0 q3 x",
                 "--source-file bm --source-format qcow2 --add --merge b0 q3 x",
                 "--add --granularity=4k bm x"):  # fmt: skip
        yield f"bitmap {line}"


def _amend() -> Iterator[str]:
    for name in ("q3", "q2", "qext", "q512", "qz", "qzstd", "q1bit", "over", "snap", "outside", "qpre"):
        for option in ("compat=0.10", "compat=1.1", "refcount_bits=16", "refcount_bits=64", "lazy_refcounts=on",
                       "lazy_refcounts=off", "size=2M", "data_file_raw=off"):  # fmt: skip
            if not ("refcount" in option and name in ("qext", "q1bit")):  # qemu-img takes up to 13 seconds for those
                yield f"amend -o {option} {name}"
    for line in ("", "q3", "-o compat=1.1", "-o help q3", "-f qcow2 -o help", "-f raw -o help", "-f bogus -o help",
                 "-o bogus=1 q3",
                 "-o cluster_size=4k q3", "-o extended_l2=on q3", "-o backing_file=raw q3", "-o backing_fmt=raw q3",
                 "-o preallocation=full q3", "-o compression_type=zstd q3", "-o data_file=x q3", "-o compat=bogus q3",
                 "-o refcount_bits=3 q3", "-o refcount_bits=x q3", "-o lazy_refcounts=x q3", "-o size=x q3",
                 "-o size=0 q3",
                 "-o '' q3", "-o , q3", "-o lazy_refcounts=on, q3", "-o lazy_refcounts=on -o compat=1.1 q3",
                 "-q -o size=2M q3",
                 "-p -o lazy_refcounts=on q3", "-p -o refcount_bits=8 q3", "-p -q -o lazy_refcounts=on q3",
                 "-t bogus -o size=2M q3",
                 "-t none -o size=2M q3", "-o size=2M missing", "-o size=2M directory", "-o size=2M locked",
                 "-f raw -o size=2M raw",
                 "-o size=2M raw", "-f bogus -o size=2M q3", "--force -o size=2M q3", "-o size=2M q3 q2",
                 "-o encryption=on q3",
                 "--image-opts -o size=2M driver=qcow2,file.filename=q3",
                 "--image-opts -f qcow2 -o size=2M file.filename=q3",
                 "-o state=active luks", "-f luks -o help", "-o lazy_refcounts q3", "-U -o size=2M q3",
                 "-o size=2M orphan"):  # fmt: skip
        yield f"amend {line}"


def _rebase() -> Iterator[str]:
    for name in ("over", "over2", "overraw", "q3", "orphan", "unsaid", "qext"):
        for line in ("-u -b raw -F raw", "-u -b missing -F qcow2", "-u -b ''", "-b ''", "-b q4 -F qcow2",
                     "-b raw -F raw", "-u",
                     "-b q4", "-b missing -F qcow2"):  # fmt: skip
            yield f"rebase {line} {name}"
    for line in ("", "over", "-b q3", "-b q3 -F bogus over", "-u -b q3 -F bogus over", "-f bogus -b q3 -F qcow2 over",
                 "-p -b '' over",
                 "-q -p -b '' over", "-t bogus -b '' over", "-T bogus -b '' over", "-t none -T none -b '' over",
                 "-U -b '' over",
                 "-b '' over over2", "-b q3 -F qcow2 missing", "-b q3 -F qcow2 directory", "-u -b q3 -F qcow2 raw",
                 "-b q3 -F qcow2 raw",
                 "-u -f raw -b q3 -F qcow2 raw", "-b over -F qcow2 over", "-u -b over -F qcow2 over",
                 "-u -b q3 -F qcow2 locked",
                 "-b over2 -F qcow2 over", "-b directory -F qcow2 over", "-b text -F raw over", "-c -b '' over",
                 "-b '' luks",
                 "--image-opts -b '' driver=qcow2,file.filename=over",
                 "--image-opts -f qcow2 -b '' file.filename=over"):  # fmt: skip
        yield f"rebase {line}"


def _commit() -> Iterator[str]:
    for name in ("over", "over2", "overraw", "q3", "orphan", "raw", "qext", "missing", "directory", "locked", "snap"):
        for options in ("", "-d ", "-q ", "-p "):
            yield f"commit {options}{name}"
    for line in ("", "over over2", "-b q3 over2", "-b over over2", "-b missing over2", "-b over2 over2",
                 "-d -b q3 over2", "-b raw over",
                 "-t bogus over", "-t none over", "-r x over", "-r 10M over", "-f raw over", "-f bogus over",
                 "-f qcow2 over",
                 "--image-opts driver=qcow2,file.filename=over", "--image-opts -f qcow2 file.filename=over",
                 "-b '' over", "-U over",
                 "-q -p over", "-d -q over2"):  # fmt: skip
        yield f"commit {line}"


def _bench() -> Iterator[str]:
    for name in ("raw", "q3", "qext", "over2", "missing", "directory", "empty"):
        for options in ("-c 5", "-c 5 -w", "-c 20 -d 4 -s 64k", "-c 3 -o 4k -S 128k -w --pattern=7"):
            yield f"bench {options} {name}"
    for line in ("", "q3 raw", "-c x q3", "-c -1 q3", "-d x q3", "-d 99999999999 q3", "-c 5 -f raw q3",
                 "-c 5 -f bogus q3",
                 "-c 5 --flush-interval=5 q3", "-c 5 -w --flush-interval=2 q3", "-c 8 -d 2 -w --flush-interval=2 q3",
                 "-c 8 -d 2 -w --flush-interval=2 --no-drain q3", "-w --flush-interval=x q3", "-i bogus q3",
                 "-c 5 -i threads q3",
                 "-c 5 -n q3", "-c 5 -n -t none q3", "-i native q3", "-o x q3", "-c 5 -o -1 q3", "--pattern=256 q3",
                 "--pattern=x q3",
                 "-c 0 q3", "-c 5 -q q3", "-s x q3", "-s 5G q3", "-S x q3", "-c 5 -s 100 q3", "-c 5 -s 2M q3",
                 "-c 5 -o 3M q3",
                 "-c 5 -t bogus q3", "-c 5 -t none q3", "-c 5 -U q3", "-c 5 -U -w q3", "-c 5 -w q3", "-c 5 -w -U q3",
                 "-c 5 locked",
                 "-c 5 --image-opts driver=qcow2,file.filename=q3", "-c 5 --image-opts -f qcow2 file.filename=q3",
                 "-c 17 -s 65535 q3",
                 "-c 0x5 q3", "-c 5 -s 4k -S 0 q3", "-c ''  q3", "-c 4294967296 q3"):  # fmt: skip
        yield f"bench {line}"


# -- wrong command lines -------------------------------------------------------------------------


def _syntax() -> Iterator[str]:
    yield from ("", "bogus", "-z", "--zz", "--zz info q3", "-T", "in q3", "''", "-- info q3", "INFO q3",
                "--version=1", "-", "info-",
                "compact q3", "mirror q3 new", "serve q3", "tools list", "help", "map_", "--trac", "-x info q3",
                "info.py", "--", "-T x")  # fmt: skip
    for command, working in OPERANDS.items():
        yield command
        yield f"{command} --bogus {working}"
        yield f"{command} {working} --bogus"
        yield f"{command} --bogus=1 {working}"
        yield f"{command} {working} extra words"
        yield f"{command} --image-opts=x {working}"
        yield f"{command} -- {working}"
        for option in LONG[command]:
            if option != "help":
                yield f"{command} --{option}"
                yield f"{command} {working} --{option}"
        for prefix in sorted({option[:length] for option in LONG[command] for length in (1, 2, 4)}):
            if not "help".startswith(prefix):
                yield f"{command} --{prefix} {working}"


def _letters() -> Iterator[str]:
    """Every letter as an option of every command: which there are, and which take a value."""
    for command, working in OPERANDS.items():
        for letter in SHORT:
            if letter != "h" and (command, letter) not in {("bench", "c"), ("bench", "d")}:
                yield f"{command} {working} -{letter}"


_GROUPS: Final = {
    "info": _info, "check": _check, "map": _map, "measure": _measure, "compare": _compare, "create": _create,
    "convert": _convert, "dd": _dd, "resize": _resize, "snapshot": _snapshot, "bitmap": _bitmap, "amend": _amend,
    "rebase": _rebase, "commit": _commit, "bench": _bench, "syntax": _syntax, "letters": _letters,
}  # fmt: skip
