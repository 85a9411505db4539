"""Entries as the Go producers write them run unchanged, and are retried and dead-lettered byte for byte."""

import json
from pathlib import Path

import pytest

from jobworker.worker.envelope import DeadJob, dead_letter, job_of, read_envelope, with_retry
from jobworker.worker.reader.admission import Admission, AdmittedJob
from jobworker.worker.store.ports import Entry

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("*.json"))
FIELDS = ["id", "type", "tenant_id", "project_id", "payload", "metadata", "created_at"]
KINDS = {kind: n for n, kind in enumerate(["embedding_batch", "index_rebuild", "summary_write_back"])}
ALL_KINDS = KINDS | {"memory_update": 3, "audit": 4, "entity_upsert": 5, "vectors_delete": 6}


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def entry(request: pytest.FixtureRequest) -> bytes:
    data = request.param.read_bytes()
    assert isinstance(data, bytes)
    return data


def as_go_writes(value: object) -> bytes:
    """Go's encoding/json: compact, not only ASCII, but with what would harm a web page escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.replace("e-07", "e-7").encode()


def test_there_is_one_for_each_type() -> None:
    assert {path.stem for path in GOLDEN} == ALL_KINDS.keys()


def test_the_file_is_as_go_writes_it(entry: bytes) -> None:
    fields = json.loads(entry)
    assert list(fields) == FIELDS
    assert as_go_writes(fields) == entry
    assert fields["type"] in ALL_KINDS


def test_every_field_reaches_the_handler(entry: bytes) -> None:
    verdict = Admission(ALL_KINDS, 8 * 1024 * 1024, 3).check(0, Entry(b"1-1", entry))
    assert isinstance(verdict, AdmittedJob)
    envelope, fields = read_envelope(entry), json.loads(entry)
    assert (verdict.type_no, verdict.isolated) == (ALL_KINDS[fields["type"]], False)
    job = job_of(envelope, "stream:x", "1-1")
    for name in set(FIELDS) - {"metadata"}:
        assert getattr(job, name) == fields[name], name
    assert job.metadata == (fields["metadata"] or {})
    assert (job.retry_count, envelope.timeout) == (0, None)


def test_a_retry_adds_its_count_and_leaves_every_other_byte(entry: bytes) -> None:
    first = with_retry(entry, 1, deaths=0)
    assert first == entry[:-1] + b',"retry_count":1}'
    second = with_retry(first, 2, deaths=1)
    assert second == entry[:-1] + b',"retry_count":2,"deaths":1}'
    again = read_envelope(second)
    assert (again.retry_count, again.deaths, again.payload) == (2, 1, read_envelope(entry).payload)


def test_a_dead_letter_holds_the_job_as_received(entry: bytes) -> None:
    job = DeadJob(entry, b"1-1", "permanent", "E: x", read_envelope(entry))
    letter = dead_letter(job, stream="s", worker="h/i/0", failed_at="2026-01-02T10:00:00Z")
    assert b'"task":' + entry + b"," in letter
    assert json.loads(letter)["task"] == json.loads(entry)


def test_html_escapes_and_han_come_out_as_text() -> None:
    path = next(path for path in GOLDEN if path.stem == "embedding_batch")
    assert b"\\u003cb\\u003e" in path.read_bytes()
    first, second = read_envelope(path.read_bytes()).payload["texts"]
    assert first == "“走吧。”她说 <b>快</b>走 & 别回头。"
    assert second == 'Tom & Jerry said: 1 < 2 > 0 \\ "quoted"\n\t🐉\u2028end'
