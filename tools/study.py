"""Does an ensemble of teachers teach a student more than its best member does?

Trains the missing teachers, probes teachers and sets of teachers, distils students of one size from
single teachers and from sets of them, and probes the students in closed form. Each result is a
small file in tools/study_results, so the same command goes on from what is there, also with more
seeds. The report, in docs/study.md and docs/study_details.md, is written from the results so far.
SPEECH has unlabeled.tsv, pr.tsv, sid.tsv, er.tsv, alignments.tsv, the audio they list,
lexicon.txt, and esc10/. Needs the extras units, plots, demo and align.

example:
  python tools/study.py SPEECH -o study_run --seeds 1 2 --jobs 2 --minutes 160
  python tools/study.py SPEECH -o study_run --seeds 1 2 3 4 5 6 7 8 --jobs 2
  python tools/study.py --report-only
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from s3prl_ekd.errors import ConfigError, EkdError, SetupError

TOOLS = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: finished, or --minutes is over. 2: a user's error, or a job failed.
    """
    args = make_parser().parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # one core for each job
    try:
        return run(args)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
    except SystemExit as error:  # a command of the preparation failed
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        prefix = f"{error.filename}: " if error.filename else ""
        print(f"error: {prefix}{error.strerror or error}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    from study_parts.rows import PROBED_TEACHERS, SINGLES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("speech", metavar="SPEECH", type=Path, nargs="?", help="manifests and audio")
    add("-o", "--out", metavar="OUT", type=Path, default=Path("study_run"),
        help="folder of teachers, targets and runs (study_run)")  # fmt: skip
    add("--results", metavar="DIR", type=Path, default=TOOLS / "study_results",
        help="folder of the results (study_results, next to this script)")  # fmt: skip
    add("--docs", metavar="DIR", type=Path, default=TOOLS.parent / "docs",
        help="folder of study.md, study_details.md, pictures (docs, next to tools)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1, 2], help="seeds from 1 up (1 2)")
    add("--steps", type=int, default=3000, help="updates of a student (3000)")
    add("--teachers", nargs="+", choices=PROBED_TEACHERS, default=[*SINGLES], metavar="NAME",
        help=f"use these teachers, and the rows that need no other one ({' '.join(SINGLES)})",
        )  # fmt: skip
    add("--rows", nargs="+", default=[], metavar="ROW",
        help="run these rows only; --dry-run lists them")  # fmt: skip
    add("--jobs", type=int, default=1, help="jobs to run in parallel, one core each (1)")
    add("--minutes", type=float, help="start no job after this many minutes")
    add("--dry-run", action="store_true", help="list the rows and what is missing")
    add("--report-only", action="store_true", help="only write the report")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the study with parsed arguments; return the exit code."""
    from study_parts import rows
    from study_parts.results import read_results
    from study_parts.run import check_results, run_missing, student_path

    names = {row.name: row for row in rows.rows() if set(row.needed) <= set(args.teachers)}
    for name in args.rows:
        if name not in names:
            raise ConfigError(f"--rows: no row {name!r}; use some of: {'; '.join(names)}")
    chosen = [names[name] for name in args.rows or names]
    if min(args.seeds) < 1 or args.jobs < 1 or args.steps < 1:
        raise ConfigError("--seeds, --jobs and --steps must be 1 or more")
    if args.dry_run:
        for row in chosen:
            missing = [s for s in args.seeds if not student_path(args.results, row, s).exists()]
            print(f"{row.name}: {f'seeds {missing} are missing' if missing else 'complete'}")
        return 0
    left, failed = 0, []
    if not args.report_only:
        from study_parts.folder import StudyFolder

        from s3prl_ekd.files.atomic import make_folder
        from s3prl_ekd.system.lock import FolderLock

        if args.speech is None:
            raise ConfigError("no folder SPEECH; give it, or --report-only")
        started = time.monotonic()
        folder = StudyFolder(args.out, args.speech, tuple(args.teachers))
        make_folder(args.out, SetupError)
        with FolderLock(args.out):
            folder.prepare()
            digests = folder.teacher_digests(folder.teachers)
            check_results(args.results, args.steps, digests, args.seeds)
            left, failed = run_missing(
                folder,
                chosen,
                args.seeds,
                args.steps,
                args.results,
                args.jobs,
                lambda: args.minutes is not None and time.monotonic() - started > 60 * args.minutes,
            )
    results = read_results(args.results)
    if not results:
        raise SetupError(f"no results in {args.results}")
    check_results(args.results, args.steps)
    from study_parts.report import write_report

    for path in write_report(results, args.docs):
        print(path)
    if failed:
        reasons = "\n".join(f"  {reason}" for reason in failed)
        raise SetupError(f"{len(failed)} jobs failed; the same command goes on:\n{reasons}")
    if left:
        print(f"{left} results are missing; the same command goes on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
