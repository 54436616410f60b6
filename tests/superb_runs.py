"""Write finished downstream runs in the format of `s3prl-ekd superb`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

METRIC = {
    "pr": "per",
    "sid": "acc",
    "er": "acc",
    "asr": "wer",
    "ks": "acc",
    "ic": "acc",
    "sf": "f1",
}
FILES = {
    "pr": ("test-hyp.ark", "test-ref.ark"),
    "sid": ("test_predict.txt", "test_truth.txt"),
    "er": ("test_{fold}_predict.txt", "test_{fold}_truth.txt"),
    "asr": ("test-clean-noLM-hyp.ark", "test-clean-noLM-ref.ark"),
    "ks": ("test_predict.txt", "test_truth.txt"),
    "ic": ("test_predict.csv", "test_truth.csv"),
    "sf": ("test-hyp.ark", "test-ref.ark"),
}
RECIPE = {
    "pr": "downstream/ctc/tiny.yaml",
    "sid": "downstream/voxceleb1/tiny.yaml",
    "er": "downstream/emotion/tiny.yaml",
    "asr": "downstream/asr/tiny.yaml",
    "ks": "downstream/speech_commands/tiny.yaml",
    "ic": "downstream/fluent_commands/tiny.yaml",
    "sf": "downstream/ctc/snips_tiny.yaml",
}
Pairs = Mapping[str, tuple[str, str]]  # utterance -> (hypothesis, reference)


def write_run(
    root: Path,
    upstream: str,
    task: str,
    pairs: Pairs | Mapping[str, Pairs],
    *,
    lr: float = 0.001,
    seed: int = 1337,
    fold: str | None = None,
    dev: float = 50.0,
    **changes,
) -> Path:
    """Write one run and return its folder.

    Args:
        pairs: of the clean test set, or condition -> pairs.
        changes: entries of superb.json to replace or add.
    """
    if not isinstance(next(iter(pairs.values()), None), Mapping):
        pairs = {"clean": pairs}
    name = f"lr{lr:g}-seed{seed}" + (f"-{fold}" if fold else "")
    folder = root / upstream / task / name
    tested = {c: "." if c == "clean" else f"noisy/{c}" for c in pairs}
    for condition, utterances in pairs.items():
        predictions = folder / tested[condition]
        predictions.mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(FILES[task]):
            separator = "," if task == "ic" else " "
            lines = [f"{name}{separator}{texts[i]}\n" for name, texts in utterances.items()]
            (predictions / file.format(fold=fold)).write_text("".join(lines), encoding="utf-8")
    record = {
        "format": 1,
        "upstream": upstream,
        "hub": "ekd_student",
        "checkpoint": f"{upstream}.pt",
        "task": task,
        "lr": lr,
        "seed": seed,
        "fold": fold,
        "steps": 400,
        "recipe": RECIPE[task],
        "split": "test-clean" if task == "asr" else "test",
        "digest": "0",
        "dev": {"metric": METRIC[task], "value": dev, "checkpoint": "dev-best.ckpt"},
        "tested": tested,
        "seconds": 1.5,
        "finished": True,
        **changes,
    }
    (folder / "superb.json").write_text(json.dumps(record))
    return folder


def write_cost(root: Path, upstream: str, parameters: int, macs: float) -> None:
    """Write the ``cost.json`` of an upstream."""
    cost = {
        "parameters": parameters,
        "unused": 0,
        "macs": macs,
        "macs_buckets": {"short": macs},
        "utterances": 32,
        "profiler": "by hand",
    }
    (root / upstream).mkdir(parents=True, exist_ok=True)
    (root / upstream / "cost.json").write_text(json.dumps(cost))
