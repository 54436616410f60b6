"""Log of a training: log.json and curves.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.superb.report_plots import COLOURS
from s3prl_ekd.system.figures import new_figure


def write_log(log: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """Write ``log.json`` (``about`` and the points ``log``) and ``curves.png``."""
    with atomic_file(folder / "log.json") as file:
        file.write(json.dumps({**about, "points": log}, indent=1).encode())
    if log:
        _draw(log, about, folder / "curves.png")


def _draw(log: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    figure = new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "prediction_loss", "loss (nats)", about["floor_loss"]),
        (right, "accuracy", "accuracy", about["floor_accuracy"]),
    )
    for axis, key, label, floor in panels:
        for colour, (name, prefix) in zip(
            COLOURS,
            {"train": "", "dev": "dev_", "dev, clean input": "dev_clean_"}.items(),
            strict=False,
        ):
            points = [(p["step"], p[prefix + key]) for p in log if prefix + key in p]
            if points:
                marker = "o" if prefix else None
                axis.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, ms=3)
        axis.axhline(
            floor, color="grey", linestyle="--", linewidth=0.8, label="unit frequencies alone"
        )
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{about['stage']}: {about['steps']} steps")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
