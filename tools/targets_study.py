"""Compare targets that several teachers share: relations, units and a common basis.

Students with random first weights learn from the three tiny teachers, each row of the table for as
many steps, on the same batches of a seed:

* ``none``: the untrained student;
* ``average``: heads for the layerwise average of the teachers;
* ``separate``: heads for each teacher;
* ``average_relation``: ``average`` and the temporal relations (``relation``);
* ``relation``: the temporal relations alone (``loss.weight: 0``);
* ``average_mean_std``: the average of normalised targets (``target_norm: mean_std``);
* ``average_procrustes``: the average in a common basis (``target_norm: procrustes``);
* ``separate_units``: ``separate`` and masked units of each teacher;
* ``units``: masked units alone (``loss.weight: 0``).

The weights of ``relation`` and ``unit_loss`` are measured once: after short runs with a weight of 1
the norm of the gradient of the distillation loss with respect to the student is divided by that of
the added term (median of ten batches).

Then linear probes, see study_parts/probes.py. Each result is a file in FOLDER/results, so the same
command continues from what is there; ``--report`` only writes report.md, report.csv and report.png.
FOLDER/study.json has the steps and the learning rate; other ones need another folder. CORPUS has
unlabeled.tsv, pr.tsv, sid.tsv, noise.tsv and alignments.tsv.

example:
  python tools/targets_study.py STUDY --corpus CORPUS
  python tools/targets_study.py TRIAL --corpus CORPUS --rows none average --seeds 0 --steps 20
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t
from study_parts.probes import PROBES, probe
from study_parts.processes import run_jobs
from study_parts.result_table import cell, read_results, write_csv
from study_parts.rows import STUDENT
from study_parts.training import TrainingFolder

TEACHERS = {"hubert": "tiny_hubert", "robust_hubert": "tiny_robust_hubert", "wavlm": "tiny_wavlm"}
LAYERS = [2, 4, 6]
UNIT_LAYER, CLUSTERS, UNIT_UTTERANCES = 4, 100, 300
NORM_STEPS = 100  # of the statistics of target_norm; 80,000 frames for a width of 192
PILOT_STEPS, PILOT_SEED, PILOT_BATCHES = 100, 1000, 10
REFERENCES = ("average", "separate")


class Study(TrainingFolder):
    """The folder of a study and its options."""

    def __init__(self, folder: Path, corpus: Path, steps: int, rate: float):
        super().__init__(folder, corpus)
        self.steps, self.rate = steps, rate

    def check_options(self) -> None:
        """Write study.json, or refuse a folder of other steps or another learning rate.

        Results without study.json count as those of their own steps and of this learning rate.

        Raises:
            SystemExit: the options differ.
        """
        path, options = self.folder / "study.json", {"steps": self.steps, "lr": self.rate}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            steps = {result["steps"] for result in read_results(self.folder / "results")} - {0}
            others = sorted(steps - {self.steps})
            found = {**options, "steps": others[0]} if others else options
        if found != options:
            raise SystemExit(
                f"{self.folder} has results of --steps {found['steps']} --lr {found['lr']}, not of "
                f"--steps {self.steps} --lr {self.rate}; use another folder"
            )
        path.write_text(json.dumps(options, indent=1), encoding="utf-8")

    def model(self, row: str, weights: dict[str, float]) -> dict[str, Any]:
        """The model config of a row; ``weights``: of relation and units."""
        first, _, added = row.partition("_")
        alone = {"loss": {"weight": 0.0}} if first in ("relation", "units") else {}
        config = {
            "teachers": {name: {"model": m, "layers": LAYERS} for name, m in TEACHERS.items()},
            "aggregation": first if first in REFERENCES else "average",
            "student": STUDENT,
            **alone,
        }
        if "relation" in (first, added):
            config["relation"] = {"weight": weights["relation"]}
        if "units" in (first, added):
            config["student"] = {**STUDENT, "mask": {}}
            config["unit_loss"] = [
                {"file": str(self.units(name)), "weight": weights["units"]} for name in TEACHERS
            ]
        if added in ("mean_std", "procrustes"):
            config |= {"target_norm": added, "target_norm_steps": NORM_STEPS}
        return config

    def units(self, teacher: str) -> Path:
        return self.folder / f"units_{teacher}.safetensors"

    def prepare(self) -> None:
        """Make the target cache, the units and the weights of the added terms."""
        if not (self.folder / "targets/index.json").exists():
            self.set_up(self.model("average", {}))
        data = ["--data", "tables/train.csv", "--audio-root", str(self.corpus.folder)]
        size = ["--clusters", str(CLUSTERS), "--utterances", str(UNIT_UTTERANCES)]
        for name in TEACHERS:
            if not self.units(name).exists():
                layer = ["--teacher", name, "--layer", str(UNIT_LAYER)]
                file = ["-o", str(self.units(name))]
                self.command("fit-units", "cache.yaml", *layer, *size, *data, *file)
        path = self.folder / "weights.json"
        if not path.exists():
            rows = {"relation": "average_relation", "units": "separate_units"}
            weights = {name: self.measure_weight(name, row) for name, row in rows.items()}
            path.write_text(json.dumps(weights, indent=1), encoding="utf-8")

    def weights(self) -> dict[str, float]:
        return json.loads((self.folder / "weights.json").read_text(encoding="utf-8"))

    def measure_weight(self, name: str, row: str) -> float:
        """The weight that gives an added term the gradient of the distillation loss.

        Units: of the sum over teachers, so the weight is that of each teacher's term.
        """
        model = self.model(row, {name: 1.0})
        steps = min(PILOT_STEPS, self.steps)
        run = self.train(f"pilot_{row}", model, steps, self.rate, 0.1, PILOT_SEED)
        expert = self.expert(model, run)
        expert.distiller.eval()
        terms, ratios = expert.distiller.terms, []
        for _, batch in zip(range(PILOT_BATCHES), expert.dataloader, strict=False):
            both = student_gradient(expert, batch)
            expert.distiller.terms = terms[:0]
            distillation = student_gradient(expert, batch)
            expert.distiller.terms = terms
            ratios.append(float(distillation.norm() / (both - distillation).norm()))
        expert.close()
        return float(f"{statistics.median(ratios):.2g}")


def student_gradient(expert: Any, batch: Any) -> Any:
    """Gradient of the loss of a batch with respect to the student's weights, as one vector."""
    import torch

    parameters = [p for p in expert.distiller.student.parameters() if p.requires_grad]
    loss, _ = expert(batch, defaultdict(list), global_step=1)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if gradient is None else gradient).flatten()
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
    )


def result_of(study: Study, row: str, seed: int) -> dict[str, Any]:
    """Train and probe the student of a row, or only probe an untrained one or a teacher; write the
    result to its file."""
    import torch
    from s3prl_ekd.upstream.expert import UpstreamExpert

    from s3prl_ekd.teachers import load_upstream

    torch.set_num_threads(1)
    start = time.monotonic()
    if row in TEACHERS.values():
        upstream: Any = load_upstream(row, row).eval()
    elif row == "none":
        upstream = UpstreamExpert(study.untrained(STUDENT, seed)).eval()
    else:
        name, model = f"{row}_{seed}", study.model(row, study.weights())
        last = study.train(name, model, study.steps, study.rate, 0.1, seed, log=name)
        upstream = UpstreamExpert(last).eval()
    trained = row != "none" and row not in TEACHERS.values()
    result = {"row": row, "seed": seed, "steps": study.steps if trained else 0}
    result |= probe(study.corpus, upstream)
    result["seconds"] = round(time.monotonic() - start)
    result_path(study, row, seed).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def result_path(study: Study, row: str, seed: int) -> Path:
    return study.folder / "results" / f"{row}_{seed}.json"


def run_missing(study: Study, rows: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
    """Compute the results that are not there, all rows of the first seed first."""
    wanted = [(row, seed) for seed in seeds for row in rows]
    wanted += [(teacher, 0) for teacher in TEACHERS.values()]
    missing = [job for job in wanted if not result_path(study, *job).exists()]
    run_jobs(jobs, result_of, [(study, *job) for job in missing])


# Report


def difference(values: dict[int, float], reference: dict[int, float]) -> tuple[float, float] | None:
    """Mean difference of two rows, paired by seed, and half the width of its 95 % interval.

    Student's t over seeds; None with fewer than two common seeds.
    """
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    count = len(differences)
    if count < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(count)
    return statistics.fmean(differences), float(student_t.ppf(0.975, count - 1)) * error


def report(study: Study) -> str:
    """Two Markdown tables, all results as CSV, and a picture."""
    results = read_results(study.folder / "results")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in [*ROWS, *TEACHERS.values()]:
        if values := [result for result in results if result["row"] == row]:
            rows[row] = values
    lines = ["Accuracy in %: mean ± standard deviation over seeds.", ""]
    lines += ["| row | seeds | " + " | ".join(PROBES) + " |", "|---" * (len(PROBES) + 2) + "|"]
    for row, values in rows.items():
        cells = [cell([result[name] for result in values]) for name in PROBES]
        lines.append(f"| {row} | {len(values)} | " + " | ".join(cells) + " |")
    intervals = 0
    for reference in (name for name in REFERENCES if name in rows):
        lines += ["", f"Difference from {reference} in points, paired by seed, with 95 % interval"]
        lines[-1] += " (Student's t over seeds); bold: the interval excludes 0."
        lines += ["", "| row | n | " + " | ".join(PROBES) + " |", "|---" * (len(PROBES) + 2) + "|"]
        for row in rows:
            if row in ROWS and row != reference:
                count, cells = differences_from(rows[row], rows[reference])
                intervals += len([text for text in cells if text])
                lines.append(f"| {row} | {count} | " + " | ".join(cells) + " |")
    if intervals:
        lines += ["", f"There are {intervals} intervals, of which about 1 in 20 is bold by chance."]
    text = "\n".join(lines) + "\n"
    (study.folder / "report.md").write_text(text, encoding="utf-8")
    write_csv(
        [result for values in rows.values() for result in values], study.folder / "report.csv"
    )
    _plot(study, rows)
    return text


def differences_from(
    results: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]
) -> tuple[int, list[str]]:
    """The number of common seeds, and a cell for each probe."""
    count, cells = 0, []
    for name in PROBES:
        a, b = ({r["seed"]: r[name] for r in values} for values in (results, reference))
        count = len(a.keys() & b.keys())
        found = difference(a, b)
        mark = "**" if found and abs(found[0]) > found[1] else ""
        cells.append(f"{mark}{found[0]:+.1f} ± {found[1]:.1f}{mark}" if found else "")
    return count, cells


def _plot(study: Study, rows: dict[str, list[dict[str, Any]]]) -> None:
    from s3prl_ekd.system.figures import new_figure

    figure = new_figure(12, 0.8 + 0.3 * len(rows))
    axes = figure.subplots(1, len(PROBES), sharey=True)
    places = range(len(rows))
    for axis, name in zip(axes, PROBES, strict=True):
        for place, (row, results) in zip(places, rows.items(), strict=True):
            values = [result[name] for result in results]
            color = "0.5" if row == "none" or row in TEACHERS.values() else "C0"
            axis.scatter(values, [place] * len(values), s=14, alpha=0.6, color=color)
            axis.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=color)
        axis.set(title=name.replace("_", " "), xlabel="accuracy, %")
        axis.grid(alpha=0.3)
    axes[0].set_yticks([*places], [row.replace("_", " ") for row in rows])
    axes[0].invert_yaxis()
    figure.savefig(study.folder / "report.png", dpi=120)


ROWS = (
    "none",
    "average",
    "separate",
    "average_relation",
    "relation",
    "average_mean_std",
    "average_procrustes",
    "separate_units",
    "units",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="folder of the study")
    add("--corpus", type=Path, required=True)
    add("--rows", nargs="+", default=[*ROWS], choices=ROWS, metavar="ROW")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=600)
    add("--lr", type=float, default=3e-3)
    add("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    add("--report", action="store_true", help="only write the report")
    args = parser.parse_args(argv)
    study = Study(args.folder, args.corpus, args.steps, args.lr)
    if not args.report:
        os.environ["OMP_NUM_THREADS"] = "1"
        study.check_options()
        study.prepare()
        run_missing(study, args.rows, args.seeds, args.jobs)
    print(report(study))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
