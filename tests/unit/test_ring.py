"""The ring: frames come out whole and in order whichever side is killed; an empty ring takes any frame."""

import random
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobworker.worker.ipc import ring as ring_module
from jobworker.worker.ipc.ring import Ring
from support import programs

HEAD, TAIL = 0, 1
#: Without the phase that explains a failure: it takes minutes for a machine of this size.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)


def make(size: int) -> Ring:
    return Ring(memoryview(bytearray(16)).cast("Q"), HEAD, TAIL, memoryview(bytearray(size)))


def take(ring: Ring, count: int | None = None) -> list[bytes]:
    """Take and release the oldest ``count`` frames."""
    taken = []
    for frame, tail in ring.frames():
        if len(taken) == count:
            break
        taken.append(bytes(frame))
        ring.release(tail)
    return taken


@pytest.fixture
def rewinds_early() -> Iterator[None]:
    before, ring_module._REWIND_BYTES = ring_module._REWIND_BYTES, 128
    yield
    ring_module._REWIND_BYTES = before


class RingAgainstDeque(RuleBasedStateMachine):
    """Both ends in one process; the real ring is as small as the sizes here make interesting."""

    @initialize(size=st.integers(4, 128).map(lambda n: 8 * n), rewind=st.sampled_from([0, 64, 512, 1 << 20]))
    def start(self, size: int, rewind: int) -> None:
        self.before, ring_module._REWIND_BYTES = ring_module._REWIND_BYTES, rewind
        self.ring = make(size)
        self.model: deque[bytes] = deque()

    def teardown(self) -> None:
        if hasattr(self, "before"):
            ring_module._REWIND_BYTES = self.before

    @rule(share=st.floats(0, 1), fill=st.integers(0, 255))
    def push(self, share: float, fill: int) -> None:
        frame = bytes([fill]) * int(share * self.ring.largest)
        if self.ring.push(frame):
            self.model.append(frame)
        else:
            assert self.model, "an empty ring refused a frame"

    @rule(count=st.integers(0, 5))
    def take(self, count: int) -> None:
        expected = [self.model.popleft() for _ in range(min(count, len(self.model)))]
        assert take(self.ring, count) == expected

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def release_several_at_once(self, data: st.DataObject) -> None:
        tails = [tail for _, tail in self.ring.frames()]
        count = data.draw(st.integers(1, len(tails)))
        self.ring.release(tails[count - 1])
        for _ in range(count):
            self.model.popleft()

    @rule()
    def look(self) -> None:
        assert [bytes(frame) for frame, _ in self.ring.frames()] == list(self.model)

    @rule()
    def too_long(self) -> None:
        with pytest.raises(ValueError, match="the ring takes at most"):
            self.ring.push(bytes(self.ring.largest + 1))

    @invariant()
    def empty_when_all_was_taken(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.empty() == (not self.model)


TestRingAgainstDeque = RingAgainstDeque.TestCase
TestRingAgainstDeque.settings = settings(max_examples=120, stateful_step_count=40, phases=PHASES)


def test_an_empty_ring_takes_the_largest_frame_wherever_its_head_stands() -> None:
    size = 2 * 1024 * 1024
    for offset in range(0, size, size // 37):
        ring = make(size)
        for part in (offset // 2, offset - offset // 2):
            assert ring.push(bytes(max(0, part - 16)))
            take(ring)
        assert ring.push(b"x" * ring.largest), f"stuck with its head near {offset}"
        assert take(ring) == [b"x" * ring.largest]


def test_a_quiet_ring_stays_in_its_first_pages() -> None:
    size, furthest = 16 * 1024 * 1024, 0
    ring = make(size)
    for _ in range(2000):
        assert ring.push(bytes(4096))
        take(ring)
        furthest = max(furthest, ring._words[HEAD] % size)
    assert ring._words[HEAD] > size, "it never came round"
    assert furthest < 512 * 1024


def test_a_full_ring_takes_the_frame_again_once_there_is_room(rewinds_early: None) -> None:
    ring = make(1024)
    frames = [bytes([i]) * 200 for i in range(20)]
    waiting, taken = deque(frames), []
    while waiting:
        if ring.push(waiting[0]):
            waiting.popleft()
        else:
            taken += take(ring, 1)
    assert taken + take(ring) == frames


@pytest.mark.parametrize("name", ["push_plain", "push_wrapping", "push_rewinding", "push_full", "release"])
def test_killed_at_any_instruction(name: str) -> None:
    assert int(programs.run("kill_scenarios", name)) > 50


@pytest.mark.parametrize("who_is_killed", ["none", "producer", "consumer"])
def test_two_processes(who_is_killed: str) -> None:
    seed = str(random.randrange(10**6))
    mode = "both" if who_is_killed == "none" else who_is_killed
    frames = int(programs.run("ring_streams", mode, seed))  # a failure shows the command, so the seed
    assert frames >= (100_000 if mode == "both" else 1)
