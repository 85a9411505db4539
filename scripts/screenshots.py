"""Makes the pictures of the documentation: the page and `top` beside a service under load with failures.

    python scripts/screenshots.py [--out docs/images] [--every FOLDER] [--warm-up SECONDS]

Everything is started here, in a temporary folder, and ended again. Needs the extras web, embedded and dev,
and a Chromium: in PATH, or fetched by scripts/fetch-tools.sh. --every takes every page, light and dark, on a
desk and on a phone, to be looked at.
"""

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from terminal_svg import drawn

from jobworker.worker import Producer

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
TOKEN = "only for the pictures, and only while they are made"
#: How long anything may take to show that it is there, on a machine that is busy with other things.
UP_WITHIN_S = 90.0
HANDLERS = {
    "embedding_batch": "Embed", "summary_write_back": "WriteBack", "index_rebuild": "Rebuild",
    "audit": "Audit",
}  # fmt: skip
#: Jobs a second that are sent, by type: in waves a little more than the workers do.
LOAD = {"embedding_batch": 80, "summary_write_back": 7, "audit": 40}
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@contextmanager
def started(*command: str, folder: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A program of ours, told to end on the way out."""
    with (folder / f"{Path(command[0]).name}.log").open("w") as log:
        popen = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env={**os.environ, **environment},
        )
        try:
            yield popen
        finally:
            popen.send_signal(signal.SIGTERM)
            try:
                popen.wait(20)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait(20)


@contextmanager
def service(folder: Path) -> Iterator[dict[str, str]]:
    """A service with stores of its own; its endpoints."""
    handlers = [f"--handler={kind}=screenshots_handlers:{name}" for kind, name in HANDLERS.items()]
    command = [
        str(BIN / "jobworker-supervise"), "--procs=8", "--no-builtin-handlers", *handlers, "--instance=blue",
        f"--data-dir={folder / 'data'}", "--metrics-addr=127.0.0.1:0", "--max-retries=2", "--retry-initial=4",
    ]  # fmt: skip
    python_path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    with started(*command, folder=folder, PYTHONPATH=python_path):
        endpoints = folder / "data" / "endpoints.json"
        give_up_at = time.monotonic() + UP_WITHIN_S
        while not endpoints.exists():
            if time.monotonic() > give_up_at:
                raise TimeoutError((folder / "jobworker-supervise.log").read_text()[-2000:])
            time.sleep(0.1)  # a file that another process makes has no event without inotify
        yield json.loads(endpoints.read_text())


def send(url: str, ending: threading.Event) -> None:
    """Jobs as they come in on a busy evening: in waves, a rebuild now and then, one wrong producer."""
    chance = random.Random(20260102)
    number = 0
    with Producer(url) as producer:
        while not ending.wait(0.5):
            wave = 1.0 + 0.9 * ((time.monotonic() / 20) % 2 > 1)
            for kind, per_s in LOAD.items():
                for _ in range(int(per_s * wave / 2)):
                    number += 1
                    tenant = f"t{chance.randrange(1, 40):03}"
                    payload = {"tenant_id": tenant, "texts": ["It was a dark night."]}
                    producer.enqueue(
                        kind, payload, tenant_id=tenant, project_id="p1", id=f"{kind[:3]}-{number:06}"
                    )
            if number % 40 < 4:
                producer.enqueue("index_rebuild", {"collection": "story_segments"})
                producer.enqueue("embeding_batch", {"ids": []}, tenant_id="t007", stream="stream:story:gen")


@contextmanager
def sending(url: str) -> Iterator[None]:
    """The load, until the pictures are made."""
    ending = threading.Event()
    thread = threading.Thread(target=send, args=(url, ending))
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(20)


@contextmanager
def web(endpoints: dict[str, str], folder: Path) -> Iterator[str]:
    """The page; where it is."""
    command = [
        str(BIN / "jobworker"), "web", "--listen=127.0.0.1:0", "--allow-actions", "--interval=1",
        f"--metrics-url={endpoints['metrics_url']}",
    ]  # fmt: skip
    with started(
        *command, folder=folder, JOBWORKER_WEB_TOKEN=TOKEN, JOBWORKER_REDIS_URL=endpoints["redis_url"]
    ) as popen:
        assert popen.stdout is not None
        if not select.select([popen.stdout], [], [], UP_WITHIN_S)[0]:
            raise TimeoutError("the page does not say where it listens")
        yield popen.stdout.readline().split()[1]


def browser_path() -> str:
    """Path of Chromium: the one that scripts/fetch-tools.sh fetched, or the machine's."""
    found = shutil.which("chromium", path=f"{sys.prefix}/debian/bin") or shutil.which("chromium")
    if found is None:
        raise SystemExit("there is no chromium in PATH: run make tools")
    return found


@contextmanager
def looking(browser: Browser, url: str, *, dark: bool, size: dict[str, int]) -> Iterator[Page]:
    """Somebody who has logged in."""
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")  # type: ignore[arg-type]
    context.set_default_timeout(UP_WITHIN_S * 1000)
    page = context.new_page()
    page.goto(f"{url}/login")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_selector(".chart canvas")
    try:
        yield page
    finally:
        context.close()


def take_every(browser: Browser, url: str, folder: Path) -> None:
    """Each page, twice in each size."""
    for name, size, dark in (("desk", DESK, False), ("desk-dark", DESK, True), ("phone", PHONE, False),
                             ("phone-dark", PHONE, True)):  # fmt: skip
        with looking(browser, url, dark=dark, size=size) as page:
            for path in ("/", "/queues", "/workers", "/retries", "/dead", "/dead?reason=permanent&newer=1h"):
                page.goto(url + path)
                page.wait_for_timeout(1500)  # the charts and the first exchange
                label = re.sub(r"\W+", "-", path).strip("-") or "overview"
                page.screenshot(path=folder / f"{label}-{name}.png", full_page=True)
            page.goto(f"{url}/dead")
            page.locator("tbody td a").first.click()
            page.screenshot(path=folder / f"letter-{name}.png", full_page=True)
            page.goto(f"{url}/workers")
            page.locator("a.id").first.click()
            page.screenshot(path=folder / f"job-{name}.png", full_page=True)
            page.goto(f"{url}/dead")
            page.get_by_role("button", name="Delete …").click()
            page.screenshot(path=folder / f"confirm-{name}.png", full_page=True)


def take_for_docs(browser: Browser, url: str, folder: Path) -> None:
    """The overview by day and by night, and dead letters on a phone."""
    for name, dark in (("web-light", False), ("web-dark", True)):
        with looking(browser, url, dark=dark, size=DESK) as page:
            page.wait_for_timeout(2500)  # two exchanges, so that nothing of it is of the start
            page.screenshot(path=folder / f"{name}.png")
    with looking(browser, url, dark=False, size=PHONE) as page:
        page.goto(f"{url}/dead")
        page.screenshot(path=folder / "web-phone.png")


def take_top(endpoints: dict[str, str], folder: Path) -> None:
    """`jobworker top` in a terminal of 100 x 30."""
    command = [str(BIN / "jobworker"), "top", "--metrics-url", endpoints["metrics_url"]]
    environment = {**os.environ, "JOBWORKER_REDIS_URL": endpoints["redis_url"]}
    (folder / "top.svg").write_text(drawn(command, environment, columns=100, rows=30, for_s=4.0))


def main() -> None:
    """Start all, wait until there is something to see, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    parser.add_argument("--every", type=Path)
    parser.add_argument("--warm-up", type=float, default=75.0)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="screenshots-")))
        endpoints = stack.enter_context(service(folder))
        stack.enter_context(sending(endpoints["redis_url"]))
        url = stack.enter_context(web(endpoints, folder))
        time.sleep(options.warm_up)  # the charts need a past
        playwright: Any = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=browser_path(), args=BROWSER_FLAGS)
        stack.callback(browser.close)
        if options.every:
            options.every.mkdir(parents=True, exist_ok=True)
            take_every(browser, url, options.every)
        else:
            options.out.mkdir(parents=True, exist_ok=True)
            take_for_docs(browser, url, options.out)
            take_top(endpoints, options.out)


if __name__ == "__main__":
    main()
