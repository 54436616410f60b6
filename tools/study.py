"""Compare students distilled from one teacher and from three, on a small corpus.

Distils one student from each teacher alone and one from all of them under average, concat and
separate heads, at two sizes, with three seeds. Evaluates each, and a control without distillation,
on PR, ASR, SID and ER, clean and under noise. Writes docs/study.md, docs/study.csv and two plots.
FOLDER has pr.tsv, asr.tsv, sid.tsv, er.tsv, unlabeled.tsv, lexicon.txt and the audio files they
list. The same command resumes a study that was stopped or killed. Needs the extra analysis.

example:
  python tools/study.py FOLDER -o study_run --jobs 2 --noise NOISES
  python tools/study.py FOLDER -o study_run --jobs 2 --noise NOISES --minutes 30  # resumes
  python tools/study.py FOLDER -o study_run --report-only --reference result/superb
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from pathlib import Path

from study_parts.options import (
    SIZES,
    STEPS,
    TEACHERS,
    check_inputs,
    parse_setting,
    require_packages,
)

from s3prl_ekd.errors import ConfigError, EkdError, SetupError


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: finished, or --minutes is over. 2: an error, or a job failed. 128 + N: signal N.
    """
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core for each job
    try:
        return run(args)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        prefix = f"{error.filename}: " if error.filename else ""
        print(f"error: {prefix}{error.strerror or error}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="manifests and audio")
    add("-o", "--out", metavar="OUT", type=Path, default=Path("study_run"),
        help="folder of all output files (study_run)")  # fmt: skip
    add("--docs", metavar="DIR", type=Path, default=Path(__file__).parent.parent / "docs",
        help="folder of study.md, study.csv and the plots (docs, next to tools)")  # fmt: skip
    add("--reference", metavar="RESULT_SUPERB", type=Path, action="append", default=[],
        help="finished results of s3prl-ekd superb (teachers, their random initialisations, "
        "fbank), shown as further rows; nothing is run for them")  # fmt: skip
    add("--jobs", type=int, default=1, help="number of jobs to run in parallel, one core each (1)")
    add("--minutes", type=float, help="stop after this many minutes; the same command resumes")
    add("--dry-run", action="store_true", help="print the commands that are left to run, and exit")
    add(
        "--report-only",
        action="store_true",
        help="run nothing, only write the report of the results so far",
    )
    group = parser.add_argument_group("distillation, the same for all students")
    add = group.add_argument
    add("--teacher", metavar="NAME=MODEL", action="append", default=[],
        help=f"a name or file, as in a model config; give two or more ({', '.join(TEACHERS)})",
        )  # fmt: skip
    add(
        "--layers",
        type=int,
        nargs="+",
        default=[2, 4, 6],
        help="target layers of each teacher (2 4 6)",
    )
    add("--init", metavar="TEACHER",
        help="teacher whose first layers and conv extractor initialise all students; none: random "
        "weights (the first teacher)")  # fmt: skip
    add("--size", metavar="NAME=CHANNELS,WIDTH,LAYERS", action="append", default=[],
        help="size of a student; channels and width must be the teacher's, unless --init is none "
        f"({' '.join(SIZES)})")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="random seeds (1 2 3)")
    add("--steps", type=int, default=200, help="optimizer steps of each distillation (200)")
    add("--batch", type=int, default=8, help="excerpts in a batch (8)")
    add("--seconds", type=float, default=2.0, help="longest excerpt, seconds (2)")
    add("--lr", type=float, default=1e-3, help="learning rate of the distillation (0.001)")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--tasks", nargs="+", choices=tuple(STEPS), default=list(STEPS), metavar="TASK",
        help="pr asr sid er (all)")  # fmt: skip
    add("--task-steps", metavar="TASK=N", action="append", default=[],
        help=f"downstream steps ({' '.join(f'{t}={n}' for t, n in STEPS.items())})")  # fmt: skip
    add("--noise", metavar="DIR", type=Path,
        help="noises for the noisy test, none of them in a teacher's training data (not needed "
        "with --report-only)",
        )  # fmt: skip
    add("--snr", type=float, default=5.0, help="signal-to-noise ratio of the noisy test, dB (5)")
    add("--sid-seconds", type=float, default=1.0,
        help="SID: seconds kept from the middle of each dev and test utterance (1)")  # fmt: skip
    add("--all-folds", action="store_true",
        help="ER: leave-one-speaker-out cross-validation, one run for each speaker")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the study with parsed arguments; return the exit code."""
    from study_parts.folder import StudyFolder, input_digests
    from study_parts.parts import is_done, plan

    from s3prl_ekd.files.atomic import make_folder
    from s3prl_ekd.system.lock import FolderLock

    require_packages()
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more, got {args.jobs}")
    speech = args.folder.absolute()
    noise = (args.noise or Path("noise")).absolute()  # unused with --report-only
    setting = parse_setting(args)
    check_inputs(setting, speech, noise, args)
    folder = StudyFolder(args.out)
    jobs = plan(setting, speech, noise, args.jobs)
    if args.dry_run:
        print("# configs/ is written when the study starts")
        print(f"mkdir -p {shlex.quote(str(folder.root))} && cd {shlex.quote(str(folder.root))}")
        for job in jobs:
            for argv in () if is_done(folder, job) else job.commands:
                program = [] if argv[0] == "run_pretrain.py" else ["s3prl-ekd"]
                print(shlex.join([*program, *argv]))
        return 0
    if args.report_only:
        if not folder.exists:
            raise SetupError(f"no study in {args.out}; name its folder with -o")
        folder.check_unchanged(setting)
        return report(setting, folder, jobs, args)
    inputs = input_digests(setting, speech, noise)
    make_folder(folder.root, SetupError)
    with FolderLock(folder.root):
        folder.start(setting, speech, inputs)
        outcome, code = run_planned_jobs(jobs, setting, folder, noise, args)
    report(setting, folder, jobs, args)
    if outcome.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in outcome.failed.items())
        raise SetupError(
            f"{len(outcome.failed)} jobs failed; fix the cause and run the same command "
            f"again:\n{reasons}"
        )
    if outcome.stopped:
        print(f"{args.out}: stopped; the same command resumes")
    return code


def run_planned_jobs(jobs, setting, folder, noise: Path, args: argparse.Namespace):
    """Run the unfinished jobs until all are done, --minutes is over, or a signal arrives.

    Returns:
        (outcome, exit code).
    """
    from study_parts.parts import superb_command
    from study_parts.run import run_jobs

    from s3prl_ekd.pretrain.interrupts import StopSignals, exit_code

    started = time.monotonic()

    def command_for(students):
        return superb_command(setting, students, students[0].seed, noise, args.jobs)

    with StopSignals() as signals:

        def stop() -> bool:
            late = args.minutes is not None and time.monotonic() - started > 60 * args.minutes
            return late or signals.received is not None

        outcome = run_jobs(jobs, setting, folder, args.jobs, stop, command_for)
    return outcome, exit_code(signals.received.name) if signals.received else 0


def report(setting, folder, jobs, args: argparse.Namespace) -> int:
    """Read the results and write the report."""
    from study_parts.compare import make_study
    from study_parts.report import write_report
    from study_parts.scores import read_study

    study = make_study(setting, read_study(setting, folder.superb, args.reference))
    for path in write_report(study, folder, jobs, args.docs):
        print(path)
    results = study.results
    print(f"{results.finished} of {results.planned} downstream models are finished")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
