"""What the page changes: each by a form that its own page sent, with a session's own token in it."""

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
from ..store.operator import OperatorStore
from .access import Access, TooManyTries
from .background import BackgroundTask, TooManyTasks
from .filters import DeadFilter, write_place
from .guard import COOKIE
from .pages import LOOK_AT, Site

log = logging.getLogger("jobworker.web")

#: A page of letters comes to some 5 KB.
_FORM_BYTES = 256 * 1024
_FORM_FIELDS = 1000
#: What may be done to dead letters, and how it is told when it is over.
_DEEDS = {"requeue": "sent again", "purge": "deleted"}

Form = dict[str, list[str]]


async def read_form(request: Request) -> Form:
    """The fields of a form. Raises `HTTPException` for a body that is none, or too large."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "A form was expected.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _FORM_BYTES:
            raise HTTPException(413, "The form is too large.")
    try:
        return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_FORM_FIELDS)
    except ValueError as error:
        raise HTTPException(400, "The form cannot be read.") from error


def one_of(form: Form, name: str) -> str:
    """A field's first value, empty where it is absent."""
    return form.get(name, [""])[0]


class Actions:
    """A method a form. Without ``allowed`` every one is refused but logging in and out."""

    def __init__(self, site: Site, access: Access, allowed: bool) -> None:
        self._site = site
        self._access = access
        self._allowed = allowed

    # -- the token

    def ask_token(self, request: Request) -> Response:
        """The form that asks for it."""
        return self._login(request, request.query_params.get("next", "/"))

    async def log_in(self, request: Request) -> Response:
        """Open a session, or ask again."""
        form = await read_form(request)
        wanted = one_of(form, "next")
        try:
            cookie = self._access.log_in(one_of(form, "token"), request.client.host if request.client else "")
        except TooManyTries:
            log.warning("too many wrong tokens", extra={"address": request.client and request.client.host})
            return self._login(request, wanted, "Too many wrong tokens: wait a minute.", 429)
        if cookie is None:
            log.warning("wrong token", extra={"address": request.client and request.client.host})
            return self._login(request, wanted, "This is not the token.", 403)
        response = RedirectResponse(_local(wanted), 303)
        response.set_cookie(
            COOKIE, cookie, path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return response

    async def log_out(self, request: Request) -> Response:
        """End the session."""
        self._check(request, await read_form(request))
        self._access.log_out(request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE, path="/")
        return response

    def _login(self, request: Request, wanted: str, trouble: str = "", status: int = 200) -> Response:
        return self._site.renderer.page(request, "login.html", status, wanted=wanted, trouble=trouble)

    def _check(self, request: Request, form: Form) -> None:
        session = request.state.session
        if session is None or not hmac.compare_digest(one_of(form, "csrf").encode(), session.csrf.encode()):
            raise HTTPException(403, "This form is of an earlier session: go back, load the page anew.")

    async def _asked(self, request: Request) -> Form:
        """A form that may change something."""
        if not self._allowed:
            raise HTTPException(403, "This page only shows: start it with --allow-actions to act from it.")
        form = await read_form(request)
        self._check(request, form)
        return form

    # -- dead letters

    async def confirm(self, request: Request) -> Response:
        """Say what would be done to how many, before it is done."""
        form = await self._asked(request)
        return await run_in_threadpool(self._confirm, request, form)

    def _confirm(self, request: Request, form: Form) -> Response:
        deed, picked, filter = _deed(form), self._picked(form), DeadFilter.read(lambda n: one_of(form, n))
        with self._site.store() as store:
            now_s = store.wall_now_s(self._site.streams[0])
            desk = self._desk(store, picked, filter, now_s)
            page = desk.page(LOOK_AT, LOOK_AT) if not picked else None
            count = len(picked) if page is None else len(page.letters)
        return self._site.renderer.page(
            request, "confirm.html", deed=deed, count=count, filter=filter, which=one_of(form, "which"),
            picked=[write_place(place) for place in picked],
            asked_at=f"{now_s:.3f}", at_least=page is not None and page.behind is not None,
            back=_local(one_of(form, "back")),
        )  # fmt: skip

    async def do(self, request: Request) -> Response:
        """Do what was confirmed."""
        form = await self._asked(request)
        deed, picked, back = _deed(form), self._picked(form), _local(one_of(form, "back"))
        filter = DeadFilter.read(lambda name: one_of(form, name))
        asked_at_s = _number(one_of(form, "asked_at"))
        self._site.streams_of(filter)  # what is wrong with the form is told now, not by the work
        filter.choice(asked_at_s)
        _tell(request, deed, letters=[write_place(place) for place in picked], filter=filter.words)

        def go(work: BackgroundTask) -> str:
            with self._site.store() as store:
                errand = BulkOperation(self._desk(store, picked, filter, asked_at_s))
                work.total = errand.desk.count()
                (errand.requeue if deed == "requeue" else errand.purge)(seen=work.seen)
            return _outcome(deed, errand)

        title = {"requeue": "Sending dead letters again", "purge": "Deleting dead letters"}[deed]
        return self._start(title, back, go)

    def _picked(self, form: Form) -> list[Cursor]:
        """The letters that were ticked; none where all that fit are meant, which a form has to say."""
        if one_of(form, "which") == "all":
            return []
        if "at" not in form:
            raise HTTPException(400, "No dead letter was ticked.")
        return [self._site.place(text) for text in form["at"]]

    def _desk(
        self, store: OperatorStore, picked: list[Cursor], filter: DeadFilter, now_s: float
    ) -> DeadLetterQueue:
        return SelectedLetters(store, picked) if picked else self._site.desk(store, filter, now_s)

    def _start(self, title: str, back: str, deed: Callable[[BackgroundTask], str]) -> Response:
        try:
            work = self._site.works.start(title, back, deed)
        except TooManyTasks:
            raise HTTPException(
                429, "As much as may be is under way already: wait until it is done."
            ) from None
        return RedirectResponse(f"/dead/progress/{work.number}", 303)

    # -- retries and pauses

    async def retry_now(self, request: Request) -> Response:
        """Have one waiting job, or all of a type and tenant, tried now."""
        form = await self._asked(request)
        id, type, tenant = (one_of(form, name) for name in ("id", "type", "tenant"))
        _tell(request, "retry now", id=id, type=type, tenant=tenant)

        def go(work: BackgroundTask) -> str:
            with self._site.store() as store:
                desk = self._site.retry_desk(store, type, tenant)
                moved = (desk.only(id) if id else desk).try_now()
            return f"{moved} due now" if moved else "None was waiting for later any more."

        return self._start("Having retries tried now", _local(one_of(form, "back")), go)

    async def pause(self, request: Request) -> Response:
        """Keep a type from being run."""
        form = await self._asked(request)
        type, note = one_of(form, "type").strip(), one_of(form, "note").strip()
        if not type:
            raise HTTPException(400, "Which type?")
        _tell(request, "pause", type=type, note=note)
        return await run_in_threadpool(self._change, lambda store: store.pause(type, note))

    async def resume(self, request: Request) -> Response:
        """Let a type run again."""
        form = await self._asked(request)
        type = one_of(form, "type")
        _tell(request, "resume", type=type)
        return await run_in_threadpool(self._change, lambda store: store.resume(type))

    def _change(self, change: Callable[[OperatorStore], object]) -> Response:
        with self._site.store() as store:
            change(store)
        self._site.board.look_now()
        return RedirectResponse("/queues", 303)


def _tell(request: Request, deed: str, **of_what: object) -> None:
    """Who did what stands in the log: a page has no shell history."""
    address = request.client.host if request.client else ""
    log.info("asked for by the page", extra={"deed": deed, "address": address, **of_what})


def _deed(form: Form) -> str:
    deed = one_of(form, "deed")
    if deed not in _DEEDS:
        raise HTTPException(400, "Nothing that can be done to a dead letter.")
    return deed


def _outcome(deed: str, errand: BulkOperation) -> str:
    gone = f", {errand.gone} were gone already" if errand.gone else ""
    left = f", {errand.skipped} left that hold no job" if errand.skipped else ""
    return f"{errand.done} {_DEEDS[deed]}{gone}{left}"


def _number(text: str) -> float:
    if not re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text, re.ASCII):
        raise HTTPException(400, "The form cannot be read.")
    return float(text)


def _local(path: str) -> str:
    """A path of this page; the first page where it would lead elsewhere."""
    elsewhere = not path.startswith("/") or path.startswith(("//", "/\\")) or any(c < " " for c in path)
    return "/" if elsewhere else path
