"""Summary of a zoo's training as a Markdown table, for the model cards."""

from __future__ import annotations

import json
from pathlib import Path

from s3prl_ekd.errors import SetupError

from .recipe import STAGES

HEAD = (
    "| stage | steps | audio (h) | time (h) | units | loss, dev | loss without input "
    "| accuracy, dev | accuracy without input |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def summary(zoo: Path) -> str:
    """Make a table with a row for each stage that has a ``log.json``.

    Dev values are the last ones, on the stage's kind of input (clean, distorted or mixed).

    Raises:
        SetupError: there is no log, or a log cannot be read.
    """
    rows = [_row(zoo / name / "log.json") for name in STAGES if (zoo / name / "log.json").is_file()]
    if not rows:
        raise SetupError(f"no log.json of a stage in {zoo}; train first")
    return "\n".join([HEAD, *rows])


def _row(path: Path) -> str:
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        points = log["points"]
        dev = next((p for p in reversed(points) if "dev_prediction_loss" in p), None)
        step = points[-1]["step"] if points else 0
        cells = [
            log["stage"],
            f"{step} of {log['steps']}" if step < log["steps"] else str(step),
            f"{log['hours_heard']:.1f}",
            f"{log['hours_spent']:.2f}",
            str(log["units"]),
            "–" if dev is None else f"{dev['dev_prediction_loss']:.2f}",
            f"{log['floor_loss']:.2f}",
            "–" if dev is None else f"{dev['dev_accuracy']:.1%}",
            f"{log['floor_accuracy']:.1%}",
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SetupError(f"cannot read {path} ({error!r})") from None
    return "| " + " | ".join(cells) + " |"
