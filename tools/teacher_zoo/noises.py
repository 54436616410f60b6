"""Synthetic noise, made once into the zoo, and what distorts with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from s3prl_ekd.atomic import whole_file
from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.audio_files import SAMPLE_RATE
from s3prl_ekd.data.distortion.pipeline import Distorter
from s3prl_ekd.data.distortion.settings import (
    AdditiveWeights,
    ConvolutiveWeights,
    DistortionSettings,
)
from s3prl_ekd.demo.noise import make_noises

from .corpus import Corpus
from .recipe import Recipe

_TAKES, _SECONDS = 6, 15.0  # clips of each kind, and their length
_TALKERS = 60  # training utterances that the babble is made of


def noise_folder(corpus: Corpus, folder: Path, seed: int) -> Path:
    """White, pink and brown noise, hum and babble of training speech, in ``folder``, as FLAC.

    Files that are there are kept; they are the same for the same corpus and seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "complete"
    if done.exists():
        return folder
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(corpus.train))[:_TALKERS]
    speech = [read_audio(corpus.train[i].path).numpy().astype(np.float64) for i in chosen]
    for take in range(_TAKES):
        for name, clip in make_noises(rng, speech, _SECONDS).items():
            with whole_file(folder / f"{name}-{take}.flac") as file:
                soundfile.write(file, clip.clip(-1, 1), SAMPLE_RATE, format="FLAC")
    done.touch()
    return folder


def make_distorter(folder: Path, recipe: Recipe) -> Distorter:
    """Noise of the folder on 5 of 6 waveforms, a simulated room around 1 of 2."""
    settings = DistortionSettings(
        setup="same",
        noise=(str(folder),),
        snr_min=recipe.snr_min,
        snr_max=recipe.snr_max,
        additive_weights=AdditiveWeights(noise=4.0, gaussian=1.0, clean=1.0),
        pitch_cents=0.0,  # another pitch is another speaker, not another room
        convolutive_weights=ConvolutiveWeights(reverb=1.0, band_reject=0.0, clean=1.0),
    )
    return Distorter(settings, recipe.seed)
