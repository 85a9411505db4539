"""PostgreSQL sink of findings: chapters.summary, entity_states, events, relations."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from jobworker.worker import ConfigurationError, PermanentError, Unavailable

from ..settings import HandlerSettings
from .sinks import ChapterFindings, Findings

log = logging.getLogger("jobworker.postgres")

#: Timeout of a connect; after it, jobs of the type wait.
_CONNECT_S = 10
#: A chapter has a few hundred rows; a longer statement waits for a lock that another program keeps.
_STATEMENT_MS = 30_000
#: Advisory lock, an arbitrary number: workers that start together create the tables one after another.
_TABLES_LOCK = 7_366_124_001

_SCOPE = ("tenant_id", "project_id", "chapter_id", "chapter_version", "position")
#: The tables that the sink writes, created if they are missing. Existing tables need these columns
#: and may have more.
SCHEMA = {
    "chapters": """CREATE TABLE chapters (
        tenant_id text NOT NULL, project_id text NOT NULL, id text NOT NULL,
        summary text, summary_version bigint, summary_updated_at timestamptz,
        PRIMARY KEY (tenant_id, project_id, id))""",
    "entity_states": """CREATE TABLE entity_states (
        tenant_id text NOT NULL, project_id text NOT NULL, chapter_id text NOT NULL,
        chapter_version bigint NOT NULL, position integer NOT NULL,
        name text NOT NULL, entity_type text NOT NULL, description text NOT NULL,
        PRIMARY KEY (tenant_id, project_id, chapter_id, position))""",
    "events": """CREATE TABLE events (
        tenant_id text NOT NULL, project_id text NOT NULL, chapter_id text NOT NULL,
        chapter_version bigint NOT NULL, position integer NOT NULL,
        description text NOT NULL, participants text[] NOT NULL,
        PRIMARY KEY (tenant_id, project_id, chapter_id, position))""",
    "relations": """CREATE TABLE relations (
        tenant_id text NOT NULL, project_id text NOT NULL, chapter_id text NOT NULL,
        chapter_version bigint NOT NULL, position integer NOT NULL,
        source text NOT NULL, target text NOT NULL, relation text NOT NULL, description text NOT NULL,
        PRIMARY KEY (tenant_id, project_id, chapter_id, position))""",
}
COLUMNS = {
    "chapters": ("tenant_id", "project_id", "id", "summary", "summary_version", "summary_updated_at"),
    "entity_states": (*_SCOPE, "name", "entity_type", "description"),
    "events": (*_SCOPE, "description", "participants"),
    "relations": (*_SCOPE, "source", "target", "relation", "description"),
}

_ADD_CHAPTER = """INSERT INTO chapters (tenant_id, project_id, id) VALUES (%s, %s, %s)
    ON CONFLICT DO NOTHING"""
_LOCK_CHAPTER = """SELECT summary_version FROM chapters WHERE tenant_id = %s AND project_id = %s AND id = %s
    FOR UPDATE"""
_SET_SUMMARY = """UPDATE chapters SET summary = %s, summary_version = %s, summary_updated_at = now()
    WHERE tenant_id = %s AND project_id = %s AND id = %s"""


class _Table(NamedTuple):
    """Rows of one table for a chapter's findings."""

    name: str
    rows: list[tuple[Any, ...]]


class PostgresSink:
    """`SummarySink` on PostgreSQL: one transaction a chapter replaces the rows of its older version."""

    def __init__(self) -> None:
        self._connection: psycopg.Connection[Any] | None = None

    def setup(self, settings: HandlerSettings) -> None:
        """Connect, and create missing tables.

        Raises ConfigurationError if `--postgres-dsn` is missing or invalid or a table lacks a column,
        Unavailable if the server does not answer.
        """
        if not settings.postgres_dsn:
            raise ConfigurationError("--summary-sink postgres needs --postgres-dsn")
        try:
            conninfo_to_dict(settings.postgres_dsn)
        except psycopg.ProgrammingError:
            # Without the cause: it quotes the string, and so the password.
            raise ConfigurationError("--postgres-dsn is not a valid PostgreSQL connection string") from None
        self._dsn = settings.postgres_dsn
        try:
            self._run(_create_tables)
        except BaseException:
            self.close()
            raise

    def healthy(self) -> None:
        """Raise Unavailable if the server does not answer."""
        self._run(lambda connection: connection.execute("SELECT 1"))

    def store(self, chapter: ChapterFindings) -> None:
        self._run(lambda connection: _store(connection, chapter))

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _run(self, action: Callable[[psycopg.Connection[Any]], object]) -> None:
        """Run one transaction. Raises Unavailable or PermanentError for the errors of psycopg.

        A missing right is Unavailable: the operator must act, and no job must fail for it.
        """
        try:
            connection = self._connect()
            with connection.transaction():
                action(connection)
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            self.close()
            raise Unavailable(f"PostgreSQL: {type(error).__name__}: {error}") from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise Unavailable(
                f"PostgreSQL: check the rights of the user in --postgres-dsn: {error}"
            ) from error
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            raise PermanentError(f"PostgreSQL: {type(error).__name__}: {error}") from error

    def _connect(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            connection = psycopg.connect(
                self._dsn, autocommit=True, connect_timeout=_CONNECT_S, application_name="jobworker"
            )
            connection.execute(f"SET statement_timeout = {_STATEMENT_MS}")
            self._connection = connection
        return self._connection


def _store(connection: psycopg.Connection[Any], chapter: ChapterFindings) -> None:
    key = (chapter.tenant_id, chapter.project_id, chapter.chapter_id)
    stored = connection.execute(_LOCK_CHAPTER, key).fetchone()
    if stored is None:
        # Only if it is missing: a table of another program may have further columns that are NOT NULL.
        connection.execute(_ADD_CHAPTER, key)
        stored = connection.execute(_LOCK_CHAPTER, key).fetchone()
    if stored is None:
        raise PermanentError(f"chapter {chapter.chapter_id} belongs to another tenant or project")
    if stored[0] is not None and stored[0] > chapter.chapter_version:
        fields = {"chapter_id": key[2], "version": stored[0], "stale_version": chapter.chapter_version}
        log.info("postgres.stale_skipped", extra=fields)
        return
    summary = _text(chapter.findings.summary)
    connection.execute(_SET_SUMMARY, (summary, chapter.chapter_version, *key))
    for table in _tables(chapter.findings):
        _replace(connection, table, key, chapter.chapter_version)


def _replace(
    connection: psycopg.Connection[Any], table: _Table, key: tuple[str, str, str], version: int
) -> None:
    name = sql.Identifier(table.name)
    delete = sql.SQL("DELETE FROM {} WHERE tenant_id = %s AND project_id = %s AND chapter_id = %s")
    connection.execute(delete.format(name), key)
    columns = COLUMNS[table.name]
    insert = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        name, _identifiers(columns), sql.SQL(", ").join([sql.Placeholder()] * len(columns))
    )
    rows = [(*key, version, position, *row) for position, row in enumerate(table.rows)]
    with connection.cursor() as cursor:
        cursor.executemany(insert, rows)


def _tables(findings: Findings) -> list[_Table]:
    return [
        _Table(
            "entity_states",
            [(_text(e.name), _text(e.entity_type), _text(e.description)) for e in findings.entity_updates],
        ),
        _Table(
            "events",
            [(_text(e.description), [_text(p) for p in e.participants]) for e in findings.new_events],
        ),
        _Table(
            "relations",
            [
                (_text(r.source), _text(r.target), _text(r.relation), _text(r.description))
                for r in findings.relation_changes
            ],
        ),
    ]


def _text(text: str) -> str:
    """Text without NUL, which PostgreSQL cannot store."""
    return text.replace("\0", "")


def _create_tables(connection: psycopg.Connection[Any]) -> None:
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (_TABLES_LOCK,))
    for table, create in SCHEMA.items():
        if connection.execute("SELECT to_regclass(%s)", (table,)).fetchone() == (None,):
            connection.execute(sql.SQL(create))
            log.info("postgres.table_created", extra={"table": table})
            continue
        probe = sql.SQL("SELECT {} FROM {} LIMIT 0").format(
            _identifiers(COLUMNS[table]), sql.Identifier(table)
        )
        try:
            connection.execute(probe)
        except psycopg.errors.UndefinedColumn as error:
            raise ConfigurationError(f"table {table}: {error.diag.message_primary}") from error


def _identifiers(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))
