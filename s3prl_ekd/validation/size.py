"""What a package costs: parameters and MACs, as :mod:`..evaluate.cost` counts them."""

from __future__ import annotations

from ..evaluate.cost import measure_cost
from .model import TASKS, Package
from .outcome import Warned


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


def _cost(package: Package) -> dict:
    if package.cost is None:
        package.cost = measure_cost(
            package.model, package.lengths, TASKS, progress=lambda work, **_: work
        )
    return package.cost
