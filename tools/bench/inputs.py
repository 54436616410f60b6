"""Inputs of a benchmark: random teachers of three sizes; a corpus of noise or real audio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.audio_files import find_audio
from s3prl_ekd.data.lengths import write_table
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.errors import DataError
from s3prl_ekd.teachers.random_weights import CONV_LAYERS, hubert_checkpoint, wavlm_checkpoint

RATE = 16_000  # Hz
TABLE = "bench"
TEACHERS = ("hubert", "robust_hubert", "wavlm")
PUBLISHED_CONV = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


@dataclass(frozen=True)
class ModelSize:
    """Target layers, and the sizes of teachers and student.

    Attributes:
        teacher: arguments for :mod:`s3prl_ekd.teachers.random_weights`.
        student: keys of ``student`` in a model config.
    """

    layers: tuple[int, ...]
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)


BASE = {
    "conv_layers": PUBLISHED_CONV,
    "embed_dim": 768,
    "ffn_dim": 3072,
    "heads": 12,
    "layers": 12,
    "conv_pos": 128,
    "conv_pos_groups": 16,
}
LARGE = {"embed_dim": 1024, "ffn_dim": 4096, "heads": 16, "layers": 24, "normalize": True}
LARGE_CONFIG = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
TINY_STUDENT = {
    "extractor_conv_feature_layers": CONV_LAYERS,
    "encoder_embed_dim": 96,
    "encoder_ffn_embed_dim": 192,
    "encoder_attention_heads": 4,
    "conv_pos": 32,
    "conv_pos_groups": 4,
}
SIZES = {
    "tiny": ModelSize((2, 4, 6), {}, TINY_STUDENT),
    "base": ModelSize((4, 8, 12), BASE),  # HuBERT Base, WavLM Base: 94 M parameters each
    "large": ModelSize((8, 16, 24), {**BASE, **LARGE, "config": LARGE_CONFIG}),  # 316 M each
}


def write_teachers(folder: Path, size: ModelSize) -> dict[str, Path]:
    """Write two HuBERT checkpoints and a WavLM one: teacher name -> file."""
    paths = {}
    for seed, name in enumerate(TEACHERS):
        checkpoint = wavlm_checkpoint if name == "wavlm" else hubert_checkpoint
        paths[name] = folder / f"{name}.pt"
        torch.save(checkpoint(seed=seed, **size.teacher), paths[name])
    return paths


def write_corpus(
    folder: Path, count: int, seconds: float, source: Path | None = None, shortest: float = 0.5
) -> None:
    """Write ``audio/*.flac`` and the length table ``tables/bench.csv``.

    Args:
        folder: an empty folder.
        count: number of utterances.
        seconds: length of the longest.
        source: folder whose first audio files are taken, cropped to ``seconds``; None: noise.
        shortest: length of the shortest noise, as a share of ``seconds``.

    Raises:
        DataError: too few files in the source, or a file cannot be read.
    """
    (folder / "audio").mkdir()
    (folder / "tables").mkdir()
    rows = []
    waves = (
        _noise(count, seconds, shortest) if source is None else _excerpts(source, count, seconds)
    )
    for number, wave in enumerate(waves):
        name = f"u{number:04d}.flac"
        soundfile.write(folder / "audio" / name, wave, RATE, subtype="PCM_16")
        rows.append(Utterance(name, len(wave)))
    write_table(folder / "tables" / f"{TABLE}.csv", rows)


def _noise(count: int, seconds: float, shortest: float) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for length in random.uniform(shortest, 1.0, count) * seconds * RATE:
        yield 0.1 * random.standard_normal(int(length)).clip(-4, 4)


def _excerpts(source: Path, count: int, seconds: float) -> Iterator[np.ndarray]:
    names = find_audio(source)[:count]
    if len(names) < count:
        raise DataError(
            f"{source} has {len(names)} audio files, but --batch times --turns is {count}; lower "
            "--batch or --turns"
        )
    for name in names:
        yield read_audio(source / name)[: int(seconds * RATE)].numpy()
