"""A server or an image that holds other bytes than were written is found out."""

from __future__ import annotations

import os

import pytest
from bench.client import ServerError
from bench.expected import Expected, WrongData
from bench.load import BLOCK, PAYLOAD, Workload

from tests.bench.nbd_server import TinyServer, disk_of

SIZE = 4 << 20
WORK = Workload(write=True, block=2 * BLOCK, depth=4, sequential=False, size=SIZE, seed=3)


@pytest.fixture
def reference(sock_dir: str) -> str:
    return os.path.join(sock_dir, "reference")


def test_what_was_written_lies_over_the_reference(reference: str) -> None:
    disk = disk_of(reference, SIZE)
    expected = Expected(SIZE, reference)
    expected.mark(WORK, 5)
    for offset in WORK.offsets()[:5]:
        disk[offset : offset + WORK.block] = PAYLOAD * 2
    assert expected.read(0, SIZE) == disk
    assert expected.read(1000, 70001) == disk[1000:71001]
    assert len(expected.written()) == len({offset // BLOCK + i for offset in WORK.offsets()[:5] for i in (0, 1)})
    assert Expected(SIZE, None).read(512, 100) == bytes(100)


def test_a_raw_image_with_one_wrong_byte(reference: str) -> None:
    disk = disk_of(reference, SIZE)
    expected = Expected(SIZE, reference)
    expected.check_image(reference, "raw")
    image = reference + ".image"
    disk[3_000_001] ^= 1
    with open(image, "wb") as file:
        file.write(disk)
    with pytest.raises(WrongData, match="offset 3000001"):
        expected.check_image(image, "raw")
    with open(image, "wb") as file:
        file.write(disk[: SIZE - 512])
    with pytest.raises(WrongData):
        expected.check_image(image, "raw")


def test_a_right_server_passes_and_its_writes_are_expected_from_then_on(sock_dir: str, reference: str) -> None:
    disk, expected = disk_of(reference, SIZE), Expected(SIZE, reference)
    for structured in (False, True):
        path = os.path.join(sock_dir, f"s{structured}")
        with TinyServer(path, disk) as server:
            expected.check_server(path, structured=structured)
            expected.check_written(path)
        assert server.disk == expected.read(0, SIZE)
    assert expected.written()


@pytest.mark.parametrize("fault", ["spoil_at", "lose_at"])
def test_a_wrong_server_does_not(sock_dir: str, reference: str, fault: str) -> None:
    number = 50 if fault == "spoil_at" else 450  # among the first reads; among the writes
    path = os.path.join(sock_dir, "s")
    with TinyServer(path, disk_of(reference, SIZE), **{fault: number}), pytest.raises(WrongData):
        Expected(SIZE, reference).check_server(path)


def test_a_failing_server_does_not_either(sock_dir: str, reference: str) -> None:
    path = os.path.join(sock_dir, "s")
    with TinyServer(path, disk_of(reference, SIZE), fail_at=10), pytest.raises(ServerError):
        Expected(SIZE, reference).check_server(path)
