"""What a chapter came to, and where it may go beyond Redis and Milvus: the port to a sink of summaries."""

import importlib
import re
import sys
from pathlib import Path
from typing import Annotated, Protocol, cast

import msgspec

from jobworker.worker import ConfigurationError

from ..settings import HandlerSettings

#: A module and a class, as for `--handler`.
_TARGET = re.compile(r"[\w.]+:\w+")
#: More of anything in one chapter is a model that repeats itself.
MOST_ITEMS = 200

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=20_000)]


class EntityUpdate(msgspec.Struct, frozen=True):
    """What a chapter tells of a person, place or thing; `description` is its whole profile, not a change."""

    name: Name
    entity_type: Annotated[str, msgspec.Meta(max_length=32)] = ""
    description: Text = ""


class Event(msgspec.Struct, frozen=True):
    """Something that happens in a chapter; `participants` are names of entities."""

    description: Annotated[str, msgspec.Meta(min_length=1, max_length=20_000)]
    participants: Annotated[list[Name], msgspec.Meta(max_length=MOST_ITEMS)] = []


class RelationChange(msgspec.Struct, frozen=True):
    """How two entities stand to each other from this chapter on."""

    source: Name
    target: Name
    relation: Name
    description: Text = ""


class Findings(msgspec.Struct, frozen=True):
    """What was found in a chapter; only the summary where no language model was asked."""

    summary: Annotated[str, msgspec.Meta(min_length=1)]
    entity_updates: Annotated[list[EntityUpdate], msgspec.Meta(max_length=MOST_ITEMS)] = []
    new_events: Annotated[list[Event], msgspec.Meta(max_length=MOST_ITEMS)] = []
    relation_changes: Annotated[list[RelationChange], msgspec.Meta(max_length=MOST_ITEMS)] = []


class ChapterFindings(msgspec.Struct, frozen=True):
    """The findings of one version of one chapter; `chapter_version` is 0 where the job named none."""

    tenant_id: str
    project_id: str
    chapter_id: str
    chapter_version: int
    findings: Findings


class SummarySink(Protocol):
    """Another place for what chapters came to; made without arguments, once for each worker process.

    Optional beside `store`: ``setup(settings)``, once, and ``healthy()``, which raises while the place does
    not answer.
    """

    def store(self, chapter: ChapterFindings) -> None:
        """Keep the findings in place of those of an older or the same version of the chapter.

        Called after Redis and Milvus have them, perhaps more than once and, of several versions at a time,
        in any order: what an older version would overwrite is left as it is. Raises PermanentError where
        that can never work, Unavailable where the place does not answer.
        """


class NoSink:
    """The default: the summary and the entities are in Redis and Milvus; events and relations go nowhere."""

    def store(self, chapter: ChapterFindings) -> None:
        """Keep nothing more."""


def open_sink(settings: HandlerSettings) -> SummarySink:
    """The sink that `--summary-sink` names: empty, `postgres`, or `module:Class`, set up.

    Raises ConfigurationError where it cannot be made, and what its own `setup` raises.
    """
    target = settings.summary_sink
    if not target:
        return NoSink()
    if target == "postgres":
        target = "jobworker.handlers.summaries.postgres_sink:PostgresSink"
    if not _TARGET.fullmatch(target):
        raise ConfigurationError(f"--summary-sink {target!r}: say postgres or module:Class")
    sink = _make(target)
    if (setup := getattr(sink, "setup", None)) is not None:
        setup(settings)
    return sink


def _make(target: str) -> SummarySink:
    module, _, name = target.partition(":")
    # As for handlers: one that lies beside the place where the service was started is found.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return cast(SummarySink, getattr(importlib.import_module(module), name)())
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"--summary-sink {target}: {error}") from error
