"""Train and evaluate SUPERB's PR, SID, ER and ASR on one or more upstreams.

Every run goes through run_downstream.py with s3prl's recipes, in a folder of `s3prl-ekd init`.
What is finished is kept and what was cut goes on, so the same command may be given again. ER runs
over all its folds; of several learning rates the one that is best on dev counts.

An UPSTREAM is a student file (student.safetensors), a name of s3prl's hub (fbank), or either with a
name of its own: mine=student.safetensors, teacher=hubert_local:teachers/hubert.pt. A path may have
= signs.

example:
  s3prl-ekd superb student.safetensors fbank_no_cmvn --recipes tiny
  s3prl-ekd superb student.safetensors --tasks pr asr --lr pr=1e-3,5e-4 --seeds 1 2 3 --jobs 4
  s3prl-ekd superb student.safetensors fbank --noise data/noise --snr 10 5 0
  s3prl-ekd superb student.safetensors fbank --recipes tiny --seeds 1 2 3 --cache-features
  s3prl-ekd superb student.safetensors --dry-run > commands.sh
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ..errors import SetupError
from ..request import LIMIT_GB


def configure(parser) -> None:
    parser.add_argument("upstreams", metavar="UPSTREAM", nargs="+")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", default=["pr", "sid", "er", "asr"],
        help="pr sid er asr (default: all four)",
    )  # fmt: skip
    parser.add_argument(
        "--recipes", choices=("full", "tiny"), default="full", help="SUPERB's, or a laptop's"
    )
    parser.add_argument(
        "--recipe", metavar="TASK=YAML", action="append", default=[], help="a recipe of your own"
    )
    parser.add_argument(
        "--lr", metavar="TASK=LR[,LR]", action="append", default=[],
        help="learning rates to try (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", metavar="TASK=N", action="append", default=[],
        help="steps of training, with four evaluations (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--override", metavar="TASK=TEXT", action="append", default=[],
        help="more for run_downstream.py's -o",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="default: 1337")
    parser.add_argument(
        "-s", "--selection", default="hidden_states", metavar="KEY",
        help="of the students' outputs: hidden_states (default) or hidden_states_and_heads",
    )  # fmt: skip
    parser.add_argument(
        "--noise", metavar="DIR", nargs="+", default=[],
        help="test again under these noises: folders of audio, or manifests (their test split)",
    )  # fmt: skip
    parser.add_argument("--snr", type=float, nargs="+", default=[], help="in dB, for --noise")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a GPU each")
    parser.add_argument(
        "--gpus", type=int, default=1, help="GPUs for one training, through torchrun (default: 1)"
    )
    parser.add_argument(
        "--cache-features", nargs="?", const="", metavar="DIR",
        help="compute hidden states once for each utterance, alone, and keep them in DIR (default: "
        "OUTPUT/.features, removed once an upstream's runs are finished). Layers x width x 100 "
        "bytes for a second of speech: 1 MB for a model of the base size (13 x 768), 0.1 MB for a "
        "tiny one (5 x 192). Scores differ a little from those over padded batches",
    )  # fmt: skip
    parser.add_argument(
        "--cache-features-gb", metavar="GB", default=str(LIMIT_GB),
        help=f"keep no more than this (default: {LIMIT_GB:g})",
    )  # fmt: skip
    parser.add_argument(
        "--keep-features", action="store_true", help="do not remove OUTPUT/.features"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, default=Path("result/superb"),
        help="default: result/superb",
    )  # fmt: skip


def main(args) -> int:
    from ..launch.forked import processes
    from ..superb import run as superb
    from ..superb.plan import plan

    runs = plan(args)
    if args.dry_run:
        for run in runs:
            for argv in superb.commands(run, args.gpus):
                print(shlex.join(argv))
        return 0
    superb.check_records(runs)
    _probe([run for run in runs if not superb.is_finished(run)])
    keep = args.keep_features or bool(args.cache_features)
    failed = superb.run_all(runs, args.jobs, args.gpus, keep_features=keep, processes=processes())
    if failed:
        reasons = "\n".join(f"  {reason}" for _, reason in failed)
        raise SetupError(
            f"{len(failed)} of {len(runs)} runs failed; give the same command again once it is "
            f"mended:\n{reasons}"
        )
    print(f"{len(runs)} runs finished; next: s3prl-ekd report {shlex.quote(str(args.output))}")
    return 0


def _probe(runs) -> None:
    """Each upstream that is still to run: can it be used, and what does it cost?"""
    from ..files.atomic import make_folder, write_text
    from ..superb.cost import build_upstream, measure_cost, probe
    from ..superb.run import upstream_folders

    for upstream, root in {run.upstream: run.root for run in runs}.items():
        module = build_upstream(upstream.hub, upstream.checkpoint)
        probe(module, upstream.selection, upstream.name)
        path = root / upstream.name / "cost.json"
        if not path.is_file() or not upstream_folders(root, upstream.name):  # of no other model
            make_folder(path.parent, SetupError)
            write_text(path, json.dumps(measure_cost(module), indent=1) + "\n")
