"""The whole way on a synthetic corpus: three tiny teachers, two students, four tasks, a table.

The teachers come with the package and have learned speech. One student is distilled from all
three, one from a single one; both, the teachers, fbank, and a model with random weights are
evaluated.

Everything is written below DIR. What is finished is kept when the command is given again, and an
interrupted distillation goes on from its last checkpoint.

example:
  s3prl-ekd demo demo_run
"""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dir",
        metavar="DIR",
        type=Path,
        nargs="?",
        default=Path("demo_run"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--steps", type=_positive, default=200, help="of distillation (%(default)s)"
    )
    parser.add_argument(
        "--downstream-steps", type=_positive, default=120,
        help="of a task (%(default)s); PR takes twice as many, SID and ER half, ASR 1.1 times",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", default=["pr", "sid", "er", "asr"],
        help="pr sid er asr (default: all four)",
    )  # fmt: skip
    parser.add_argument(
        "--utterances", type=_positive, default=400, help="for training (%(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    from ..demo.run import Demo
    from ..downstream.tasks import choose_tasks

    tasks = [task.name for task in choose_tasks(args.tasks)]
    steps = (args.steps, args.downstream_steps)
    Demo(args.dir.resolve(), *steps, args.utterances, tasks).run()
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 4 or more")
    return number
