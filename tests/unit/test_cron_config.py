"""The [[cron]] tables of the configuration file: what is taken, and what a wrong one says."""

import re
import tomllib
from pathlib import Path

import orjson
import pytest

from jobworker.worker.config.tables import ConfigTables
from jobworker.worker.cron.config import parse_cron_tables
from jobworker.worker.cron.enqueuer import tick_job
from jobworker.worker.cron.table import CronTable, decode_table, digest, encode_table
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.keys import Source
from jobworker.worker.settings import Settings

STREAM = "stream:story:gen"
TICK = 1_767_322_800
ALL = """
[[cron]]
name = "nightly"
schedule = "0 3 * * *"
timezone = "Europe/Berlin"
type = "report"
tenant_id = "acme"
project_id = "p1"
metadata = { priority = "9" }
timeout = 60
missed = "once"
[cron.payload]
days = [1, 2.50]
since = 2026-01-02
"""


def parse(text: str) -> tuple[CronTable, ...]:
    return parse_cron_tables(tomllib.loads(text)["cron"], [STREAM])


def test_every_key_of_a_job_is_taken() -> None:
    (table,) = parse(ALL)
    assert table.job_id(TICK) == "cron:nightly:2026-01-02T03:00:00Z"
    job = orjson.loads(tick_job(table, TICK, float(TICK)).data)
    assert job == {
        "id": "cron:nightly:2026-01-02T03:00:00Z", "type": "report", "tenant_id": "acme", "project_id": "p1",
        "payload": {"days": [1, 2.5], "since": "2026-01-02"},
        "metadata": {"priority": "9", "idempotency_key": "cron:nightly:2026-01-02T03:00:00Z",
                     "cron_tick": "2026-01-02T03:00:00Z"},
        "created_at": "2026-01-02T03:00:00.000Z", "timeout": 60.0,
    }  # fmt: skip
    assert (table.stream, table.timezone, table.missed) == (STREAM, "Europe/Berlin", "once")


def test_a_short_table_is_enough() -> None:
    (table,) = parse('[[cron]]\nname = "n"\nschedule = "@daily"\ntype = "report"\n')
    assert (table.timezone, table.missed, table.payload) == ("UTC", "skip", "null")


def test_a_table_survives_the_job_store() -> None:
    (table,) = parse(ALL)
    assert decode_table(encode_table(table)) == table
    assert digest([table]) != digest([])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('name = "a b"', "does not match"),
        ("schedule = 3", "schedule is 3"),
        ('schedule = "61 * * * *"', "Bad minute"),
        ('timezone = "Mars"', "not known"),
        ('missed = "all"', "say 'skip' or 'once'"),
        ('scedule = "@daily"', "did you mean 'schedule'"),
        ('tenant_id = "a b"', "tenant_id"),
        ("timeout = -1", "timeout"),
        ("timeout = true", "timeout is True"),
        ("payload = nan", "no JSON"),
        ('metadata = { idempotency_key = "k" }', "set for each tick"),
        ("metadata = { priority = 9 }", "text to text"),
        ('stream = "elsewhere"', "does not read"),
        ('stream = ""', ""),
    ],
)
def test_a_wrong_table_is_named_with_what_is_wrong(change: str, says: str) -> None:
    lines = {"name": 'name = "n"', "schedule": 'schedule = "@daily"', "type": 'type = "report"'}
    lines[change.partition(" ")[0]] = change
    text = "\n".join(["[[cron]]", *lines.values()])
    if not says:
        assert parse(text)[0].stream == STREAM
        return
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        parse(text)
    assert "[[cron]] 'n'" in str(error.value) or "[[cron]] 'a b'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[cron]\nname = "n"\n', "write [[cron]]"),
        ("cron = 3\n", "write [[cron]]"),
        ('[[cron]]\nname = "n"\n', "'n': schedule, type is missing"),
        ('[[cron]]\ntype = "n"\n', "number 1: name, schedule is missing"),
        (2 * '[[cron]]\nname = "n"\nschedule = "@daily"\ntype = "x"\n', "given twice"),
        (f'[[cron]]\nname = "n"\nschedule = "@daily"\ntype = "x"\npayload = "{"x" * 70_000}"', "more than"),
    ],
)
def test_wrong_tables_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(text)


def test_the_file_is_read_again_and_named_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "jobworker.toml"
    settings = Settings(config_file=str(file), streams=(Source(STREAM, "g"),))
    file.write_text(ALL)
    assert [table.name for table in ConfigTables.load(settings).cron] == ["nightly"]
    file.write_text("procs = 1\n")
    assert ConfigTables.load(settings).cron == ()
    for text in ("[[cron", ALL.replace("0 3", "61 3")):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=re.escape(str(file))):
            ConfigTables.load(settings)
    file.unlink()
    with pytest.raises(ConfigurationError, match=re.escape(str(file))):
        ConfigTables.load(settings)
    assert ConfigTables.load(Settings()).cron == ()
