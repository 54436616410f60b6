"""What a zoo's training came to, as a Markdown table for the model cards."""

from __future__ import annotations

import json
from pathlib import Path

from s3prl_ekd.errors import SetupError

from .recipe import STAGES

HEAD = (
    "| stage | steps | audio heard (h) | time (h) | units | loss of hidden frames, dev "
    "| by frequency alone | right, dev | most frequent unit |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def summary(zoo: Path) -> str:
    """A row for each stage that has begun, from its ``log.json``; dev values are its last ones,
    on what the stage hears (clean, distorted or mixed).

    Raises:
        SetupError: no stage has begun, or a log cannot be read.
    """
    rows = [_row(zoo / name / "log.json") for name in STAGES if (zoo / name / "log.json").is_file()]
    if not rows:
        raise SetupError(f"{zoo} holds no log of a stage; train first")
    return "\n".join([HEAD, *rows])


def _row(path: Path) -> str:
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        points = log["points"]
        dev = next((p for p in reversed(points) if "dev_masked_loss" in p), None)
        done = points[-1]["step"] if points else 0
        cells = [
            log["stage"],
            f"{done} of {log['steps']}" if done < log["steps"] else str(done),
            f"{log['hours_heard']:.1f}",
            f"{log['hours_spent']:.2f}",
            str(log["units"]),
            "–" if dev is None else f"{dev['dev_masked_loss']:.2f}",
            f"{log['floor_loss']:.2f}",
            "–" if dev is None else f"{dev['dev_accuracy']:.1%}",
            f"{log['floor_accuracy']:.1%}",
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SetupError(f"{path} cannot be read ({error!r})") from None
    return "| " + " | ".join(cells) + " |"
