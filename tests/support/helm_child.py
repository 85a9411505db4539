"""Helm's own code in a child process: ``python helm_child.py CHART`` answers one question.

The library brings Go's runtime. Inside a process that had run many other tests it ended that process with
signal 11, in a chart's test or later, about once in four runs of the suite. The question is JSON on standard
input: ``what`` is ``lint``, ``render`` or ``check`` (against the schema), ``values`` are for the chart. The
answer is JSON; for values that Helm refuses it is ``{"error": TEXT}``.
"""

import json
import sys
from typing import Any

import helm_python


def answer(chart_path: str, what: str, values: dict[str, Any]) -> Any:
    """The answer of Helm as plain values."""
    if what == "lint":
        return helm_python.lint(chart_path, values, strict=True)
    chart = helm_python.Chart.load(chart_path)
    if what == "render":
        return chart.render(values, name="rel", namespace="jobs")
    return chart.validate_schema(chart.merge_values(values))


if __name__ == "__main__":
    question = json.load(sys.stdin)
    try:
        found = answer(sys.argv[1], question["what"], question["values"])
    except helm_python.HelmError as error:
        found = {"error": str(error)}
    json.dump(found, sys.stdout, default=str)
