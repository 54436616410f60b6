"""Time training steps with each term of the loss and each option of the targets.

In each turn all variants take a step on the same batch of noise, in alternating order; the first
turn is not counted. Prints a Markdown table: the median of the CPU seconds, and median and
quartiles of their ratio to those of the plain step (`aggregation: average`) of the same turn.

* ``tiny``: three teachers of random weights run in every step;
* ``base``: a student of DistilHuBERT's size, 768 wide with 2 layers; the targets are random numbers
  in place of a target cache, so that no teacher runs.

``teacher_masked_norm`` needs running teachers. ``loss.reduce: batches`` is s3prl's mean of batch
means; all other steps have the default, ``frames``.

example:
  python -m tools.targets_speed
  python -m tools.targets_speed --size base --batch 2 --turns 3
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from s3prl_ekd import compat
from s3prl_ekd.system.terminal import quiet_s3prl
from s3prl_ekd.teachers.random_weights import CONV_LAYERS

from .bench.inputs import RATE, SIZES, ModelSize, write_teachers

CLUSTERS = 100


@dataclass(frozen=True)
class Variant:
    """A name and keys of the model config.

    Attributes:
        units: whether there are masked spans and units of every teacher.
        teachers: whether the option is one of running teachers.
    """

    name: str
    model: dict[str, Any]
    units: bool = False
    teachers: bool = False


PLAIN = Variant("plain: average", {})
NORM = {"target_norm": "procrustes", "target_norm_steps": 1_000_000}
VARIANTS = (
    PLAIN,
    *(
        Variant(f"relation, window {n}", {"relation": {"weight": 1.0, "window": n}})
        for n in (50, 100, 200)
    ),
    Variant(
        "relation, between_layers",
        {"relation": {"weight": 1.0, "between_layers": True, "student_layers": [0, 1, 2]}},
    ),
    Variant("units of 3 teachers, masked spans", {}, units=True),
    Variant("procrustes, statistics", NORM),
    Variant("procrustes, frozen", {**NORM, "target_norm_steps": 1}),
    Variant("student.masked_norm", {"student": {"masked_norm": True}}),
    Variant("teacher_masked_norm", {"teacher_masked_norm": True}, teachers=True),
    Variant("loss.reduce: batches", {"loss": {"reduce": "batches"}}),
)


def small(size: ModelSize) -> ModelSize:
    """Teachers of the same width and depth with few weights, for those that never run."""
    return replace(size, teacher={**size.teacher, "conv_layers": CONV_LAYERS, "ffn_dim": 64})


class TimedStep:
    """The training step of a variant.

    Args:
        models: checkpoints of the teachers, by name.
        live: whether the teachers run; otherwise batches have targets.
    """

    def __init__(self, variant: Variant, size: ModelSize, models: dict[str, Path], live: bool):
        from s3prl_ekd.distill.distiller import EnsembleDistiller
        from s3prl_ekd.distill.span_mask import SpanMask
        from s3prl_ekd.distill.student import Student
        from s3prl_ekd.distill.student_settings import MaskSettings, StudentSettings
        from s3prl_ekd.essence.units import Units
        from s3prl_ekd.files.config import from_plain_data
        from s3prl_ekd.pretrain.optim import fused_adamw
        from s3prl_ekd.pretrain.settings import ModelFile
        from s3prl_ekd.pretrain.target_cache.use import free_teachers
        from s3prl_ekd.teachers import load_teachers

        names, layer = [*models], size.layers[1]
        config: dict[str, Any] = {
            "teachers": {
                name: {"model": str(path), "layers": [*size.layers]}
                for name, path in models.items()
            },
            "aggregation": "average",
            **variant.model,
        }
        config["student"] = {**size.student, **variant.model.get("student", {})}
        if variant.units:
            config["unit_loss"] = [{"file": name} for name in names]  # the units are given below
            config["student"]["mask"] = {}
        settings = from_plain_data(ModelFile, config, "the benchmark")
        torch.manual_seed(0)
        teachers = load_teachers(
            settings.teachers, dropout=False, masked_norm=settings.teacher_masked_norm
        )
        assert isinstance(settings.student, StudentSettings)
        units = [
            Units(torch.randn(CLUSTERS, teachers[name].width), name, layer)
            for name in (names if variant.units else ())
        ]
        student = Student(settings.student)
        self.distiller = EnsembleDistiller(teachers, student, settings, units).train()
        self.optimizer: torch.optim.Optimizer = fused_adamw(self.distiller.trainable, {"lr": 2e-4})
        self.spans = SpanMask(MaskSettings(), settings.student) if variant.units else None
        self.targets = None if live else (len(size.layers), teachers[names[0]].width)
        if not live:
            free_teachers(teachers)
        self.teachers = names

    def batch(self, waves: torch.Tensor, lengths: torch.Tensor) -> Any:
        """A batch with what the variant needs; the same for the same waves."""
        from s3prl_ekd.distill.batch import CachedTargets, DistillBatch

        frames = self.distiller.student.settings.frames(lengths)
        cached = spans = None
        if self.targets is not None:
            layers, width = self.targets
            generator = torch.Generator().manual_seed(0)
            shape = (len(waves), layers, int(frames.max()), width)
            values = {name: torch.randn(shape, generator=generator) for name in self.teachers}
            cached = CachedTargets(values, frames)
        if self.spans is not None:
            drawn = [self.spans.draw(n, random.Random(n)) for n in lengths.tolist()]
            spans = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True)
        return DistillBatch(waves, lengths, cached_targets=cached, spans=spans)

    def seconds(self, batch: Any) -> float:
        """CPU seconds of a training step, from the targets to the update."""
        start = time.process_time()
        self.distiller(batch, step=2)[0].backward()
        torch.nn.utils.clip_grad_norm_(self.distiller.trainable.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def measure(
    steps: dict[str, TimedStep], turns: int, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, np.ndarray]:
    """CPU seconds by variant, ``[turn]``; ``make``: waves and lengths of a batch."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(turns + 1), desc="turns", unit="turn"):
        waves, lengths = make()
        for name in [*steps] if turn % 2 else [*steps][::-1]:
            seconds[name].append(steps[name].seconds(steps[name].batch(waves, lengths)))
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def table(seconds: dict[str, np.ndarray]) -> str:
    """A Markdown table: median CPU seconds, and the ratio to the plain step of the same turn."""
    lines = ["| step | CPU s | ratio | quartiles |", "|---|---|---|---|"]
    for name, values in seconds.items():
        low, ratio, high = np.quantile(values / seconds[PLAIN.name], (0.25, 0.5, 0.75))
        lines.append(f"| {name} | {np.median(values):.3f} | {ratio:.2f} | {low:.2f}–{high:.2f} |")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.targets_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny", help="(default: tiny)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="utterances (default: 4)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of the longest (default: 6)")
    parser.add_argument("--turns", type=int, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error("--turns must be 1 or more")
    compat.apply()
    quiet_s3prl()
    torch.set_num_threads(args.threads)
    size, live = SIZES[args.size], args.size == "tiny"
    lengths = (torch.linspace(1, 0.5, args.batch) * args.seconds * RATE).long()
    with tempfile.TemporaryDirectory() as folder:
        models = write_teachers(Path(folder), size if live else small(size))
        steps = {
            variant.name: TimedStep(variant, size, models, live)
            for variant in VARIANTS
            if live or not variant.teachers
        }

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            waves = 0.1 * torch.randn(args.batch, int(lengths.max()))
            padding = torch.arange(waves.shape[1]) >= lengths[:, None]
            return waves.masked_fill(padding, 0), lengths

        seconds = measure(steps, args.turns, make)
    print(
        f"{args.size}, {'running teachers' if live else 'cached targets'}: batches of {args.batch} "
        f"utterances of {args.seconds / 2:g} to {args.seconds:g} s, {args.turns} turns; "
        f"{processor()}, {args.threads} thread(s), torch {torch.__version__}\n"
    )
    print(table(seconds))


if __name__ == "__main__":
    main()
