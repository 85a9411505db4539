"""Verb of `jobworker` for the HTTP API: ask a collection a question."""

import sys
from typing import Any

import click

from jobworker.worker import ConfigurationError
from jobworker.worker.cli.common import AS_JSON, NEGATIVE_RESULT, echo_json, echo_line
from jobworker.worker.config.quantities import Count, Number
from jobworker.worker.options import CONFIG_OF_SERVICE, DATA_DIR, ENV_PREFIX, ExplicitOption

from .client import TOKEN_VARIABLE, SearchClient, SearchRefused, find_api, read_serve_token

#: Characters of a row's text that are shown; --json has all of it.
_TEXT_CHARS = 300
#: A 64-bit integer, as the field in Milvus.
_STORY_TIME = Count(-(1 << 63), (1 << 63) - 1)


def add_to(main: click.Group) -> None:
    """Add the verb to ``jobworker``."""
    command: Any = search
    for option in reversed((
        click.argument("query"),
        click.option("--tenant", required=True, cls=ExplicitOption, help="Tenant whose rows are searched."),
        click.option("--project", required=True, cls=ExplicitOption, help="Project of the tenant."),
        click.option("--collection", default="story_segments", show_default=True, cls=ExplicitOption,
                     help="Collection, with or without its prefix."),
        click.option("--limit", type=Count(1, 200), default=5, show_default=True, help="Most rows."),
        click.option("--chapter", "chapters", multiple=True, help="Only this chapter; repeatable."),
        click.option("--segment-type", "types", multiple=True, help="Only this segment type; repeatable."),
        click.option("--from", "time_from", type=_STORY_TIME, help="Story time of the first row."),
        click.option("--to", "time_to", type=_STORY_TIME, help="Story time of the last row."),
        click.option("--min-score", type=Number(-1, 1), help="Least cosine."),
        click.option("--mode", type=click.Choice(["auto", "dense", "hybrid"]), default="auto",
                     show_default=True,
                     help="hybrid finds names better; auto takes it where the collection has it."),
        click.option("--serve-url", default="", envvar=f"{ENV_PREFIX}_SERVE_URL", show_envvar=True,
                     cls=ExplicitOption,
                     help="API of the service.  [default: that of the service of --data-dir]"),
        click.option("--token-file", default="", type=click.Path(dir_okay=False), cls=ExplicitOption,
                     envvar=f"{ENV_PREFIX}_SERVE_CLIENT_TOKEN_FILE",
                     help=f"File with the token.  [default: {TOKEN_VARIABLE}]"),
        click.option("--serve-addr", hidden=True, default="", envvar=f"{ENV_PREFIX}_SERVE_ADDR",
                     cls=ExplicitOption),
        AS_JSON, DATA_DIR, CONFIG_OF_SERVICE,
    )):  # fmt: skip
        command = option(command)
    main.command()(command)


def search(
    query: str, tenant: str, project: str, collection: str, limit: int, chapters: tuple[str, ...],
    types: tuple[str, ...], time_from: int | None, time_to: int | None, min_score: float | None,
    mode: str, serve_url: str, token_file: str, serve_addr: str, as_json: bool, data_dir: str,
) -> None:  # fmt: skip
    """Search a collection for the rows nearest to QUERY.

    The service must run with --serve-addr. It embeds the question with the model of the collection.

    \b
    jobworker search "Who kept the lamp?" --tenant t001 --project p123
    jobworker search "Who kept the lamp?" --tenant t001 --project p123 --chapter c7 --min-score 0.3 --json

    Exit code 1: nothing was found, or the service refused the search.
    """
    url = find_api(serve_url, data_dir, serve_addr)
    if not url:
        raise ConfigurationError(
            "which service? Start it with --serve-addr and give its --data-dir here, or give --serve-url"
        )
    asked = {
        "query": query, "tenant_id": tenant, "project_id": project, "collection": collection, "limit": limit,
        "chapter_ids": chapters, "segment_types": types, "story_time_from": time_from,
        "story_time_to": time_to, "min_score": min_score, "mode": mode,
    }  # fmt: skip
    try:
        found = SearchClient(url, read_serve_token(token_file)).search(asked)
    except SearchRefused as error:
        echo_line(f"jobworker: {error}", err=True)
        sys.exit(NEGATIVE_RESULT)
    if as_json:
        said = {"model": found.model, "collection": found.collection, "mode": found.mode}
        echo_json({"results": found.rows, **said, **({"note": found.note} if found.note else {})})
    else:
        _print(found.rows)
        if found.note:
            echo_line(f"mode: {found.mode} ({found.note})", err=True)
    if not found.rows:
        sys.exit(NEGATIVE_RESULT)


def _print(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("nothing was found", err=True)
    for row in rows:
        places = [
            f"{name} {row[name]}"
            for name in ("name", "entity_type", "chapter_id", "segment_type", "story_time")
            if row.get(name)
        ]
        echo_line("  ".join([f"{row['score']:.3f}", str(row["id"]), *places]))
        text = " ".join(str(row.get("text_content") or row.get("description") or "").split())
        cut = text if len(text) <= _TEXT_CHARS else text[:_TEXT_CHARS] + "…"
        echo_line(f"       {cut}")
