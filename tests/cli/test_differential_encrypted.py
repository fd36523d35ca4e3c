"""Encrypted images beside qemu-img: what is told, texts of refusals, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import diskwright, needs_qemu, needs_same_texts, qemu_img, same

pytestmark = [needs_qemu, needs_same_texts]

SECRET = ("--object", "secret,id=sec0,data=passphrase")
WRONG = ("--object", "secret,id=sec0,data=wrong")
KINDS = {
    "luks": ("luks", "key-secret=sec0,iter-time=1"),
    "luks-essiv": ("luks", "key-secret=sec0,iter-time=1,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1"),
    "qcow2-luks": ("qcow2", "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=1"),
    "qcow2-essiv": (
        "qcow2",
        "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=1,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    ),
    "qcow2-aes": ("qcow2", "encrypt.format=aes,encrypt.key-secret=sec0,compat=0.10"),
}


def image(format: str, key: str = "sec0") -> str:
    return f"driver={format},file.filename=image,{'' if format == 'luks' else 'encrypt.'}key-secret={key}"


def build(kind: str, folder: Path) -> str:
    format, options = KINDS[kind]
    made = diskwright("create", *SECRET, "-q", "-f", format, "-o", options, "image", "1M", cwd=folder)
    assert made.code == 0, made
    return format


@pytest.mark.parametrize("kind", KINDS)
def test_info_needs_no_key(kind: str, tmp_path: Path) -> None:
    format = build(kind, tmp_path)
    same("info", "image", cwd=tmp_path)
    same("info", "-f", format, "--output=json", "image", cwd=tmp_path)
    same("info", "--output=json", "image", cwd=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_unknown_and_wrong_keys(kind: str, tmp_path: Path) -> None:
    format = build(kind, tmp_path)
    same("map", "image", cwd=tmp_path)
    same("convert", "-O", "raw", "image", "out", cwd=tmp_path)
    same("map", "--image-opts", image(format, "nope"), cwd=tmp_path)
    same("map", *SECRET, "--output=json", "--image-opts", image(format), cwd=tmp_path)
    if kind != "qcow2-aes":  # of which nobody can tell
        same("map", *WRONG, "--output=json", "--image-opts", image(format), cwd=tmp_path)
        same("convert", *WRONG, "--image-opts", "-O", "raw", image(format), "out", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["qcow2-luks", "qcow2-aes"])
def test_check(kind: str, tmp_path: Path) -> None:
    format = build(kind, tmp_path)
    same("check", *SECRET, "--image-opts", image(format), cwd=tmp_path)
    same("check", "image", cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ("-f", "luks", "new", "1M"),
        ("-f", "luks", "-o", "key-secret=nope", "new", "1M"),
        ("-f", "luks", "-o", "key-secret=sec0,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha512", "new", "1M"),
        ("-f", "luks", "-o", "key-secret=sec0,cipher-alg=cast5-128", "new", "1M"),
        ("-f", "qcow2", "-o", "encrypt.format=luks", "new", "1M"),
        ("-f", "qcow2", "-o", "encryption=on", "new", "1M"),
        ("-f", "qcow2", "-o", "encrypt.key-secret=sec0", "new", "1M"),
        ("-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=nope", "new", "1M"),
        ("-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=sec0", "new", "1M"),
    ],
)
def test_creation(words: tuple[str, ...], tmp_path: Path) -> None:
    ours = diskwright("create", *SECRET, *words, cwd=tmp_path)
    theirs = qemu_img("create", *SECRET, *words, cwd=tmp_path)
    assert (ours.code, ours.err) == (theirs.code, theirs.err)
    if ours.code == 0:
        assert ours.out == theirs.out


@pytest.mark.parametrize(
    "definition",
    ["secret,id=s", "secret,data=x", "secret,id=s,data=a,file=b", "secret,id=s,data=a,format=hex", "foo,id=s",
     "secret,id=s,data=a,bla=3", "secret,id=s,data=YWE=,format=base64,keyid=nope"],
)  # fmt: skip
def test_objects_that_cannot_be(definition: str, tmp_path: Path) -> None:
    build("luks", tmp_path)
    same("info", "--object", definition, "image", cwd=tmp_path)


def test_convert_to_encrypted_and_back(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 4096)
    for kind, (format, options) in KINDS.items():
        made = diskwright("convert", *SECRET, "-O", format, "-o", options, "source", "image", cwd=tmp_path)
        assert made.code == 0, (kind, made)
        back = qemu_img("convert", *SECRET, "--image-opts", "-O", "raw", image(format), "back", cwd=tmp_path)
        assert back.code == 0, (kind, back)
        assert (tmp_path / "back").read_bytes() == (tmp_path / "source").read_bytes()
