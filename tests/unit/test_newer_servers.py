"""Newer commands of the store: used where the server has them, never required. Against a stub on the wire."""

import itertools

import pytest

from jobworker.worker.errors import StoreUnavailable
from jobworker.worker.keys import Source
from jobworker.worker.store.redis.features import features_of
from jobworker.worker.store.redis.producer import RedisProducerStore
from jobworker.worker.store.redis.reader import RedisReaderStore
from support.redis_stub import bulk, redis_stub

STREAM = "jobs"


class Added:
    """A stream of the stub: the answer of the first XADD is lost after it was carried out."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[bytes, ...], bytes] = {}
        self._numbers = itertools.count(1)

    def answer(self, command: list[bytes]) -> bytes | None:
        number = next(self._numbers)
        key = tuple(command[3:5]) if command[2] == b"IDMP" else (b"%d" % number,)
        entry_id = self.by_key.setdefault(key, b"%d-0" % number)
        return None if number == 1 else bulk(entry_id)


def test_a_job_whose_answer_was_lost_is_sent_again_and_is_there_once() -> None:
    added = Added()
    with redis_stub("8.6.0", added.answer) as stub:
        store = RedisProducerStore(stub.url)
        assert store.add(STREAM, [b"one"]) == 1
        assert store.add(STREAM, [b"two", b"three"]) == 2
        store.close()
    assert len(stub.seen) == 4, "the first one twice"
    assert len(added.by_key) == 3


@pytest.mark.parametrize("version", ["7.0.15", "8.4.1", "valkey"])
def test_an_older_server_gets_a_job_once_and_the_caller_learns_of_the_lost_answer(version: str) -> None:
    with redis_stub(version, Added().answer) as stub:
        store = RedisProducerStore(stub.url)
        with pytest.raises(StoreUnavailable):
            store.add(STREAM, [b"one"])
        store.close()
    assert stub.seen == [[b"XADD", b"jobs", b"*", b"data", b"one"]]


def test_more_jobs_than_the_server_remembers_are_not_sent_again() -> None:
    with redis_stub("8.8.0", Added().answer) as stub:
        store = RedisProducerStore(stub.url)
        with pytest.raises(StoreUnavailable):
            store.add(STREAM, [b"%d" % number for number in range(101)])
        store.close()
    assert not any(b"IDMP" in command for command in stub.seen)


@pytest.mark.parametrize(("version", "limits"), [("8.10.1", True), ("8.8.0", False), ("valkey", False)])
def test_the_server_limits_the_bytes_of_a_read_where_it_can(version: str, limits: bool) -> None:
    with redis_stub(version, lambda command: b"*-1\r\n") as stub:
        store = RedisReaderStore(stub.url, "host/one")
        store.begin_read(Source(STREAM, "workers"), 10, 1)
        assert store.finish_read(Source(STREAM, "workers")) == []
        store.close()
    (command,) = stub.seen
    assert (b"MAXSIZE" in command) == limits
    assert command[-3:] == [b"STREAMS", b"jobs", b">"]


def test_the_features_by_version() -> None:
    assert features_of(b"redis_version:8.6.0\r\n").names == ["XADD IDMP"]
    assert features_of(b"redis_version:9.0.0\r\n").names == ["XADD IDMP", "XREADGROUP MAXSIZE"]
    assert features_of(b"redis_version:7.2.4\r\nvalkey_version:9.1.2\r\n").names == []
    assert features_of(b"").names == [], "this user may not run INFO"
