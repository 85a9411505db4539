"""promtool checks the rules, and a real Prometheus with these rules scrapes a running service."""

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobworker.worker.supervision.pdeathsig import tied_to_us
from support.redis_servers import free_port
from support.service import STREAM, Service, eventually, handlers, service
from support.tools import why_missing

WHY_NOT = why_missing("prometheus", "prometheus", "promtool")
pytestmark = [pytest.mark.process, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

MONITORING = Path(__file__).resolve().parents[2] / "monitoring"
RULES = sorted(str(path) for path in MONITORING.glob("*.rules.yml"))


def promtool(*arguments: str) -> None:
    """Run it; the test fails with its output if it finds something."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid_and_pass_their_own_tests() -> None:
    promtool("check", "rules", *RULES)
    promtool("check", "config", str(MONITORING / "prometheus.yml"))
    promtool("test", "rules", str(MONITORING / "tests/alerts.test.yml"))


def test_the_page_passes_the_linter_of_metrics(scraped: Service) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=scraped.get("/metrics")[1],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    # Metrics in milliseconds keep their names, though the linter wants base units.
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


def often_evaluated(rules: str, folder: Path) -> Path:
    """A copy of a file of rules whose groups do not wait 15 s for their turn."""
    content = yaml.safe_load(Path(rules).read_text("utf-8"))
    for group in content["groups"]:
        group["interval"] = "1s"
    copy = folder / Path(rules).name
    copy.write_text(yaml.safe_dump(content))
    return copy


@pytest.fixture
def prometheus(scraped: Service, tmp_path: Path) -> Iterator[str]:
    """URL of a Prometheus with the repository's rules that scrapes the service."""
    port = free_port()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(often_evaluated(path, tmp_path)) for path in RULES]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [urllib.parse.urlsplit(scraped.url).netloc]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [str(shutil.which("prometheus")), f"--config.file={tmp_path}/prometheus.yml",
               f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    log = tmp_path / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*tied_to_us(), *command], stdout=out, stderr=out, cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: process.poll() is not None or is_ready(url), saying=log.read_text)
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.kill()
        process.wait(10)


def is_ready(url: str) -> bool:
    """Whether this Prometheus answers queries yet."""
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=30):
            return True
    except urllib.error.URLError:
        return False


def asked(url: str, path: str, **parameters: str) -> Any:
    """The ``data`` of an answer of Prometheus; the test fails if it refuses the query."""
    try:
        with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as page:
            return json.load(page)["data"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{path} {parameters}: {error.read().decode()}")


def value(url: str, expression: str) -> float | None:
    """Of the first sample."""
    found = asked(url, "/api/v1/query", query=expression)
    return float(found["result"][0]["value"][1]) if found["result"] else None


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
        asked(prometheus, "/api/v1/query", query=expression)

    eventually(lambda: all(rule["health"] != "unknown" for rule in rules()), saying="evaluated")
    assert not [rule for rule in rules() if rule["health"] != "ok"]
    assert not [rule["name"] for rule in rules() if rule.get("state") == "firing"]
