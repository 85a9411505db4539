"""Report of ``run.py`` as one HTML page: a bar chart for each figure, and the further programs' reports."""

import html
import json
from pathlib import Path
from typing import Any

import pygal
from pygal.style import Style

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>jobworker benchmarks</title>
<style>body{{font:15px system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}}
figure{{display:inline-block;width:32%;min-width:330px;margin:0}}pre{{overflow:auto;background:#f4f5f7;padding:1rem}}</style>
<h1>jobworker benchmarks</h1><p>{facts}</p>{parts}{others}</html>"""


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write the page."""
    charts: dict[str, dict[str, dict[str, float]]] = {}
    for part, contender, name, value, _ in report["figures"]:
        charts.setdefault(part, {}).setdefault(name, {})[contender] = value
    parts = "".join(
        f"<h2>{html.escape(part)}</h2>"
        + "".join(f"<figure>{_bars(name, values)}</figure>" for name, values in by_name.items())
        for part, by_name in charts.items()
    )
    others = "".join(
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(_pretty(found))}</pre>"
        for name, found in report["others"].items()
    )
    facts = html.escape(", ".join(f"{name} {value}" for name, value in report["host"].items()))
    path.write_text(_PAGE.format(facts=facts, parts=parts, others=others))


def _pretty(found: Any) -> str:
    return json.dumps(found, ensure_ascii=False, indent=1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(name: str, values: dict[str, float]) -> str:
    style = Style(background="transparent", plot_background="transparent", colors=("#7fa8f0",),
                  title_font_size=15, label_font_size=12, value_font_size=12)  # fmt: skip
    chart = pygal.HorizontalBar(
        title=name, style=style, width=430, height=70 + 30 * len(values), js=[],
        show_legend=False, show_x_guides=False, show_y_guides=False, show_x_labels=False, print_values=True,
        value_formatter=_short, disable_xml_declaration=True,
    )  # fmt: skip
    chart.x_labels = list(reversed(values))  # the first bar is the lowest one
    chart.add(name, list(reversed(values.values())))
    return str(chart.render(is_unicode=True))
