"""Report of ``run.py`` as one HTML page: a bar chart for each figure, and the further programs' reports.

Bars are table cells with a width in percent: a plotting library would be the largest dependency of the tests.
"""

import html
from pathlib import Path
from typing import Any

from jobworker.worker.safe_text import safe_json

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>jobworker benchmarks</title><style>
body{{font:15px system-ui,sans-serif;max-width:1150px;margin:2rem auto;padding:0 1rem}}
.charts{{display:flex;flex-wrap:wrap;gap:1rem 2rem}} table{{width:350px;border-collapse:collapse}}
caption{{text-align:left;font-weight:600}} th{{text-align:left;font-weight:400;width:170px}}
td{{padding:2px 0}} td div{{background:#2f6fde;height:12px;min-width:1px}} td.n{{width:70px;text-align:right}}
pre{{overflow:auto;background:#f4f5f7;padding:1rem}}</style>
<h1>jobworker benchmarks</h1><p>{facts}</p>{parts}{others}</html>"""


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write the page."""
    charts: dict[str, dict[str, dict[str, float]]] = {}
    for part, contender, name, value, _ in report["figures"]:
        charts.setdefault(part, {}).setdefault(name, {})[contender] = value
    parts = "".join(
        f'<h2>{html.escape(part)}</h2><div class="charts">'
        + "".join(_bars(name, values) for name, values in by_name.items())
        + "</div>"
        for part, by_name in charts.items()
    )
    others = "".join(
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(_pretty(found))}</pre>"
        for name, found in report["others"].items()
    )
    facts = html.escape(", ".join(f"{name} {value}" for name, value in report["host"].items()))
    path.write_text(_PAGE.format(facts=facts, parts=parts, others=others))


def _pretty(found: Any) -> str:
    return safe_json(found, indent=True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(name: str, values: dict[str, float]) -> str:
    longest = max(values.values()) or 1.0
    rows = (
        f"<tr><th>{html.escape(contender)}</th>"
        f'<td><div style="width:{100 * value / longest:.1f}%"></div></td>'
        f'<td class="n">{_short(value)}</td></tr>'
        for contender, value in values.items()
    )
    return f"<table><caption>{html.escape(name)}</caption>{''.join(rows)}</table>"
