"""Measure whether two teachers share a basis: frame cosine, Gram matrices, Procrustes rotation.

For each target layer of the tiny teachers, against tiny_hubert, a Markdown table with

* the mean cosine of equal frames;
* the correlation of the cosine Gram matrices over frames, off the diagonal, mean over utterances;
* the correlation of equal dimensions, before and after a rotation (`target_norm: procrustes`)
  which is fitted on half of the utterances and measured on the other half.

CORPUS has unlabeled.tsv (columns path, duration in seconds, split) with paths relative to it.

example:
  python tools/teacher_similarity.py --corpus CORPUS
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from s3prl_ekd import compat
from s3prl_ekd.distill.procrustes import procrustes
from s3prl_ekd.system.tables import markdown_table

REFERENCE = "tiny_hubert"
OTHERS = ("tiny_robust_hubert", "tiny_wavlm")
LAYERS = (2, 4, 6)


def gram_correlation(x: Tensor, y: Tensor) -> float:
    """Correlation of the cosine Gram matrices of ``[frame, dim]``, off the diagonal."""
    grams = []
    for frames in (x, y):
        unit = F.normalize(frames, dim=-1)
        gram = unit @ unit.T
        grams.append(gram[~torch.eye(len(gram), dtype=torch.bool)])
    return float(torch.corrcoef(torch.stack(grams))[0, 1])


def basis_correlation(x: Tensor, y: Tensor, rotation: Tensor) -> float:
    """Correlation of equal dimensions of centred ``[frame, dim]``, after the rotation of ``x``."""
    return float(((x @ rotation) * y).sum() / (x.norm() * y.norm()))


def compare(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The four numbers of a row, for the frames ``[frame, dim]`` of two teachers by utterance."""
    cosine = torch.cat([F.cosine_similarity(x, y, dim=-1) for x, y in pairs]).mean()
    grams = [gram_correlation(x, y) for x, y in pairs]
    halves = []
    for half in (pairs[::2], pairs[1::2]):
        x, y = (torch.cat(side) for side in zip(*half, strict=True))
        halves.append((x - x.mean(0), y - y.mean(0)))
    (fit_x, fit_y), (x, y) = halves
    rotation = procrustes((fit_x.T @ fit_y)[None])[0]
    before = basis_correlation(x, y, torch.eye(x.shape[1]))
    after = basis_correlation(x, y, rotation)
    return [float(cosine), sum(grams) / len(grams), before, after]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--utterances", type=int, default=48)
    args = parser.parse_args(argv)
    compat.apply()
    from s3prl_ekd.data.audio import Recording
    from s3prl_ekd.distill.settings import TeacherSettings
    from s3prl_ekd.teachers import load_teachers

    with (args.corpus / "unlabeled.tsv").open(encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file, delimiter="\t")]
    paths = random.Random(0).sample(sorted(paths), args.utterances)
    names = (REFERENCE, *OTHERS)
    teachers = load_teachers({name: TeacherSettings(name, LAYERS) for name in names}, dropout=False)
    utterances = []  # {teacher: [layer, frame, dim]}
    for path in paths:
        with Recording(args.corpus / path) as recording:
            wave = recording.read_speech(0, recording.samples)
        utterances.append({name: states[0] for name, states in teachers([wave]).items()})
    rows = [["teacher", "layer", "frame cosine", "Gram matrices", "basis", "after rotation"]]
    for name in OTHERS:
        for i, layer in enumerate(LAYERS):
            numbers = compare([(u[name][i], u[REFERENCE][i]) for u in utterances])
            rows.append([name, str(layer), *(f"{number:.3f}" for number in numbers)])
    print(markdown_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
