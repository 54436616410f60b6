"""Measure how far padding changes hidden states, with and without masked norms.

Utterances of several lengths run alone and as one padded batch, through tiny teachers and through a
student of two layers with weights of tiny_hubert. Prints a Markdown table of the difference in the
last layer: root mean square over the valid frames, relative to that of the utterance alone.

CORPUS has unlabeled.tsv (columns path, duration in seconds) with paths relative to it. For each of
the lengths, the utterance of the nearest duration is taken.

example:
  python tools/padding_differences.py --corpus CORPUS
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd import compat
from s3prl_ekd.system.tables import markdown_table

LENGTHS = (1.9, 2.5, 3.5, 5.0, 7.0, 9.6)  # seconds
TEACHERS = ("tiny_hubert", "tiny_wavlm")
LAST = 6  # the last layer of a tiny teacher


def nearest_utterances(corpus: Path) -> list[Path]:
    """The files whose durations are nearest to :data:`LENGTHS`."""
    with (corpus / "unlabeled.tsv").open(encoding="utf-8") as file:
        rows = [(float(r["duration"]), r["path"]) for r in csv.DictReader(file, delimiter="\t")]
    return [corpus / min(rows, key=lambda row: abs(row[0] - length))[1] for length in LENGTHS]


def differences(
    last_layer: Callable[[Sequence[Tensor]], Tensor], waves: Sequence[Tensor]
) -> list[float]:
    """Relative difference between each utterance in the batch and alone.

    ``last_layer``: waveforms ``[sample]`` -> ``[batch, frame, dim]``.
    """
    batch, result = last_layer(waves), []
    for state, wave in zip(batch, waves, strict=True):
        alone = last_layer([wave])[0]
        difference = state[: len(alone)] - alone
        result.append(float(difference.norm() / alone.norm()))
    return result


def teacher_layer(name: str, masked_norm: bool) -> Callable[[Sequence[Tensor]], Tensor]:
    from s3prl_ekd.distill.settings import TeacherSettings
    from s3prl_ekd.teachers import load_teachers

    settings = {"teacher": TeacherSettings(name, (LAST,))}
    teachers = load_teachers(settings, dropout=False, masked_norm=masked_norm)
    return lambda waves: teachers(waves)["teacher"][:, 0]


def student_layer(masked_norm: bool) -> Callable[[Sequence[Tensor]], Tensor]:
    from s3prl_ekd.distill.initialisation import initialise
    from s3prl_ekd.distill.student import Student
    from s3prl_ekd.distill.student_settings import StudentSettings
    from s3prl_ekd.teachers.load import load_upstream

    model = load_upstream("tiny_hubert", "student").model
    settings = StudentSettings(
        extractor_conv_feature_layers="[(128,10,5)] + [(128,3,2)] * 4 + [(128,2,2)] * 2",
        encoder_embed_dim=192,
        encoder_ffn_embed_dim=768,
        encoder_attention_heads=4,
        masked_norm=masked_norm,
    )
    student = Student(settings).eval()
    initialise(student, [model], conv=True, encoder=True)

    def run(waves: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(wave) for wave in waves])
        return student(pad_sequence(list(waves), batch_first=True), lengths).last

    return run


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    args = parser.parse_args(argv)
    compat.apply()
    from s3prl_ekd.data.audio import Recording

    waves = []
    for path in nearest_utterances(args.corpus):
        with Recording(path) as recording:
            waves.append(recording.read_speech(0, recording.samples))
    longest = max(map(len, waves))
    columns = {
        **{name: [teacher_layer(name, masked) for masked in (False, True)] for name in TEACHERS},
        "two-layer student": [student_layer(masked) for masked in (False, True)],
    }
    results = {name: [differences(run, waves) for run in runs] for name, runs in columns.items()}
    rows = [["utterance", "padding", *columns]]
    for i, wave in enumerate(waves):
        shares = [f"{100 * plain[i]:.1f} %" for plain, _ in results.values()]
        rows.append([f"{len(wave) / 16_000:.1f} s", f"{1 - len(wave) / longest:.0%}", *shares])
    worst = [f"{max(masked):.1e}" for _, masked in results.values()]
    rows.append(["with masked norm, largest", "", *worst])
    print(markdown_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
