"""Other people's NBD clients against our server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.exports.nbd.client import MIB, serving_image
from tests.peers import fio, libnbd, qemu_img
from tests.peers.process import PeerError, run

DRIVERS = pytest.mark.parametrize("driver", ["raw", "qcow2"])
SIZE = 16 * MIB


@pytest.fixture
def sparse(tmp_path: Path) -> bytes:
    """Contents with data at 0, a hole, data at 4 MiB, and a hole to the end."""
    data = bytearray(SIZE)
    data[: 128 * 1024] = os.urandom(128 * 1024)
    data[4 * MIB : 6 * MIB] = os.urandom(2 * MIB)
    return bytes(data)


@pytest.fixture
def images(tmp_path: Path, sparse: bytes) -> dict[str, str]:
    """The same sparse contents as raw and as qcow2."""
    raw = tmp_path / "a.raw"
    with open(raw, "wb") as file:
        for at in range(0, SIZE, 65536):
            if any(sparse[at : at + 65536]):
                os.pwrite(file.fileno(), sparse[at : at + 65536], at)
        file.truncate(SIZE)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(tmp_path / "a.qcow2"))
    return {"raw": str(raw), "qcow2": str(tmp_path / "a.qcow2")}


BITS = """
import hashlib
print(h.get_structured_replies_negotiated())
data = bytearray(h.pread(16 << 20, 0))
print(hashlib.sha256(data).hexdigest())
h.pwrite(b"a" * 5000, 1000000)
h.pwrite(b"b" * 10, 1002000, nbd.CMD_FLAG_FUA)
data[1000000:1005000] = b"a" * 5000
data[1002000:1002010] = b"b" * 10
assert h.pread(1 << 20, 1 << 19) == data[1 << 19:(1 << 19) + (1 << 20)]
h.zero(70000, 1000)
data[1000:71000] = bytes(70000)
h.zero(65536, 200000, nbd.CMD_FLAG_NO_HOLE)
data[200000:265536] = bytes(65536)
h.trim(65536, 8 << 20)
h.cache(4096, 0)
h.flush()
got = bytearray(h.pread(4096 * 80, 0))
assert got == data[:4096 * 80]
bufs = [nbd.Buffer(4096) for i in range(64)]
cookies = [h.aio_pread(buf, 4096 * i) for i, buf in enumerate(bufs)]
while h.aio_in_flight():
    h.poll(-1)
for i, cookie in enumerate(cookies):
    assert h.aio_command_completed(cookie)
    assert bufs[i].to_bytearray() == data[4096 * i:4096 * i + 4096]
for bad in (lambda: h.pread(512, 16 << 20), lambda: h.pwrite(bytes(512), (16 << 20) - 1)):
    try:
        bad()
        print("no error")
    except nbd.Error as error:
        print(error.errno)
print(h.pread(10, 5).hex() == bytes(data[5:15]).hex())
h.shutdown()
"""


@DRIVERS
@pytest.mark.parametrize("structured", [False, True])
def test_libnbd(sock_dir: str, images: dict[str, str], sparse: bytes, driver: str, structured: bool) -> None:
    import hashlib

    strict = "h.set_strict_mode(0)\n"  # lets requests out that the library itself would refuse
    before = strict + f"h.set_request_structured_replies({structured})"
    with serving_image(images[driver], driver, sock_dir) as served:
        said = libnbd.run_snippet(served.uri, BITS, before=before).split()
    assert said == [str(structured), hashlib.sha256(sparse).hexdigest(), "EINVAL", "ENOSPC", "True"]
    if driver == "qcow2":
        qemu_img.assert_clean(images[driver])


@DRIVERS
def test_nbdinfo(sock_dir: str, images: dict[str, str], driver: str) -> None:
    with serving_image(images[driver], driver, sock_dir) as served:
        (export,) = libnbd.info_json(served.uri)["exports"]
        (listed,) = libnbd.info_json(served.uri, "--list")["exports"]
        extents = libnbd.map_json(served.uri)
    for what in (export, listed):
        assert what["export-size"] == SIZE and what["contexts"] == ["base:allocation"]
        assert what["can_multi_conn"] and what["can_df"] and what["can_fua"] and what["can_fast_zero"]
        assert what["can_cache"] and what["can_flush"] and what["can_trim"] and what["can_zero"]
        assert not what["is_read_only"] and not what["is_rotational"]
        assert (what["block_size_minimum"], what["block_size_maximum"]) == (1, 32 * MIB)
    assert [(row["offset"], row["length"], row["type"]) for row in extents] == [
        (0, 128 * 1024, 0),
        (128 * 1024, 4 * MIB - 128 * 1024, 3),
        (4 * MIB, 2 * MIB, 0),
        (6 * MIB, SIZE - 6 * MIB, 3),
    ]


@DRIVERS
def test_qemu_img(sock_dir: str, tmp_path: Path, images: dict[str, str], sparse: bytes, driver: str) -> None:
    copy = tmp_path / "copy.raw"
    copy.write_bytes(sparse)
    with serving_image(images[driver], driver, sock_dir) as served:
        assert qemu_img.info_json(served.uri, "raw")["virtual-size"] == SIZE
        assert qemu_img.compare(served.uri, str(copy), "raw", "raw")
        rows = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", served.uri).stdout)
        assert [(row["start"], row["length"]) for row in rows if row["data"]] == [(0, 128 * 1024), (4 * MIB, 2 * MIB)]
        qemu_img.qemu_io(served.uri, "write -P 7 8M 64k", "write -z -u 4M 1M", "discard 5M 1M", "flush", fmt="raw")
        qemu_img.qemu_io(served.uri, "read -P 7 8M 64k", "read -P 0 4M 1M", fmt="raw")
        with open(copy, "r+b") as file:
            os.pwrite(file.fileno(), b"x", 3)
        assert not qemu_img.compare(served.uri, str(copy), "raw", "raw")


@DRIVERS
def test_nbdcopy_both_ways(sock_dir: str, tmp_path: Path, images: dict[str, str], sparse: bytes, driver: str) -> None:
    target = qemu_img.create(str(tmp_path / f"target.{driver}"), str(SIZE), driver)
    out = tmp_path / "out.raw"
    with serving_image(images[driver], driver, sock_dir) as served:
        libnbd.copy(served.uri, str(out))
    assert out.read_bytes() == sparse
    with serving_image(target, driver, sock_dir) as served:
        libnbd.copy(str(out), served.uri, "--flush")
    assert qemu_img.read_all(target, driver, str(tmp_path)) == sparse


@DRIVERS
@pytest.mark.parametrize("block", ["4k", "128k"])
def test_fio_verifies_through_four_connections(sock_dir: str, tmp_path: Path, driver: str, block: str) -> None:
    image = qemu_img.create(str(tmp_path / "fio"), str(SIZE), driver)
    with serving_image(image, driver, sock_dir) as served:
        (job,) = fio.verify(served.uri, size=SIZE // 4, connections=4, block=block)["jobs"]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] == job["read"]["io_bytes"] == SIZE
    if driver == "qcow2":
        qemu_img.assert_clean(image)


def test_tls_is_refused_and_said(sock_dir: str, images: dict[str, str]) -> None:
    with serving_image(images["raw"], "raw", sock_dir) as served:
        with pytest.raises(PeerError, match="TLS"):
            libnbd.run_snippet(served.uri, "", before="h.set_tls(nbd.TLS_REQUIRE)")
        assert libnbd.run_snippet(served.uri, "print(h.get_size())", before="h.set_tls(nbd.TLS_ALLOW)").strip() == str(
            SIZE
        )
