"""The kernel's NBD device, as far as it can be tried without one: what the kernel would be told, and when."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from struct import pack, unpack
from typing import Any

import pytest

from diskwright.cli.common import Failure
from diskwright.cli.qnbd import device
from tests.exports.nbd.client import MIB, Medium, serving_medium


class Kernel:
    """Records ioctls; ``DO_IT`` reads the export's first bytes over the socket it was given, as the kernel would."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.data = b""
        self.fail = 0

    def ioctl(self, descriptor: int, request: int, value: int = 0) -> int:
        self.calls.append((request, value))
        if request == self.fail:
            raise OSError(22, "Invalid argument")
        if request == device.SET_SOCK:
            self._sock = socket.socket(fileno=os.dup(value))
        if request == device.DO_IT:
            with self._sock as sock:
                sock.sendall(pack(">IHHQQI", 0x25609513, 0, 0, 7, 512, 8))
                assert unpack(">IIQ", sock.recv(16, socket.MSG_WAITALL)) == (0x67446698, 0, 7)
                self.data = sock.recv(8, socket.MSG_WAITALL)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()

    class Fcntl:
        ioctl = staticmethod(made.ioctl)

    monkeypatch.setattr(device, "fcntl", Fcntl)
    return made


def test_a_device_becomes_an_export(kernel: Kernel, sock_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "nbd0"
    path.touch()
    medium = Medium(MIB)
    medium.data[512:520] = b"contents"
    with serving_medium(medium, sock_dir) as served:
        made = device.Device(str(path))
        made.attach(served.path, "")
        made.run()
        made.close()
    assert kernel.data == b"contents"
    requests: dict[int, Any] = dict(kernel.calls)
    assert (requests[device.SET_BLKSIZE], requests[device.SET_SIZE_BLOCKS]) == (512, MIB // 512)
    assert requests[device.SET_FLAGS] & 1
    assert [request for request, _ in kernel.calls][-3:] == [device.DO_IT, device.CLEAR_QUE, device.CLEAR_SOCK]


@pytest.mark.parametrize("size, fail, match", [(1000, 0, "no whole sectors"), (MIB, device.SET_SOCK, "Failed to set")])
def test_what_cannot_be_a_device(
    kernel: Kernel, sock_dir: str, tmp_path: Path, size: int, fail: int, match: str
) -> None:
    path = tmp_path / "nbd0"
    path.touch()
    kernel.fail = fail
    with serving_medium(Medium(size), sock_dir) as served:
        made = device.Device(str(path))
        with pytest.raises(Failure, match=match):
            made.attach(served.path, "")
        made.close()
    assert device.DO_IT not in dict(kernel.calls)


def test_disconnecting(kernel: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nbd0"
    path.touch()
    assert device.disconnect(str(path)) == 0
    assert [request for request, _ in kernel.calls] == [device.CLEAR_QUE, device.DISCONNECT, device.CLEAR_SOCK]
    assert capsys.readouterr().out == f"{path} disconnected\n"
    kernel.fail = device.DISCONNECT
    with pytest.raises(Failure, match="Cannot disconnect"):
        device.disconnect(str(path))
    with pytest.raises(Failure, match="Cannot open"):
        device.disconnect(str(tmp_path / "other"))
