"""Pack predict.zip for SUPERB's public leaderboard, with the layout of s3prl's submit.py.

DIR is a folder that `s3prl-ekd superb` wrote. For each task the learning rate with the best dev
metric is used, and of several seeds the best one on dev. PR, SID, ER (folds 1 to 5, because the
leaderboard scores ER only with all of them) and ASR are required, unless --partial is given.
Results of further tasks are packed, too.

example:
  s3prl-ekd predict-zip result/superb/student -o predict.zip
  s3prl-ekd predict-zip result/superb --upstream student -o predict.zip --partial
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SetupError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("folders", metavar="DIR", type=Path, nargs="+")
    add("-o", "--output", metavar="FILE", type=Path, required=True)
    add("--upstream", metavar="NAME", help="which upstream, if DIR has several")
    add("--partial", action="store_true", help="allow missing tasks; they get no score")
    add("--force", action="store_true", help="overwrite FILE")


def main(args: argparse.Namespace) -> int:
    """Choose the runs, check that none is missing, and pack; the exit code is 0."""
    from ..downstream.tasks import DEFAULT_TASKS
    from ..files.atomic import atomic_file, make_folder
    from ..superb.results import check_known_upstream, read_results, select_best_lr
    from ..superb.submission import MEMBERS, choose_runs, write_archive

    if args.output.exists() and not args.force:
        raise SetupError(f"{args.output} exists; add --force to overwrite it")
    results = read_results(args.folders)
    selections = select_best_lr(results.runs, results.unfinished)
    names = tuple(dict.fromkeys(upstream for upstream, _ in selections))
    if args.upstream is not None:
        check_known_upstream(args.upstream, names)
        names = (args.upstream,)
    if not names:
        folders = ", ".join(map(str, args.folders))
        raise SetupError(f"no complete run in {folders}; run s3prl-ekd superb again")
    if len(names) > 1:
        raise SetupError(f"several upstreams; choose one with --upstream: {', '.join(names)}")
    (upstream,) = names
    runs = choose_runs({task: s for (name, task), s in selections.items() if name == upstream})
    needed = {*DEFAULT_TASKS, *(task for task, _ in runs)}
    missing = [
        " ".join(filter(None, key))  # er fold2
        for key in MEMBERS
        if key[0] in needed and key not in runs
    ]
    if missing and not (args.partial and runs):
        raise SetupError(
            f"no complete run of {upstream} for {', '.join(missing)}; run s3prl-ekd superb, or add "
            "--partial to leave them out"
        )
    make_folder(args.output.parent, SetupError)
    with atomic_file(args.output) as file:
        write_archive(runs, file)
    for key, run in runs.items():
        for place in MEMBERS[key].values():
            print(f"predict/{place}  <- {run.folder.name}")
    if missing:
        print(f"missing, so without a score: {', '.join(missing)}")
    print(f"wrote {args.output}")
    return 0
