"""Does a student learn more from three teachers than from one? The whole study, on a small corpus.

Distils one student for each teacher alone and for all of them under average, concat and separate
heads, at two sizes, with three seeds; evaluates each, and one that no one has taught, on PR, ASR,
SID and ER, clean and under noise; writes docs/study.md, docs/study.csv and two plots. FOLDER has
pr.tsv, asr.tsv, sid.tsv, er.tsv, unlabeled.tsv, lexicon.txt and the audio they name. What is
finished is kept, so the same command goes on after it was stopped or killed. Needs the extra
analysis.

example:
  python tools/study.py FOLDER -o study_run --jobs 2 --noise NOISES
  python tools/study.py FOLDER -o study_run --jobs 2 --noise NOISES --minutes 30  # again: goes on
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
    require_packages,
    setting_of,
)

from s3prl_ekd.errors import ConfigError, EkdError, SetupError


def main(argv: list[str] | None = None) -> int:
    """0: all is done, or its minutes are over; 2: a mistake or failed parts; 130 ...: a signal."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the jobs have a core each
    try:
        return run(args)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="manifests and audio")
    add("-o", "--out", metavar="OUT", type=Path, default=Path("study_run"),
        help="folder for all that is made (study_run)")  # fmt: skip
    add("--docs", metavar="DIR", type=Path, default=Path(__file__).parent.parent / "docs",
        help="where study.md, study.csv and the plots go (docs, beside tools)")  # fmt: skip
    add("--reference", metavar="RESULT_SUPERB", type=Path, action="append", default=[],
        help="finished results of s3prl-ekd superb (teachers, their random twins, fbank) as rows "
        "beside the students; nothing of them is run")  # fmt: skip
    add("--jobs", type=int, default=1, help="parts at a time, a core each (1)")
    add("--minutes", type=float, help="stop after so long; the same command goes on")
    add("--dry-run", action="store_true", help="print the commands that are left and leave")
    add("--report-only", action="store_true", help="run nothing, write the report of what is there")
    group = parser.add_argument_group("what is the same for all students")
    add = group.add_argument
    add("--teacher", metavar="NAME=MODEL", action="append", default=[],
        help=f"a name or a file, as in a model config; two or more ({', '.join(TEACHERS)})",
        )  # fmt: skip
    add("--layers", type=int, nargs="+", default=[2, 4, 6], help="of each teacher (2 4 6)")
    add("--init", metavar="TEACHER",
        help="whose first layers and conv extractor all students begin with, none for random "
        "weights (the first teacher)")  # fmt: skip
    add("--size", metavar="NAME=CHANNELS,WIDTH,LAYERS", action="append", default=[],
        help="of the students; channels and width are the teacher's, unless --init is none "
        f"({' '.join(SIZES)})")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    add("--steps", type=int, default=200, help="of each distillation (200)")
    add("--batch", type=int, default=8, help="excerpts a step (8)")
    add("--seconds", type=float, default=2.0, help="longest excerpt (2)")
    add("--lr", type=float, default=1e-3, help="learning rate of the distillation (0.001)")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--tasks", nargs="+", choices=tuple(STEPS), default=list(STEPS), metavar="TASK",
        help="pr asr sid er (all)")  # fmt: skip
    add("--task-steps", metavar="TASK=N", action="append", default=[],
        help=f"downstream steps ({' '.join(f'{t}={n}' for t, n in STEPS.items())})")  # fmt: skip
    add("--noise", metavar="DIR", type=Path,
        help="noises of the test, which no teacher was trained on (--report-only needs none)",
        )  # fmt: skip
    add("--snr", type=float, default=5.0, help="of the noisy test, dB (5)")
    add("--sid-seconds", type=float, default=1.0,
        help="of each dev and test utterance of SID, its middle (1)")  # fmt: skip
    add("--all-folds", action="store_true",
        help="ER: leave each speaker out once, which takes as many runs")  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Everything after the command line was read."""
    from study_parts.folder import Folder, inputs_of
    from study_parts.parts import is_done, plan

    from s3prl_ekd.files.atomic import make_folder
    from s3prl_ekd.system.lock import FolderLock

    require_packages()
    if args.jobs < 1:
        raise ConfigError(f"--jobs is {args.jobs}; 1 or more is allowed")
    speech = args.folder.absolute()
    noise = (args.noise or Path("noise")).absolute()  # --report-only alone needs none
    setting = setting_of(args)
    check_inputs(setting, speech, noise, args)
    folder = Folder(args.out)
    parts = plan(setting, speech, noise, args.jobs)
    if args.dry_run:
        print("# configs/ is written once the study begins")
        print(f"mkdir -p {shlex.quote(str(folder.root))} && cd {shlex.quote(str(folder.root))}")
        for part in parts:
            for words in () if is_done(folder, part) else part.commands:
                own = [] if words[0] == "run_pretrain.py" else ["s3prl-ekd"]
                print(shlex.join([*own, *words]))
        return 0
    if args.report_only:
        if not folder.begun:
            raise SetupError(f"{args.out} holds no study; name its folder with -o")
        folder.compare(setting)
        return report(setting, folder, parts, args)
    inputs = inputs_of(setting, speech, noise)
    make_folder(folder.root, SetupError)
    with FolderLock(folder.root):
        folder.begin(setting, speech, inputs)
        outcome, code = run_parts(parts, setting, folder, noise, args)
    report(setting, folder, parts, args)
    if outcome.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in outcome.failed.items())
        raise SetupError(
            f"{len(outcome.failed)} parts failed; give the same command again once it is "
            f"mended:\n{reasons}"
        )
    if outcome.stopped:
        print(f"{args.out}: stopped; the same command goes on from here")
    return code


def run_parts(parts, setting, folder, noise: Path, args: argparse.Namespace):
    """Run what is left until it is done, late, or a signal comes: (outcome, exit code)."""
    from study_parts.parts import evaluation
    from study_parts.run import run_all

    from s3prl_ekd.pretrain.interrupts import StopSignals, exit_code

    started = time.monotonic()

    def restrict(part, chosen):
        return evaluation(setting, chosen, chosen[0].seed, noise, args.jobs)

    with StopSignals() as signals:

        def stop() -> bool:
            late = args.minutes is not None and time.monotonic() - started > 60 * args.minutes
            return late or signals.received is not None

        outcome = run_all(parts, setting, folder, args.jobs, stop, restrict)
    return outcome, exit_code(signals.received.name) if signals.received else 0


def report(setting, folder, parts, args: argparse.Namespace) -> int:
    """Read what is there and write it down."""
    from study_parts.compare import make_study
    from study_parts.report import write_report
    from study_parts.scores import read_study

    study = make_study(setting, read_study(setting, folder.superb, args.reference))
    for path in write_report(study, folder, parts, args.docs):
        print(path)
    found = study.found
    print(f"{found.finished} of {found.wanted} downstream models are finished")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
