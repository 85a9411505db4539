"""Import and export of books: lines, segments, jobs; an importer that is killed sends each job once."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.handlers.book.book_file import open_book
from jobworker.handlers.book.cutter import segments
from jobworker.handlers.book.importer import Importer, ImportStopped, Pace
from jobworker.handlers.book.jobs import BookJob, RejectedLine, Target, jobs_of, segment_id
from jobworker.handlers.book.lines import Chapter, Fault, Piece, RowLine, read_json_lines, read_text
from jobworker.worker import ConfigurationError, OpenBatch, Producer, StoreUnavailable
from jobworker.worker.store.batches import Added
from jobworker.worker.store.memory.server import MemoryServer
from jobworker.worker.store.memory.store import MemoryStore

STREAM = "stream:story:gen"
TARGET = Target("t1", "p1")


def pieces(data: bytes, read: Callable[[Any], Iterator[Any]] = read_json_lines) -> list[Piece]:
    return [one.piece for one in read(io.BytesIO(data))]


def chapter_lines(count: int, text: str = "It rained.") -> bytes:
    return b"".join(
        json.dumps({"chapter_id": f"c{n}", "text": f"{n} {text}"}).encode() + b"\n" for n in range(count)
    )


# -- lines


def test_wrong_lines_are_named_and_the_others_read() -> None:
    good = b'\xef\xbb\xbf{"chapter_id": "c1", "text": "a", "unknown": 1}'
    wrong = [
        b"not JSON", b"[1]", b'{"chapter_id": "c 1", "text": "a"}', b'{"chapter_id": "c1"}', b'{"text": "a"}',
        b'{"chapter_id": "c1", "text": " "}', b'{"chapter_id": "c1", "text": "\\ud800 b"}',
        b'{"chapter_id": "c1", "text": "\xff"}', b'{"chapter_id": "c1", "text": "a", "version": 1.5}',
        b'{"chapter_id": "c1", "text": "a", "story_time": 9223372036854775808}',
        b'{"chapter_id": "c1", "text": "a", "segment_type": "' + "场".encode() * 11 + b'"}',
    ]  # fmt: skip
    row = b'{"id": "r1", "text": "b", "chapter_id": "", "version": 0, "vector": [1.0]}'
    found = pieces(b"\n".join([good, b"", *wrong, row]))
    assert found[0] == Chapter(1, "c1", "", "a", "", 0, None)
    assert [one.line for one in found if isinstance(one, Fault)] == list(range(3, 3 + len(wrong)))
    assert found[-1] == RowLine(3 + len(wrong), "r1", "b", "", "", 0, 0)


def test_a_line_that_is_too_long_is_passed_over_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobworker.handlers.book.lines.MAX_LINE_BYTES", 60)
    data = b'{"chapter_id": "c1", "text": "a"}\n' + b"x" * 1000 + b'\n{"chapter_id": "c2", "text": "b"}'
    found = list(read_json_lines(io.BytesIO(data)))
    assert [type(one.piece) for one in found] == [Chapter, Fault, Chapter]
    assert found[1].raw == b""
    assert [one.offset for one in found] == [34, 34 + 1001, len(data)]


def test_headings_divide_a_plain_text() -> None:
    novel = (
        "Preface\n\nContents\n第一章\n第二章 雨\n\n第一章\n　　下雨了。\n  第 十二 回 归来\n他回来了。\n"
        "Chapter Twenty-One: The Lamp\nIt burned.\nChapter houses are old, and no heading.\nEnd\n"
    )
    found = pieces(novel.encode(), read_text)
    assert [(one.chapter_id, one.title) for one in found if isinstance(one, Chapter)] == [
        ("c0", ""), ("c1", "第一章"), ("c2", "第 十二 回 归来"), ("c3", "Chapter Twenty-One: The Lamp"),
    ]  # fmt: skip
    assert isinstance(found[-1], Chapter)
    assert "no heading" in found[-1].text
    (fault,) = pieces("第一章\n".encode() + "你".encode("gbk"), read_text)
    assert isinstance(fault, Fault)
    assert fault.line == 2


def test_a_file_in_another_encoding_is_named() -> None:
    for data in ("It rained.\n".encode("utf-16-le"), "下雨了。".encode("gbk")):
        faults = pieces(data, read_text)
        assert faults
        assert all(isinstance(one, Fault) and "iconv" in one.reason for one in faults)
    (fault,) = pieces('{"chapter_id": "c1", "text": "下雨了。"}'.encode("gbk"))
    assert isinstance(fault, Fault)
    assert "iconv" in fault.reason


# -- segments


@given(st.text(alphabet="a 。.\n，你e\u0301\u3000", max_size=300), st.integers(1, 40))
def test_segments_hold_the_whole_text_and_fit(text: str, limit: int) -> None:
    found = list(segments(text, limit))
    assert all(one == one.strip() and one for one in found)
    assert all(len(one) <= limit for one in found)
    assert "".join("".join(found).split()) == "".join(text.split())


def test_segments_begin_at_paragraphs_and_end_at_sentences() -> None:
    text = "　　第一段。\n\n短。\n" + "一句很长的话。" * 10 + "\n尾巴。"
    found = list(segments(text, 30))
    assert found[0] == "第一段。\n短。"
    assert found[1:] == ["一句很长的话。" * 4, "一句很长的话。" * 4, "一句很长的话。" * 2 + "\n尾巴。"]


# -- jobs


def made(data: bytes, target: Target = TARGET) -> list[BookJob | RejectedLine]:
    return list(jobs_of(read_json_lines(io.BytesIO(data)), target))


def payloads(data: bytes, target: Target = TARGET) -> list[Any]:
    return [one.job.payload for one in made(data, target) if isinstance(one, BookJob)]


def test_ids_of_segments_are_stable_and_of_one_project() -> None:
    line = b'{"chapter_id": "c1", "title": "Rain", "text": "a\\n\\nb", "version": 3, "story_time": 7}'
    (payload,) = payloads(line, TARGET._replace(replace=True, segment_chars=6))
    assert payload["texts"] == ["Rain\na", "b"]
    assert payload["ids"] == [segment_id(TARGET, "c1", 0), segment_id(TARGET, "c1", 1)]
    assert payload["ids"] == sorted(payload["ids"])
    assert (payload["version"], payload["replace"], payload["story_times"]) == (3, True, [7, 7])
    assert payload["chapter_ids"] == ["c1", "c1"]
    others = (Target("t1:p1", "x"), Target("t1", "p1:x"), Target("t2", "p1"))
    assert len({segment_id(one, "c1", 0) for one in (TARGET, *others)}) == 4
    assert payloads(line)[0]["replace"] is False


def test_rows_keep_their_ids_and_share_jobs() -> None:
    rows = [{"id": f"r{n}", "text": "a", "segment_type": "scene", "version": n // 70} for n in range(140)]
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    found = payloads(lines + b"\n" + chapter_lines(1))
    assert [len(payload["ids"]) for payload in found] == [64, 6, 64, 6, 1]
    assert [payload.get("version") for payload in found] == [None, None, 1, 1, None]
    assert [id_ for payload in found[:4] for id_ in payload["ids"]] == [row["id"] for row in rows]


def test_a_chapter_that_comes_twice_or_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobworker.handlers.book.jobs.MAX_JOB_BYTES", 5000)
    data = chapter_lines(2) + chapter_lines(1) + b'{"chapter_id": "big", "text": "%s"}\n' % (b"x " * 3000)
    found = made(data + chapter_lines(3).splitlines()[2])
    rejected = [one.fault for one in found if isinstance(one, RejectedLine)]
    assert [fault.line for fault in rejected] == [3, 4]
    assert "line 1" in rejected[0].reason
    assert "big" in rejected[1].reason
    assert sum(isinstance(one, BookJob) for one in found) == 3


@pytest.mark.parametrize(
    "target",
    [
        Target("a b", "p"),
        Target("t", ""),
        Target("t", "p", "notes_v2"),
        Target("t", "p", "z_entity_profiles"),
    ],
)
def test_a_target_that_no_service_takes_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match=r"match|collection|entities"):
        target.checked()


# -- the importer


class Store(MemoryStore):
    """Fails some calls, before or after they have an effect."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server)
        self.fail_before = self.fail_after = self.hang = 0
        self._hung: list[Any] = []

    def batch_add(self, *arguments: Any) -> Added:
        while self._hung:
            super().batch_add(*self._hung.pop())
        if self.hang:
            self.hang -= 1
            self._hung.append(arguments)
            raise StoreUnavailable("hung")
        if self.fail_before:
            self.fail_before -= 1
            raise StoreUnavailable("before")
        done = super().batch_add(*arguments)
        if self.fail_after:
            self.fail_after -= 1
            raise StoreUnavailable("after")
        return done


class World:
    """A book, its batch in memory, and a clock that sleeping moves."""

    def __init__(self, folder: Path, data: bytes) -> None:
        self.server = MemoryServer()
        self.store = Store(self.server)
        self.producer = Producer(store=self.store)
        self.path = folder / "book.jsonl"
        self.path.write_bytes(data)
        self.now_s = 0.0
        self.sleeps = 0
        self.on_sleep: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.sleeps += 1
        self.on_sleep()

    def run(self, pace: Pace, die_after: int = 10**9, close: bool = True) -> tuple[Importer, OpenBatch]:
        """One run of the importer, which ends after `die_after` lines as if it was killed."""
        with open_book(str(self.path), TARGET) as book:
            batch = book.open_batch(self.producer, TARGET, "", "")
            importer = Importer(
                batch, pace, show=lambda _: None, reject=lambda _: None, mono_s=lambda: self.now_s,
                sleep=self.sleep,
            )  # fmt: skip

            def until_death() -> Iterator[BookJob | RejectedLine]:
                for number, one in enumerate(jobs_of(book.reads(), TARGET)):
                    if number == die_after:
                        raise KeyboardInterrupt
                    yield one

            importer.send(until_death())
            if close:
                importer.close()
            return importer, batch

    def chapters(self) -> list[str]:
        """The chapter of each job in the stream."""
        return [
            json.loads(data)["payload"]["chapter_ids"][0]
            for data in self.server.entries(STREAM).values()
            if data
        ]

    def end(self, batch: OpenBatch, count: int) -> None:
        """Let jobs of the batch end."""
        self.server.stream(STREAM).batches.count(batch.id, "done", count)


ALL = [f"c{n}" for n in range(250)]
QUICK = Pace(None, 10**6)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, chapter_lines(250))


@pytest.mark.parametrize("deaths", [(0,), (99,), (100,), (101, 101), (230, 0, 249)])
def test_an_importer_that_was_killed_continues_and_sends_each_job_once(
    world: World, deaths: tuple[int, ...]
) -> None:
    for lines in deaths:
        with pytest.raises(KeyboardInterrupt):
            world.run(QUICK, die_after=lines)
    importer, batch = world.run(QUICK)
    assert world.chapters() == ALL
    assert (importer.tally.jobs, batch.counts().total, batch.counts().state) == (250, 250, "closed")
    assert importer.tally.known_jobs == max(lines // 100 * 100 for lines in deaths)
    again, _ = world.run(QUICK)
    assert (again.tally.known_jobs, world.chapters()) == (250, ALL)
    ids = [json.loads(data or b"")["id"] for data in world.server.entries(STREAM).values()]
    assert ids == [f"{batch.id}:{n}" for n in range(250)]


@pytest.mark.parametrize(("before", "after", "hang"), [(1, 0, 0), (0, 1, 0), (3, 2, 0), (0, 0, 1), (1, 1, 2)])
def test_a_store_that_fails_gets_each_job_once(world: World, before: int, after: int, hang: int) -> None:
    """A call that hung is carried out before the next one."""
    world.store.fail_before, world.store.fail_after, world.store.hang = before, after, hang
    world.run(QUICK)
    assert world.chapters() == ALL


def test_a_store_that_does_not_recover_ends_the_import(world: World) -> None:
    world.store.fail_before = 10**9
    with pytest.raises(ImportStopped, match="takes no jobs"):
        world.run(Pace(None, 10**6, 30.0))
    assert 30 <= world.now_s < 40


def test_no_more_jobs_wait_than_the_limit(world: World) -> None:
    most = 0
    batches = world.server.stream(STREAM).batches

    def work() -> None:
        nonlocal most
        (batch_id,) = batches.open
        record = batches.get(batch_id) or {}
        left = int(record.get(b"total", b"0")) - int(record.get(b"done", b"0"))
        most = max(most, left)
        batches.count(batch_id, "done", min(left, 60))

    world.on_sleep = work
    world.run(Pace(None, 120))
    assert world.chapters() == ALL
    assert 100 <= most <= 120


def test_segments_are_sent_at_the_rate(world: World) -> None:
    world.run(Pace(50.0, 10**6))
    assert 4.0 <= world.now_s <= 5.5


def test_an_import_without_a_service_gives_up(world: World) -> None:
    with pytest.raises(ImportStopped, match="no job of the batch has ended for 60 s"):
        world.run(Pace(None, 100, 60.0))
    assert world.chapters() == ALL[:100]


def test_following_ends_when_the_batch_has_finished(world: World) -> None:
    importer, batch = world.run(QUICK)
    world.on_sleep = lambda: world.end(batch, 250) or world.store.batch_finish(STREAM, batch.id, b"", "", 60)  # type: ignore[func-returns-value]
    importer.follow()
    assert (importer.counts.done, importer.counts.state) == (250, "finished")
    # Imported again, it is another batch, and overwrites its rows.
    world.on_sleep = lambda: None
    _, second = world.run(QUICK)
    assert second.id == f"{batch.id}-2"
    assert len(world.chapters()) == 500


def test_another_file_does_not_continue_the_batch(world: World, tmp_path: Path) -> None:
    def opened(target: Target = TARGET, batch_id: str = "") -> OpenBatch:
        with open_book(str(world.path), target) as book:
            return book.open_batch(world.producer, target, batch_id, "")

    first = opened()
    assert opened().id == first.id
    assert opened(TARGET._replace(segment_chars=300)).id != first.id
    assert opened(TARGET._replace(tenant_id="t2")).id != first.id
    opened(batch_id="mine")
    world.path.write_bytes(chapter_lines(3))
    assert opened().id != first.id
    with pytest.raises(ConfigurationError, match="belongs to another file"):
        opened(batch_id="mine")


def test_two_imports_at_once_are_noticed(world: World) -> None:
    with (
        open_book(str(world.path), TARGET),
        pytest.raises(ConfigurationError, match="another import"),
        open_book(str(world.path), TARGET),
    ):
        pass
    importer, batch = world.run(QUICK, close=False)
    batch.enqueue("embedding_batch", {"ids": [], "texts": []}, project_id="p1")
    with pytest.raises(ImportStopped, match="251 jobs"):
        importer.send(jobs_of(read_json_lines(io.BytesIO(b"")), TARGET))


@pytest.mark.parametrize("first_sends", [100, 200])
def test_of_two_machines_one_is_refused_and_no_job_is_left_out(world: World, first_sends: int) -> None:
    copy = world.path.with_name("copy.jsonl")  # with a lock of its own, as on another machine
    copy.write_bytes(world.path.read_bytes())
    with open_book(str(copy), TARGET) as book:
        batch = book.open_batch(world.producer, TARGET, "", "")
        second = Importer(batch, QUICK, show=lambda _: None, reject=lambda _: None, sleep=world.sleep)
        with pytest.raises(KeyboardInterrupt):
            world.run(QUICK, die_after=first_sends)
        with pytest.raises(ImportStopped, match=f"another import .* has {first_sends} jobs and not 0"):
            second.send(jobs_of(book.reads(), TARGET))
    world.run(QUICK)
    assert world.chapters() == ALL


def test_a_total_that_the_store_lost_stops_the_import(world: World) -> None:
    importer, batch = world.run(QUICK, die_after=10**9, close=False)
    record = world.server.stream(STREAM).batches.get(batch.id)
    assert record is not None
    record[b"total"] = b"100"
    with pytest.raises(ImportStopped, match="has lost entries"):
        importer.send(one for one in made(chapter_lines(300)))


def test_a_file_that_is_changed_meanwhile_is_not_closed(world: World) -> None:
    with open_book(str(world.path), TARGET) as book:
        world.path.write_bytes(chapter_lines(251))
        with pytest.raises(ImportStopped, match="was changed"):
            book.check_unchanged()
