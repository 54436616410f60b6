"""Run a whole study as one command: distillations, SUPERB's four tasks, a report.

`recipe ekd960` asks what an ensemble of teachers gives over a single one, at the size of the paper
(EKD, arXiv 2302.12757): LibriSpeech 960 h, three Base teachers, students of each teacher alone and
of the three together (average, concatenation, heads, average and heads), and a pruned student. It
prints a projection of hours and disk first. Every stage is a command of this package, which
--dry-run prints as typed. The same command continues after an interruption and skips what is done.

Without --voxceleb1, --iemocap or --lexicon, SID, ER or PR is left out. --tiny and --steps rehearse
all stages in minutes, with tiny teachers or few updates, in a folder of their own.

example:
  s3prl-ekd recipe ekd960 --dry-run
  s3prl-ekd recipe ekd960 --librispeech /data/LibriSpeech --tiny --steps 20 -o rehearsal
  s3prl-ekd recipe ekd960 --librispeech /data/LibriSpeech --voxceleb1 /data/VoxCeleb1 \\
      --iemocap /data/IEMOCAP_full_release --lexicon /data/cmudict.dict --g2p --jobs 8
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from ..downstream.tasks import DEFAULT_TASKS, choose_tasks
from ..errors import SetupError
from ..recipe.plan import DEFAULT_ROWS, RECIPES, ROWS, RecipeOptions, make_plan
from ..system.jobs import typed
from ..system.seeds import seed_number
from ..workspace import absolute_path

logger = logging.getLogger(__name__)

# Option that a task needs -> the task, and the path that --dry-run shows without it.
NEEDED = {
    "voxceleb1": ("sid", Path("/data/VoxCeleb1")),
    "iemocap": ("er", Path("/data/IEMOCAP_full_release")),
    "lexicon": ("pr", Path("/data/cmudict.dict")),
}
LIBRISPEECH = Path("/data/LibriSpeech")
REHEARSAL_STEPS = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help="the recipe; without it, recipes are listed")
    add("--list", action="store_true", help="list the recipes and their rows, and exit")
    add("-o", "--output", metavar="FOLDER", type=Path, help="working folder (default: NAME)")
    add("--librispeech", metavar="DIR", type=Path, help="contains train-clean-100/ and the others")
    add("--voxceleb1", metavar="DIR", type=Path, help="dev/, test/, iden_split.txt; for SID")
    add("--iemocap", metavar="DIR", type=Path, help="contains Session1/ to Session5/; for ER")
    add(
        "--lexicon", metavar="FILE", type=Path, nargs="+", action="extend",
        help="pronunciations; for PR",
    )  # fmt: skip
    add("--g2p", action="store_true", help="predict the pronunciations that no lexicon has")
    add(
        "--rows", metavar="ROW", nargs="+", action="extend",
        help="students to train (default: all of --list but dp_hubert)",
    )  # fmt: skip
    add(
        "--seeds",
        type=seed_number,
        nargs="+",
        action="extend",
        help="of distillations (default: 1337)",
    )
    add(
        "--tasks",
        metavar="TASK",
        nargs="+",
        action="extend",
        help="any of pr sid er asr, or all (the default)",
    )
    add("--gpus", type=int, default=1, help="GPUs of one training, through torchrun (default: 1)")
    add("--jobs", type=int, default=1, help="students at a time, a GPU each (default: 1)")
    add(
        "--tiny", action="store_true", help="rehearse with tiny teachers and students, on a CPU too"
    )
    add(
        "--steps", metavar="N", type=int,
        help=f"rehearse: steps of every training (with --tiny: {REHEARSAL_STEPS})",
    )  # fmt: skip
    add(
        "--updates-per-second", metavar="X", type=float,
        help="project from this rate of three_average on one GPU, not from an assumed one",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="print the projection and the commands, and exit")


def main(args: argparse.Namespace) -> int:
    """Project, check and run; return exit code 0."""
    if args.list or args.name is None:
        for name, line in RECIPES.items():
            print(f"{name}\n    {line}")
            for row, text in ROWS.items():
                print(f"    {row:20} {text}")
        return 0
    if args.name not in RECIPES:
        raise SetupError(f"no such recipe {args.name!r}; expected: {', '.join(RECIPES)}")
    if args.updates_per_second is not None and not 0 < args.updates_per_second < 1e6:
        raise SetupError(f"--updates-per-second must be above 0, got {args.updates_per_second:g}")
    notes: list[str] = []
    plan = make_plan(_options(args, notes))

    from ..recipe.projection import projection_lines
    from ..recipe.run import problems, run

    lines = ["a rehearsal with tiny students: nothing is projected"]
    if not plan.options.tiny:
        lines = projection_lines(plan, args.updates_per_second)
    if args.dry_run:
        missing = [f"missing: {problem}" for problem in problems(plan)]
        for line in [*lines, "", *notes, *missing]:
            print(f"# {line}".rstrip())
        folder = shlex.quote(str(plan.options.folder))
        print(f"\nset -e\nmkdir -p {folder}\ncd {folder}")
        for stage in plan.stages:
            print(typed(stage.argv))
        return 0
    print("\n".join(lines), flush=True)
    for note in notes:
        logger.warning(note)
    if found := problems(plan):
        raise SetupError("; ".join(found))
    print(f"\nreport: {run(plan)}")
    return 0


def _options(args: argparse.Namespace, notes: list[str]) -> RecipeOptions:
    """The options of the plan; adds a note for each task that is left out.

    A dry run shows all tasks, with example paths for corpora that are not given.

    Raises:
        SetupError: a corpus is missing that the options need.
    """
    paths = {"librispeech": args.librispeech, "voxceleb1": args.voxceleb1, "iemocap": args.iemocap}
    paths = {name: path and absolute_path(path) for name, path in paths.items()}
    for name, path in paths.items():
        if path is not None and not path.is_dir():
            raise SetupError(f"--{name} {path} is not an existing folder")
    paths["lexicon"] = [absolute_path(path) for path in args.lexicon or []]
    tasks = [task.name for task in choose_tasks(args.tasks or DEFAULT_TASKS, DEFAULT_TASKS)]
    g2p = args.g2p
    if paths["librispeech"] is None:
        if not args.dry_run:
            raise SetupError("LibriSpeech is needed; add --librispeech DIR, or --dry-run")
        notes.append(f"--librispeech is not given; {LIBRISPEECH} stands for it")
        paths["librispeech"] = LIBRISPEECH
    for name, (task, example) in NEEDED.items():
        if task not in tasks or paths[name] or (name == "lexicon" and g2p):
            continue
        if args.dry_run:
            notes.append(
                f"--{name} is not given; {example} stands for it, and a run without it leaves out "
                f"{task.upper()}"
            )
            paths[name] = [example] if name == "lexicon" else example
            g2p = g2p or name == "lexicon"
        elif args.tasks:
            raise SetupError(f"--tasks {task} needs --{name}; add it, or leave {task} out")
        else:
            notes.append(f"{task.upper()} is left out; to add it, give --{name}")
            tasks.remove(task)
    return RecipeOptions(
        folder=args.output or Path(args.name),
        **paths,
        g2p=g2p,
        rows=args.rows or DEFAULT_ROWS,
        seeds=args.seeds or [1337],
        tasks=tasks,
        gpus=args.gpus,
        jobs=args.jobs,
        steps=REHEARSAL_STEPS if args.tiny and args.steps is None else args.steps,
        tiny=args.tiny,
    )
