"""Lock file of an instance: one holder, a list of its predecessors, and no trace of a password."""

import stat
from contextlib import closing
from pathlib import Path

from jobworker.worker.settings import Settings
from jobworker.worker.supervision.instance import InstanceLock

URL = "redis://:correct-horse@store:6379/0"


def lock(folder: Path, url: str = URL, instance: str = "one") -> InstanceLock:
    return InstanceLock(Settings(data_dir=str(folder), redis_url=url, instance=instance, host="h"))


def test_a_second_service_does_not_get_the_lock_and_sees_the_holder(tmp_path: Path) -> None:
    with closing(lock(tmp_path)) as first, closing(lock(tmp_path)) as second:
        assert first.try_lock()
        first.record_start()
        assert not second.try_lock()
        assert second.holder_pid() > 1


def test_other_instances_and_stores_have_separate_locks(tmp_path: Path) -> None:
    others = [lock(tmp_path), lock(tmp_path, instance="two"), lock(tmp_path, "redis://store:6379/1")]
    assert [one.try_lock() for one in others] == [True, True, True]
    for one in others:
        one.close()


def test_every_earlier_start_is_a_predecessor(tmp_path: Path) -> None:
    tokens = []
    for _ in range(20):
        with closing(lock(tmp_path)) as one:
            assert one.try_lock()
            holder = one.record_start()
        assert list(holder.predecessors) == tokens[-16:]
        assert holder.token not in tokens
        tokens.append(holder.token)


def test_a_damaged_file_gives_no_predecessors_and_no_error(tmp_path: Path) -> None:
    with closing(lock(tmp_path)) as one:
        (path,) = tmp_path.iterdir()
        path.write_bytes(b"\xff\xfe not a start\nx\n\n" * 100)
        assert one.try_lock()
        assert one.holder_pid() == 0
        assert one.record_start().predecessors == ()


def test_the_file_is_private_and_its_name_does_not_depend_on_the_password(tmp_path: Path) -> None:
    names = set()
    for url in (
        URL,
        "redis://store:6379/0",
        "redis://user:other@store:6379/0",
        "redis://store:6379/0?password=x",
    ):
        with closing(lock(tmp_path, url)):
            names |= {path.name for path in tmp_path.iterdir()}
    (name,) = names
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
