"""Crashes in the midst of qcow2 operations."""

from __future__ import annotations

import random

import pytest

from tests.crash.workload import Workload
from tests.formats.qcow2.support import LONG, created

CASES = {
    "512": {"size": 96 << 10, "cluster_size": 512},
    "4k": {"size": 512 << 10, "cluster_size": 4096},
    "4k refcounts of a bit": {"size": 512 << 10, "cluster_size": 4096, "refcount_bits": 1},
    "64k version 2": {"size": 2 << 20, "cluster_size": 65536, "compat": "0.10"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(60 if LONG else 1))
def test_everything_a_guest_does(case: str, seed: int) -> None:
    chance = random.Random(f"{case} {seed}")
    with Workload(created(**CASES[case])) as work:
        work.play(chance, 60)
    work.verify(chance, most=0 if LONG else 60, each=3 if LONG else 2)


@pytest.mark.parametrize("seed", range(60 if LONG else 2))
def test_resize(seed: int) -> None:
    chance = random.Random(seed)
    with Workload(created(size=64 << 10, cluster_size=512)) as work:
        work.play(chance, 20)
        work.resize(300 << 10)
        work.play(chance, 20, actions="wwwzdfg")
        work.flush()
        work.resize(40 << 10)
        work.play(chance, 10)
    work.verify(chance, most=0 if LONG else 80, each=2)
