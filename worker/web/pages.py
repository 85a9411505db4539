"""What the page shows: every look at the deployment, and nothing that changes it."""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..admin.dead_letters import Cursor, DeadLetterQueue, Letter, LetterFilter
from ..admin.find_job import JobFinder, JobLocation
from ..admin.retries import RetrySet
from ..admin.status_client import Service
from ..keys import Source
from ..outcome import Reason
from ..store.operator import OperatorStore
from .background import BackgroundTasks
from .filters import DeadFilter, read_place, write_place
from .history import History
from .rendering import Renderer

#: Rows of a page: as many as a person reads, and a page of megabyte jobs still comes at once.
_ROWS = 50
#: Entries that a filter goes through for one page, and that a job is looked for among at first: a second.
LOOK_AT = 20_000
#: The farthest that a person may ask a search to look: a minute or so of one connection's time.
_FARTHEST = 5_000_000


@dataclass(frozen=True)
class Site:
    """The deployment as the page sees it. ``open_store``: a connection for one request; ``ask``: what the
    services say this moment."""

    sources: list[Source]
    board: History
    works: BackgroundTasks
    renderer: Renderer
    open_store: Callable[[], OperatorStore]
    ask: Callable[[], list[Service]]
    show_payloads: bool

    @property
    def streams(self) -> list[str]:
        """Names of the streams."""
        return [source.stream for source in self.sources]

    @contextmanager
    def store(self) -> Iterator[OperatorStore]:
        """A store of one's own: stores serve one thread at a time."""
        store = self.open_store()
        try:
            yield store
        finally:
            store.close()

    def desk(self, store: OperatorStore, filter: DeadFilter, wall_now_s: float) -> DeadLetterQueue:
        """The dead letters that a filter means."""
        return DeadLetterQueue(store, self.streams_of(filter), filter.choice(wall_now_s))

    def streams_of(self, filter: DeadFilter) -> list[str]:
        """The streams that a filter means; an error page where it names one that is not ours."""
        if filter.stream and filter.stream not in self.streams:
            raise HTTPException(400, f"{filter.stream!r} is no stream of this page.")
        return [filter.stream] if filter.stream else self.streams

    def place(self, text: str) -> Cursor:
        """A letter's place out of a link or a form; an error page where it is none."""
        place = read_place(text, self.streams)
        if place is None:
            raise HTTPException(400, f"{text!r} is no dead letter of these streams")
        return place

    def retry_desk(self, store: OperatorStore, type: str, tenant: str) -> RetrySet:
        """The waiting retries of a type and a tenant, empty for any."""
        return RetrySet(
            store, self.streams, types=frozenset({type} - {""}), tenants=frozenset({tenant} - {""})
        )


class Pages:
    """A method a page; all are called from threads."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def alive(self, request: Request) -> Response:
        """For whoever watches the page itself: whether the store answers."""
        trouble = bool(self._site.board.seen.trouble)
        return PlainTextResponse(
            "the job store does not answer\n" if trouble else "ok\n", 503 if trouble else 200
        )

    def history(self, request: Request) -> Response:
        """What the charts draw."""
        after = request.query_params.get("after", "0")
        return JSONResponse(self._site.board.history(int(after) if after.isdecimal() else 0))

    def overview(self, request: Request) -> Response:
        """Everything at a glance."""
        return self._of_board(request, "overview.html")

    def workers(self, request: Request) -> Response:
        """Every service and what each of its processes does."""
        return self._of_board(request, "workers.html")

    def queues(self, request: Request) -> Response:
        """Streams with their readers, and types with their pauses."""
        with self._site.store() as store:
            groups = {source: store.group(source) for source in self._site.sources}
        return self._of_board(request, "queues.html", groups=groups)

    def _of_board(self, request: Request, template: str, **values: Any) -> Response:
        seen = self._site.board.seen
        return self._site.renderer.page(
            request, template, seen=seen, wall_now_s=seen.wall_s, kinds=_kinds(seen.totals), **values
        )

    def retries(self, request: Request) -> Response:
        """What waits for its next try."""
        asked = {name: request.query_params.get(name, "").strip() for name in ("type", "tenant")}
        behind = request.query_params.get("behind", "0")
        with self._site.store() as store:
            desk = self._site.retry_desk(store, asked["type"], asked["tenant"])
            page = desk.page(_ROWS, LOOK_AT, int(behind) if behind.isdecimal() else 0)
            now_s = store.wall_now_s(self._site.streams[0])
        return self._site.renderer.page(
            request, "retries.html", page=page, asked=asked, behind=behind, wall_now_s=now_s,
            kinds=_kinds(self._site.board.seen.totals),
        )  # fmt: skip

    def dead(self, request: Request) -> Response:
        """Dead letters, newest first, by a filter."""
        filter = DeadFilter.read(lambda name: request.query_params.get(name, ""))
        after = request.query_params.get("after", "")
        with self._site.store() as store:
            now_s = store.wall_now_s(self._site.streams[0])
            desk = self._site.desk(store, filter, now_s)
            page = desk.page(_ROWS, LOOK_AT, self._site.place(after) if after else None)
            count = desk.count()
        return self._site.renderer.page(
            request, "dead.html", page=page, filter=filter, after=after, count=count, wall_now_s=now_s,
            streams=self._site.streams, reasons=list(Reason), place_of=_place_of, write_place=write_place,
            kinds=_kinds(self._site.board.seen.totals),
        )  # fmt: skip

    def letter(self, request: Request) -> Response:
        """All that is known of one dead letter."""
        place = self._site.place(request.query_params.get("at", ""))
        with self._site.store() as store:
            letter = DeadLetterQueue(store, self._site.streams, LetterFilter()).letter(place)
            now_s = store.wall_now_s(place.stream)
        if letter is None:
            raise HTTPException(404, "This dead letter is gone: it was sent again or deleted.")
        return self._site.renderer.page(
            request, "letter.html", letter=letter, at=write_place(place), wall_now_s=now_s,
            payload=_payload(letter.task, letter.raw) if self._site.show_payloads else None,
        )  # fmt: skip

    def job(self, request: Request) -> Response:
        """Where a job is and why it waits there: what ``jobworker explain`` says."""
        id = request.query_params.get("id", "").strip()
        far = request.query_params.get("look_at", "")
        look_at = min(int(far), _FARTHEST) if far.isdecimal() and int(far) else LOOK_AT
        if not id:
            return self._site.renderer.page(
                request, "job.html", id="", found=[], search=None, look_at=look_at
            )
        with self._site.store() as store:
            search = JobFinder(store, self._site.sources, self._site.ask(), look_at)
            found = [(one, *self._more(store, one)) for one in search.find(id)]
            now_s = store.wall_now_s(self._site.streams[0])
        return self._site.renderer.page(
            request, "job.html", 200 if found else 404, id=id, found=found, search=search, wall_now_s=now_s,
            look_at=look_at, farther=min(look_at * 10, _FARTHEST), write_place=write_place,
        )  # fmt: skip

    def _more(self, store: OperatorStore, found: JobLocation) -> tuple[Letter | None, str | None]:
        """The dead letter, where there is one, and the payload, where it may be shown and can be had."""
        if found.state == "dead":
            place = Cursor(found.stream, found.facts["letter"].encode())
            letter = DeadLetterQueue(store, self._site.streams, LetterFilter()).letter(place)
            may = letter is not None and self._site.show_payloads
            return letter, _payload(letter.task, letter.raw) if letter and may else None
        entry_id = found.facts.get("entry_id")
        if not self._site.show_payloads or entry_id is None:
            return None, None
        entry = store.entry(found.stream, entry_id.encode())
        return None, _payload(entry.data, None) if entry else None

    def work(self, request: Request) -> Response:
        """How far something that was asked for is."""
        work = self._site.works.get(request.path_params["number"])
        if work is None:
            raise HTTPException(404, "Nothing of this number was asked for since the page was started.")
        return self._site.renderer.page(request, "work.html", work=work)


def _place_of(letter: Letter) -> Cursor:
    return Cursor(letter.stream, letter.id)


def _kinds(totals: dict[str, Any]) -> list[str]:
    """Types of jobs that are known, for a form to offer."""
    return sorted(totals)


def _payload(task: bytes | None, raw: str | None) -> str:
    """The job's own bytes as text, set out over lines where they are JSON."""
    import json

    whole = task if task is not None else base64.b64decode(raw or "")
    try:
        return json.dumps(json.loads(whole), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return whole.decode("utf-8", "replace")
