"""``jobworker web`` in Chromium beside a running service: charts, layout and buttons."""

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

#: How long the page may take to show a change: it refreshes every 2 s, on a busy machine.
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


#: For what depends on the screen; each other test uses one of them.
ON_BOTH = pytest.mark.parametrize("tab", ["light desk", "dark phone"], indirect=True)
ON_PHONE = pytest.mark.parametrize("tab", ["dark phone"], indirect=True)


@pytest.fixture(params=["light desk"])
def tab(request: pytest.FixtureRequest, browser: Any, guarded: Page) -> Iterator[Any]:
    """A logged-in browser tab. At its end the console must hold no error and no warning."""
    light, size = request.param.split()
    context = browser.new_context(color_scheme=light, viewport=DESK if size == "desk" else PHONE)
    context.set_default_timeout(SHOWN_WITHIN_MS)
    tab = context.new_page()
    problems: list[str] = []
    tab.on(
        "console",
        lambda message: problems.append(message.text) if message.type in ("error", "warning") else None,
    )
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(guarded.url)
    tab.get_by_label("Token").fill(TOKEN)
    tab.get_by_role("button", name="Log in").click()
    tab.wait_for_selector("#tiles")
    tab.light, tab.size = light, size
    yield tab
    assert problems == []
    context.close()


def dead_jobs(live: Service, kind: str, count: int = 1, **payload: Any) -> list[str]:
    """Send jobs that fail permanently and wait for their dead letters."""
    ids = live.enqueue_many([{"type": kind, "payload": payload, "tenant_id": "t1"}] * count)
    for id in ids:
        live.dead_letter(id)
    return ids


class TestPage:
    @ON_BOTH
    def test_charts_and_tables_refresh(self, tab: Any, live: Service) -> None:
        tab.wait_for_selector(".chart canvas")
        assert tab.locator(".chart canvas").count() == 4
        id = live.enqueue("gate", {"gate": f"browser {tab.size}"})
        live.wait_for_start(id)
        tab.locator("#busy").get_by_text(id).wait_for()
        live.open_gate(f"browser {tab.size}")
        live.wait_for_end(id)
        tab.locator("#busy").get_by_text(id).wait_for(state="detached")
        assert "live" in tab.locator(".live").inner_text()

    def test_each_type_has_charts(self, tab: Any, guarded: Page, live: Service) -> None:
        live.wait_for_end(live.enqueue("noop"))
        tab.goto(guarded.url + "/types")
        charts = tab.locator("[data-type=noop] canvas")
        charts.nth(2).wait_for()
        assert charts.count() == 3

    def test_slash_goes_to_the_search_box(self, tab: Any, guarded: Page) -> None:
        search = tab.get_by_role("searchbox")
        tab.locator("body").press("/")
        assert tab.evaluate("document.activeElement.name") == "id"
        search.press("/")
        assert search.input_value() == "/", "inside of a field it is a character"

    @ON_BOTH
    def test_it_fits_the_screen_and_the_colour_scheme(self, tab: Any, guarded: Page, live: Service) -> None:
        dead_jobs(live, "permanent")
        for path in ("/", "/queues", "/types", "/workers", "/retries", "/dead"):
            tab.goto(guarded.url + path)
            width = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert width[0] <= width[1], path
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(number) for number in re.findall(r"\d+", colour)[:3]) / 3
        assert brightness > 200 if tab.light == "light" else brightness < 60

    @ON_PHONE
    def test_a_selected_letter_is_requeued(self, tab: Any, guarded: Page, live: Service) -> None:
        (id,) = dead_jobs(live, "permanent")
        tab.goto(f"{guarded.url}/dead?type=permanent")
        row = tab.locator("tr", has_text=id)
        row.get_by_role("checkbox").check()
        tab.get_by_role("button", name="Requeue (1)").click()
        tab.get_by_role("heading", name="Requeue 1 dead letter?").wait_for()
        started = len(live.events("start", id))
        tab.get_by_role("button", name="Requeue").click()
        tab.get_by_text("1 requeued").wait_for()
        live.wait_for_start(id, started + 1)
        tab.get_by_role("link", name="Back").click()
        assert "/dead?type=permanent" in tab.url

    def test_all_matching_letters_are_deleted_after_confirmation(
        self, tab: Any, guarded: Page, live: Service
    ) -> None:
        dead_jobs(live, "permanent", 3)
        before = live.client.xlen(f"dlq:{STREAM}")
        tab.goto(f"{guarded.url}/dead")
        tab.get_by_label("Reason").select_option("permanent")
        tab.get_by_role("button", name="Show").click()
        tab.get_by_role("button", name="Delete …").click()
        tab.get_by_role("link", name="Cancel").click()
        assert live.client.xlen(f"dlq:{STREAM}") == before
        tab.get_by_role("button", name="Delete …").click()
        tab.get_by_role("button", name="Delete permanently").click()
        tab.get_by_text(f"{before} deleted").wait_for()
        assert live.client.xlen(f"dlq:{STREAM}") == 0

    @ON_PHONE
    def test_a_job_is_found_by_its_id_and_retried_now(self, tab: Any, live: Service) -> None:
        id = live.enqueue("flaky", {"times": 1})
        eventually(lambda: live.client.zcard(f"retry:{STREAM}"))
        tab.get_by_role("searchbox").fill(id)
        tab.get_by_role("searchbox").press("Enter")
        tab.get_by_text("the next try is in").wait_for()
        tab.get_by_role("button", name="Retry now").click()
        tab.get_by_text("1 due now").wait_for()
        live.wait_for_end(id)

    def test_a_page_that_stops_answering_is_reported(self, live: Service, browser: Any) -> None:
        context = browser.new_context()
        with page(live) as one:
            tab = context.new_page()
            tab.goto(one.url)
            tab.wait_for_selector(".chart canvas")
        tab.locator(".live.lost").wait_for(timeout=SHOWN_WITHIN_MS)
        context.close()
