"""Distil with several model configs and seeds, and print one table of how they ended.

Runs in a working folder of `s3prl-ekd init`, through `run_pretrain.py -u ekd`; finished runs are
kept, cut ones go on. Losses compare only where the targets are the same; the distances to each
teacher compare between experiments of the same teachers.

example:
  s3prl-ekd init . -x all
  s3prl-ekd matrix pretrain/ekd/tiny/*.yaml -c pretrain/ekd/tiny_runner.yaml --seeds 1 2 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SetupError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", metavar="MODEL.yaml", type=Path, nargs="+")
    parser.add_argument("-c", "--runner", metavar="RUNNER.yaml", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="default: 1337")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("-o", "--override", default="", help="as for run_pretrain.py")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="also write the table there")


def main(args: argparse.Namespace) -> int:
    from ..files.atomic import write_csv
    from ..pretrain.settings import load_model_config, load_runner_config
    from ..pretrain.sweep import SweepRun, markdown, run_all, table

    if not Path("pretrain/ekd").is_dir():
        raise SetupError("nothing is set up in this folder; type: s3prl-ekd init .")
    names = [config.stem for config in args.configs]
    if len(set(names)) < len(names) or len(set(args.seeds)) < len(args.seeds):
        raise SetupError("the configs and the seeds must have different names")
    if args.jobs < 1:
        raise SetupError(f"--jobs is {args.jobs}; 1 or more is allowed")
    if args.csv:
        args.csv.touch()  # say now, not after hours, that it cannot be written
    load_runner_config(args.runner, args.override)
    for config in args.configs:
        load_model_config(config)
    runs = [
        SweepRun(config, args.runner, seed, args.override)
        for config in args.configs
        for seed in args.seeds
    ]
    done = dict(run_all(runs, args.jobs))
    grouped = {name: [done[run] for run in runs if run.config.stem == name] for name in names}
    rows = table(grouped)
    print(markdown(rows))
    if args.csv:
        write_csv(args.csv, rows)
    return 0
