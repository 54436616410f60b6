"""Train the tiny experiment in two precisions, with several seeds, and compare losses and targets.

Teachers and student compute in the precision: `runner.precision` and `teacher_precision`. All else
is tiny_model.yaml and tiny_runner.yaml, except what the options change. Each tenth audio file is in
the dev set, whose loss is measured in the precision of the run. Finished runs in -o are kept. On a
CPU without AMX bfloat16 is many times slower; use few steps and short excerpts there.

example:
  python tools/precision_study.py AUDIO_FOLDER -o study --steps 300 --seeds 1 2 3 --device cuda
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml

from s3prl_ekd import compat
from s3prl_ekd.data.lengths import write_table
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.files.atomic import write_text
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.system.tables import markdown_table
from s3prl_ekd.teachers import load_teachers

PRECISIONS = ("float32", "bfloat16")
SUFFIXES = (".flac", ".wav", ".opus", ".ogg")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("audio", metavar="AUDIO_FOLDER", type=Path, help="16 kHz, mono")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="of an excerpt (default: 4)")
    parser.add_argument("--files", type=int, default=500, help="at most (default: 500)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    compat.apply()
    folder = args.output.resolve()
    command(folder, "init", ".")
    write_tables(folder, args.audio.resolve(), args.files)
    rows = {name: [train(folder, args, name, seed) for seed in args.seeds] for name in PRECISIONS}
    table = [["precision", *(f"seed {seed}" for seed in args.seeds), "mean", "deviation"]]
    for name, losses in rows.items():
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        values = [*losses, statistics.mean(losses), spread]
        table.append([name, *(f"{value:.4f}" for value in values)])
    print(
        f"{platform.machine()}, {args.device}, torch {torch.__version__}, {args.steps} steps of "
        f"{args.batch} x {args.seconds:g} s; loss on the dev set\n"
    )
    print(markdown_table(table))
    print("\nmean difference of targets, relative to their mean absolute value")
    for name, value in target_differences(folder, args).items():
        print(f"- {name}: {value:.2%}")
    return 0


def command(folder: Path, *argv: str) -> None:
    """Run a command of this package in ``folder``; its output goes to ``log.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, "-m", "s3prl_ekd", *argv],
            cwd=folder,
            stdout=log,
            stderr=log,
            check=True,
        )


def write_tables(folder: Path, audio: Path, count: int) -> None:
    """Write ``tables/train.csv`` and ``tables/dev.csv``."""
    paths = sorted(path for path in audio.rglob("*") if path.suffix in SUFFIXES)
    if len(paths) < 10:
        raise SystemExit(f"{audio}: {len(paths)} audio files ({', '.join(SUFFIXES)}), need 10")
    paths = paths[:: -(-len(paths) // count)]
    (folder / "tables").mkdir(exist_ok=True)
    for name, members in (
        ("dev", paths[::10]),
        ("train", [path for i, path in enumerate(paths) if i % 10]),
    ):
        rows = (Utterance(str(p.relative_to(audio)), soundfile.info(p).frames) for p in members)
        write_table(folder / f"tables/{name}.csv", rows)
    write_text(folder / "audio.txt", str(audio))


def train(folder: Path, args: argparse.Namespace, precision: str, seed: int) -> float:
    """Train one run, unless it is finished; return its last dev loss."""
    name = f"{precision}-seed{seed}"
    model = {"extends": "pretrain/ekd/tiny_model.yaml", "teacher_precision": precision}
    write_text(folder / f"{precision}.yaml", yaml.safe_dump(model))
    data: dict[str, Any] = {
        "libri_root": (folder / "audio.txt").read_text(encoding="utf-8"),
        "file_path": "tables",
        "sets": ["train"],
        "dev_sets": ["dev"],
        "train_batch_size": args.batch,
        "num_workers": 0,
        "sequence_length": round(16_000 * args.seconds),
    }
    run = {"precision": precision, "total_steps": args.steps, "log_step": max(1, args.steps // 10)}
    run |= {"save_step": args.steps - 1, "eval_step": args.steps}
    changes = {f"runner.{key}": value for key, value in run.items()}
    changes |= {f"pretrain_expert.datarc.{key}": value for key, value in data.items()}
    text = ",,".join(f"config.{key}={value!r}" for key, value in changes.items())
    result = folder / "result/pretrain" / name
    if not (result / f"states-{args.steps}.ckpt").exists():
        files = ["-c", "pretrain/ekd/tiny_runner.yaml", "-g", f"{precision}.yaml", "-o", text]
        more = ["-n", name, "--seed", str(seed), "--device", args.device]
        command(folder, "run_pretrain.py", "-u", "ekd", *files, *more)
    return list(read_scalars(str(result))["ekd/dev-loss"].values())[-1]


@torch.no_grad()
def target_differences(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Mean absolute difference of each teacher's targets, over ten utterances of the dev set."""
    lines = (folder / "tables/dev.csv").read_text(encoding="utf-8").splitlines()[1:11]
    root = Path((folder / "audio.txt").read_text(encoding="utf-8"))
    waves = [soundfile.read(root / line.split(",")[1], dtype="float32")[0] for line in lines]
    tensors = [torch.from_numpy(w[: round(16_000 * args.seconds)]).to(args.device) for w in waves]
    os.chdir(folder)
    settings = load_model_config("float32.yaml").teachers
    ensembles = [
        load_teachers(settings, False, precision=p).to(args.device).eval() for p in PRECISIONS
    ]
    totals = {name: [0.0, 0.0] for name in settings}
    for wave in tensors:
        exact, other = (ensemble([wave]) for ensemble in ensembles)
        for name in settings:
            totals[name][0] += (exact[name] - other[name]).abs().sum().item()
            totals[name][1] += exact[name].abs().sum().item()
    return {name: difference / size for name, (difference, size) in totals.items()}


if __name__ == "__main__":
    sys.exit(main())
