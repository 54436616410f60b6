"""Pretrain with several model configs and seeds, and print a table of losses and distances.

Run it in a working folder made by `s3prl-ekd init`. Each run is a `run_pretrain.py -u ekd`;
finished runs are kept, interrupted ones are resumed. Losses are comparable only between experiments
with the same targets, distances to a teacher between experiments with the same teachers.

example:
  s3prl-ekd init . -x three_average -x three_separate --tiny
  s3prl-ekd sweep pretrain/ekd/tiny/*.yaml -c pretrain/ekd/tiny_runner.yaml --seeds 1 2 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SetupError
from ..system.seeds import seed_number


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", metavar="MODEL.yaml", type=Path, nargs="+")
    parser.add_argument("-c", "--runner", metavar="RUNNER.yaml", type=Path, required=True)
    parser.add_argument(
        "--seeds", type=seed_number, nargs="+", action="extend", help="default: 1337"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs in parallel (default: 1)")
    parser.add_argument("-o", "--override", default="", help="-o of run_pretrain.py")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write the table to FILE")


def main(args: argparse.Namespace) -> int:
    from ..files.atomic import write_csv
    from ..files.report_file import check_report
    from ..pretrain.settings import (
        check_pruning_run,
        load_model_config,
        load_runner_config,
    )
    from ..pretrain.sweep import SweepResult, SweepRun, results_table, run_sweep
    from ..system.tables import markdown_table

    if not Path("pretrain/ekd").is_dir():
        raise SetupError("no pretrain/ekd in this folder; type: s3prl-ekd init .")
    names = [config.stem for config in args.configs]
    seeds = args.seeds or [1337]
    if len(set(names)) < len(names) or len(set(seeds)) < len(seeds):
        raise SetupError(
            "two configs have the same file name, or two seeds are equal; rename or remove one"
        )
    if args.jobs < 1:
        raise SetupError(f"--jobs must be 1 or more, got {args.jobs}")
    runner = load_runner_config(args.runner, args.override)
    for config in args.configs:
        check_pruning_run(load_model_config(config), runner)
    runs = [
        SweepRun(config, args.runner, seed, args.override)
        for config in args.configs
        for seed in seeds
    ]
    if args.csv:
        check_report(args.csv, "experiment,seeds,")  # before the runs, not hours later
    grouped: dict[str, list[SweepResult]] = {name: [] for name in names}
    for run, result in zip(runs, run_sweep(runs, args.jobs), strict=True):
        grouped[run.config.stem].append(result)
    rows = results_table(grouped)
    print(markdown_table(rows))
    if args.csv:
        write_csv(args.csv, rows)
    return 0
