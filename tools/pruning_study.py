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
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

TEACHERS = {"hubert": "tiny_hubert", "robust_hubert": "tiny_robust_hubert", "wavlm": "tiny_wavlm"}
LAYERS = [0, 2, 4, 6]
EXCERPT = 32_000  # samples of an utterance in training, 2 s
FRAME = 320  # samples
COPY = 3_253_504  # parameters of a copy of tiny_hubert
KINDS = ("pruned", "random", "two_layer")
MEASURES = ("parameters", "dev_loss", "phones", "speakers", "noisy_speakers")
ROW = Callable[["Study", float, int], dict[str, Any]]


class Study:
    """The folder of a study and its options."""

    def __init__(self, args: argparse.Namespace):
        self.folder, self.corpus = args.folder.resolve(), args.corpus.resolve()
        self.first, self.second = args.steps
        self.rate, self.gate_rate = args.lr, args.gate_lr
        self.two_layer_rate = args.two_layer_lr
        (self.folder / "results").mkdir(parents=True, exist_ok=True)

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.corpus / f"{name}.tsv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    def run(self, *command: str) -> None:
        """Run a command of this package in the study's folder; its output goes to log.txt."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            print("$", *command, file=log, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "s3prl_ekd", *command],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise SystemExit(f"failed: {' '.join(command)}; see {self.folder / 'log.txt'}")

    def set_up(self) -> None:
        """Write the working folder, length tables and the target cache."""
        if not (self.folder / "pretrain").exists():
            self.run("init", ".")
        tables = self.folder / "tables"
        tables.mkdir(exist_ok=True)
        for split in ("train", "dev"):
            rows = [row for row in self.table("unlabeled") if row["split"] == split]
            lengths = {row["path"]: round(float(row["duration"]) * 16_000) for row in rows}
            paths = sorted(lengths, key=lambda path: -lengths[path])
            lines = [f"{i},{path},{lengths[path]}," for i, path in enumerate(paths)]
            text = "\n".join([",file_path,length,label", *lines]) + "\n"
            (tables / f"{split}.csv").write_text(text, encoding="utf-8")
        self.write("cache.yaml", self.model({"kind": "copy", "of": "hubert"}))
        self.write("cache_runner.yaml", self.runner(2, self.rate, cached=False))
        self.run(
            "cache", "-c", "cache_runner.yaml", "-g", "cache.yaml", "-o", "targets", "--aggregated"
        )

    def model(self, student: dict[str, Any], **more: Any) -> dict[str, Any]:
        config = {
            "teachers": {name: {"model": m, "layers": LAYERS} for name, m in TEACHERS.items()},
            "aggregation": "average",
            "student": student,
            "heads": {"kind": "layerwise"},
            "loss": {"cosine": "raw"},
        }
        return {**config, **more}

    def runner(
        self, steps: int, rate: float, warmup: float = 0.1, cached: bool = True
    ) -> dict[str, Any]:
        data = {
            "libri_root": str(self.corpus),
            "file_path": "tables",
            "sets": ["train"],
            "dev_sets": ["dev"],
            "train_batch_size": 8,
            "num_workers": 1,
            "sequence_length": EXCERPT,
        }
        if cached:
            data["target_cache"] = "targets"
        return {
            "runner": {
                "n_epochs": -1,
                "total_steps": steps,
                "gradient_clipping": 10.0,
                "gradient_accumulate_steps": 1,
                "log_step": 1 if steps == 2 else 10,
                "save_step": steps - 1,
                "max_keep": 1,
            },
            "optimizer": {
                "name": "FusedAdamW",
                "lr": rate,
                "warmup_proportion": warmup,
                "betas": [0.9, 0.98],
                "eps": 1e-8,
                "weight_decay": 0,
            },
            "pretrain_expert": {"datarc": data},
        }

    def write(self, name: str, config: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def train(
        self, name: str, model: dict[str, Any], steps: int, rate: float, warmup: float, seed: int
    ) -> Path:
        """Train a run, unless it is there; return its last checkpoint."""
        last = self.folder / "result/pretrain" / name / "last.ckpt"
        if not (last.parent / f"states-{steps}.ckpt").exists():
            self.write(f"{name}.yaml", model)
            self.write(f"{name}_runner.yaml", self.runner(steps, rate, warmup))
            configs = ["-c", f"{name}_runner.yaml", "-g", f"{name}.yaml"]
            resume = ["-a"] if last.exists() else []
            self.run(
                "run_pretrain.py", "-u", "ekd", "-n", name, *configs, "--seed", str(seed), *resume
            )
        return last

    def dev_loss(self, config: dict[str, Any], steps: int, checkpoint: Path | None) -> float:
        """Loss on the dev set, with the weights of the config or of a checkpoint."""
        from s3prl_ekd.files.run_checkpoints import read_checkpoint
        from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert
        from s3prl_ekd.pretrain.trainer import dev_loss

        datarc = self.runner(steps, self.rate)["pretrain_expert"]["datarc"]
        datarc |= {"file_path": str(self.folder / "tables"), "num_workers": 0}
        datarc["target_cache"] = str(self.folder / "targets")
        expert = UpstreamPretrainExpert(datarc, config, device="cpu")
        if checkpoint is not None:
            expert.load_model(read_checkpoint(checkpoint))
        assert expert.dev_dataloader is not None
        total, samples = dev_loss(expert, expert.dev_dataloader, steps, "cpu")
        expert.close()
        return total / samples


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
    return {**result, "dev_loss": study.dev_loss(second, study.second, last), **probe(study, last)}


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
    return {"dev_loss": study.dev_loss(config, steps, last), **probe(study, last)}


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


# Probes


@torch.no_grad()
def features(upstream: Any, wave: Tensor) -> Tensor:
    """All hidden states side by side, ``[frame, dim]``."""
    states = upstream([wave])["hidden_states"]
    return torch.cat([state[0] for state in states], dim=-1).float()


def probe(study: Study, checkpoint: Path) -> dict[str, float]:
    from s3prl_ekd.upstream.expert import UpstreamExpert

    upstream = UpstreamExpert(checkpoint).eval()
    parameters = sum(p.numel() for p in upstream.student.parameters())
    return {
        "parameters": parameters,
        "removed": 1 - parameters / COPY,
        **probe_upstream(study, upstream),
    }


def probe_upstream(study: Study, upstream: Any) -> dict[str, float]:
    """Accuracies in percent of ridge classifiers on frozen hidden states."""
    train: list[list[Tensor]] = [[], []]
    test: list[list[Tensor]] = [[], []]
    splits = {row["path"]: row["split"] for row in study.table("pr")}
    names: dict[str, int] = {}
    rows = study.table("alignments")
    seen = [row for row in rows if splits[row["path"]] != "test"]
    for row in [*seen[::2], *(row for row in rows if splits[row["path"]] == "test")]:
        frames, labels = phone_frames(study, upstream, row, names)
        into = test if splits[row["path"]] == "test" else train
        into[0].append(frames)
        into[1].append(labels)
    result = {"phones": accuracy(*(torch.cat(part) for part in (*train, *test)))}
    noises = [read(study, row["path"]) for row in study.table("noise")][:12]
    generator = torch.Generator().manual_seed(0)
    speakers: dict[str, int] = {}
    pools: dict[str, tuple[list[Tensor], list[int]]] = {
        k: ([], []) for k in ("train", "test", "noisy")
    }
    for row in study.table("sid"):
        wave = read(study, row["path"])
        label = speakers.setdefault(row["speaker"], len(speakers))
        split = "train" if row["split"] == "train" else "test"
        crop = middle(wave)
        pools[split][0].append(features(upstream, crop).mean(0))
        pools[split][1].append(label)
        if split == "test":
            noise = noises[int(torch.randint(len(noises), (1,), generator=generator))]
            pools["noisy"][0].append(features(upstream, add_noise(crop, noise, 5)).mean(0))
            pools["noisy"][1].append(label)
    x = {name: torch.stack(rows) for name, (rows, _) in pools.items()}
    y = {name: torch.tensor(labels) for name, (_, labels) in pools.items()}
    for name, test_name in (("speakers", "test"), ("noisy_speakers", "noisy")):
        result[name] = accuracy(x["train"], y["train"], x[test_name], y[test_name])
    return result


def phone_frames(
    study: Study, upstream: Any, row: dict[str, str], names: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Hidden states of the frames with a phone, and the phones' numbers."""
    phones: list[str] = []
    for segment in row["segments"].split():
        phone, _, span = segment.partition(":")
        phones += [phone] * int(span.partition("+")[2])
    hidden = features(upstream, read(study, row["path"]))
    centres = [(i * FRAME + 200) // 160 for i in range(len(hidden))]  # in frames of 10 ms
    kept = [i for i, c in enumerate(centres) if c < len(phones) and phones[c] != "SIL"]
    labels = [names.setdefault(phones[centres[i]], len(names)) for i in kept]
    return hidden[kept], torch.tensor(labels)


def middle(wave: Tensor) -> Tensor:
    """The second in the middle of an utterance, or all of a shorter one."""
    start = max(0, len(wave) // 2 - 8000)
    return wave[start : start + 16_000]


def add_noise(wave: Tensor, noise: Tensor, snr: float) -> Tensor:
    noise = noise.repeat(-(-len(wave) // len(noise)))[: len(wave)]
    power, noise_power = wave.square().mean(), noise.square().mean().clamp(min=1e-10)
    return wave + noise * (power / noise_power * 10 ** (-snr / 10)).sqrt()


def accuracy(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy in percent of a ridge classifier; its penalty is chosen on every fifth example."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-5)
    x, test_x = ((part - mean) / deviation for part in (x, test_x))
    held_out = torch.arange(len(x)) % 5 == 0
    targets = torch.nn.functional.one_hot(y, int(max(y.max(), test_y.max())) + 1).float()
    centre = targets.mean(0)
    gram, cross = (x[~held_out].T @ part[~held_out] for part in (x, targets - centre))
    eye = torch.eye(x.shape[1])

    def score(weight: Tensor, on: Tensor, labels: Tensor) -> float:
        return 100 * float(((on @ weight + centre).argmax(1) == labels).float().mean())

    penalties = [len(x) * 10.0**power for power in range(-4, 2)]
    weights = [torch.linalg.solve(gram + penalty * eye, cross) for penalty in penalties]
    scores = [score(weight, x[held_out], y[held_out]) for weight in weights]
    penalty = penalties[scores.index(max(scores))]
    weight = torch.linalg.solve(x.T @ x + penalty * eye, x.T @ (targets - centre))
    return score(weight, test_x, test_y)


def read(study: Study, path: str) -> Tensor:
    from s3prl_ekd.data.audio import Recording

    with Recording(study.corpus / path) as recording:
        return recording.read_speech(0, recording.samples)


# Report


def report(study: Study) -> str:
    """A Markdown table: mean and standard deviation over seeds; all results as CSV; a picture."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for path in sorted((study.folder / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault((result["kind"], result["sparsity"]), []).append(result)
    columns = ("parameters", "removed", "dev_masked", "dev_cut", *MEASURES[1:])
    lines = ["| student | sparsity | seeds | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for (kind, sparsity), results in sorted(
        rows.items(), key=lambda item: (item[0][1], item[0][0])
    ):
        cells = [_cell([r[name] for r in results if name in r]) for name in columns]
        seeds = len(results)
        lines.append(f"| {kind} | {sparsity:g} | {seeds} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (study.folder / "report.md").write_text(text, encoding="utf-8")
    names = dict.fromkeys(
        name for results in rows.values() for result in results for name in result
    )
    with (study.folder / "report.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(result for results in rows.values() for result in results)
    _plot(study, rows)
    return text


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if mean > 1000:
        return f"{mean:,.0f}"
    digits = 3 if mean < 5 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


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
            study.set_up()
        if not (path := study.folder / "results/teacher.json").exists():
            from s3prl_ekd.teachers import load_upstream

            upstream = load_upstream("tiny_hubert", "tiny_hubert").eval()
            count = {"parameters": COPY}
            result = {
                "kind": "tiny_hubert",
                "sparsity": 0.0,
                **count,
                **probe_upstream(study, upstream),
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
