"""Command-line tool ``jobworker`` for operators and scripts."""

import click

from ..extension import extension, imported
from ..host.process_env import prepare_process
from . import (
    batch,
    cancel,
    cron,
    dlq,
    doctor,
    enqueue,
    explain,
    limit,
    pause,
    result,
    retry,
    stats,
    top,
    url,
    web,
    weight,
)
from .common import CliGroup


@click.group(cls=CliGroup, context_settings={"max_content_width": 110})
@click.version_option(package_name="jobworker")
def main() -> None:
    """Inspect and repair a jobworker deployment, and send it jobs.

    Every verb takes --redis-url (better set as JOBWORKER_REDIS_URL, which no process list shows), the
    --config FILE of the service, or the --data-dir of a service on this machine that runs its own store.

    \b
    jobworker doctor                           what is wrong, and how to fix it
    jobworker stats                            queued, pending, retrying and dead jobs
    jobworker dlq requeue --reason timeout     send dead letters again
    jobworker cron list                        cron tables: next and last tick
    jobworker batch show import-7              how far the import is
    jobworker stats --config /etc/jobworker/jobworker.toml
    jobworker VERB --help                      more, with examples
    eval "$(_JOBWORKER_COMPLETE=bash_source jobworker)"    Tab completes verbs and options (also zsh, fish)

    Exit codes: 0 done, 1 done, but something is missing or wrong, 2 bad usage, 5 the job store
    does not answer.
    """
    prepare_process()


for module in (top, enqueue, stats, explain, result, cancel, pause, doctor, url, web):
    module.add_to(main)
for target in extension().verbs:
    imported(target)(main)
main.add_command(dlq.dlq)
main.add_command(retry.retry)
main.add_command(limit.limit)
main.add_command(weight.weight)
main.add_command(cron.cron)
main.add_command(batch.batch)
