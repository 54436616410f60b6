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

from ..downstream.arguments import LIMIT_GB
from ..errors import SetupError

FEATURES = ".features"  # below the output


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

    runs = plan(args)
    for upstream in {run.upstream.name: run.upstream for run in runs}.values():
        for path in (upstream.checkpoint, upstream.hub):
            if path and "'" in path:
                raise SetupError(f"{path}: quotes cannot stand in an upstream's name")
    if args.dry_run:
        for run in runs:
            for words in superb.commands(run, args.gpus):
                print(superb.shell(words))
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


def plan(args) -> list:
    """The runs that the options ask for, all checked before the first one begins."""
    from ..downstream.tasks import choose_tasks
    from ..superb.plan import Recipe, Run, noise_conditions, parse_upstream, steps_overrides

    tasks = choose_tasks(args.tasks)
    if args.jobs < 1 or args.gpus < 1:
        raise SetupError("--jobs and --gpus must be 1 or more")
    if len(set(args.seeds)) < len(args.seeds):
        raise SetupError("--seeds names a seed twice")
    upstreams = [parse_upstream(text, args.selection) for text in args.upstreams]
    names = [upstream.name for upstream in upstreams]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SetupError(f"two upstreams are called {twice.pop()}; name them: NAME=CHECKPOINT")
    recipes_of, rates, steps, more = (
        _by_task(option, given, tasks)
        for option, given in (
            ("--recipe", args.recipe),
            ("--lr", args.lr),
            ("--steps", args.steps),
            ("--override", args.override),
        )
    )
    noises = noise_conditions(args.noise, args.snr)
    features = {name: _features(args, name) for name in names}
    runs = []
    for task in tasks:
        path = recipes_of.get(task.name, getattr(task, args.recipes))
        if not Path(path).is_file():
            raise SetupError(f"there is no recipe {path} in this folder; type: s3prl-ekd init .")
        parts = []
        if task.name in steps:
            parts.append(steps_overrides(_number("--steps", steps[task.name], int)))
        if task.name in more:
            parts.append(more[task.name])
        recipe = Recipe(task, path, ",,".join(parts))
        recipe.check(Path.cwd())
        chosen = rates.get(task.name)
        chosen = [_number("--lr", r, float) for r in chosen.split(",")] if chosen else None
        for upstream in upstreams:
            for lr in chosen or [recipe.learning_rate()]:
                for seed in args.seeds:
                    for fold in recipe.folds():
                        facts = (upstream, recipe, lr, seed, fold, args.output, noises)
                        runs.append(Run(*facts, features[upstream.name]))
    # an upstream's four tasks together, so that the first numbers to compare come early
    return sorted(runs, key=lambda run: names.index(run.upstream.name))


def _features(args, upstream: str):
    """Where an upstream's hidden states are kept: a folder of its own, unless the user named one,
    in which the digests of several keep them apart."""
    from ..downstream.arguments import OPTION, CacheOptions, check_folder, read_limit

    if args.cache_features is None:
        if args.keep_features:
            raise SetupError(f"--keep-features goes with {OPTION}")
        return None
    if args.gpus > 1:
        raise SetupError(f"{OPTION} is for --gpus 1: several processes train without it")
    folder = args.cache_features or str(args.output / FEATURES / upstream)
    check_folder(folder)
    return CacheOptions(folder, read_limit(args.cache_features_gb))


def _by_task(option: str, given: list[str], tasks) -> dict[str, str]:
    """``["pr=1e-3", …]`` -> ``{"pr": "1e-3"}``; without a task's name for all tasks."""
    from ..downstream.tasks import TASKS

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name in TASKS:
            found[name] = value
        elif option == "--recipe" and Path(text).is_file():  # its path may have = signs
            found.update({task.name: text for task in tasks})
        elif not equals or (option == "--override" and "." in name):
            found.update({task.name: text for task in tasks})
        else:
            raise SetupError(f"{option} {text}: unknown task {name!r}; known: {', '.join(TASKS)}")
    return found


def _number(option: str, text: str, kind):
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise SetupError(f"{option} {text}: a number above 0 is needed")
    return number


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
