"""Secrets: how they are defined, and that they show nowhere."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import diskwright
from diskwright.core.secrets import MAX_SECRET, Secret, Secrets, needed_to_open
from diskwright.errors import DiskwrightError, OptionError
from tests.cli.run import environment

HIDDEN = "h1dden-Passphrase"


def defined(**options: str) -> bytes:
    secrets = Secrets({"master": bytes(range(32))})
    secrets.add_object({"id": "s", **options})
    return secrets.reveal("s")


def test_data_file_and_base64(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"with a newline\n")
    assert defined(data="text") == b"text"
    assert defined(data="dGV4\ndA==", format="base64") == b"text"
    assert defined(file=str(tmp_path / "file")) == b"with a newline\n"


def test_an_encrypted_secret() -> None:
    vector, padded = b"v" * 16, HIDDEN.encode() + bytes([15]) * 15
    sealed = Cipher(algorithms.AES(bytes(range(32))), modes.CBC(vector)).encryptor().update(padded)
    text, iv = base64.b64encode(sealed).decode(), base64.b64encode(vector).decode()
    assert defined(data=text, format="base64", keyid="master", iv=iv) == HIDDEN.encode()
    for broken, what in (
        ({"iv": ""}, "IV should be 16 bytes"),
        ({"keyid": "nope"}, "No secret with id 'nope'"),
        ({"data": text[:-8]}, "Base64|blocks|padding"),
    ):
        with pytest.raises(OptionError, match=what):
            defined(**{"data": text, "format": "base64", "keyid": "master", "iv": iv, **broken})
    with pytest.raises(OptionError, match="IV is required"):
        defined(data=text, format="base64", keyid="master")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "Either 'file' or 'data'"),
        ({"data": "a", "file": "b"}, "mutually exclusive"),
        ({"file": "/nonexistent/file"}, "Unable to read /nonexistent/file"),
        ({"data": HIDDEN, "format": "base64"}, "Base64"),
        ({"data": HIDDEN, "format": "hex"}, "does not accept value 'hex'"),
        ({"data": HIDDEN, "foo": "x"}, "'foo' is unexpected"),
    ],
)
def test_refusals_name_the_option_not_the_secret(options: dict[str, str], what: str) -> None:
    with pytest.raises(OptionError, match=what) as caught:
        defined(**options)
    assert HIDDEN not in "".join(traceback.format_exception(caught.value))


def test_ids_are_taken_once_and_lengths_have_an_end(tmp_path: Path) -> None:
    secrets = Secrets({"a": "x"})
    with pytest.raises(OptionError, match="duplicate"):
        secrets.add("a", b"y")
    with pytest.raises(OptionError, match=str(MAX_SECRET)):
        secrets.add("b", bytes(MAX_SECRET + 1))


def test_nothing_shows_a_secret() -> None:
    secrets = Secrets({"sec0": HIDDEN})
    secret = Secret("sec0", secrets)
    assert secret.reveal() == HIDDEN.encode()
    for text in (repr(secrets), repr(secret), str(secret), f"{secret}", str(vars(type(secret)))):
        assert HIDDEN not in text
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        json.dumps({"key": secret})


def test_nothing_shows_a_secret_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    diskwright.create(path, "luks", 1 << 20, secrets={"s": HIDDEN}, **{"key-secret": "s", "iter-time": 1})
    spec = {"driver": "luks", "file.filename": str(path), "key-secret": "s"}
    disk = diskwright.open(spec, secrets={"s": HIDDEN})
    form = disk.node.format  # type: ignore[attr-defined]
    seen = [repr(disk.graph.secrets), repr(disk.node), repr(form.cipher), repr(form.info()), repr(vars(form))]
    disk.close()
    with pytest.raises(DiskwrightError) as caught:
        diskwright.open(spec, secrets={"s": HIDDEN + "x"})
    seen.append("".join(traceback.format_exception(caught.value)))
    seen.append(json.dumps(diskwright.info(path)))
    assert not [text for text in seen if HIDDEN in text] and HIDDEN.encode() not in path.read_bytes()


def test_a_command_shows_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "a.luks"
    diskwright.create(path, "luks", 1 << 20, secrets={"s": "other"}, **{"key-secret": "s", "iter-time": 1})
    image = f"driver=luks,file.filename={path},key-secret=s"
    for definition in (f"secret,id=s,data={HIDDEN}", f"secret,id=s,data={HIDDEN},=x", f"secret,id=s,data={HIDDEN},a=b"):
        done = subprocess.run(
            [sys.executable, "-m", "diskwright", "map", "--object", definition, "--image-opts", image],
            env=environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and HIDDEN not in done.stdout + done.stderr


def test_which_options_opening_takes() -> None:
    given = {"encrypt.key_secret": "a", "size": 5, "encrypt.format": "luks", "key-secret": None}
    assert needed_to_open(given) == {"encrypt.key-secret": "a"}
