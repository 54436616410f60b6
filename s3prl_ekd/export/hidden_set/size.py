"""What a package costs: parameters and MACs, as :mod:`...superb.cost` counts them."""

from __future__ import annotations

import math
from typing import Any

from ...superb.cost import PROFILER
from .messages import BadMessage
from .outcome import Skipped, Warned
from .runtime_checks import Package


def parameters(package: Package) -> str:
    cost = _cost(package)
    text = f"{cost['parameters']:,}"
    if cost["unused"]:
        raise Warned(f"{text}, of which no hidden state needs {cost['unused']:,}: they count too")
    return f"{text}, all of them used"


def macs(package: Package) -> str:
    cost = _cost(package)
    buckets = " + ".join(f"{value / 1e9:.3f}" for value in cost["macs_buckets"].values())
    return f"{cost['macs'] / 1e9:,.3f} G = {buckets} over {cost['utterances']} utterances"


def _cost(package: Package) -> dict[str, Any]:
    """As :func:`...superb.cost.measure_cost` gives it, of the counts that the process sends."""
    if not package.built:
        raise Skipped("there is no model: see the checks above")
    if package.cost is None:
        facts = package.facts("cost")
        buckets = facts.get("macs_buckets")
        if not isinstance(buckets, dict) or list(buckets) != list(package.lengths):
            raise BadMessage("an answer has no MACs for each bucket")
        counts = {key: facts.get(key) for key in ("parameters", "unused", "macs_products")}
        for count in (*counts.values(), *buckets.values()):
            if type(count) not in (int, float) or not (math.isfinite(count) and count >= 0):
                raise BadMessage("an answer has something else in the place of a count")
        package.cost = {
            "parameters": int(counts["parameters"]),
            "unused": int(counts["unused"]),
            "macs": sum(buckets.values()),
            "macs_buckets": buckets,
            "macs_products": float(counts["macs_products"]),
            "utterances": sum(map(len, package.lengths.values())),
            "profiler": PROFILER,
        }
    return package.cost
