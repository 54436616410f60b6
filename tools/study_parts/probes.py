"""Linear probes of frozen hidden states in closed form: phones of frames and speakers.

Phones are those of the frames of forced alignments, with other speakers in the test; speakers
those of excerpts of one second, clean and with noise at 5 dB. The classifiers are ridge regressions
on the hidden states of all layers side by side.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FRAME = 320  # samples
PROBES = ("phones", "speakers", "noisy_speakers")


@dataclass(frozen=True)
class Corpus:
    """A folder with the tables unlabeled.tsv, pr.tsv, sid.tsv, noise.tsv and alignments.tsv; paths
    in them are relative to it."""

    folder: Path

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.folder / f"{name}.tsv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    def read(self, path: str) -> Tensor:
        """Read an utterance: ``[sample]``."""
        from s3prl_ekd.data.audio import Recording

        with Recording(self.folder / path) as recording:
            return recording.read_speech(0, recording.samples)


def probe(corpus: Corpus, upstream: Any) -> dict[str, float]:
    """Accuracies in percent, by :data:`PROBES`."""
    return {"phones": probe_phones(corpus, upstream), **probe_speakers(corpus, upstream)}


def probe_phones(corpus: Corpus, upstream: Any) -> float:
    """Accuracy on the frames of the test utterances of pr.tsv."""
    train: list[list[Tensor]] = [[], []]
    test: list[list[Tensor]] = [[], []]
    splits = {row["path"]: row["split"] for row in corpus.table("pr")}
    names: dict[str, int] = {}
    rows = corpus.table("alignments")
    seen = [row for row in rows if splits[row["path"]] != "test"]
    for row in [*seen[::2], *(row for row in rows if splits[row["path"]] == "test")]:
        frames, labels = phone_frames(corpus, upstream, row, names)
        into = test if splits[row["path"]] == "test" else train
        into[0].append(frames)
        into[1].append(labels)
    return accuracy(*(torch.cat(part) for part in (*train, *test)))


def probe_speakers(corpus: Corpus, upstream: Any) -> dict[str, float]:
    """Accuracy on the test utterances of sid.tsv, clean and with noise."""
    result = {}
    noises = [corpus.read(row["path"]) for row in corpus.table("noise")][:12]
    generator = torch.Generator().manual_seed(0)
    speakers: dict[str, int] = {}
    pools: dict[str, tuple[list[Tensor], list[int]]] = {
        k: ([], []) for k in ("train", "test", "noisy")
    }
    for row in corpus.table("sid"):
        wave = corpus.read(row["path"])
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


@torch.no_grad()
def features(upstream: Any, wave: Tensor) -> Tensor:
    """All hidden states side by side, ``[frame, dim]``."""
    states = upstream([wave])["hidden_states"]
    return torch.cat([state[0] for state in states], dim=-1).float()


def phone_frames(
    corpus: Corpus, upstream: Any, row: dict[str, str], names: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Hidden states of the frames with a phone, and the phones' numbers."""
    phones: list[str] = []
    for segment in row["segments"].split():
        phone, _, span = segment.partition(":")
        phones += [phone] * int(span.partition("+")[2])
    hidden = features(upstream, corpus.read(row["path"]))
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
