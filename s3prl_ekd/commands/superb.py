"""Train and evaluate SUPERB's tasks, by default PR, SID, ER and ASR, on one or more upstreams.

Runs s3prl's recipes through run_downstream.py, in a folder made by `s3prl-ekd init`. Finished runs
are skipped and interrupted ones resumed, so the same command can be repeated. ER is run on all its
folds. With several learning rates, `s3prl-ekd report` uses the one with the best dev metric.

UPSTREAM is a student (a student file, the folder of a run or a Hugging Face folder), a model on the
Hugging Face Hub (ORG/NAME or ORG/NAME@REVISION) or a name of s3prl's hub (fbank), optionally with a
name for reports: mine=student.safetensors, teacher=hubert_local:teachers/hubert.pt. Paths may
contain =. Of a run's folder the newest checkpoint is used, and of a model on the Hub its newest
commit; the records name it.

example:
  s3prl-ekd superb student.safetensors fbank_no_cmvn --recipes tiny
  s3prl-ekd superb student.safetensors --tasks pr asr --lr pr=1e-3,5e-4 --seeds 1 2 3 --jobs 4
  s3prl-ekd superb student.safetensors fbank --noise data/noise --snr 10 5 0
  s3prl-ekd superb student.safetensors --tasks sid --lr search
  s3prl-ekd superb student.safetensors fbank --seeds 1 2 3 --cache-features
  s3prl-ekd superb student.safetensors --dry-run > commands.sh
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ..downstream.tasks import DEFAULT_TASKS, TASKS
from ..errors import SetupError
from ..request import LIMIT_GB
from ..system.seeds import seed_number


def configure(parser) -> None:
    parser.add_argument("upstreams", metavar="UPSTREAM", nargs="+")
    parser.add_argument(
        "--tasks", nargs="+", action="extend", metavar="TASK",
        help=f"any of {' '.join(TASKS)}, or all (default: {' '.join(DEFAULT_TASKS)})",
    )  # fmt: skip
    parser.add_argument(
        "--recipes", choices=("full", "tiny"), default="full",
        help="SUPERB's recipes (default), or tiny ones for a laptop",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", metavar="TASK=YAML", action="append", default=[], help="use another recipe"
    )
    parser.add_argument(
        "--lr", metavar="TASK=LR[,LR]", action="append", default=[],
        help="learning rates to try (default: the recipe's). search: the recipe's, a tenth and ten "
        f"times of it, and with --recipes full {_published()}",
    )  # fmt: skip
    parser.add_argument(
        "--steps", metavar="TASK=N", action="append", default=[],
        help="training steps, with four evaluations (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--override", metavar="TASK=TEXT", action="append", default=[],
        help="overrides in the notation of run_downstream.py's -o; several options are joined",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=seed_number, nargs="+", action="extend", help="default: 1337"
    )
    parser.add_argument(
        "-s", "--selection", default="hidden_states", metavar="KEY",
        help="outputs of students: hidden_states (default) or hidden_states_and_heads",
    )  # fmt: skip
    parser.add_argument(
        "--noise", metavar="DIR", nargs="+", action="extend", default=[],
        help="also test under these noises: folders of audio, or manifests (test split)",
    )  # fmt: skip
    parser.add_argument(
        "--snr", type=float, nargs="+", action="extend", default=[], help="SNRs in dB for --noise"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs in parallel, each on one GPU (default: 1)"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        help="GPUs of one training, through torchrun, without --jobs (default: 1)",
    )
    parser.add_argument(
        "--cache-features", nargs="?", const="", metavar="DIR",
        help="compute each utterance's hidden states once, without padding, and cache them in DIR "
        "(default: OUTPUT/.features, removed when an upstream's runs are finished); the default "
        "with --recipes tiny on one GPU or CPU. A second of "
        "speech takes layers x width x 100 bytes: 1 MB for a base model (13 x 768), 0.1 MB for a "
        "tiny one (7 x 192). Scores are not comparable with those from padded batches",
    )  # fmt: skip
    parser.add_argument(
        "--no-cache-features", dest="cache_features", action="store_const", const=False,
        help="use the hidden states of s3prl's padded batches; the default with --recipes full",
    )  # fmt: skip
    parser.add_argument(
        "--cache-features-gb", metavar="GB", default=str(LIMIT_GB),
        help=f"limit of the cache in GB (default: {LIMIT_GB:g})",
    )  # fmt: skip
    parser.add_argument(
        "--keep-features", action="store_true", help="do not remove OUTPUT/.features"
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the commands and exit; of tasks that choose a checkpoint or layer by its test "
        "(asv qbe) all tests, without those under noise",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, default=Path("result/superb"),
        help="default: result/superb",
    )  # fmt: skip


def _published() -> str:
    """The published rates that ``--lr search`` tries: ``0.0005 (pr) and 0.005 (sid)``."""
    tasks = (task for task in TASKS.values() if task.published_rates)
    rates = (f"{' '.join(f'{r:g}' for r in t.published_rates)} ({t.name})" for t in tasks)
    return " and ".join(rates)


def main(args) -> int:
    from ..superb.plan import plan_runs

    runs = plan_runs(args)

    from ..superb import run as superb  # which imports torch

    if args.dry_run:
        _check_students(runs)
        for run in runs:
            for argv in superb.commands(run, args.gpus):
                print(shlex.join(argv))
        return 0
    superb.check_records(runs)
    _check_upstreams([run for run in runs if not superb.is_finished(run)])
    keep = args.keep_features or bool(args.cache_features)
    superb.run_plan(runs, args.jobs, args.gpus, keep_features=keep)
    for line in superb.chosen_learning_rates(runs):
        print(line)
    print(f"{len(runs)} runs finished; next: s3prl-ekd report {shlex.quote(str(args.output))}")
    return 0


def _check_students(runs) -> None:
    """Load the students among the upstreams, but none that would be downloaded."""
    from ..superb.cost import build_upstream

    upstreams = dict.fromkeys(run.upstream for run in runs)
    for upstream in upstreams:
        path = upstream.checkpoint
        if upstream.hub.startswith("ekd_student") and path is not None and Path(path).exists():
            build_upstream(upstream.hub, path)  # as the runs do


def _check_upstreams(runs) -> None:
    """Check each upstream of ``runs`` with a forward, and write its ``cost.json``."""
    from ..files.atomic import make_folder, write_text
    from ..superb.cost import build_upstream, check_forward, measure_cost
    from ..superb.run import recorded_folders

    for upstream, root in {run.upstream: run.root for run in runs}.items():
        module = build_upstream(upstream.hub, upstream.checkpoint)
        check_forward(module, upstream.selection, upstream.name)
        path = root / upstream.name / "cost.json"
        # without records the file may be of another model
        if not path.is_file() or not recorded_folders(root, upstream.name):
            make_folder(path.parent, SetupError)
            cost = measure_cost(module, selection=upstream.selection)
            write_text(path, json.dumps(cost, indent=1) + "\n")
