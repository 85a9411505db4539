"""Screenshots for the documentation: the web page and `top` beside a service under load with failures.

    python scripts/screenshots.py [--out docs/images] [--every FOLDER] [--warm-up SECONDS]

Starts all programs in a temporary folder and ends them. Needs the extras web, embedded and dev, and a
Chromium: in PATH, or fetched by scripts/fetch-tools.sh. --every takes every page, light and dark, in the size
of a desktop and of a phone, for a visual check.
"""

import argparse
import itertools
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

import orjson
from playwright.sync_api import Browser, Page, sync_playwright
from terminal_svg import render_terminal

from jobworker.worker import Producer

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
TOKEN = "only for the screenshots, while they are taken"
#: How long a program or a page may take to be ready, on a busy machine.
READY_WITHIN_S = 90.0
HANDLERS = {
    "embedding_batch": "Embed", "summary_write_back": "WriteBack", "index_rebuild": "Rebuild",
    "audit": "Audit",
}  # fmt: skip
#: Jobs sent per second by type: at the peaks slightly more than the workers process.
LOAD = {"embedding_batch": 80, "summary_write_back": 7, "audit": 40}
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@contextmanager
def started(*command: str, folder: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """A program that gets TERM at the end."""
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
    """A service with embedded stores; its endpoints."""
    handlers = [f"--handler={job_type}=screenshots_handlers:{name}" for job_type, name in HANDLERS.items()]
    command = [
        str(BIN / "jobworker-supervise"), "--procs=8", "--no-builtin-handlers", *handlers, "--instance=blue",
        f"--data-dir={folder / 'data'}", "--metrics-addr=127.0.0.1:0", "--max-retries=2", "--retry-initial=4",
    ]  # fmt: skip
    python_path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    with started(*command, folder=folder, PYTHONPATH=python_path):
        endpoints = folder / "data" / "endpoints.json"
        give_up_at = time.monotonic() + READY_WITHIN_S
        while not endpoints.exists():
            if time.monotonic() > give_up_at:
                raise TimeoutError((folder / "jobworker-supervise.log").read_text()[-2000:])
            time.sleep(0.1)  # without inotify there is no event for a file of another process
        yield orjson.loads(endpoints.read_text())


def send(url: str, stopping: threading.Event) -> None:
    """Send jobs until stopped: in waves, with a rebuild now and then and a producer with a wrong type."""
    rng = random.Random(20260102)
    number = 0
    with Producer(url) as producer:
        while not stopping.wait(0.5):
            wave = 1.0 + 0.9 * ((time.monotonic() / 20) % 2 > 1)
            for job_type, per_s in LOAD.items():
                for _ in range(int(per_s * wave / 2)):
                    number += 1
                    tenant = f"t{rng.randrange(1, 40):03}"
                    payload = {"tenant_id": tenant, "texts": ["It was a dark night."]}
                    producer.enqueue(
                        job_type, payload, tenant_id=tenant, project_id="p1", id=f"{job_type[:3]}-{number:06}"
                    )
            if number % 40 < 4:
                producer.enqueue("index_rebuild", {"collection": "story_segments"})
                producer.enqueue("embeding_batch", {"ids": []}, tenant_id="t007", stream="stream:story:gen")


@contextmanager
def sending(url: str) -> Iterator[None]:
    """Send load in a thread."""
    stopping = threading.Event()
    thread = threading.Thread(target=send, args=(url, stopping))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(20)


@contextmanager
def web(endpoints: dict[str, str], folder: Path) -> Iterator[str]:
    """The web page; its url."""
    command = [
        str(BIN / "jobworker"), "web", "--listen=127.0.0.1:0", "--allow-actions", "--interval=1",
        f"--metrics-url={endpoints['metrics_url']}",
    ]  # fmt: skip
    with started(
        *command, folder=folder, JOBWORKER_WEB_TOKEN=TOKEN, JOBWORKER_REDIS_URL=endpoints["redis_url"]
    ) as popen:
        assert popen.stdout is not None
        if not select.select([popen.stdout], [], [], READY_WITHIN_S)[0]:
            raise TimeoutError("the page did not print its address")
        yield popen.stdout.readline().split()[1]


def browser_path() -> str:
    """Path of Chromium: the one that scripts/fetch-tools.sh fetched, or the machine's. Raises SystemExit if
    there is none."""
    found = shutil.which("chromium", path=f"{sys.prefix}/debian/bin") or shutil.which("chromium")
    if found is None:
        raise SystemExit("there is no chromium in PATH: run make tools")
    return found


@contextmanager
def logged_in(browser: Browser, url: str, *, dark: bool, size: dict[str, int]) -> Iterator[Page]:
    """A browser tab after the log in."""
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")  # type: ignore[arg-type]
    context.set_default_timeout(READY_WITHIN_S * 1000)
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
    """Every page, light and dark, in each size."""
    sizes = {"desktop": DESKTOP, "phone": PHONE}
    for size, dark in itertools.product(sizes, (False, True)):
        name = f"{size}-dark" if dark else size
        with logged_in(browser, url, dark=dark, size=sizes[size]) as page:
            plain = ("/", "/queues", "/types", "/workers", "/retries", "/dead")
            for path in (*plain, "/dead?reason=permanent&newer=1h"):
                page.goto(url + path)
                page.wait_for_timeout(1500)  # the charts and the first refresh
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
    """The overview in both colour schemes, and dead letters on a phone."""
    for name, dark in (("web-light", False), ("web-dark", True)):
        with logged_in(browser, url, dark=dark, size=DESKTOP) as page:
            page.wait_for_timeout(2500)  # two refreshes: the numbers of the start are gone
            page.screenshot(path=folder / f"{name}.png")
    with logged_in(browser, url, dark=False, size=DESKTOP) as page:
        page.goto(f"{url}/types")
        page.wait_for_selector("[data-type] canvas")
        page.wait_for_timeout(1500)  # all charts
        page.screenshot(path=folder / "web-types.png")
    with logged_in(browser, url, dark=False, size=PHONE) as page:
        page.goto(f"{url}/dead")
        page.screenshot(path=folder / "web-phone.png")


def take_top(endpoints: dict[str, str], folder: Path) -> None:
    """`jobworker top` in a terminal of 100 x 30, as SVG."""
    command = [str(BIN / "jobworker"), "top", "--metrics-url", endpoints["metrics_url"]]
    environment = {**os.environ, "JOBWORKER_REDIS_URL": endpoints["redis_url"]}
    (folder / "top.svg").write_text(render_terminal(command, environment, columns=100, rows=30, after_s=4.0))


def main() -> None:
    """Start all programs, wait for the warm-up, take the screenshots."""
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
        time.sleep(options.warm_up)  # the charts need some history
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
