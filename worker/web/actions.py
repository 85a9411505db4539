"""Forms that change something: log in and out, requeue, delete, retry now, cancel, pause and resume.

An action needs ``--allow-actions``, a session and the session's CSRF token in the form.
"""

import hmac
import logging
import re
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..admin.dead_letters import BulkOperation, Cursor, DeadLetterQueue, SelectedLetters
from ..admin.deployment import with_shards
from ..cancel import SCAN_LIMIT, Canceller, JobFilter, outcome_of
from ..results import CancelOutcome
from ..store.redis.operator import OperatorStore
from .access import Access, TooManyFailures
from .background import BackgroundTask, TooManyTasks
from .filters import DeadFilter, format_cursor
from .guard import COOKIE
from .pages import Site, named_refusal

log = logging.getLogger("jobworker.web")

#: A form with a page of letters has about 5 KB.
_MAX_FORM_BYTES = 256 * 1024
_MAX_FORM_FIELDS = 1000
#: Operations on dead letters, and the participle of each for its outcome.
_OPERATIONS = {"requeue": "requeued", "purge": "deleted"}
#: Outcome of a cancellation in words.
_CANCELLED = {
    CancelOutcome.CANCELLED: "The job waited and was removed: it is a dead letter now.",
    CancelOutcome.REQUESTED: "The service that has the job was asked to end it.",
    CancelOutcome.ENDED: "The job had ended already.",
    CancelOutcome.UNKNOWN: "The job was not found any more.",
}

Form = dict[str, list[str]]


async def read_form(request: Request) -> Form:
    """The fields of a form. Raises `HTTPException` if the body is not a form or too large."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "The body of this request is not a form.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise HTTPException(413, "The form is too large.")
    try:
        return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FORM_FIELDS)
    except ValueError as error:
        raise HTTPException(400, "The form cannot be read.") from error


def first_value(form: Form, name: str) -> str:
    """The first value of a field; empty if the field is absent."""
    return form.get(name, [""])[0]


class Actions:
    """One method per form. Unless ``allowed``, only log in and log out work."""

    def __init__(self, site: Site, access: Access, allowed: bool) -> None:
        self._site = site
        self._access = access
        self._allowed = allowed

    # -- the session

    def login_form(self, request: Request) -> Response:
        """The form that asks for the token."""
        return self._login_page(request, request.query_params.get("next", "/"))

    async def log_in(self, request: Request) -> Response:
        """Open a session, or show the form again."""
        form = await read_form(request)
        next_page = first_value(form, "next")
        address = request.client.host if request.client else ""
        try:
            cookie = self._access.log_in(first_value(form, "token"), address)
        except TooManyFailures:
            log.warning("web.login_throttled", extra={"address": address})
            return self._login_page(request, next_page, "Too many wrong tokens: wait a minute.", 429)
        if cookie is None:
            log.warning("web.login_refused", extra={"address": address})
            return self._login_page(request, next_page, "The token is wrong.", 403)
        response = RedirectResponse(_local_path(next_page), 303)
        response.set_cookie(
            COOKIE, cookie, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return response

    async def log_out(self, request: Request) -> Response:
        """End the session."""
        self._check_csrf(request, await read_form(request))
        self._access.log_out(request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE, path="/")
        return response

    def _login_page(self, request: Request, next_page: str, error: str = "", status: int = 200) -> Response:
        return self._site.renderer.page(request, "login.html", status, next_page=next_page, error=error)

    def _check_csrf(self, request: Request, form: Form) -> None:
        session = request.state.session
        token = first_value(form, "csrf")
        if session is None or not hmac.compare_digest(token.encode(), session.csrf.encode()):
            raise HTTPException(403, "This form is from an earlier session: go back and reload the page.")

    async def _read_action(self, request: Request) -> Form:
        """The form of an action. Raises `HTTPException` unless actions are allowed and the form is from this
        session."""
        if not self._allowed:
            raise HTTPException(
                403, "This page is read-only: start it with --allow-actions to allow actions."
            )
        form = await read_form(request)
        self._check_csrf(request, form)
        return form

    # -- dead letters

    async def confirm(self, request: Request) -> Response:
        """Ask for confirmation, with the number of letters."""
        form = await self._read_action(request)
        return await run_in_threadpool(self._confirm, request, form)

    def _confirm(self, request: Request, form: Form) -> Response:
        operation, selected, filter = _operation(form), self._selected(form), _filter(form)
        with self._site.store() as store:
            now_s = store.wall_now_s(self._site.streams[0])
            queue = self._queue(store, selected, filter, now_s)
            page = queue.page(SCAN_LIMIT, SCAN_LIMIT) if not selected else None
            count = len(selected) if page is None else len(page.letters)
        return self._site.renderer.page(
            request, "confirm.html", operation=operation, count=count, filter=filter,
            which=first_value(form, "which"), selected=[format_cursor(cursor) for cursor in selected],
            asked_at=f"{now_s:.3f}", at_least=page is not None and page.next_cursor is not None,
            back=_local_path(first_value(form, "back")),
        )  # fmt: skip

    async def start_operation(self, request: Request) -> Response:
        """Start the operation that was confirmed."""
        form = await self._read_action(request)
        operation, selected, filter = _operation(form), self._selected(form), _filter(form)
        back = _local_path(first_value(form, "back"))
        # Letters written after the question was asked are left: their number was not part of it.
        asked_at_s = _parse_time(first_value(form, "asked_at"))
        self._site.streams_of(filter)  # an invalid form is refused here, not by the task
        filter.letter_filter(asked_at_s)
        letters = [format_cursor(cursor) for cursor in selected]
        _log_action(request, operation, letters=letters, filter=filter.descriptions)

        def run(task: BackgroundTask) -> str:
            with self._site.store() as store:
                queue = self._queue(store, selected, filter, asked_at_s)
                bulk = BulkOperation(queue)
                task.total = queue.count()
                (bulk.requeue if operation == "requeue" else bulk.purge)(on_scanned=task.add_scanned)
            return "; ".join([_outcome(operation, bulk), *queue.refused.values()])

        title = {"requeue": "Requeue dead letters", "purge": "Delete dead letters"}[operation]
        return self._start_task(title, back, run)

    def _selected(self, form: Form) -> list[Cursor]:
        """The selected letters; none if the form says that all matching letters are meant. Raises
        `HTTPException` if it says neither."""
        if first_value(form, "which") == "all":
            return []
        if "at" not in form:
            raise HTTPException(400, "No dead letter was selected.")
        return [self._site.cursor(text) for text in form["at"]]

    def _queue(
        self, store: OperatorStore, selected: list[Cursor], filter: DeadFilter, now_s: float
    ) -> DeadLetterQueue:
        if selected:
            return SelectedLetters(store, selected)
        return self._site.dead_letters(store, filter, now_s)

    def _start_task(self, title: str, back: str, run: Callable[[BackgroundTask], str]) -> Response:
        try:
            task = self._site.tasks.start(title, back, run)
        except TooManyTasks:
            raise HTTPException(429, "Too many tasks are running: wait until one has ended.") from None
        return RedirectResponse(f"/dead/progress/{task.number}", 303)

    # -- retries and pauses

    async def retry_now(self, request: Request) -> Response:
        """Make one waiting job due now, or all of a type and tenant."""
        form = await self._read_action(request)
        id, type, tenant = (first_value(form, name) for name in ("id", "type", "tenant"))
        _log_action(request, "retry_now", id=id, type=type, tenant=tenant)

        def run(task: BackgroundTask) -> str:
            with self._site.store() as store:
                retries = self._site.retries(store, type, tenant)
                moved = (retries.with_id(id) if id else retries).make_due_now()
            says = f"{moved} due now" if moved else "No job was waiting any more."
            return "; ".join([says, *(retries.refused or {}).values()])

        return self._start_task("Retry now", _local_path(first_value(form, "back")), run)

    async def cancel(self, request: Request) -> Response:
        """Cancel one job of a stream or of its shards; it becomes a dead letter."""
        form = await self._read_action(request)
        id, stream = first_value(form, "id"), first_value(form, "stream")
        if not id or not stream:
            raise HTTPException(400, "The form names no job.")
        _log_action(request, "cancel", id=id, stream=stream)

        def run(task: BackgroundTask) -> str:
            with self._site.store() as store:
                # Since the page was made the job may have been moved into a shard, where its entry is new.
                streams, selected = with_shards(store, stream), JobFilter(frozenset([id]))
                search = Canceller(store, streams, selected, by="operator", scan_limit=SCAN_LIMIT)
                outcome = outcome_of(list(search.run()))
            if outcome == CancelOutcome.UNKNOWN and search.incomplete:
                return f"The job was not found among the first {SCAN_LIMIT:,} entries of each stream."
            return _CANCELLED[outcome]

        return self._start_task("Cancel a job", _local_path(first_value(form, "back")), run)

    async def pause(self, request: Request) -> Response:
        """Pause a job type."""
        form = await self._read_action(request)
        type, note = first_value(form, "type").strip(), first_value(form, "note").strip()
        if not type:
            raise HTTPException(400, "Enter the job type to pause.")
        _log_action(request, "pause", type=type, note=note)
        return await run_in_threadpool(self._change_pauses, lambda store: store.pause(type, note))

    async def resume(self, request: Request) -> Response:
        """Resume a job type."""
        form = await self._read_action(request)
        type = first_value(form, "type")
        _log_action(request, "resume", type=type)

        def change(store: OperatorStore) -> None:
            if not store.resume(type):
                raise HTTPException(404, f"The type {type!r:.80} is not paused, so nothing changed.")

        return await run_in_threadpool(self._change_pauses, change)

    def _change_pauses(self, change: Callable[[OperatorStore], None]) -> Response:
        with self._site.store() as store, named_refusal("paused types", store.pause_faults):
            change(store)
        self._site.history.refresh()
        return RedirectResponse("/queues", 303)


def _log_action(request: Request, action: str, **fields: object) -> None:
    """Log who did what: unlike a shell, a page keeps no history of commands."""
    address = request.client.host if request.client else ""
    log.info("web.action", extra={"action": action, "address": address, **fields})


def _operation(form: Form) -> str:
    operation = first_value(form, "operation")
    if operation not in _OPERATIONS:
        raise HTTPException(400, "The form names no operation on dead letters.")
    return operation


def _filter(form: Form) -> DeadFilter:
    return DeadFilter.read(lambda name: first_value(form, name))


def _outcome(operation: str, bulk: BulkOperation) -> str:
    gone = f", {bulk.gone} were gone already" if bulk.gone else ""
    skipped = f", {bulk.skipped} skipped that hold no readable job" if bulk.skipped else ""
    return f"{bulk.done} {_OPERATIONS[operation]}{gone}{skipped}"


def _parse_time(text: str) -> float:
    if not re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text, re.ASCII):
        raise HTTPException(400, "The form cannot be read.")
    return float(text)


def _local_path(path: str) -> str:
    """The path itself if it leads to this page, else the first page: protection against open redirects."""
    elsewhere = not path.startswith("/") or path.startswith(("//", "/\\")) or any(c < " " for c in path)
    return "/" if elsewhere else path
