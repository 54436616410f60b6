"""Distil and evaluate on a synthetic corpus: three tiny teachers, two students, four tasks.

The teachers are part of the package and were trained on speech. One student is distilled from all
three teachers, the other from one. Both are evaluated and compared with the teachers, fbank, and a
model with random weights.

All files are written below DIR. If the command is repeated, it skips finished steps and resumes an
interrupted distillation from its last checkpoint.

example:
  s3prl-ekd demo demo_run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..downstream.tasks import DEFAULT_TASKS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir", metavar="DIR", type=Path, nargs="?", default=Path("demo_run"),
        help="the folder to write (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_positive, default=200,
        help="steps of each distillation (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--downstream-steps", type=_positive, default=120,
        help="steps of a task (default: %(default)s); times 2 (PR), 0.5 (SID, ER), 1.1 (ASR)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", action="extend", metavar="TASK",
        help=f"tasks to evaluate: {' '.join(DEFAULT_TASKS)} (default: all four)",
    )  # fmt: skip
    parser.add_argument(
        "--utterances", type=_positive, default=400,
        help="training utterances (default: %(default)s)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    from ..demo.run import Demo
    from ..downstream.tasks import choose_tasks

    tasks = [task.name for task in choose_tasks(args.tasks or DEFAULT_TASKS, DEFAULT_TASKS)]
    folder = args.dir.resolve()
    Demo(folder, args.steps, args.downstream_steps, args.utterances, tasks).run()
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 4:
        raise argparse.ArgumentTypeError(f"expected an integer of 4 or more, got {text!r}")
    return number
