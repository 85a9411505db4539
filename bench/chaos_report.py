"""Report of the chaos test: recovery times, counts, verdict."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from chaos_faults import InjectedFault, limit_s
from chaos_oracle import Verdict
from hosts import table

#: Ids that are shown; others are counted.
_SHOWN = 8
#: Highest CPU use of supervisor, reader or reaper during an outage of the store, as a share of a core.
_MAX_CPU = 0.2


def recoveries(faults: Sequence[InjectedFault], lease_s: float) -> dict[str, dict[str, Any]]:
    """By kind: number of faults, measured recoveries, their p50, p99 and maximum, and the promised limit."""
    found = {}
    for kind in sorted({fault.kind for fault in faults}):
        of_kind = [fault for fault in faults if fault.kind == kind]
        took = sorted(fault.took_s for fault in of_kind if fault.took_s is not None)
        missed = sum(fault.took_s is None and bool(fault.awaited) for fault in of_kind)
        found[kind] = {
            "faults": len(of_kind), "measured": len(took), "missed": missed,
            "p50_s": percentile(took, 0.5), "p99_s": percentile(took, 0.99),
            "max_s": round(took[-1], 3) if took else None, "limit_s": limit_s(kind, lease_s),
            "slowest": _slowest(of_kind),
            "cpu_max": max((round(s.busiest, 2) for s in of_kind if s.busiest is not None), default=None),
        }  # fmt: skip
    return found


def _slowest(faults: Sequence[InjectedFault]) -> str:
    """Detail of the slowest fault."""
    took = {fault.took_s: fault.detail for fault in faults if fault.took_s is not None}
    return took[max(took)] if took else ""


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile of ordered values."""
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3) if ordered else None


def quick(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether every recovery was within its limit, and no process spun meanwhile."""
    return all(
        row["missed"] == 0 and (row["max_s"] or 0) <= row["limit_s"] and (row["cpu_max"] or 0) <= _MAX_CPU
        for row in rows.values()
    )


def verdict_of(verdict: Verdict) -> dict[str, Any]:
    """The verdict as plain values."""
    values = asdict(verdict)
    del values["dead_ids"]
    return {"safe": verdict.safe, **values}


def format_report(report: dict[str, Any]) -> str:
    """The tables of recoveries, jobs and leftovers, and the verdict."""
    rows = [("fault", "done", "measured", "missed", "p50 s", "p99 s", "max s", "limit s", "cpu")]
    for kind, row in report["recovery"].items():
        cells = ("faults", "measured", "missed", "p50_s", "p99_s", "max_s", "limit_s", "cpu_max")
        rows.append((kind, *("-" if row[cell] is None else str(row[cell]) for cell in cells)))
    jobs = report["jobs"] | {f"seen: {name}": seen for name, seen in report["jobs"]["flow_counts"].items()}
    del jobs["flow_counts"]
    counts = [("", ""), *((name, _shown(value)) for name, value in jobs.items())]
    rest = [(name, _shown(value)) for name, value in report["rest"].items()]
    lines = [table(rows), table(counts), table([("at rest", ""), *rest])]
    lines.append(f"seed {report['seed']}, {report['took_s']} s: {'PASS' if report['pass'] else 'FAIL'}")
    return "\n\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        more = f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
        return f"{len(value)}" + (f": {', '.join(map(str, value[:_SHOWN]))}{more}" if value else "")
    return str(value)
