"""Train the tiny teachers that the package ships, from folders of audio.

Tiny HuBERT in two iterations (units from MFCC, then from its own middle layer), tiny RobustHuBERT
(tiny HuBERT continued on noisy and reverberant speech) and tiny WavLM (with other utterances and
noise mixed in), 3.3 M parameters each, with s3prl's classes. The result depends only on inputs,
options and seed. The same command resumes, on a CPU bit for bit. Needs the extras units and plots.

example:
  python tools/make_voices.py voices
  python tools/train_tiny_teachers.py speech voices/train-clean -o zoo \\
      --manifest speech/unlabeled.tsv
  python tools/train_tiny_teachers.py AUDIO_FOLDER -o zoo --device cuda --steps 20000 \\
      --batch-seconds 80 --crop-seconds 8 --dropout 0.1 --minutes 60
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

from s3prl_ekd.errors import ConfigError, EkdError, SetupError
from s3prl_ekd.system.jobs import end_with_parent


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: finished, or --minutes is over. 2: a user's error. 128 + N: signal N.
    """
    args = make_parser().parse_args(argv)
    end_with_parent()  # if tools/study.py has started this command
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if args.summary:
            return print_summary(args.out)
        return run(args)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # such as a full disk; files written before are complete
        print(f"error: cannot write to {args.out}: {error.strerror}", file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The argument parser; options of the recipe have its names and defaults."""
    from teacher_zoo.recipe import TEACHERS, TeacherRecipe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = TeacherRecipe()
    add = parser.add_argument
    add("folders", metavar="AUDIO_FOLDER", nargs="+", help="folders of audio, searched recursively")
    add("-o", "--out", metavar="ZOO", required=True, help="folder of all output files")
    add(
        "--manifest",
        metavar="TSV",
        action="append",
        default=[],
        help="manifest in one of the folders, with columns path and split; only its train and dev "
        "utterances of that folder are used (without: one in 50 utterances is held out)",
    )
    add(
        "--noise",
        metavar="AUDIO",
        nargs="+",
        default=[],
        help="noise recordings, or folders of them, added to RobustHuBERT's synthetic noise",
    )
    add(
        "--teacher",
        choices=TEACHERS,
        action="append",
        help="train this teacher and the stages it needs (hubert, robust_hubert, wavlm)",
    )
    add(
        "--steps",
        type=int,
        default=default.steps,
        help=f"steps of a stage; half for tiny HuBERT's first iteration ({default.steps})",
    )
    add(
        "--batch-seconds",
        type=float,
        default=default.batch_seconds,
        help=f"seconds of audio in a batch ({default.batch_seconds:g})",
    )
    add(
        "--crop-seconds",
        type=float,
        default=default.crop_seconds,
        help=f"longest excerpt, seconds ({default.crop_seconds:g})",
    )
    add("--lr", type=float, default=default.lr, help=f"peak learning rate ({default.lr:g})")
    add(
        "--dropout",
        type=float,
        default=default.dropout,
        help=f"dropout; 0.1 for long runs, a tenth slower on a CPU ({default.dropout:g})",
    )
    add(
        "--alpha",
        type=float,
        default=default.alpha,
        help=f"weight of the loss of masked frames; unmasked: 1 - alpha ({default.alpha:g})",
    )
    add(
        "--mfcc-clusters",
        type=int,
        default=default.units.mfcc_clusters,
        help=f"number of units of the first iteration ({default.units.mfcc_clusters})",
    )
    add(
        "--hidden-clusters",
        type=int,
        default=default.units.hidden_clusters,
        help=f"number of units of later iterations ({default.units.hidden_clusters})",
    )
    add("--seed", type=int, default=default.seed, help=f"random seed ({default.seed})")
    add("--device", help="cpu, cuda, cuda:1 ... (cuda if available)")
    add("--workers", type=int, help="loader workers (cuda: up to 8; cpu: 0)")
    add(
        "--minutes",
        type=float,
        help="save and stop after this many minutes; the same command resumes",
    )
    add("--summary", action="store_true", help="only print a summary of the training in ZOO")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train with parsed arguments; return the exit code."""
    from s3prl_ekd import compat
    from s3prl_ekd.essence.units import require_sklearn
    from s3prl_ekd.pretrain.interrupts import StopSignals, exit_code
    from s3prl_ekd.system.figures import require_matplotlib
    from s3prl_ekd.system.terminal import quiet_s3prl

    require_sklearn()
    require_matplotlib()
    compat.apply()
    quiet_s3prl()
    from teacher_zoo.corpus import hours, read_corpus
    from teacher_zoo.noises import find_noise
    from teacher_zoo.recipe import SHIPPED
    from teacher_zoo.trainer import TrainingOptions
    from teacher_zoo.zoo import make_zoo

    started = time.monotonic()
    recipe = parse_recipe(args)
    device = parse_device(args.device)
    on_cuda = device.startswith("cuda")
    workers = args.workers if args.workers is not None else min(8, os.cpu_count() or 1) * on_cuda
    noise = find_noise(args.noise)
    corpus = read_corpus(args.folders, args.manifest, round(recipe.shortest_seconds * 16_000))
    logging.info(
        "train: %d utterances, %.2f h; held out: %d utterances, %.2f h; device %s",
        len(corpus.train), hours(corpus.train), len(corpus.dev), hours(corpus.dev), device,
    )  # fmt: skip
    with StopSignals() as signals:

        def stop(step: int) -> bool:
            late = args.minutes is not None and time.monotonic() - started > 60 * args.minutes
            return late or signals.received is not None

        interval = min(50, max(1, recipe.steps // 100))
        options = TrainingOptions(device, workers, log_every=interval, dev_every=10 * interval)
        files = make_zoo(
            tuple(args.teacher or SHIPPED), corpus, recipe, Path(args.out), options, stop, noise
        )
    if files is None:
        print(f"{args.out}: saved; the same command resumes")
        return exit_code(signals.received.name) if signals.received else 0
    print_summary(args.out)
    for path in files.values():
        print(path)
    return 0


def print_summary(out: str) -> int:
    """Print a summary of the training in the folder ``out``."""
    from teacher_zoo.summary import summary

    print(summary(Path(out)))
    return 0


def parse_recipe(args: argparse.Namespace):
    """The recipe with the options of the command line.

    Raises:
        ConfigError: an option is invalid.
    """
    from teacher_zoo.recipe import TeacherRecipe, check_recipe

    default = TeacherRecipe()
    units = dataclasses.replace(
        default.units, mfcc_clusters=args.mfcc_clusters, hidden_clusters=args.hidden_clusters
    )
    names = ("steps", "batch_seconds", "crop_seconds", "lr", "dropout", "alpha", "seed")
    recipe = dataclasses.replace(default, units=units, **{n: getattr(args, n) for n in names})
    try:
        check_recipe(recipe)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return recipe


def parse_device(name: str | None) -> str:
    """The device to train on.

    Raises:
        SetupError: no such device.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise SetupError(
            f"--device {name} is not available; use cpu, or cuda if torch finds a GPU"
        ) from None
    return name


if __name__ == "__main__":
    raise SystemExit(main())
