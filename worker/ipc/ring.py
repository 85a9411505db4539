"""Bounded single-producer single-consumer ring of frames in shared memory, without a lock.

Two words count bytes and never decrease: how far the producer has written (head) and the consumer has read
(tail). Each has one writer. The producer writes a whole frame before it moves the head over it. So a producer
that is killed at any instruction leaves either a whole frame or none. A consumer that is killed before
`release` leaves the frame for its successor.

The order of the two stores relies on a processor that does not reorder stores, such as x86-64. Elsewhere the
system call that wakes the peer is the barrier.
"""

from collections.abc import Iterator
from struct import Struct

_LENGTH = Struct("<I")
#: Written instead of a length where a frame does not fit before the end: the next frame is at the start.
_WRAP = 0xFFFFFFFF
#: An empty ring rewinds at its beginning past this offset, so that quiet rings keep few pages in memory.
_REWIND_BYTES = 256 * 1024


def _padded(length: int) -> int:
    """Bytes that a frame takes. Frames are aligned to 8 bytes, so that a length never straddles the end."""
    return (length + _LENGTH.size + 7) & ~7


class Ring:
    """One direction of a channel. ``words`` is the shared header; ``head`` and ``tail`` index into it."""

    def __init__(self, words: memoryview, head: int, tail: int, area: memoryview) -> None:
        self._words = words
        self._head = head
        self._tail = tail
        self._area = area
        self._size = len(area)
        assert self._size % 8 == 0

    @property
    def largest(self) -> int:
        """The longest frame (bytes) that always fits into an empty ring, at any position of its head."""
        return self._size // 2 - 8

    def push(self, frame: bytes) -> bool:
        """Append a frame; False if there is no room for it now.

        Raises ValueError for a frame longer than `largest`, which might never fit.
        """
        length = len(frame)
        if length > self.largest:
            raise ValueError(f"frame of {length} bytes; the ring takes at most {self.largest}")
        head, tail = self._words[self._head], self._words[self._tail]
        offset = head % self._size
        need = _padded(length)
        # A jump to the start uses up the rest of the ring, so the frame must fit before the current offset.
        rewinds = head == tail and offset > max(_REWIND_BYTES, need)
        if rewinds or offset + need > self._size:
            skipped = self._size - offset
            if head + skipped + need - tail > self._size:
                return False
            _LENGTH.pack_into(self._area, offset, _WRAP)
            head, offset = head + skipped, 0
        elif head + need - tail > self._size:
            return False
        start = offset + _LENGTH.size
        self._area[start : start + length] = frame
        _LENGTH.pack_into(self._area, offset, length)
        self._words[self._head] = head + need
        return True

    def frames(self) -> Iterator[tuple[memoryview, int]]:
        """All unreleased frames, each with the tail to pass to `release` after it was processed.

        The views point into shared memory and are valid until that `release`.
        """
        tail, head = self._words[self._tail], self._words[self._head]
        while tail < head:
            offset = tail % self._size
            (length,) = _LENGTH.unpack_from(self._area, offset)
            if length == _WRAP:
                tail += self._size - offset
                continue
            tail += _padded(length)
            start = offset + _LENGTH.size
            yield self._area[start : start + length], tail

    def release(self, tail: int) -> None:
        """Return the space of all frames before ``tail`` to the producer."""
        self._words[self._tail] = tail

    def empty(self) -> bool:
        """Whether every frame was released."""
        return bool(self._words[self._head] == self._words[self._tail])
