"""Noise: synthetic, made once into the zoo, and given recordings; what distorts with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.audio_files import SAMPLE_RATE, find_audio
from s3prl_ekd.data.distortion.pipeline import Distorter
from s3prl_ekd.data.distortion.settings import (
    AdditiveWeights,
    ConvolutiveWeights,
    DistortionSettings,
)
from s3prl_ekd.demo.noise import make_noises
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.files.atomic import atomic_file

from .corpus import Corpus
from .recipe import Recipe

RECORDED_NOISE = "recorded_noise"  # the folder of the recordings, beside that of synthetic noise
RECORDINGS_LIST = "list.json"
_TAKES, _SECONDS = 6, 15.0  # clips of each kind, and their length
_TALKERS = 60  # training utterances that the babble is made of


def make_synthetic_noise(corpus: Corpus, folder: Path, seed: int) -> Path:
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
            with atomic_file(folder / f"{name}-{take}.flac") as file:
                soundfile.write(file, clip.clip(-1, 1), SAMPLE_RATE, format="FLAC")
    done.touch()
    return folder


def copy_recordings(files: Sequence[Path], folder: Path, already_trained: bool) -> None:
    """Copy recordings into ``folder``, once, with ``list.json`` of their names and sizes.

    Args:
        files: in any order; their names and bytes count, and not where they lie.
        folder: ``ZOO/recorded_noise``.
        begun: a stage that hears noise has taken steps already.

    Raises:
        ConfigError: it was begun with others.
        DataError: a file is no audio.
    """
    facts = [[path.name, path.stat().st_size] for path in sorted(files, key=lambda p: p.name)]
    listed = folder / RECORDINGS_LIST
    known = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    if known == facts:
        return
    if known or already_trained:
        raise ConfigError(
            f"{folder.parent} was begun with {len(known)} recordings of noise, now there are "
            f"{len(facts)}, or others; give the same --noise, or another folder with -o"
        )
    for path in files:
        read_audio(path)  # what cannot be read is said before anything is there
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was cut here
    folder.mkdir(parents=True)
    for path in files:
        with atomic_file(folder / path.name) as file:
            file.write(path.read_bytes())
    with atomic_file(listed) as file:  # last: without it nothing of the folder is heard
        file.write(json.dumps(facts, indent=1).encode())


def find_noise(given: Sequence[str | Path]) -> list[Path]:
    """The audio files among ``given`` and below its folders.

    Raises:
        ConfigError: one is missing, a folder has none, or two have one name.
    """
    found: list[Path] = []
    for path in map(Path, given):
        if not path.exists():
            raise ConfigError(f"--noise {path}: there is no such file or folder")
        below = [path / name for name in find_audio(path)] if path.is_dir() else [path]
        if not below:
            raise ConfigError(f"--noise {path} holds no .flac, .wav, .ogg or .opus file")
        found += below
    names = [path.name for path in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"--noise: two files are called {min(twice)}; rename one")
    return found


def make_distorter(folder: Path, recipe: Recipe) -> Distorter:
    """Noise of the folder on 5 of 6 waveforms, or of it and recordings beside it, as often, on 9 of
    10; a simulated room around 1 of 2."""
    recorded = folder.with_name(RECORDED_NOISE)
    settings = DistortionSettings(
        setup="same",
        noise=(str(folder), *([str(recorded)] if (recorded / RECORDINGS_LIST).is_file() else [])),
        snr_min=recipe.snr_min,
        snr_max=recipe.snr_max,
        additive_weights=AdditiveWeights(noise=4.0, gaussian=1.0, clean=1.0),
        pitch_cents=0.0,  # another pitch is another speaker, not another room
        convolutive_weights=ConvolutiveWeights(reverb=1.0, band_reject=0.0, clean=1.0),
    )
    return Distorter(settings, recipe.seed)
