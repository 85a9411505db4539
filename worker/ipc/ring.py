"""A bounded single-producer single-consumer ring of frames in shared memory, without a lock.

Two words, counted up for ever, say how far the producer has written (head) and the consumer has read
(tail); each has one writer. A frame is written whole before the head moves over it, so a producer that
is killed at any instruction leaves either a whole frame or none. The same holds for the tail: a consumer
killed before `release` finds the frame again. (The order of the two stores relies on the processor not
reordering stores, as on x86-64; elsewhere the system call that wakes the peer is the barrier.)
"""

from collections.abc import Iterator
from struct import Struct

_LENGTH = Struct("<I")
#: Stands where a frame would not fit before the end: the next one is at the start.
_WRAP = 0xFFFFFFFF
#: An empty ring goes back to its start once past this, so that quiet rings keep few pages in memory.
_REWIND_BYTES = 256 * 1024


def _padded(length: int) -> int:
    """Frames start on 8-byte borders, so that a length never straddles the end of the ring."""
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
        """Append a frame; False when there is no room for it now.

        Raises ValueError for a frame longer than `largest`: it might never fit.
        """
        length = len(frame)
        if length > self.largest:
            raise ValueError(f"frame of {length} bytes; the ring takes at most {self.largest}")
        head, tail = self._words[self._head], self._words[self._tail]
        offset = head % self._size
        need = _padded(length)
        # Going back to the start takes up the rest of the ring, so the frame must fit into what is before.
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
        """Every frame that is there, each with the tail to `release` once it has been dealt with.

        The views point into shared memory and are valid until then.
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
        """Give the space of every frame before ``tail`` back to the producer."""
        self._words[self._tail] = tail

    def empty(self) -> bool:
        """Whether everything pushed was released."""
        return bool(self._words[self._head] == self._words[self._tail])
