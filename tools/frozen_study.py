"""Compare a frozen with a trained conv extractor.

The student of pretrain_configs/tiny_model.yaml, whose first weights are those of tiny_hubert,
learns from the three tiny teachers, by cached targets. The rows are ``trained``
(``feature_grad_mult: 0.1``, DistilHuBERT's) and ``frozen`` (``train_extractor: false``); the values
the loss on the dev set, the accuracies of the linear probes of study_parts/probes.py, and the CPU
seconds of a run. Each result is a file in FOLDER/results, so the same command continues from what
is there. CORPUS: see targets_study.py.

example:
  python tools/frozen_study.py STUDY --corpus CORPUS
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from study_parts.probes import PROBES, probe
from study_parts.result_table import cell, read_results
from study_parts.training import TrainingFolder

CONFIG = Path(__file__).resolve().parents[1] / "pretrain_configs/tiny_model.yaml"
ROWS = {
    "trained": {"feature_grad_mult": 0.1},
    "frozen": {"train_extractor": False},
}


def model_config(row: str) -> dict[str, Any]:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    del config["student"]["feature_grad_mult"]
    config["student"] |= ROWS[row]
    return config


def run(study: TrainingFolder, row: str, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """Train and measure a student."""
    from s3prl_ekd.upstream.expert import UpstreamExpert

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    model = model_config(row)
    last = study.train(f"{row}_{seed}", model, steps, rate, 0.1, seed)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    result = {"row": row, "seed": seed, "steps": steps, "cpu_seconds": round(seconds)}
    result["dev_loss"] = study.dev_loss(model, steps, last)
    return result | probe(study.corpus, UpstreamExpert(last).eval())


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    values = ("dev_loss", *PROBES, "cpu_seconds")
    lines = [f"| row | seeds | {' | '.join(values)} |", "|---" * (len(values) + 2) + "|"]
    for row in ROWS:
        if own := [result for result in results if result["row"] == row]:
            cells = [cell([result[value] for result in own]) for value in values]
            lines.append(f"| {row} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the study")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the training runs
    study = TrainingFolder(args.folder, args.corpus)
    if not (study.folder / "targets/index.json").exists():
        study.set_up(model_config("frozen"))
    for seed in args.seeds:
        for row in ROWS:
            path = study.folder / f"results/{row}_{seed}.json"
            if not path.exists():
                result = run(study, row, seed, args.steps, args.lr)
                path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(table(read_results(study.folder / "results")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
