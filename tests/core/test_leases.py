"""Leases and quarantine: nothing comes back while somebody may still be reading it."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from diskwright.core.leases import Leases, Quarantine


class LeaseMachine(RuleBasedStateMachine):
    """The model keeps, for each thing given up, the leases held at that moment."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.leases = Leases()
        self.quarantine: Quarantine[int] = Quarantine(self.leases)
        self.active: set[int] = set()
        self.waiting: list[tuple[int, set[int]]] = []
        self.serial = 0

    @rule(target=held)
    def take(self) -> tuple[int, int]:
        self.serial += 1
        self.active.add(self.serial)
        return self.serial, self.leases.take()

    @rule(lease=consumes(held))
    def end(self, lease: tuple[int, int]) -> None:
        self.leases.end(lease[1])
        self.active.discard(lease[0])

    @rule(count=st.integers(1, 3))
    def put(self, count: int) -> None:
        for _ in range(count):
            self.serial += 1
            self.quarantine.put(self.serial)
            self.waiting.append((self.serial, set(self.active)))

    @rule()
    def take_passed(self) -> None:
        freed = self.quarantine.take_passed()
        expected = []
        # In order: a thing waits for those given up before it too.
        while self.waiting and not self.waiting[0][1] & self.active:
            expected.append(self.waiting.pop(0)[0])
        assert freed == expected
        assert len(self.quarantine) == len(self.waiting)


TestLeases = LeaseMachine.TestCase


def test_held_ends_the_lease_when_its_body_raises() -> None:
    leases = Leases()
    try:
        with leases.held():
            epoch = leases.close_epoch()
            assert not leases.passed(epoch)
            raise RuntimeError
    except RuntimeError:
        pass
    assert leases.passed(epoch)
