"""Verbs of `jobworker` for books: import chapters from a file, export the rows of a project."""

import sys
from typing import Any

import click

from jobworker.worker import ConfigurationError, Producer
from jobworker.worker.cli.common import (
    AS_JSON,
    NEGATIVE_RESULT,
    JobType,
    echo_json,
    echo_line,
    find_store,
    service_endpoints,
    standard_input,
)
from jobworker.worker.config.quantities import Count, Duration
from jobworker.worker.options import CONFIG_OF_SERVICE, DATA_DIR, REDIS_URL, ExplicitOption

from .. import doctor
from .book_file import BookFile, Rejects, open_book
from .importer import Importer, ImportProgress, ImportStopped, Pace, Tally
from .jobs import RejectedLine, Target, jobs_of
from .progress import count_shown, share_shown
from .rate import Rate

_IMPORT_OPTIONS = [
    click.argument("file", type=click.Path(exists=True, allow_dash=True, dir_okay=False)),
    click.option("--tenant", required=True, cls=ExplicitOption, help="Tenant of the book."),
    click.option("--project", required=True, cls=ExplicitOption, help="Project of the tenant."),
    click.option("--collection", default="", cls=ExplicitOption,
                 help="Collection, with or without its prefix.  [default: story_segments]"),
    click.option("--segment-chars", type=Count(20, 20_000), default=400, show_default=True,
                 help="Most characters of a segment."),
    click.option("--replace", is_flag=True,
                 help="Remove older rows of each chapter. Without --version, the version is the time in "
                 "milliseconds at which the import began."),
    click.option("--version", type=Count(1, (1 << 63) - 1),
                 help="Version of lines that have none."),
    click.option("--rate", type=Rate(), help="Most segments in a time, such as 200/s or 5000/min."),
    click.option("--max-waiting", type=Count(1), default=1000, show_default=True,
                 help="Most jobs of the book that wait or run at once."),
    click.option("--priority", type=Count(0, 10), default=3, show_default=True,
                 help="0 to 10; other jobs have 5."),
    click.option("--batch", "batch_id", default="", metavar="ID",
                 help="Id of the batch.  [default: from the file's content]"),
    click.option("--on-complete", type=JobType(), default="", metavar="TYPE",
                 help="Type of a job to be enqueued when all jobs of the book have ended."),
    click.option("--follow/--no-follow", default=True, show_default=True,
                 help="Wait until all jobs of the book have ended."),
    click.option("--stalled-after", "stalled_after_s", type=Duration(1.0), default=600.0,
                 help="Give up if no job ends for this time.  [default: 10m]"),
    click.option("--rejected", type=click.Path(dir_okay=False, writable=True), metavar="FILE",
                 help="Write the lines that are left out to this file."),
    click.option("--dry-run", is_flag=True, help="Count chapters, segments and wrong lines; send nothing."),
    AS_JSON, REDIS_URL, DATA_DIR, CONFIG_OF_SERVICE,
]  # fmt: skip
_FILE_OPTION = click.option(
    "--out", type=click.Path(dir_okay=False, writable=True), default="-", metavar="FILE",
    help="Where to write.  [default: standard output]",
)  # fmt: skip


def add_to(main: click.Group) -> None:
    """Add the verbs to ``jobworker``."""
    command: Any = import_
    for option in reversed(_IMPORT_OPTIONS):
        command = option(command)
    main.command("import")(command)
    command = export
    for option in (
        _FILE_OPTION, click.option("--vectors", is_flag=True, help="With the vectors."), *doctor.OPTIONS[:2],
        click.option("--collection", default="story_segments", show_default=True, cls=ExplicitOption,
                     help="Collection, with or without its prefix."),
        click.option("--project", required=True, cls=ExplicitOption, help="Project of the tenant."),
        click.option("--tenant", required=True, cls=ExplicitOption, help="Tenant whose rows are read."),
        DATA_DIR, REDIS_URL, CONFIG_OF_SERVICE,
    ):  # fmt: skip
        command = option(command)
    main.command()(command)


def import_(
    file: str, tenant: str, project: str, collection: str, segment_chars: int, replace: bool,
    version: int | None, rate: float | None, max_waiting: int, priority: int, batch_id: str,
    on_complete: str, follow: bool, stalled_after_s: float, rejected: str | None, dry_run: bool,
    as_json: bool, redis_url: str, data_dir: str,
) -> None:  # fmt: skip
    """Embed the chapters of FILE (- for standard input) as one batch.

    A line is a JSON object: chapter_id, text, and optionally title, version, segment_type, story_time. A
    line with an id is a row of its own, as export writes it. A file that ends in .txt is a plain novel in
    UTF-8, whose chapters begin at lines such as "Chapter 3" or "第三章".

    The same command continues an import that was stopped or killed: no job is sent twice. A file that is
    imported again overwrites its rows.

    \b
    jobworker import novel.jsonl --tenant t001 --project p123
    jobworker import novel.jsonl --tenant t001 --project p123 --replace --rate 200/s
    jobworker import novel.txt --tenant t001 --project p123 --dry-run

    Exit code 1: a line was left out, a job was dead-lettered, or the import was stopped.
    """
    target = Target(tenant, project, collection, segment_chars, version, replace, priority).checked()
    with (
        open_book(file, target, lambda: standard_input("-")) as book,
        Rejects(rejected, _complain) as rejects,
    ):
        if dry_run:
            facts = _count(book, target, rejects)
        else:
            pace = Pace(rate, max_waiting, stalled_after_s)
            url = find_store(redis_url, data_dir)
            facts = _send(url, book, target, pace, rejects, batch_id, on_complete, follow)
    if as_json:
        echo_json(facts)
    else:
        _print(facts)
    if facts["rejected"] or facts.get("dead") or facts.get("error"):
        sys.exit(NEGATIVE_RESULT)


def _complain(text: str) -> None:
    echo_line(f"jobworker: {text}", err=True)


def _count(book: BookFile, target: Target, rejects: Rejects) -> dict[str, Any]:
    tally = Tally()
    for one in jobs_of(book.reads(), target):
        if isinstance(one, RejectedLine):
            rejects.add(one)
        else:
            tally.add(one)
    return {"dry_run": True, **_facts(tally, rejects)}


def _facts(tally: Tally, rejects: Rejects) -> dict[str, Any]:
    return {
        "chapters": tally.chapters, "segments": tally.segments, "jobs": tally.jobs,
        "rejected": rejects.count, "rejected_lines": rejects.first,
    }  # fmt: skip


def _send(
    url: str, book: BookFile, target: Target, pace: Pace, rejects: Rejects, batch_id: str, on_complete: str,
    follow: bool,
) -> dict[str, Any]:  # fmt: skip
    """Send the book; the facts of the report."""
    error = ""
    with Producer(url) as producer, share_shown("imported") as show:

        def show_progress(now: ImportProgress) -> None:
            ended = now.counts.ended / max(1, now.counts.total)
            share = ended * (now.offset / max(1, book.size))
            dead = f", {now.counts.dead} dead" if now.counts.dead else ""
            show(share, f"{now.counts.ended:,} of {now.counts.total:,} jobs{dead}")

        batch = book.open_batch(producer, target, batch_id, on_complete)
        importer = Importer(batch, pace, show=show_progress, reject=rejects.add)
        if target.replace and target.version is None:
            target = target._replace(version=round(importer.counts.wall_created_s * 1000))
        try:
            importer.send(jobs_of(book.reads(), target))
            book.check_unchanged()
            importer.close()
            if follow:
                importer.follow()
        except ImportStopped as stopped:
            error = str(stopped)
        except KeyboardInterrupt:
            error = "interrupted; the same command continues"
        counts, tally = importer.counts, importer.tally
    facts = {"batch": batch.id, **_facts(tally, rejects), "known_jobs": tally.known_jobs}
    return {**facts, "done": counts.done, "dead": counts.dead, "state": counts.state, "error": error}


def _print(facts: dict[str, Any]) -> None:
    if facts["rejected"]:
        _complain(f"{facts['rejected']} lines were left out")
    words = f"{facts['chapters']:,} chapters, {facts['segments']:,} segments in {facts['jobs']:,} jobs"
    if "batch" not in facts:
        return click.echo(words)
    known = f", {facts['known_jobs']:,} of them sent before" if facts["known_jobs"] else ""
    echo_line(f"{words}{known}; {facts['done']:,} done, {facts['dead']:,} dead")
    if facts["dead"]:
        _complain("see jobworker dlq list --type embedding_batch")
    if facts["error"]:
        _complain(facts["error"])
    if facts["state"] != "finished":
        echo_line(f"the batch is {facts['state']}; see jobworker batch show {facts['batch']}")


def export(
    redis_url: str, data_dir: str, tenant: str, project: str, collection: str, milvus_uri: str,
    milvus_prefix: str, vectors: bool, out: str,
) -> None:  # fmt: skip
    """Write the rows of a project as JSON lines, by id.

    \b
    jobworker export --tenant t001 --project p123 --out rows.jsonl
    jobworker export --tenant t001 --project p123 --vectors | gzip > rows.jsonl.gz

    A file is complete or not there. Exit code 1: there are no such rows, or the store refuses to read them.
    """
    from .export import NoRows, export_rows, open_project

    endpoints = service_endpoints(redis_url, data_dir)
    access = doctor.milvus_access(milvus_uri, str(endpoints.get("milvus_uri", "")))
    if not access[0]:
        raise ConfigurationError(
            "which Milvus? Give --milvus-uri (or JOBWORKER_MILVUS_URI), or the --data-dir of a service, "
            "without the URL of another job store"
        )
    try:
        project_rows = open_project(access, milvus_prefix, collection, tenant, project)
        with count_shown("exported") as show:
            count = export_rows(project_rows, out, vectors=vectors, show=show)
    except NoRows as error:
        _complain(str(error))
        sys.exit(NEGATIVE_RESULT)
    echo_line(f"{count:,} rows", err=True)
