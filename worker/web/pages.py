"""Read-only pages: overview, queues, workers, retries, dead letters, one job, and a task's progress."""

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..admin.batches import ended_since, list_batches
from ..admin.dead_letters import Cursor, DeadLetterQueue, Letter, LetterFilter
from ..admin.deployment import StreamTable
from ..admin.find_job import OVERDUE_S, SILENT_S, JobFinder, JobLocation
from ..admin.overview import Overview
from ..admin.refusals import faults_of, refusal
from ..admin.retries import RetrySet
from ..admin.status_client import Service
from ..admin.tenants import WaitingTenants, waiting_tenants
from ..errors import StoreRefused
from ..keys import Source
from ..outcome import Reason
from ..safe_text import safe_json
from ..shards import logical_stream
from ..store.operator import GroupState
from ..store.ports import KeyFault
from ..store.redis.operator import OperatorStore
from ..telemetry.log import redacted
from .background import BackgroundTasks
from .filters import DeadFilter, format_cursor, parse_cursor
from .history import History
from .rendering import Renderer

#: Rows of a page: readable, and quick to load even if each job has megabytes.
_PAGE_ROWS = 50
#: Entries scanned for one page, and in each place for a job at first: about a second.
SCAN_LIMIT = 20_000
#: Tenants shown, and the interval of counting them, which reads megabytes from the store.
_MAX_TENANTS, _COUNT_TENANTS_EVERY_S = 20, 10.0
#: Batches shown, and for how long finished ones are.
_MAX_BATCHES, _BATCHES_SINCE_S = 50, 24 * 3600.0
#: Largest scan that a visitor may ask for: about a minute on one connection.
_MAX_SCAN = 5_000_000
#: Longest number in an address: Redis takes no larger ones as positions.
_MAX_DIGITS = 18


@dataclass(frozen=True)
class Site:
    """What the pages are made of. ``open_store`` opens a connection for one request; ``fetch_services``
    fetches the status of the services that answer."""

    table: StreamTable
    history: History
    tasks: BackgroundTasks
    renderer: Renderer
    open_store: Callable[[], OperatorStore]
    fetch_services: Callable[[], list[Service]]
    show_payloads: bool

    @property
    def sources(self) -> list[Source]:
        """The streams of the last snapshot."""
        return self.table.latest

    @property
    def streams(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(source.stream for source in self.sources))

    @property
    def logical_streams(self) -> list[str]:
        """The names without those of shards."""
        return list(dict.fromkeys(map(logical_stream, self.streams)))

    @contextmanager
    def store(self) -> Iterator[OperatorStore]:
        """A store for one request: a store serves one thread at a time."""
        store = self.open_store()
        try:
            yield store
        finally:
            store.close()

    def dead_letters(self, store: OperatorStore, filter: DeadFilter, wall_now_s: float) -> DeadLetterQueue:
        """The dead letters that a filter selects. Raises `HTTPException` for an unknown stream and
        `InvalidDuration`."""
        return DeadLetterQueue(
            store, self.streams_of(filter), filter.letter_filter(wall_now_s), leave_out_refused=True
        )

    def streams_of(self, filter: DeadFilter) -> list[str]:
        """The streams that a filter selects. Raises `HTTPException` for an unknown one."""
        chosen = [one for one in self.streams if filter.stream in ("", one, logical_stream(one))]
        if not chosen:
            raise HTTPException(400, f"This page does not show a stream {filter.stream!r}.")
        return chosen

    def cursor(self, text: str) -> Cursor:
        """The position of a letter from a link or a form. Raises `HTTPException` if it is invalid."""
        cursor = parse_cursor(text, self.streams)
        if cursor is None:
            raise HTTPException(400, f"{text!r} is not a dead letter of the streams on this page.")
        return cursor

    def retries(self, store: OperatorStore, type: str, tenant: str) -> RetrySet:
        """The waiting retries of a type and a tenant; an empty string selects all."""
        return RetrySet(
            store,
            self.streams,
            types=frozenset({type} - {""}),
            tenants=frozenset({tenant} - {""}),
            refused={},
        )


class Pages:
    """One method per page. Starlette calls them in threads."""

    def __init__(self, site: Site, mono_s: Callable[[], float] = time.monotonic) -> None:
        self._site = site
        self._mono_s = mono_s
        self._tenants_lock = threading.Lock()
        self._latest_tenants: WaitingTenants | None = None
        self._mono_counted_s = 0.0

    def health(self, request: Request) -> Response:
        """200 while the job store answers, else 503: for the monitoring of this page."""
        if self._site.history.latest.error:
            return PlainTextResponse("the job store does not answer\n", 503)
        return PlainTextResponse("ok\n")

    def history(self, request: Request) -> Response:
        """The samples of the charts as JSON, after the sample number ``after``."""
        after = request.query_params.get("after", "0")
        samples = self._site.history.since(_number(after))
        return Response(orjson.dumps(samples), media_type="application/json")

    def overview(self, request: Request) -> Response:
        """Numbers, charts and the newest dead letters."""
        return self._snapshot_page(request, "overview.html")

    def workers(self, request: Request) -> Response:
        """Every service with its processes."""
        return self._snapshot_page(request, "workers.html")

    def queues(self, request: Request) -> Response:
        """Streams with their consumers, job types with their pauses."""
        with self._site.store() as store:
            groups, refused = _read_groups(store, self._site.sources)
            tenants = self._tenants(store)
            batches, refused_batches = list_batches(store, self._site.streams, _MAX_BATCHES)
        since_s = self._site.history.latest.wall_s - _BATCHES_SINCE_S
        return self._snapshot_page(
            request,
            "queues.html",
            groups=groups,
            refused=[*refused, *refused_batches],
            silent_s=SILENT_S,
            tenants=tenants,
            max_tenants=_MAX_TENANTS,
            batches=[batch for batch in batches if ended_since(batch, since_s)],
        )

    def _tenants(self, store: OperatorStore) -> WaitingTenants:
        """The tenants with waiting jobs, counted at most every 10 s for all visitors."""
        with self._tenants_lock:
            if self._latest_tenants is None or self._mono_s() - self._mono_counted_s > _COUNT_TENANTS_EVERY_S:
                self._latest_tenants = waiting_tenants(store, self._site.sources)
                self._mono_counted_s = self._mono_s()
            return self._latest_tenants

    def types(self, request: Request) -> Response:
        """Charts of each job type."""
        return self._snapshot_page(request, "types.html")

    def _snapshot_page(self, request: Request, template: str, **values: Any) -> Response:
        overview = self._site.history.latest
        return self._site.renderer.page(
            request, template, overview=overview, wall_now_s=overview.wall_s, job_types=_job_types(overview),
            **values,
        )  # fmt: skip

    def retries(self, request: Request) -> Response:
        """Jobs that wait for a retry."""
        wanted = {name: request.query_params.get(name, "").strip() for name in ("type", "tenant")}
        offset = request.query_params.get("offset", "0")
        with self._site.store() as store:
            retries = self._site.retries(store, wanted["type"], wanted["tenant"])
            page = retries.page(_PAGE_ROWS, SCAN_LIMIT, _number(offset))
            now_s = store.wall_now_s(self._site.streams[0])
        return self._site.renderer.page(
            request, "retries.html", page=page, wanted=wanted, offset=offset, wall_now_s=now_s,
            refused=list((retries.refused or {}).values()), overdue_s=OVERDUE_S,
            job_types=_job_types(self._site.history.latest),
        )  # fmt: skip

    def dead(self, request: Request) -> Response:
        """Dead letters that a filter selects, newest first."""
        filter = DeadFilter.read(lambda name: request.query_params.get(name, ""))
        after = request.query_params.get("after", "")
        with self._site.store() as store:
            now_s = store.wall_now_s(self._site.streams[0])
            queue = self._site.dead_letters(store, filter, now_s)
            page = queue.page(_PAGE_ROWS, SCAN_LIMIT, self._site.cursor(after) if after else None)
            count = queue.count()
        return self._site.renderer.page(
            request, "dead.html", page=page, filter=filter, after=after, count=count, wall_now_s=now_s,
            refused=list(queue.refused.values()), streams=self._site.logical_streams, reasons=list(Reason),
            cursor_of=_cursor_of, format_cursor=format_cursor,
            job_types=_job_types(self._site.history.latest),
        )  # fmt: skip

    def letter(self, request: Request) -> Response:
        """One dead letter in full."""
        cursor = self._site.cursor(request.query_params.get("at", ""))
        what = f"dead letters of {cursor.stream}"
        with (
            self._site.store() as store,
            named_refusal(what, partial(faults_of, store, cursor.stream, store.dead_key)),
        ):
            letter = DeadLetterQueue(store, self._site.streams, LetterFilter()).get(cursor)
            now_s = store.wall_now_s(cursor.stream)
        if letter is None:
            raise HTTPException(404, "This dead letter no longer exists: it was requeued or deleted.")
        return self._site.renderer.page(
            request, "letter.html", letter=letter, at=format_cursor(cursor), wall_now_s=now_s,
            payload=_payload(letter.task, letter.raw) if self._site.show_payloads else None,
        )  # fmt: skip

    def job(self, request: Request) -> Response:
        """Where a job is and why it waits: the answer of ``jobworker explain``."""
        id = request.query_params.get("id", "").strip()
        scan = request.query_params.get("scan", "")
        scan_limit = min(_number(scan), _MAX_SCAN) or SCAN_LIMIT
        if not id:
            return self._site.renderer.page(
                request, "job.html", id="", found=[], finder=None, scan_limit=scan_limit
            )
        with self._site.store() as store:
            finder = JobFinder(store, self._site.sources, self._site.fetch_services(), scan_limit)
            found = [(one, *self._letter_and_payload(store, one)) for one in finder.find(id)]
            now_s = store.wall_now_s(self._site.streams[0])
        return self._site.renderer.page(
            request, "job.html", 200 if found else 404, id=id, found=found, finder=finder, wall_now_s=now_s,
            scan_limit=scan_limit, larger_scan=min(scan_limit * 10, _MAX_SCAN),
        )  # fmt: skip

    def _letter_and_payload(
        self, store: OperatorStore, location: JobLocation
    ) -> tuple[Letter | None, str | None]:
        """The dead letter at a location, and the payload if it may be shown and still exists."""
        if location.state == "dead":
            cursor = Cursor(location.stream, location.facts["letter"].encode())
            letter = DeadLetterQueue(store, self._site.streams, LetterFilter()).get(cursor)
            visible = letter is not None and self._site.show_payloads
            return letter, _payload(letter.task, letter.raw) if letter and visible else None
        entry_id = location.facts.get("entry_id")
        if not self._site.show_payloads or entry_id is None:
            return None, None
        entry = store.entry(location.stream, entry_id.encode())
        return None, _payload(entry.data, None) if entry else None

    def task(self, request: Request) -> Response:
        """Progress and outcome of a background task."""
        task = self._site.tasks.get(_number(request.path_params["number"]))
        if task is None:
            raise HTTPException(
                404, "There is no such task: it was started before the last restart of this page."
            )
        return self._site.renderer.page(request, "task.html", task=task)


@contextmanager
def named_refusal(what: str, read_faults: Callable[[], Sequence[KeyFault]]) -> Iterator[None]:
    """An error page that names the key, where the store refuses the only one that the block needs."""
    try:
        yield
    except StoreRefused as error:
        raise HTTPException(503, redacted(refusal(what, error, read_faults))) from error


def _read_groups(
    store: OperatorStore, sources: list[Source]
) -> tuple[dict[Source, GroupState | None], list[str]]:
    """The groups of the streams, except of those whose keys the store refuses, which are described."""
    groups, refused = {}, []
    for source in sources:
        try:
            groups[source] = store.group(source)
        except StoreRefused as error:
            refused.append(refusal(f"stream {source.stream}", error, partial(store.key_faults, source)))
    return groups, refused


def _cursor_of(letter: Letter) -> Cursor:
    return Cursor(letter.stream, letter.id)


def _job_types(overview: Overview) -> list[str]:
    """The job types that services reported, for the suggestions of a form."""
    return sorted(overview.totals)


def _number(text: str) -> int:
    """A number of an address; 0 for anything else."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else 0


def _payload(task: bytes | None, raw: str | None) -> str:
    """The bytes of a job as text, indented if they are JSON."""
    data = task if task is not None else base64.b64decode(raw or "")
    try:
        # orjson would round integers beyond 64 bits.
        return safe_json(msgspec.json.decode(data), indent=True)
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")
