"""Five hundred malformed entries: each is dead-lettered with its bytes, and no worker is disturbed."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from support.service import handlers, service

pytestmark = pytest.mark.process

#: Any seed does; a fixed one makes a failure repeatable.
SEED = 20260102
COUNT = 500
#: Jobs sent among them, which must all be run.
GOOD = 50


def _job(rng: random.Random) -> dict[str, object]:
    return {"id": f"job-{rng.randrange(10**9)}", "type": "noop", "tenant_id": "t", "project_id": "p",
            "payload": {"text": "風" * rng.randrange(20)}, "metadata": {"request_id": "r"},
            "created_at": "2026-01-02T10:00:00.123Z"}  # fmt: skip


def _encoded(job: dict[str, object]) -> bytes:
    return json.dumps(job, ensure_ascii=False, separators=(",", ":")).encode()


def _with(rng: random.Random, **changed: object) -> bytes:
    return _encoded({**_job(rng), **changed})


def _without(rng: random.Random, *names: str) -> bytes:
    return _encoded({name: value for name, value in _job(rng).items() if name not in names})


def _spliced(rng: random.Random, text: bytes) -> bytes:
    """A job with raw text as its payload."""
    return _with(rng, payload="@").replace(b'"@"', text)


def _cut(rng: random.Random) -> bytes:
    whole = _encoded(_job(rng))
    return whole[: rng.randrange(len(whole) - 1)]


def _deep(rng: random.Random) -> bytes:
    depth = rng.randrange(2_000, 60_000)
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return _spliced(rng, opening * depth + b"1" + closing * depth)


def _no_utf8(rng: random.Random) -> bytes:
    where = rng.choice(["id", "payload", "unknown"])
    bad = rng.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
    return _with(rng, **{where: "@"}).replace(b"@", bad)


def _twice(rng: random.Random) -> bytes:
    name = rng.choice([b"id", b"type", b"tenant_id", b"payload", b"retry_count"])
    value = b"1" if name == b"retry_count" else b'"x"'
    member = b'"%s":%s' % (name, value)
    return b"{" + member + b"," + member + b"," + _encoded(_job(rng))[1:]


def _wrong_kind(rng: random.Random) -> bytes:
    name, values = rng.choice([
        ("id", [1, None, [], {}, ""]), ("type", [0, True, None, ""]), ("tenant_id", [None, 3, []]),
        ("project_id", [None, {}]), ("metadata", ["x", [], {"a": 1}, {"a": None}]),
        ("created_at", [0, None]), ("retry_count", ["1", -1, 1.5, None, 10**30]), ("timeout", [0, -1, "5"]),
    ])  # fmt: skip
    return _with(rng, **{name: rng.choice(values)})


FORMS: list[Callable[[random.Random], bytes]] = [
    _cut, _deep, _no_utf8, _twice, _wrong_kind,
    lambda rng: _without(rng, rng.choice(["id", "type"])),
    lambda rng: _spliced(rng, rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"nul"])),
    lambda rng: _spliced(rng, b"9" * rng.randrange(4_400, 9_000)),
    lambda rng: _spliced(rng, rng.choice([b'"\x00"', b'"\x1f"', b'"\\ud800"', b'"\\x41"', b"'a'"])),
    lambda rng: rng.choice([b"[@]", b"\xef\xbb\xbf@", b"@}", b"@ @"]).replace(b"@", _encoded(_job(rng))),
    lambda rng: rng.choice([b"", b" ", b"null", b"true", b"1", b'"job"', b"[]", b"{}", b"\x80\x04N."]),
    lambda rng: rng.randbytes(rng.randrange(1, 400)),
]  # fmt: skip


def test_whatever_is_no_job_is_kept_as_it_came_and_no_worker_notices(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    entries = [FORMS[number % len(FORMS)](rng) for number in range(COUNT)]
    with service(tmp_path, handlers("Noop")) as one:
        pids = {role: pid for role, pid in one.roles().items() if role.startswith("worker")}
        good = []
        for number, data in enumerate(entries):
            one.add_raw({"data": data})
            if number % (COUNT // GOOD) == 0:
                good.append(one.enqueue("noop"))
        one.wait_until_drained()
        letters = one.dead_letters()
        assert {letter["reason"] for letter in letters} == {"malformed"}
        assert sorted(base64.b64decode(letter["raw"]) for letter in letters) == sorted(entries)
        assert all(len(one.events("end", id)) == 1 for id in good)
        assert {role: pid for role, pid in one.roles().items() if role.startswith("worker")} == pids


def test_jobs_with_huge_names_are_refused_and_others_are_run(tmp_path: Path) -> None:
    """Text that any producer may send is logged; it must not keep the reader or a worker busy."""
    huge = ("x" * 200_000, "a://:" * 40_000, "." * 199_999 + "x")
    with service(tmp_path, handlers("Noop"), procs=1) as one:
        reader = one.roles()["reader"]
        bad = [one.enqueue("noop", id=text) for text in huge]
        bad += [one.enqueue(text) for text in huge]
        bad += [one.enqueue("noop", metadata={"request_id": text}) for text in huge]
        # As long as is allowed, and hostile: these are run.
        longest = [one.enqueue("noop", id=text[:512], metadata={"trace_id": text[:16384]}) for text in huge]
        good = [one.enqueue("noop", payload={"text": text}) for text in huge]
        for id in good + longest:
            one.wait_for_end(id)
        one.wait_until_drained()
        letters = one.dead_letters()
        assert [letter["reason"] for letter in letters] == ["malformed"] * len(bad)
        sent = [json.loads(base64.b64decode(letter["raw"])) for letter in letters]
        assert sorted(job["id"] for job in sent) == sorted(bad)
        assert all(len(letter["error"]) < 200 for letter in letters)
        assert one.roles()["reader"] == reader
        assert max(map(len, one.log_text.splitlines())) < 100_000
