"""Findings of a chapter, and the port to a summary sink: a further store beside Redis and Milvus."""

import re
from typing import Annotated, Protocol, cast

import msgspec

from jobworker.worker import ConfigurationError
from jobworker.worker.extension import create

from ..settings import HandlerSettings

#: `module:Class`, as for `--handler`.
_TARGET = re.compile(r"[\w.]+:\w+")
#: Longest list in one chapter's findings; a model that exceeds it repeats itself.
MAX_ITEMS = 200

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=20_000)]


class EntityUpdate(msgspec.Struct, frozen=True):
    """Person, place or thing after a chapter; `description` is the whole profile, not a change."""

    name: Name
    entity_type: Annotated[str, msgspec.Meta(max_length=32)] = ""
    description: Text = ""


class Event(msgspec.Struct, frozen=True):
    """Event in a chapter; `participants` are names of entities."""

    description: Annotated[str, msgspec.Meta(min_length=1, max_length=20_000)]
    participants: Annotated[list[Name], msgspec.Meta(max_length=MAX_ITEMS)] = []


class RelationChange(msgspec.Struct, frozen=True):
    """Relation between two entities from this chapter on."""

    source: Name
    target: Name
    relation: Name
    description: Text = ""


class Findings(msgspec.Struct, frozen=True):
    """Summary of a chapter, with entities, events and relations if a language model extracted them."""

    summary: Annotated[str, msgspec.Meta(min_length=1)]
    entity_updates: Annotated[list[EntityUpdate], msgspec.Meta(max_length=MAX_ITEMS)] = []
    new_events: Annotated[list[Event], msgspec.Meta(max_length=MAX_ITEMS)] = []
    relation_changes: Annotated[list[RelationChange], msgspec.Meta(max_length=MAX_ITEMS)] = []


class ChapterFindings(msgspec.Struct, frozen=True):
    """Findings of one version of one chapter; `chapter_version` is 0 if the job has none."""

    tenant_id: str
    project_id: str
    chapter_id: str
    chapter_version: int
    findings: Findings


class SummarySink(Protocol):
    """Further store for findings; its class is called without arguments, once in each worker process.

    Optional methods: ``setup(settings)``, called once, and ``healthy()``, which raises while the store does
    not answer.
    """

    def store(self, chapter: ChapterFindings) -> None:
        """Replace the findings of an older or the same version of the chapter; ignore an older version.

        Called after Redis and Milvus have stored them. Calls may repeat, and versions come in any order and
        at the same time. Raises PermanentError if a retry cannot succeed, Unavailable if the store does not
        answer.
        """


class NoSink:
    """Default sink: stores nothing. Redis and Milvus hold summary and entities, not events or relations."""

    def store(self, chapter: ChapterFindings) -> None:
        """Do nothing."""


def open_sink(settings: HandlerSettings) -> SummarySink:
    """Create and set up the sink of `--summary-sink`: empty, `postgres` or `module:Class`.

    Raises ConfigurationError if it cannot be imported or created, and the errors of its `setup`.
    """
    target = settings.summary_sink
    if not target:
        return NoSink()
    if target == "postgres":
        target = "jobworker.handlers.summaries.postgres_sink:PostgresSink"
    if not _TARGET.fullmatch(target):
        raise ConfigurationError(f"--summary-sink {target!r}: must be postgres or module:Class")
    sink = cast(SummarySink, create(target, "--summary-sink"))
    if (setup := getattr(sink, "setup", None)) is not None:
        setup(settings)
    return sink
