"""Compare pruned students with two-layer students of the same size and with random cuts.

The teachers are the three tiny ones; their layerwise average is the target. For each sparsity and
seed:

* ``pruned``: a copy of tiny_hubert, pruned while it is distilled, cut, distilled again;
* ``random``: the same first run, but as many units of each layer are kept at random;
* ``two_layer``: a student of two layers with the same number of parameters, for as many steps.

Then linear probes of all hidden states in closed form: phones of frames (forced alignments, other
speakers in the test) and speakers of excerpts of one second, clean and with noise at 5 dB. Each
result is a file in FOLDER/results, so the same command goes on from what is there; ``--report``
only writes report.md, report.csv and report.png.

CORPUS has unlabeled.tsv, sid.tsv, noise.tsv and alignments.tsv (`path`, `segments` as
`PHONE:START+LENGTH` in frames of 10 ms) with paths relative to it.

example:
  python tools/pruning_study.py STUDY --corpus CORPUS
  python tools/pruning_study.py STUDY --corpus CORPUS --sparsity 0.5 --seeds 0 --steps 30 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study_parts.probes import probe
from study_parts.result_table import cell, read_results, write_csv
from study_parts.training import TrainingFolder

TEACHERS = {"hubert": "tiny_hubert", "robust_hubert": "tiny_robust_hubert", "wavlm": "tiny_wavlm"}
LAYERS = [0, 2, 4, 6]
COPY = 3_253_504  # parameters of a copy of tiny_hubert
KINDS = ("pruned", "random", "two_layer")
MEASURES = ("parameters", "dev_loss", "phones", "speakers", "noisy_speakers")
ROW = Callable[["Study", float, int], dict[str, Any]]


class Study(TrainingFolder):
    """The folder of a study and its options."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args.folder, args.corpus)
        self.first, self.second = args.steps
        self.rate, self.gate_rate = args.lr, args.gate_lr
        self.two_layer_rate = args.two_layer_lr

    def model(self, student: dict[str, Any], **more: Any) -> dict[str, Any]:
        config = {
            "teachers": {name: {"model": m, "layers": LAYERS} for name, m in TEACHERS.items()},
            "aggregation": "average",
            "student": student,
            "heads": {"kind": "layerwise"},
            "loss": {"cosine": "raw"},
        }
        return {**config, **more}


def first_run(study: Study, sparsity: float, seed: int) -> tuple[dict[str, Any], Path]:
    pruning = {"sparsity": sparsity, "reach_at": study.first // 2, "lr": study.gate_rate}
    config = study.model({"kind": "copy", "of": "hubert"}, pruning=pruning)
    name = f"first_{sparsity}_{seed}"
    return config, study.train(name, config, study.first, study.rate, 0.3, seed)


def pruned(study: Study, sparsity: float, seed: int, random: int | None = None) -> dict[str, Any]:
    """A pruned student, or with ``random`` a student cut at random."""
    from s3prl_ekd.distill.pruning.cut import cut, gate_values
    from s3prl_ekd.student_file import LoadedStudent, load_student, write_student

    config, checkpoint = first_run(study, sparsity, seed)
    loaded = load_student(checkpoint)
    kind = "pruned" if random is None else "random"
    name = f"{kind}_{sparsity}_{seed}"
    file = study.folder / f"{name}.pt"
    student = cut(loaded.student, gate_values(loaded.student, random))
    write_student(LoadedStudent(student, loaded.heads, loaded.targets, loaded.about), file)
    second = study.model({"kind": "file", "file": str(file)})
    result = {
        "dev_masked": study.dev_loss(config, study.first, checkpoint),
        "dev_cut": study.dev_loss(second, 1, None),
    }
    last = study.train(name, second, study.second, study.rate, 0.2, seed)
    return {
        **result,
        "dev_loss": study.dev_loss(second, study.second, last),
        **probe_student(study, last),
    }


def random_cut(study: Study, sparsity: float, seed: int) -> dict[str, Any]:
    return pruned(study, sparsity, seed, random=seed)


def two_layer(study: Study, sparsity: float, seed: int) -> dict[str, Any]:
    """A two-layer student of the size that the pruned one should have."""
    student, same_width = two_layer_size(round((1 - sparsity) * COPY))
    config = study.model(student, heads={"kind": "split"})
    if same_width:
        config["init"] = {"teacher": "hubert", "conv": True, "encoder": False}
    name, steps = f"two_layer_{sparsity}_{seed}", study.first + study.second
    last = study.train(name, config, steps, study.two_layer_rate, 0.07, seed)
    return {"dev_loss": study.dev_loss(config, steps, last), **probe_student(study, last)}


def two_layer_size(parameters: int) -> tuple[dict[str, Any], bool]:
    """Settings of a two-layer student with so many parameters, and whether it is 192 wide."""
    from s3prl_ekd.distill.student import Student
    from s3prl_ekd.distill.student_settings import StudentSettings

    conv = "[(128,10,5)] + [(128,3,2)] * 4 + [(128,2,2)] * 2"
    for width in (192, 128, 96):
        size = {
            "extractor_conv_feature_layers": conv,
            "feature_grad_mult": 0.1,
            "encoder_embed_dim": width,
            "encoder_attention_heads": 4,
        }
        smallest = Student(StudentSettings(**size, encoder_ffn_embed_dim=1))
        count = sum(parameter.numel() for parameter in smallest.parameters())
        units = 1 + round((parameters - count) / (2 * (2 * width + 1)))
        if units >= width:
            return {**size, "encoder_ffn_embed_dim": units}, width == 192
    raise SystemExit(f"no two-layer student of {parameters:,} parameters")


def probe_student(study: Study, checkpoint: Path) -> dict[str, float]:
    from s3prl_ekd.upstream.expert import UpstreamExpert

    upstream = UpstreamExpert(checkpoint).eval()
    parameters = sum(p.numel() for p in upstream.student.parameters())
    return {
        "parameters": parameters,
        "removed": 1 - parameters / COPY,
        **probe(study.corpus, upstream),
    }


# Report


def report(study: Study) -> str:
    """A Markdown table: mean and standard deviation over seeds; all results as CSV; a picture."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in read_results(study.folder / "results"):
        rows.setdefault((result["kind"], result["sparsity"]), []).append(result)
    columns = ("parameters", "removed", "dev_masked", "dev_cut", *MEASURES[1:])
    lines = ["| student | sparsity | seeds | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for (kind, sparsity), results in sorted(
        rows.items(), key=lambda item: (item[0][1], item[0][0])
    ):
        cells = [cell([r[name] for r in results if name in r]) for name in columns]
        seeds = len(results)
        lines.append(f"| {kind} | {sparsity:g} | {seeds} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (study.folder / "report.md").write_text(text, encoding="utf-8")
    write_csv(
        [result for results in rows.values() for result in results], study.folder / "report.csv"
    )
    _plot(study, rows)
    return text


def _plot(study: Study, rows: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    from s3prl_ekd.system.figures import new_figure

    figure = new_figure(13, 3)
    axes = figure.subplots(1, 4)
    for axis, measure in zip(axes, MEASURES[1:], strict=True):
        for index, kind in enumerate(dict.fromkeys(kind for kind, _ in rows)):
            points = [
                (sparsity, result[measure])
                for (k, sparsity), results in rows.items()
                for result in results
                if k == kind and measure in result
            ]
            if not points:
                continue
            levels = sorted({level for level, _ in points})
            means = [statistics.fmean(v for at, v in points if at == level) for level in levels]
            color = f"C{index}"
            axis.plot(levels, means, marker="o", label=kind.replace("_", " "), color=color)
            axis.scatter(*zip(*points, strict=True), s=12, alpha=0.5, color=color)
        is_loss = measure == "dev_loss"
        title = "loss on dev" if is_loss else measure.replace("_", " ")
        axis.set(title=title, xlabel="sparsity", ylabel="loss" if is_loss else "accuracy, %")
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False)
    figure.savefig(study.folder / "report.png", dpi=120)


ROWS: dict[str, ROW] = {"pruned": pruned, "random": random_cut, "two_layer": two_layer}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="folder of the study")
    add("--corpus", type=Path, required=True)
    add("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.75])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    add(
        "--steps", type=int, nargs=2, default=[450, 150], help="of the two runs of a pruned student"
    )
    add("--lr", type=float, default=5e-4)
    add("--gate-lr", type=float, default=0.1)
    add("--two-layer-lr", type=float, default=1e-3)
    add("--report", action="store_true", help="only write the report")
    args = parser.parse_args()
    study = Study(args)
    if not args.report:
        if not (study.folder / "targets/index.json").exists():
            study.set_up(study.model({"kind": "copy", "of": "hubert"}), "--aggregated")
        if not (path := study.folder / "results/teacher.json").exists():
            from s3prl_ekd.teachers import load_upstream

            upstream = load_upstream("tiny_hubert", "tiny_hubert").eval()
            result = {
                "kind": "tiny_hubert",
                "sparsity": 0.0,
                "parameters": COPY,
                **probe(study.corpus, upstream),
            }
            path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        for seed in args.seeds:
            for sparsity in args.sparsity:
                for kind in args.kinds:
                    path = study.folder / "results" / f"{kind}_{sparsity}_{seed}.json"
                    if path.exists():
                        continue
                    start = time.monotonic()
                    result = {"kind": kind, "sparsity": sparsity, "seed": seed}
                    result |= ROWS[kind](study, sparsity, seed)
                    result["seconds"] = round(time.monotonic() - start)
                    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
                    print(json.dumps(result), flush=True)
    print(report(study))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
