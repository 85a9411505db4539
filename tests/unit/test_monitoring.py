"""Rules and dashboard use metrics that are exported, and every alert leads to a runbook."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobworker.worker.telemetry.metrics import all_metrics

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "monitoring"
#: Labels that Prometheus itself puts on every sample.
SCRAPED = {"job", "instance"}
#: Made by Prometheus for every target.
SYNTHETIC = {"up"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"(?<![\w:$])[a-zA-Z_:][\w:]*(?![\w:])")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")
_BY = re.compile(r"\bby\s*\(([^)]*)\)")
_WORDS = {"by", "without", "or", "and", "unless", "on", "ignoring", "NaN"}


@functools.cache
def rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    found = []
    for path in sorted(MONITORING.glob("*.rules.yml")):
        for group in yaml.load(path.read_text("utf-8"), yaml.CSafeLoader)["groups"]:
            found += group["rules"]
    return found


ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression of every query of the dashboard, as Grafana would send it."""
    dashboard = json.loads((MONITORING / "grafana/jobworker.json").read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")


def expressions() -> list[tuple[str, str]]:
    """All of them, with whose they are."""
    named = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    return [*named, *panels()]


def exported() -> dict[str, set[str]]:
    """Every series that the service can show, with its labels."""
    found: dict[str, set[str]] = {}
    for name, metric in all_metrics().items():
        labels = set(metric.labels) | SCRAPED
        if metric.kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


def series(expression: str) -> set[str]:
    """The names of series in an expression: what is left without strings, selectors, labels and functions."""
    bare = _STRING.sub('""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    return {
        match[0]
        for match in _NAME.finditer(bare)
        if match[0] not in _WORDS and not bare[match.end() :].lstrip().startswith("(")
    }


def labels_of(name: str) -> set[str]:
    """The labels that a series has; those of a recorded one are what it is grouped by."""
    if name in RECORDED:
        inner = {label for one in series(RECORDED[name]) & RECORDED.keys() for label in labels_of(one)}
        grouped = {label.strip() for by in _BY.findall(RECORDED[name]) for label in by.split(",")}
        return (grouped - {"le"}) | inner
    return exported().get(name, SCRAPED)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (job, x) (rate(a_total{job=~"b|c"}[5m])) / count(d)', {"a_total", "d"}),
        ("a:b:c > 0.1 and deriv(a:b:c[15m]) > 0", {"a:b:c"}),
        ('up{job="x"} == 0 or absent(up{job="x"})', {"up"}),
    ],
)
def test_names_are_found_in_expressions(expression: str, names: set[str]) -> None:
    assert series(expression) == names


@pytest.mark.parametrize(("owner", "expression"), expressions())
def test_what_is_asked_for_exists(owner: str, expression: str) -> None:
    known = exported().keys() | RECORDED.keys() | SYNTHETIC
    asked = series(expression)
    assert asked, owner
    assert asked <= known, f"{owner}: {asked - known}"
    has = set.union(*(labels_of(name) for name in asked)) | {"le"}
    for by in _BY.findall(expression):
        assert {label.strip() for label in by.split(",")} <= has, owner
    for name, selector in _SELECTOR.findall(_STRING.sub('""', expression)):
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        assert wanted <= labels_of(name), f"{owner}: {name}{{{selector}}}"


def test_texts_name_labels_that_the_alert_has() -> None:
    for alert in ALERTS:
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
        grouped = [set(re.split(r",\s*", by)) for by in _BY.findall(alert["expr"])]
        has = set.union(*grouped) if grouped else set.union(*map(labels_of, series(alert["expr"])))
        assert named <= has, f"{alert['alert']}: {named - has}"


def test_every_alert_leads_to_a_runbook_and_every_runbook_belongs_to_an_alert() -> None:
    text = (ROOT / "docs/alerts.md").read_text("utf-8")
    headings = re.findall(r"^## (Jobworker\w+)$", text, re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{alert['alert'].lower()}"
        assert f"[{alert['alert']}](#{alert['alert'].lower()})" in text
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert {"summary", "description"} <= alert["annotations"].keys()


def test_every_alert_is_tested_with_what_fires_it_and_what_does_not() -> None:
    cases = yaml.safe_load((MONITORING / "tests/alerts.test.yml").read_text("utf-8"))["tests"]
    checks = [check for case in cases for check in case.get("alert_rule_test", ())]
    for alert in ALERTS:
        assert any(c["alertname"] == alert["alert"] and c.get("exp_alerts") for c in checks), alert["alert"]


def test_the_operators_table_explains_every_metric() -> None:
    text = (ROOT / "docs/operating.md").read_text("utf-8")
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    missing = [name for name in all_metrics() if f"`{name}" not in table]
    assert not missing


def test_what_the_builtin_handlers_count_has_a_meaning() -> None:
    sources = [path.read_text("utf-8") for path in sorted((ROOT / "handlers").rglob("*.py"))]
    counted = {
        name for source in sources for name in re.findall(r"counters(?:: [^=]+)? \|?= \{(.*?)\}", source)
    }
    names = {name for group in counted for name in re.findall(r'"(\w+)"', group)}
    assert "audit_entries" in names
    assert {f"z_novel_{name}_total" for name in names} <= all_metrics().keys()
