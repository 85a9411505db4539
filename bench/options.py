"""Command-line options that several benchmarks have."""

import os
from pathlib import Path

import click

as_json = click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of the tables.")
redis_url = click.option(
    "--redis-url", default="", envvar="JOBWORKER_REDIS_URL", help="[default: a new Valkey]"
)
unique_window = click.option(
    "--unique-window",
    "window",
    default="86400",
    show_default=True,
    metavar="SECONDS",
    help="Like that of the service. Each job has an idempotency key; with 0 keys do not count.",
)
seed = click.option("--seed", type=int, help="Seed of the run to repeat.  [default: random]")
model = click.option("--model", default="", help="Like --model of the service.")
texts = click.option(
    "--texts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL with a field `content` a line, one chapter each.  [default: the sample novel]",
)
workers = click.option(
    "--procs", type=click.IntRange(1), default=2, show_default=True, help="Workers of the service."
)
worker_a_core = click.option(
    "--procs",
    type=click.IntRange(1),
    default=lambda: len(os.sched_getaffinity(0)),
    help="Workers of the service.  [default: number of cores]",
)
