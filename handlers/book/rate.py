"""Click type of a rate, in units a second."""

import re

import click

_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(?:/([0-9]{0,6})(s|min|h))?")
_SECONDS = {"s": 1, "min": 60, "h": 3600}


class Rate(click.ParamType[float]):
    """``200/s``, ``5000/min`` or ``10/10s``; a plain number is one a second."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Units a second. Raises `click.BadParameter`."""
        found = _RATE.fullmatch(str(value).strip())
        if found is None or not float(found[1]) or found[2] == "0":
            self.fail(f"{str(value)[:40]!r} is not a rate: say 200/s or 5000/min", param, ctx)
        return float(found[1]) / (int(found[2] or 1) * _SECONDS[found[3] or "s"])
