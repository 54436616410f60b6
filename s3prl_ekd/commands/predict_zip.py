"""Pack predict.zip for SUPERB's public leaderboard, as s3prl's submit.py lays it out.

DIR is what `s3prl-ekd superb` has written. For each task the learning rate that is best on dev is
taken, and of several seeds the one that is best on dev. The leaderboard scores ER only with all
five folds, so without --partial all of PR, SID, ER (fold 1 to 5) and ASR must be there.

example:
  s3prl-ekd predictions result/superb/student -o predict.zip
  s3prl-ekd predictions result/superb --upstream student -o predict.zip --partial
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SetupError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    parser.add_argument("--upstream", metavar="NAME", help="whose, where DIR has several")
    parser.add_argument(
        "--partial", action="store_true", help="pack what there is; other tasks stay unscored"
    )
    parser.add_argument("--force", action="store_true", help="write over an existing FILE")


def main(args: argparse.Namespace) -> int:
    """Choose, check, pack; see the module's text."""
    from ..files.atomic import make_folder, whole_file
    from ..superb.results import check_upstream, read_results, select
    from ..superb.submission import choose_runs, lacking, write_archive

    if args.output.exists() and not args.force:
        raise SetupError(f"{args.output} exists; add --force to write over it")
    results = read_results(args.folders)
    selections = select(results.runs, results.unfinished)
    names = tuple(dict.fromkeys(upstream for upstream, _ in selections))
    if args.upstream is not None:
        check_upstream(args.upstream, names)
    elif not names:
        raise SetupError("no run is finished there; start s3prl-ekd superb again")
    elif len(names) > 1:
        raise SetupError(f"a submission is of one upstream; add --upstream: {', '.join(names)}")
    upstream = args.upstream or names[0]
    runs = choose_runs({task: s for (name, task), s in selections.items() if name == upstream})
    missing = lacking(runs)
    if missing and not (args.partial and runs):
        raise SetupError(
            f"{upstream} lacks {', '.join(missing)}; run s3prl-ekd superb for it, or add --partial "
            "to pack what there is"
        )
    make_folder(args.output.parent, SetupError)
    with whole_file(args.output) as file:
        members = write_archive(runs, file)
    for member, run in zip(members, runs.values(), strict=True):
        print(f"{member}  <- {run.folder.name}")
    if missing:
        print(f"not in it, and so not scored: {', '.join(missing)}")
    print(f"wrote {args.output}")
    return 0
