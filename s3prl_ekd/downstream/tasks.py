"""The four SUPERB tasks as s3prl runs them: recipes, splits, metrics, names of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SetupError


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what the user types.
        downstream: the name after ``-d``.
        full, tiny: recipes below the working folder.
        split: the split that is tested, as ``-t`` wants it.
        best: the checkpoint that s3prl keeps by dev.
        metric: ``per``, ``wer`` or ``acc``; in per cent everywhere in this package.
        scale: what makes s3prl's number, as a best checkpoint holds it, per cent.
        hyp, ref: the prediction files; ``{fold}`` stands in ER's.
    """

    name: str
    downstream: str
    full: str
    tiny: str
    split: str
    best: str
    metric: str
    scale: float
    hyp: str
    ref: str

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "acc"

    @property
    def title(self) -> str:
        """As in SUPERB's tables: ``PR PER ↓``."""
        return f"{self.name.upper()} {self.metric.upper()} {'↑' if self.higher_is_better else '↓'}"

    @property
    def worst(self) -> float:
        return 0.0 if self.higher_is_better else 100.0

    def files(self, fold: str | None) -> tuple[str, str]:
        """Names of the hypotheses and the references in a run's folder."""
        return self.hyp.format(fold=fold), self.ref.format(fold=fold)


_ROWS = (
    ("pr", "ctc", "libriphone", "test", "dev-best.ckpt", "per", 100.0)
    + ("test-hyp.ark", "test-ref.ark"),
    ("sid", "voxceleb1", "config", "test", "dev-best.ckpt", "acc", 100.0)
    + ("test_predict.txt", "test_truth.txt"),
    ("er", "emotion", "config", "test", "dev-best.ckpt", "acc", 100.0)
    + ("test_{fold}_predict.txt", "test_{fold}_truth.txt"),
    ("asr", "asr", "config", "test-clean", "dev-clean-best.ckpt", "wer", 1.0)
    + ("test-clean-noLM-hyp.ark", "test-clean-noLM-ref.ark"),
)

TASKS = {
    name: Task(
        name, folder, f"downstream/{folder}/{full}.yaml", f"downstream/{folder}/tiny.yaml", *rest
    )
    for name, folder, full, *rest in _ROWS
}


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks named, in the order of SUPERB's tables.

    Raises:
        SetupError: one is unknown.
    """
    for name in names:
        if name not in TASKS:
            raise SetupError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return [task for task in TASKS.values() if task.name in names]
