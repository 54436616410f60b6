"""Store hidden states of Resemblyzer's speaker encoder, as a teacher for experiments.

The encoder (GE2E, arXiv 1710.10467; https://github.com/resemble-ai/Resemblyzer) was trained with
labels of speakers: it is a positive control, a teacher that is known to have what others lack, and
not for students that are submitted to SUPERB. Its three LSTM layers run over 40 mel channels and
see no later sample than HuBERT's frame does; every second output is kept, the one nearest to the
centre of HuBERT's frame. A layer's 256 dimensions are projected to 192 by PCA and divided by one
number, so that their mean variance is 1 and an average with a tiny teacher is defined.

The waveforms are those of `s3prl-ekd cache -c RUNNER --seed SEED`. What is in the folder already is
not computed again, so an interrupted command continues; another seed or table adds to it, after
which caches have to be built again. The PCA is fitted at the first start and kept in
FOLDER/projection.safetensors. No code of the wheel is run. Get it with:
pip download resemblyzer==0.1.4 --no-deps

example:
  python tools/resemblyzer_features.py Resemblyzer-0.1.4-py3-none-any.whl -c RUNNER -o FOLDER
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from s3prl_ekd import compat
from s3prl_ekd.errors import EkdError, SetupError
from s3prl_ekd.files.atomic import atomic_file
from s3prl_ekd.files.safetensors_file import read_safetensors, write_safetensors
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.pretrain.target_cache.build import CachedWaves
from s3prl_ekd.teachers.names import STORED
from s3prl_ekd.teachers.stored import StoredStates, write_states

MEMBER = "resemblyzer/pretrained.pt"  # of the wheel
LAYERS, HIDDEN, MELS, WINDOW, HOP = 3, 256, 40, 400, 160  # resemblyzer/hparams.py
LOUDNESS = -30.0  # dB below full scale, to which quieter waveforms are raised
WIDTH = 192  # of the tiny teachers


class SpeakerEncoder(nn.Module):
    """The LSTM layers of Resemblyzer, without its embedding.

    Args:
        weights: ``model_state`` of its checkpoint.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        sizes = [MELS] + [HIDDEN] * LAYERS
        self.lstms = nn.ModuleList(nn.LSTM(size, HIDDEN, batch_first=True) for size in sizes[:-1])
        for layer, lstm in enumerate(self.lstms):
            names = {name: f"lstm.{name[:-1]}{layer}" for name in lstm.state_dict()}
            lstm.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
        self.requires_grad_(False)

    def forward(self, wave: Tensor) -> Tensor:
        """Hidden states ``[layer, frame, 256]`` of a waveform ``[sample]``, at HuBERT's frames.

        HuBERT's frame i is centred at sample 320 i + 200, mel frame 2 i + 1 at 320 i + 160.
        """
        x, states = mel_spectrogram(raise_loudness(wave))[None], []
        for lstm in self.lstms:
            x = lstm(x)[0]
            states.append(x[0])
        frames = (len(wave) - 400) // 320 + 1
        return torch.stack(states)[:, 1::2][:, :frames]


def raise_loudness(wave: Tensor) -> Tensor:
    """Scale a waveform to :data:`LOUDNESS` if it is quieter, as Resemblyzer does."""
    rms = wave.pow(2).mean().sqrt().clamp_min(1e-7)
    return wave * (10 ** (LOUDNESS / 20) / rms).clamp_min(1)


def mel_spectrogram(wave: Tensor) -> Tensor:
    """``[mel frame, 40]``, power without logarithm: ``librosa.feature.melspectrogram``."""
    spectrum = torch.stft(
        wave,
        WINDOW,
        HOP,
        window=torch.hann_window(WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    return spectrum.abs().square().T @ mel_filters()


@functools.cache
def mel_filters() -> Tensor:
    """Slaney's filters, as those of librosa, ``[frequency, 40]``."""
    compat.apply()  # before torchaudio is imported
    from torchaudio.functional import melscale_fbanks

    bins = WINDOW // 2 + 1
    return melscale_fbanks(bins, 0.0, 8000.0, MELS, 16000, norm="slaney", mel_scale="slaney")


def load_encoder(wheel: Path) -> SpeakerEncoder:
    """Read the encoder out of the wheel.

    Raises:
        SetupError: it is not a wheel of Resemblyzer.
        CheckpointError: its checkpoint is damaged, or its pickle contains code.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                path = archive.extract(MEMBER, folder)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise SetupError(
                f"{wheel} is not the wheel of Resemblyzer ({error}); get it with: "
                "pip download resemblyzer==0.1.4 --no-deps"
            ) from None
        return SpeakerEncoder(safe_load(path, "speaker encoder")["model_state"])


def fit_projection(states: Tensor) -> dict[str, Tensor]:
    """PCA of each layer, fitted on ``[layer, frame, 256]``; see :func:`project`.

    ``mean [layer, 1, 256]`` and ``matrix [layer, 256, 192]``. The columns of a matrix are
    orthogonal and equally long; the mean variance of the projected frames is 1.
    """
    states = states.double()
    mean = states.mean(1, keepdim=True)
    centred = states - mean
    variances, vectors = torch.linalg.eigh(centred.mT @ centred / states.shape[1])  # ascending
    scale = variances[:, -WIDTH:].mean(1).rsqrt()[:, None, None]
    matrix = vectors[:, :, -WIDTH:].flip(-1) * scale
    return {"mean": mean.float(), "matrix": matrix.float()}


def project(states: Tensor, projection: dict[str, Tensor]) -> Tensor:
    """``[layer, frame, 256]`` -> ``[layer, frame, 192]``."""
    return (states - projection["mean"]) @ projection["matrix"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", metavar="WHEEL", type=Path, help="Resemblyzer-0.1.4-...whl")
    parser.add_argument("-c", "--config", metavar="RUNNER", required=True, help="runner config")
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1337, help="of the cache (default: 1337)")
    parser.add_argument(
        "--sample", metavar="N", type=int, default=300, help="waveforms for the PCA (default: 300)"
    )
    args = parser.parse_args(argv)
    try:
        store(args)
    except EkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@torch.no_grad()
def store(args: argparse.Namespace) -> None:
    """Store the hidden states that the folder lacks."""
    encoder = load_encoder(args.wheel)
    waves = CachedWaves(args.config, args.seed)
    path = args.out / "projection.safetensors"
    if path.exists():
        projection = read_safetensors(path, "projection")[1]
    else:
        sample = itertools.islice(waves, 0, None, max(1, len(waves) // args.sample))
        total = min(args.sample, len(waves))
        states = [encoder(wave) for _, wave in tqdm(sample, "PCA", total, unit="utt")]
        projection = fit_projection(torch.cat(states, 1))
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            write_safetensors(file, projection, {})
    stored = StoredStates(args.out) if (args.out / STORED).is_file() else ()
    added = 0
    for _, wave in tqdm(waves, "states", unit="utt"):
        if wave not in stored:
            write_states(args.out, wave, project(encoder(wave), projection))
            added += 1
    print(
        f"{added} of {len(waves)} waveforms added; in the model config: "
        f"resemblyzer: {{model: {args.out}, layers: [0, 1, 2]}}"
    )


if __name__ == "__main__":
    sys.exit(main())
