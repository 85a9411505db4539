"""PostgreSQL sink on a real server: versions, tenants, repeated calls, outages."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobworker.handlers.settings import HandlerSettings
from jobworker.handlers.summaries.sinks import (
    ChapterFindings,
    EntityUpdate,
    Event,
    Findings,
    RelationChange,
    SummarySink,
    open_sink,
)
from jobworker.worker import ConfigurationError, PermanentError, Unavailable

psycopg = pytest.importorskip("psycopg", reason="psycopg: not installed (extra `postgres`)")
from support.postgres import PostgresServer, postgres, why_no_postgres  # noqa: E402  (it needs the extra, too)

WHY_NOT = why_no_postgres()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres() as running:
        yield running


@pytest.fixture
def database(server: PostgresServer) -> Iterator[Any]:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS chapters, entity_states, events, relations")
        yield connection


def sink_on(server: PostgresServer) -> SummarySink:
    return open_sink(HandlerSettings(summary_sink="postgres", postgres_dsn=server.dsn))


@pytest.fixture
def sink(server: PostgresServer, database: Any) -> Iterator[Any]:
    opened: Any = sink_on(server)
    yield opened
    opened.close()


def chapter(version: int = 1, *, id: str = "c1", tenant: str = "t1", text: str = "") -> ChapterFindings:
    text = text or f"version {version}"
    found = Findings(
        text,
        [EntityUpdate("林黛玉", "person", text), EntityUpdate("宝玉", "person", text)][: 1 + version % 2],
        [Event(f"event of {text}", ["林黛玉", "宝玉"])],
        [RelationChange("林黛玉", "宝玉", "cousin", text)],
    )
    return ChapterFindings(tenant, "p1", id, version, found)


def rows(database: Any, query: str) -> list[Any]:
    return list(database.execute(query).fetchall())


def test_findings_are_stored_in_their_tables(sink: Any, database: Any) -> None:
    sink.store(chapter(3))
    assert rows(database, "SELECT tenant_id, project_id, id, summary, summary_version FROM chapters") == [
        ("t1", "p1", "c1", "version 3", 3)
    ]
    states = "SELECT chapter_id, chapter_version, name, entity_type, description FROM entity_states"
    assert rows(database, f"{states} ORDER BY position") == [
        ("c1", 3, "林黛玉", "person", "version 3"), ("c1", 3, "宝玉", "person", "version 3"),
    ]  # fmt: skip
    assert rows(database, "SELECT description, participants FROM events") == [
        ("event of version 3", ["林黛玉", "宝玉"])
    ]
    assert rows(database, "SELECT source, target, relation FROM relations") == [("林黛玉", "宝玉", "cousin")]


def test_a_repeated_store_changes_nothing(sink: Any, database: Any) -> None:
    for _ in range(2):
        sink.store(chapter(3))
    counts = "SELECT (SELECT count(*) FROM chapters), (SELECT count(*) FROM entity_states), "
    counts += "(SELECT count(*) FROM events), (SELECT count(*) FROM relations)"
    assert rows(database, counts) == [(1, 2, 1, 1)]


def test_a_newer_version_replaces_all_rows_and_an_older_changes_nothing(sink: Any, database: Any) -> None:
    for version in (5, 3, 6, 4):
        sink.store(chapter(version))
    assert rows(database, "SELECT summary FROM chapters") == [("version 6",)]
    assert rows(database, "SELECT name, chapter_version FROM entity_states") == [("林黛玉", 6)]
    assert rows(database, "SELECT description FROM events") == [("event of version 6",)]


def test_concurrent_writers_leave_the_newest_version(server: PostgresServer, database: Any) -> None:
    versions = list(range(1, 41))
    random.Random(3).shuffle(versions)

    def write(mine: list[int]) -> None:
        one: Any = sink_on(server)  # all threads create the tables at once
        for version in mine:
            one.store(chapter(version))
        one.close()

    threads = [threading.Thread(target=write, args=(versions[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rows(database, "SELECT summary, summary_version FROM chapters") == [("version 40", 40)]
    assert rows(database, "SELECT DISTINCT chapter_version FROM entity_states") == [(40,)]


def test_tenants_are_separate_and_sql_in_texts_is_plain_text(sink: Any, database: Any) -> None:
    hostile = "'; DROP TABLE chapters; -- %s {} \0 \\"
    sink.store(chapter(1, text=hostile))
    sink.store(chapter(9, tenant="t2", text="theirs"))
    stored = rows(database, "SELECT tenant_id, summary FROM chapters ORDER BY tenant_id")
    assert stored == [("t1", hostile.replace("\0", "")), ("t2", "theirs")]


def test_an_existing_table_is_used_unchanged(server: PostgresServer, database: Any) -> None:
    database.execute(
        "CREATE TABLE chapters (id text PRIMARY KEY, tenant_id text, project_id text, title text NOT NULL, "
        "summary text, summary_version bigint, summary_updated_at timestamptz)"
    )
    database.execute("INSERT INTO chapters VALUES ('c1', 't1', 'p1', 'First'), ('c2', 't9', 'p9', 'Theirs')")
    one: Any = sink_on(server)
    one.store(chapter(1))
    assert rows(database, "SELECT title, summary FROM chapters WHERE id = 'c1'") == [("First", "version 1")]
    with pytest.raises(PermanentError):
        one.store(chapter(1, id="c2"))
    with pytest.raises(PermanentError, match="title"):
        one.store(chapter(1, id="c3"))
    one.store(chapter(2))
    assert rows(database, "SELECT id, summary FROM chapters ORDER BY id") == [
        ("c1", "version 2"),
        ("c2", None),
    ]
    one.close()


def test_a_table_without_a_needed_column_is_a_configuration_error(
    server: PostgresServer, database: Any
) -> None:
    database.execute("CREATE TABLE events (id bigint)")
    with pytest.raises(ConfigurationError, match="table events"):
        sink_on(server)


def test_an_outage_is_unavailable_and_the_sink_reconnects(sink: Any, server: PostgresServer) -> None:
    sink.store(chapter(1))
    server.stop()
    try:
        for call in (lambda: sink.store(chapter(2)), sink.healthy):
            with pytest.raises(Unavailable):
                call()
    finally:
        server.start()
    sink.store(chapter(2))
    sink.healthy()


def test_a_missing_right_is_unavailable(sink: Any, database: Any) -> None:
    database.execute("DROP ROLE IF EXISTS stranger")
    database.execute("CREATE ROLE stranger")
    try:
        sink._run(lambda connection: connection.execute("SET ROLE stranger"))
        with pytest.raises(Unavailable, match="--postgres-dsn"):
            sink.store(chapter(1))
    finally:
        sink.close()
        database.execute("DROP ROLE stranger")


@pytest.mark.parametrize("dsn", ["", "nonsense hunter2", "postgresql://u:hunter2@[bad"])
def test_a_bad_dsn_is_a_configuration_error_without_its_password(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="--postgres-dsn") as caught:
        open_sink(HandlerSettings(summary_sink="postgres", postgres_dsn=dsn))
    assert "hunter2" not in str(caught.value)
