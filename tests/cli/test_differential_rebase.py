"""``rebase`` beside ``qemu-img rebase``: texts, exit codes, and what the images are afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.chains import THREE, alike, both, twice
from tests.cli.run import diskwright, make, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

NEW = (
    "qemu-img create -q -f qcow2 new 2560k",
    "qemu-io -f qcow2 -c write~-P~2~64k~128k -c write~-P~9~320k~64k -c write~-P~9~2112k~64k new",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-b", "base", "-F", "qcow2"),
        ("-b", "new", "-F", "qcow2"),
        ("-b", "mid", "-F", "qcow2"),
        ("-b", ""),
        ("-u", "-b", "base", "-F", "qcow2"),
        ("-u", "-b", "gone", "-F", "raw"),
        ("-u", "-b", ""),
        ("-u",),
        ("-u", "-F", "qcow2"),
        ("-q", "-f", "qcow2", "-t", "none", "-T", "none", "-b", "new", "-F", "qcow2"),
        ("-U", "-b", "base", "-F", "qcow2"),
    ],
)
def test_images_are_the_same_afterwards(arguments: tuple[str, ...], tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE, *NEW)
    before = _content(where[0])
    both(where, "rebase", *arguments, "top")
    if "gone" in arguments:
        same_info = [qemu_img("info", "top", cwd=directory).out.splitlines()[4:] for directory in where]
        assert same_info[0] == same_info[1]
        return
    alike(where, "top", maps="new" not in arguments)
    if "-u" not in arguments:
        assert _content(where[0]) == before


def _content(where: Path) -> bytes:
    assert qemu_img("convert", "-O", "raw", "top", "content", cwd=where).code == 0
    return (where / "content").read_bytes()


def test_one_after_the_other(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE, *NEW)
    before = _content(where[0])
    for backing in ("new", "base", "base", "", "mid", "new", ""):
        both(where, "rebase", "-b", backing, *(("-F", "qcow2") if backing else ()), "top")
        assert _content(where[0]) == before
        assert qemu_img("check", "top", cwd=where[0]).code == 0
        alike(where, "top", maps=False)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("top",),
        ("-b", "new", "top", "mid"),
        ("-b", "new", "top"),
        ("-u", "-b", "new", "top"),
        ("-b", "gone", "-F", "qcow2", "top"),
        ("-b", "new", "-F", "nonesuch", "top"),
        ("-u", "-b", "new", "-F", "nonesuch", "top"),
        ("-b", "new", "-F", "qcow2", "-t", "bogus", "top"),
        ("-b", "new", "-F", "qcow2", "-T", "bogus", "top"),
        ("-F", "qcow2", "top"),
        ("-f", "raw", "-b", "new", "-F", "qcow2", "raw"),
        ("-u", "-f", "raw", "-b", "new", "-F", "qcow2", "raw"),
        ("-b", "top", "-F", "qcow2", "top"),
        ("-b", "new", "gone"),
        ("-u", "-b", "new", "-c", "top"),
        ("--image-opts", "-f", "qcow2", "-b", "new", "driver=qcow2,file.filename=top"),
        ("--image-opts", "-b", "new", "driver=qcow2,file.filename=top"),
    ],
)
def test_refusals(arguments: tuple[str, ...], tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE, *NEW, "qemu-img create -q -f raw raw 1M")
    before = (where[0] / "top").read_bytes()
    # Of a wrong command line the second line differs: it points to the command's own help.
    usage = (
        not arguments
        or ("new" not in arguments and "gone" not in arguments and "top" in arguments[-1:])
        or ("-c" in arguments or "mid" in arguments)
    )
    assert both(where, "rebase", *arguments, err=not usage).code == 1
    assert (where[0] / "top").read_bytes() == before


def test_old_backing_file_is_gone(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE, *NEW, "qemu-img rebase -u -b gone -F qcow2 top")
    assert both(where, "rebase", "-b", "new", "-F", "qcow2", "top").code == 1
    both(where, "rebase", "-u", "-b", "mid", "-F", "qcow2", "top")
    alike(where, "top")


def test_names_are_seen_from_the_image(tmp_path: Path) -> None:
    where = twice(
        tmp_path,
        "mkdir sub",
        "qemu-img create -q -f qcow2 sub/base 1M",
        "qemu-img create -q -f qcow2 -b base -F qcow2 sub/top",
        "qemu-img create -q -f raw sub/new 1M",
        "qemu-io -f raw -c write~0~64k sub/new",
    )
    both(where, "rebase", "-b", "gone", "-F", "raw", "sub/top")
    both(where, "rebase", "-b", "new", "-F", "raw", "sub/top")
    alike(where, "sub/top", maps=False)
    assert diskwright("info", "--backing-chain", "sub/top", cwd=where[0]).out.count("image: ") == 2


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"sub/base"}}',
        "file:base",
        "file:sub/base",
        "./x:y",
        "x:y",
        "/nowhere/at/all",
        "../sub/base",
        "link",
        "top",
    ],
)
def test_names_of_all_kinds(name: str, tmp_path: Path) -> None:
    where = twice(
        tmp_path,
        "mkdir sub",
        "qemu-img create -q -f qcow2 sub/base 1M",
        "qemu-img create -q -f qcow2 -b base -F qcow2 sub/top",
        "ln -s ../sub/base sub/link",
    )
    both(where, "rebase", "-u", "-b", name, "-F", "raw" if "raw" in name else "qcow2", "sub/top")
    directory = where[0]
    for words in (("info",), ("info", "--output=json"), ("info", "--backing-chain"),
                  ("info", "--backing-chain", "--output=json")):  # fmt: skip
        same(*words, "sub/top", cwd=directory)
        same(*words, "file:sub/top", cwd=directory)
        same(*words, 'json:{"driver":"qcow2","file":{"driver":"file","filename":"sub/top"}}', cwd=directory)
        same(*words, "--image-opts", "driver=qcow2,file.filename=sub/top", cwd=directory)
    if name != "top":  # qemu-img never comes to an end there
        same("map", "--output=json", "sub/top", cwd=directory)
    without = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"sub/top"},"backing":null}'
    same("map", "--output=json", without, cwd=directory)


def test_a_link_to_the_image_does_not_move_its_backing_file(tmp_path: Path) -> None:
    where = twice(
        tmp_path,
        "mkdir sub",
        "qemu-img create -q -f qcow2 sub/base 1M",
        "qemu-img create -q -f qcow2 -b base -F qcow2 sub/top",
        "ln -s sub/top link",
    )
    same("info", "link", cwd=where[0])
    same("info", "--backing-chain", "link", cwd=where[0])
    same("map", "link", cwd=where[0])


def test_progress(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE, *NEW)
    ours = diskwright("rebase", "-p", "-b", "new", "-F", "qcow2", "top", cwd=where[0])
    theirs = qemu_img("rebase", "-p", "-b", "new", "-F", "qcow2", "top", cwd=where[1])
    assert ours.code == theirs.code == 0
    assert ours.out.startswith("    (0.00/100%)\r") and theirs.out.startswith("    (0.00/100%)\r")
    assert ours.out.endswith("    (100.00/100%)\r\n") and theirs.out.endswith("    (100.00/100%)\r\n")


def test_the_gate_holds_for_the_chain_and_not_for_what_the_user_names(tmp_path: Path) -> None:
    where = twice(tmp_path, *THREE, *NEW)
    ours = diskwright("rebase", "--gate=closed", "-b", "new", "-F", "qcow2", "top", cwd=where[0])
    assert ours.code == 1 and "references are not followed" in ours.err
    both(where, "rebase", "-b", "", "top")
    assert diskwright("rebase", "--gate=closed", "-b", "new", "-F", "qcow2", "top", cwd=where[0]).code == 0


def test_chains_as_long_as_the_limit(tmp_path: Path) -> None:
    from diskwright.units import MAX_CHAIN

    _long_chain(tmp_path, MAX_CHAIN)
    name = f"i{MAX_CHAIN - 1}"
    assert diskwright("info", "--backing-chain", name, cwd=tmp_path).out.count("image: ") == MAX_CHAIN
    found = diskwright("map", "--output=json", name, cwd=tmp_path)
    assert f'"depth": {MAX_CHAIN - 1}' in found.out
    assert found.out == qemu_img("map", "--output=json", name, cwd=tmp_path).out
    assert diskwright("rebase", "-b", "i5", "-F", "qcow2", name, cwd=tmp_path).code == 0
    assert qemu_img("compare", name, "i0", cwd=tmp_path).code == 0
    _link(tmp_path, MAX_CHAIN - 1)
    name = f"i{MAX_CHAIN}"
    make(tmp_path, f"qemu-img create -q -u -f qcow2 -b i{MAX_CHAIN - 1} -F qcow2 {name} 64k")
    for words in (("map", name), ("info", "--backing-chain", name), ("commit", name)):
        ours = diskwright(*words, cwd=tmp_path)
        assert ours.code == 1 and f"longer than {MAX_CHAIN} images" in ours.err


def _long_chain(directory: Path, length: int) -> None:
    make(directory, "qemu-img create -q -f qcow2 -o cluster_size=512 i0 64k", "qemu-io -c write~-P~7~0~20k i0")
    for number in range(1, length):
        _link(directory, number)


def _link(directory: Path, number: int) -> None:
    from diskwright.core.create import create_image

    options = {"size": 65536, "cluster_size": 512, "backing_file": f"i{number - 1}", "backing_fmt": "qcow2"}
    create_image(str(directory / f"i{number}"), "qcow2", options, check_backing=False)
