"""Time training steps of a student that is being pruned against those of the same student without
gates.

Both students are copies of a HuBERT with random weights, which is also the only teacher. In each
turn both take a step on the same batch of noise, in alternating order; the first turn is not
counted. Prints median and quartiles of CPU seconds, which other programs disturb less than wall
time, and of their ratio.

example:
  python -m tools.pruning_speed
  python -m tools.pruning_speed --size base --batch 1 --seconds 2
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from s3prl_ekd import compat
from s3prl_ekd.system.terminal import quiet_s3prl
from s3prl_ekd.teachers.random_weights import hubert_checkpoint

from .bench.inputs import RATE, SIZES


def make_distiller(
    model: Path, layers: tuple[int, ...], pruning: dict[str, Any] | None
) -> tuple[Any, Any]:
    """Make the distiller of a copied student, and its optimizer."""
    from s3prl_ekd.distill.distiller import EnsembleDistiller
    from s3prl_ekd.distill.student_settings import CopySettings
    from s3prl_ekd.files.config import from_plain_data
    from s3prl_ekd.pretrain.optim import fused_adamw
    from s3prl_ekd.pretrain.settings import ModelFile
    from s3prl_ekd.teachers import copied_student, load_teachers

    config = {
        "teachers": {"hubert": {"model": str(model), "layers": [0, *layers]}},
        "student": {"kind": "copy", "of": "hubert"},
        "heads": {"kind": "layerwise"},
        "pruning": pruning,
    }
    settings = from_plain_data(ModelFile, config, "the benchmark")
    torch.manual_seed(0)
    teachers = load_teachers(settings.teachers, dropout=False)
    assert isinstance(settings.student, CopySettings)
    student = copied_student(teachers, settings.student, settings.pruning)
    distiller = EnsembleDistiller(teachers, student, settings).train()
    return distiller, fused_adamw(distiller.trainable, {"lr": 2e-4}, settings.pruning)


def step_seconds(distiller: Any, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """CPU seconds of a training step, from the teacher's forward to the update."""
    start = time.process_time()
    distiller(batch, step=2)[0].backward()
    torch.nn.utils.clip_grad_norm_(distiller.trainable.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pruning_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the teacher")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="utterances (default: 4)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each utterance (default: 4)")
    parser.add_argument("--turns", type=int, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error("--turns must be 1 or more")
    compat.apply()
    quiet_s3prl()
    torch.set_num_threads(args.threads)
    from s3prl_ekd.distill.batch import DistillBatch

    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "hubert.pt"
        torch.save(hubert_checkpoint(**size.teacher), model)
        variants = {
            "plain": make_distiller(model, size.layers, None),
            "gated": make_distiller(model, size.layers, {}),
        }
    samples = round(args.seconds * RATE)
    seconds: dict[str, list[float]] = {"plain": [], "gated": []}
    for turn in tqdm(range(args.turns + 1), desc="turns", unit="turn"):
        lengths = torch.full((args.batch,), samples)
        batch = DistillBatch(0.1 * torch.randn(args.batch, samples), lengths)
        for name in sorted(variants, reverse=turn % 2 == 0):
            seconds[name].append(step_seconds(*variants[name], batch))
    times = {name: np.array(values[1:]) for name, values in seconds.items()}
    ratios = times["gated"] / times["plain"]
    for name, values in (*times.items(), ("gated / plain", ratios)):
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        print(f"{name}: median {median:.3f}, quartiles {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    main()
