"""The real tools: promtool judges the rules, and a Prometheus scrapes a running service by them.

They are used where they are installed (Debian's package `prometheus`); nothing is fetched for it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.service import STREAM, Service, eventually, handlers, service

pytestmark = pytest.mark.process

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
RULES = sorted(str(path) for path in MONITORING.glob("*.rules.yml"))

needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="no promtool here: apt install prometheus")
needs_prometheus = pytest.mark.skipif(not PROMETHEUS, reason="no prometheus here: apt install prometheus")


def promtool(*arguments: str) -> str:
    """Run it; its output, which it is shown by where it found something."""
    done = subprocess.run(
        [str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_the_rules_are_valid_and_pass_their_own_tests() -> None:
    promtool("check", "rules", *RULES)
    promtool("check", "config", str(MONITORING / "prometheus.yml"))
    promtool("test", "rules", str(MONITORING / "tests/alerts.test.yml"))


@needs_promtool
def test_the_page_passes_the_linter_of_metrics(scraped: Service) -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=scraped.get("/metrics")[1],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    # The names are older than the linter's taste: a unit that is not the base unit is all that it may find.
    found = [line for line in done.stderr.splitlines() if line and "milliseconds" not in line]
    assert not found


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that has done something."""
    options: dict[str, Any] = {"max_retries": 0, "procs": 1}
    with service(tmp_path_factory.mktemp("scraped"), handlers("Noop", "Permanent"), **options) as one:
        one.enqueue_many({"type": "noop", "created_at": "2026-01-02T10:00:00Z"} for _ in range(10))
        one.dead_letter(one.enqueue("permanent"))
        yield one


@pytest.fixture
def prometheus(scraped: Service, tmp_path: Path) -> Iterator[str]:
    """A Prometheus of this test's own with the repository's rules, scraping the service; its url."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = RULES
    config["scrape_configs"][0]["static_configs"] = [{"targets": [urllib.parse.urlsplit(scraped.url).netloc]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [str(PROMETHEUS), f"--config.file={tmp_path}/prometheus.yml",
               f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    log = tmp_path / "prometheus.log"
    with log.open("wb") as out:
        tether = [sys.executable, "-m", "jobworker.worker.supervision.pdeathsig", str(os.getpid())]
        process = subprocess.Popen([*tether, *command], stdout=out, stderr=out, cwd=tmp_path)
    try:
        yield f"http://127.0.0.1:{port}"
    except BaseException as error:
        error.add_note(log.read_text()[-3000:])
        raise
    finally:
        process.kill()
        process.wait(10)


def asked(url: str, path: str, **parameters: str) -> Any:
    """The ``data`` of an answer of Prometheus; None while it does not listen yet."""
    try:
        with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(parameters)}", timeout=5) as page:
            return json.load(page)["data"]
    except urllib.error.URLError:
        return None


def value(url: str, expression: str) -> float | None:
    """Of the first sample."""
    found = asked(url, "/api/v1/query", query=expression)
    return float(found["result"][0]["value"][1]) if found and found["result"] else None


@needs_prometheus
def test_a_real_prometheus_scrapes_it_and_can_work_with_every_rule(scraped: Service, prometheus: str) -> None:
    eventually(lambda: value(prometheus, 'up{job="jobworker"}') == 1.0, saying="scraped")
    eventually(lambda: value(prometheus, 'z_novel_jobs_completed_total{task_type="noop"}') == 10.0)
    eventually(lambda: value(prometheus, f'stream:z_novel_dlq_length:max{{stream="{STREAM}"}}') == 1.0)
    assert value(prometheus, "z_novel_ready") == 1.0
    # Two scrapes, and what is counted per second has a value.
    eventually(lambda: (value(prometheus, "rate(z_novel_read_cycles_total[1m])") or 0) > 0)

    def rules() -> list[dict[str, Any]]:
        groups = asked(prometheus, "/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    dashboard = json.loads((MONITORING / "grafana/jobworker.json").read_text("utf-8"))
    for target in [target for panel in dashboard["panels"] for target in panel.get("targets", ())]:
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$job", ".+")
        assert asked(prometheus, "/api/v1/query", query=expression) is not None, expression

    eventually(lambda: all(rule["health"] != "unknown" for rule in rules()), saying="evaluated")
    assert not [rule for rule in rules() if rule["health"] != "ok"]
    assert not [rule["name"] for rule in rules() if rule.get("state") == "firing"]
