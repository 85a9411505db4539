"""``jobworker web`` in a real Chromium, beside a running service: what a person sees and clicks."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from support.service import STREAM, Service, eventually, handlers, service
from support.tools import why_missing
from support.web import BROWSER_FLAGS, TOKEN, Page, page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright: not installed (extra `dev`)")

WHY_NOT = why_missing("chromium", "chromium")
pytestmark = [pytest.mark.process, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

#: How long the page may take to show what has happened: its own turn of 2 s, on a busy machine.
SHOWN_WITHIN_MS = 20_000
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    toys = handlers("Noop", "Gate", "Flaky", "Permanent")
    with service(tmp_path_factory.mktemp("live"), toys, retry_initial=60, retry_max=600) as one:
        yield one


@pytest.fixture(scope="module")
def guarded(live: Service) -> Iterator[Page]:
    with page(live, "--allow-actions", token=TOKEN) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER_FLAGS)
        yield one
        one.close()


@pytest.fixture(params=["light desk", "dark phone"])
def person(request: pytest.FixtureRequest, browser: Any, guarded: Page) -> Iterator[Any]:
    """Somebody who logs in by the form; at the end nothing may have been refused or gone wrong."""
    light, size = request.param.split()
    context = browser.new_context(color_scheme=light, viewport=DESK if size == "desk" else PHONE)
    context.set_default_timeout(SHOWN_WITHIN_MS)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on(
        "console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None
    )
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(guarded.url)
    tab.get_by_label("Token").fill(TOKEN)
    tab.get_by_role("button", name="Log in").click()
    tab.wait_for_selector("#tiles")
    tab.light, tab.size = light, size
    yield tab
    assert complaints == []
    context.close()


def settled(live: Service, kind: str, count: int = 1, **payload: Any) -> list[str]:
    """Send jobs that fail for good, and wait for their dead letters."""
    ids = live.enqueue_many([{"type": kind, "payload": payload, "tenant_id": "t1"}] * count)
    for id in ids:
        live.dead_letter(id)
    return ids


class TestPage:
    def test_charts_and_numbers_move_by_themselves(self, person: Any, live: Service) -> None:
        person.wait_for_selector(".chart canvas")
        assert person.locator(".chart canvas").count() == 4
        id = live.enqueue("gate", {"gate": f"browser {person.size}"})
        live.wait_for_start(id)
        person.locator("#busy").get_by_text(id).wait_for()
        live.open_gate(f"browser {person.size}")
        live.wait_for_end(id)
        person.locator("#busy").get_by_text(id).wait_for(state="detached")
        assert "live" in person.locator(".live").inner_text()

    def test_it_fits_the_screen_and_its_light(self, person: Any, guarded: Page, live: Service) -> None:
        settled(live, "permanent")
        for path in ("/", "/queues", "/workers", "/retries", "/dead"):
            person.goto(guarded.url + path)
            width = person.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert width[0] <= width[1], path
        colour = person.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(number) for number in re.findall(r"\d+", colour)[:3]) / 3
        assert brightness > 200 if person.light == "light" else brightness < 60

    def test_a_ticked_letter_is_sent_again(self, person: Any, guarded: Page, live: Service) -> None:
        (id,) = settled(live, "permanent")
        person.goto(f"{guarded.url}/dead?type=permanent")
        row = person.locator("tr", has_text=id)
        row.get_by_role("checkbox").check()
        person.get_by_role("button", name="Send again (1)").click()
        person.get_by_role("heading", name="Send 1 dead letter again?").wait_for()
        started = len(live.events("start", id))
        person.get_by_role("button", name="Send again").click()
        person.get_by_text("1 sent again").wait_for()
        live.wait_for_start(id, started + 1)
        person.get_by_role("link", name="Back").click()
        assert "/dead?type=permanent" in person.url

    def test_all_that_fit_are_deleted_once_confirmed(self, person: Any, guarded: Page, live: Service) -> None:
        settled(live, "permanent", 3)
        before = live.client.xlen(f"dlq:{STREAM}")
        person.goto(f"{guarded.url}/dead")
        person.get_by_label("Reason").select_option("permanent")
        person.get_by_role("button", name="Show").click()
        person.get_by_role("button", name="Delete …").click()
        person.get_by_role("link", name="Leave it").click()
        assert live.client.xlen(f"dlq:{STREAM}") == before
        person.get_by_role("button", name="Delete …").click()
        person.get_by_role("button", name="Delete for good").click()
        person.get_by_text(f"{before} deleted").wait_for()
        assert live.client.xlen(f"dlq:{STREAM}") == 0

    def test_a_job_is_found_by_its_id_and_tried_now(self, person: Any, live: Service) -> None:
        id = live.enqueue("flaky", {"times": 1})
        eventually(lambda: live.client.zcard(f"retry:{STREAM}"))
        person.get_by_role("searchbox").fill(id)
        person.get_by_role("searchbox").press("Enter")
        person.get_by_text("its next try is in").wait_for()
        person.get_by_role("button", name="Try now").click()
        person.get_by_text("1 due now").wait_for()
        live.wait_for_end(id)

    def test_it_says_when_nobody_answers_any_more(self, live: Service, browser: Any) -> None:
        context = browser.new_context()
        with page(live) as one:
            tab = context.new_page()
            tab.goto(one.url)
            tab.wait_for_selector(".chart canvas")
        tab.locator(".live.lost").wait_for(timeout=SHOWN_WITHIN_MS)
        context.close()
