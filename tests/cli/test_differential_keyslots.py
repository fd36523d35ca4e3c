"""``amend`` of key slots beside ``qemu-img amend``, of LUKS images and of encrypted qcow2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.run import diskwright, needs_qemu, needs_same_texts
from tests.cli.run import qemu_img_with_keys as by_qemu

pytestmark = [needs_qemu, needs_same_texts]

SECRETS = ("--object", "secret,id=s0,data=first", "--object", "secret,id=s1,data=second")
FORMATS = {"luks": "", "qcow2": "encrypt."}

# Applied one after the other to the same image; 0 that it has to be, 1 that it is refused.
STEPS = [
    ("state=active,new-secret=s1,iter-time=10", 0, "s0"),
    ("state=active,new-secret=s1,iter-time=10,keyslot=1", 1, "s0"),
    ("state=active,new-secret=s1,iter-time=10,keyslot=8", 1, "s0"),
    ("state=active,new-secret=s0,iter-time=10,keyslot=7", 0, "s1"),
    ("state=active,keyslot=3", 1, "s0"),
    ("keyslot=3", 1, "s0"),
    ("state=active,new-secret=nope", 1, "s0"),
    ("state=active,new-secret=s1,old-secret=s0", 1, "s0"),
    ("state=inactive", 1, "s0"),
    ("state=inactive,keyslot=5", 1, "s0"),
    ("state=inactive,keyslot=0,old-secret=s1", 1, "s0"),
    ("state=inactive,keyslot=0,old-secret=s0", 0, "s1"),
    ("state=inactive,new-secret=s0,keyslot=1", 1, "s1"),
    ("state=inactive,iter-time=10,keyslot=1", 1, "s1"),
    ("state=inactive,keyslot=7", 0, "s1"),
    ("state=active,new-secret=s0,iter-time=10", 1, "s0"),  # does not open it any more
    ("state=inactive,keyslot=1", 1, "s1"),
    ("state=inactive,old-secret=s0", 1, "s1"),
    ("state=inactive,old-secret=s1", 1, "s1"),
    ("bogus=1", 1, "s1"),
    ("cipher-alg=aes-128", 1, "s1"),
]


def image(format: str, key: str) -> tuple[str, str]:
    return "--image-opts", f"driver={format},file.filename=image,{FORMATS[format]}key-secret={key}"


def built(format: str, tmp_path: Path) -> tuple[Path, Path]:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    kind = {
        "luks": "key-secret=s0,iter-time=1",
        "qcow2": "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1",
    }
    made = diskwright("create", "-q", *SECRETS, "-f", format, "-o", kind[format], "image", "1M", cwd=ours)
    assert made.code == 0, made
    shutil.copy(ours / "image", theirs / "image")
    return ours, theirs


@pytest.mark.parametrize("format", FORMATS)
def test_key_slots(format: str, tmp_path: Path) -> None:
    ours, theirs = built(format, tmp_path)
    for step, code, key in STEPS:
        change = ",".join(FORMATS[format] + word for word in step.split(","))
        words = ("amend", *SECRETS, "-o", change, *image(format, key))
        left, right = diskwright(*words, cwd=ours), by_qemu(*words, cwd=theirs)
        # One of the texts ends with a blank, which is not imitated.
        assert (left.code, left.out, left.err.rstrip()) == (right.code, right.out, right.err.rstrip()), step
        assert left.code == code, (step, left)
        for opener in ("s0", "s1"):
            words = ("map", *SECRETS, "--output=json", *image(format, opener))
            assert by_qemu(*words, cwd=ours).code == by_qemu(*words, cwd=theirs).code, (step, opener)
    if format == "qcow2":
        assert by_qemu("check", *SECRETS, *image(format, "s1"), cwd=ours).code == 0
    # Erasing the last one has to be meant.
    words = ("amend", *SECRETS, "--force", "-o", f"{FORMATS[format]}state=inactive,{FORMATS[format]}keyslot=1")
    assert diskwright(*words, *image(format, "s1"), cwd=ours).code == 0
    assert by_qemu("map", *SECRETS, *image(format, "s1"), cwd=ours).code == 1


def test_refusals_of_other_images(tmp_path: Path) -> None:
    for words in (
        ("create", "-q", "-f", "qcow2", "image", "1M"),
        ("create", "-q", *SECRETS, "-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s0", "old", "1M"),
    ):
        assert diskwright(*words, cwd=tmp_path).code == 0
    active = "encrypt.state=active,encrypt.new-secret=s1"
    for words in (
        ("-o", active, "-f", "qcow2", "image"),
        ("-o", "encrypt.keyslot=1", "image"),
        ("-o", "encrypt.format=luks", "image"),
        ("-o", "encryption=on", "image"),
        ("-o", active, "--image-opts", "driver=qcow2,file.filename=old,encrypt.key-secret=s0"),
        ("-o", active, "-f", "qcow2", "old"),
    ):
        left = diskwright("amend", *SECRETS, *words, cwd=tmp_path)
        right = by_qemu("amend", *SECRETS, *words, cwd=tmp_path)
        assert (left.code, left.out, left.err) == (right.code, right.out, right.err), words


def test_with_other_changes(tmp_path: Path) -> None:
    ours, _ = built("qcow2", tmp_path)
    change = "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=1,lazy_refcounts=on,size=2M,refcount_bits=64"
    assert diskwright("amend", *SECRETS, "-o", change, *image("qcow2", "s0"), cwd=ours).code == 0
    assert by_qemu("check", *SECRETS, *image("qcow2", "s1"), cwd=ours).code == 0
    told = by_qemu("info", *SECRETS, *image("qcow2", "s1"), cwd=ours).out
    assert "2 MiB" in told and "refcount bits: 64" in told and "lazy refcounts: true" in told
