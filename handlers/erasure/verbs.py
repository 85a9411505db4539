"""Verbs of `jobworker` for the built-in types: delete a tenant, and show what tenants use."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import click

from jobworker.worker import ConfigurationError, Producer
from jobworker.worker.cli.common import (
    AS_JSON,
    Age,
    confirm,
    echo_json,
    print_table,
    verb,
    verb_on_deployment,
)
from jobworker.worker.safe_text import escape_control
from jobworker.worker.urls import parse_http_url

from .. import doctor

_MILVUS = doctor.OPTIONS[:2]
_TENANT = click.option("--tenant", default="", help="The tenant; required.")
_PROJECT = click.option("--project", default="", help="Only this project of it.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Count what would be deleted, and delete nothing.")
_YES = click.option("--yes", is_flag=True, help="Do not ask.")


def add_to(main: click.Group) -> None:
    """Add the verbs to ``jobworker``."""
    command: Callable[..., None] = erase
    for option in (AS_JSON, _YES, _DRY_RUN, *_MILVUS, _PROJECT, _TENANT):
        command = option(command)
    verb_on_deployment(main)(command)
    command = usage
    for option in (AS_JSON, _ONE_TENANT, _SINCE):
        command = option(command)
    verb(main)(command)


def erase(
    deployment: Any,
    tenant: str,
    project: str,
    milvus_uri: str,
    milvus_prefix: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete everything of a tenant or project.

    Enqueues a job vectors_delete: rows, summaries, entities and cached vectors are deleted. Work that was
    enqueued before it and runs later stores nothing. Jobs in streams and dead letters stay, and so do usage
    counters.

    \b
    jobworker erase --tenant t001 --dry-run
    jobworker erase --tenant t001 --project p123 --yes
    """
    if not tenant:
        raise ConfigurationError("name a tenant by --tenant")
    whose = f"tenant {tenant}" + (f", project {project}" if project else " with all its projects")
    if dry_run:
        access = doctor.milvus_access(milvus_uri, str(deployment.endpoints.get("milvus_uri", "")))
        found = _count(deployment.url, access, milvus_prefix, tenant, project)
        if as_json:
            echo_json(found)
        else:
            rows = [[f"rows of {name}", f"{count:,}"] for name, count in found["rows"].items()]
            records = [[name, f"{found[name]:,}"] for name in ("summaries", "entities")]
            print_table(["WOULD BE DELETED", "COUNT>"], [*rows, *records])
        return
    confirm(lambda: f"Delete everything of {whose}?", yes)
    with Producer(deployment.url) as producer:
        id_ = producer.enqueue("vectors_delete", {"all": True}, tenant_id=tenant, project_id=project)
    if as_json:
        echo_json({"job": id_})
    else:
        click.echo(f"enqueued {id_}; follow it with: jobworker explain {id_}")


def _count(redis_url: str, access: tuple[str, str], prefix: str, tenant: str, project: str) -> dict[str, Any]:
    """What a deletion of the scope finds now. `access`: address and token of Milvus."""
    from ..jobstore.erasures import Scope
    from ..jobstore.open import open_erasures, open_fence, open_records
    from ..settings import HandlerSettings
    from ..vectors.open import open_store
    from ..vectors.ports import VectorStoreError
    from ..vectors.schema import check_id
    from .erase import Eraser, EraseRequest

    milvus_uri, token = access
    if not milvus_uri:
        raise ConfigurationError(
            "--dry-run counts rows: give --milvus-uri (or JOBWORKER_MILVUS_URI), or the --data-dir of the "
            "service, without the URL of another job store"
        )
    parse_http_url(milvus_uri, "--milvus-uri", "http://milvus.example:19530")
    try:
        scope = Scope(check_id("--tenant", tenant), project and check_id("--project", project))
    except VectorStoreError as error:
        raise ConfigurationError(str(error)) from error
    store = open_store(HandlerSettings(milvus_uri=milvus_uri, milvus_token=token, milvus_prefix=prefix))
    parts = (open_fence(redis_url), open_erasures(redis_url), open_records(redis_url))
    eraser = Eraser(store, *parts, prefix=prefix, ttl_ms=0)
    try:
        return eraser.count(EraseRequest("dry run", scope, 0))._asdict()
    except VectorStoreError as error:
        raise click.ClickException(f"the rows cannot be counted: {escape_control(str(error))}") from error


_SINCE = click.option(
    "--since", "since_s", type=Age(), default="30d", show_default=True, help="How far back, in whole days."
)
_ONE_TENANT = click.option("--tenant", default="", help="Only this tenant.")


def usage(url: str, since_s: float, tenant: str, as_json: bool) -> None:
    """Show what tenants used: tokens, time of the model, rows.

    The days are those of UTC. SPARED: tokens of texts whose vectors were in the cache.

    \b
    jobworker usage --since 30d
    jobworker usage --since 1d --tenant t001 --json
    """
    from ..jobstore.usage import RedisUsages, days_since

    days = days_since(since_s, time.time())
    found = {
        name: _plain(asdict(one)) for name, one in RedisUsages(url).read(days).items() if tenant in ("", name)
    }
    ordered = sorted(found.items(), key=lambda item: (-item[1]["embedded_tokens"], item[0]))
    if as_json:
        echo_json({"from": days[0], "to": days[-1], "tenants": dict(ordered)})
        return
    if not found:
        click.echo(
            f"no usage{f' of {escape_control(tenant)}' if tenant else ''} since {days[0]} (UTC)", err=True
        )
        return
    rows = [[name, *(f"{one[counter]:,}" for counter in _COLUMNS)] for name, one in ordered]
    print_table(["TENANT", *(f"{heading}>" for heading in _COLUMNS.values())], rows)


#: Counter -> heading.
_COLUMNS = {"embedded_tokens": "TOKENS", "spared_tokens": "SPARED", "model_ms": "MODEL MS", "rows": "ROWS"}


def _plain(counters: Mapping[str, int]) -> dict[str, int]:
    found = dict(counters)
    found["model_ms"] = found.pop("model_us") // 1000
    return {counter: found[counter] for counter in _COLUMNS}
