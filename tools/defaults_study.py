"""Compare dev losses of the default optimizer, precision and forward with those of s3prl.

Each row trains the student of pretrain/ekd/tiny_model.yaml from cached targets of the three tiny
teachers, on the same batches of a seed:

* ``s3prl``: s3prl's optimizer (AdamW_with_schedule) and forward of the student, in float32;
* ``default``: FusedAdamW, this package's forward, ``precision: auto``.

The loss is that of the dev set after the last step. Each result is a file in FOLDER/results, so the
same command continues from what is there. CORPUS has unlabeled.tsv (columns path, duration, split).

example:
  python tools/defaults_study.py STUDY --corpus CORPUS --steps 2000
  python tools/defaults_study.py TRIAL --corpus CORPUS --rows s3prl default --seeds 0 --steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from study_parts.processes import run_jobs
from study_parts.result_table import read_results
from study_parts.training import TrainingFolder, runner_config

# Row -> changes of the model config, and of the runner config.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "s3prl": (
        {"student_backend": "s3prl"},
        {"runner": {"precision": "float32"}, "optimizer": {"name": "AdamW_with_schedule"}},
    ),
    "default": ({}, {"runner": {"precision": "auto"}}),
}


class Study(TrainingFolder):
    """The folder of a study."""

    def model(self, row: str = "default") -> dict[str, Any]:
        """The model config of a row: the shipped one with the row's changes."""
        path = self.folder / "pretrain/ekd/tiny_model.yaml"
        return merged(yaml.safe_load(path.read_text(encoding="utf-8")), ROWS[row][0])

    def runner(self, row: str, steps: int) -> dict[str, Any]:
        """The runner config of a row: the shipped optimizer with the row's changes."""
        path = self.folder / "pretrain/ekd/tiny_runner.yaml"
        shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = runner_config(self.data(), steps, shipped["optimizer"]["lr"])
        config["runner"] |= {"gradient_clipping": shipped["runner"]["gradient_clipping"]}
        config["optimizer"] = shipped["optimizer"]
        return merged(config, ROWS[row][1])


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested mappings with changes."""
    result = {**config, **changes}
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            result[key] = merged(config[key], value)
    return result


def result_of(study: Study, row: str, seed: int, steps: int) -> dict[str, Any]:
    """Train a run and write its dev loss."""
    import torch

    torch.set_num_threads(1)
    name, model = f"{row}_{seed}", study.model(row)
    last = study.folder / "result/pretrain" / name / "last.ckpt"
    checkpoint = last.with_name(f"states-{steps}.ckpt")
    if not checkpoint.exists():
        study.write(f"{name}.yaml", model)
        study.write(f"{name}_runner.yaml", study.runner(row, steps))
        argv = ["run_pretrain.py", "-u", "ekd", "-n", name, "-c", f"{name}_runner.yaml"]
        argv += ["-g", f"{name}.yaml", "--seed", str(seed)]
        study.command(*argv, *(["-a"] if last.exists() else []), log=name)
    loss = study.dev_loss(model, steps, checkpoint)
    result = {"row": row, "seed": seed, "steps": steps, "dev_loss": loss}
    path = study.folder / "results" / f"{name}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return result


def report(study: Study) -> str:
    """A Markdown table: mean, standard deviation and single dev losses of each row."""
    results = read_results(study.folder / "results")
    lines = ["| row | steps | dev loss | seeds |", "|---|---|---|---|"]
    for row in ROWS:
        values = [result for result in results if result["row"] == row]
        if not values:
            continue
        losses = [result["dev_loss"] for result in values]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        single = ", ".join(f"{loss:.4f}" for loss in losses)
        mean = f"{statistics.fmean(losses):.4f}{spread}"
        lines.append(f"| {row} | {values[0]['steps']} | {mean} | {single} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="folder of the study")
    add("--corpus", type=Path, required=True)
    add("--rows", nargs="+", default=["s3prl", "default"], choices=ROWS, metavar="ROW")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=2000)
    add("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(args.folder, args.corpus)
    if not (study.folder / "pretrain").exists():
        study.command("init", ".")
    if not (study.folder / "targets").exists():
        study.set_up(study.model())
    wanted = [(row, seed) for seed in args.seeds for row in args.rows]
    missing = [
        job for job in wanted if not (study.folder / "results" / f"{job[0]}_{job[1]}.json").exists()
    ]
    run_jobs(args.jobs, result_of, [(study, *job, args.steps) for job in missing])
    print(report(study))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
