"""Noise clips of the zoo, synthetic and recorded, and the distorter that uses them."""

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
from .recipe import TeacherRecipe

RECORDED_NOISE = "recorded_noise"  # folder of the recordings, next to the folder of synthetic noise
RECORDINGS_LIST = "list.json"
_TAKES, _SECONDS = 6, 15.0  # number of clips of each kind, and their length
_TALKERS = 60  # number of training utterances in the babble


def make_synthetic_noise(corpus: Corpus, folder: Path, seed: int) -> Path:
    """Write white, pink and brown noise, hum and babble of training speech to ``folder``, as FLAC.

    Does nothing if the folder is complete. The files depend only on corpus and seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / "complete"
    if complete.exists():
        return folder
    rng = np.random.default_rng(seed)
    talkers = rng.permutation(len(corpus.train))[:_TALKERS]
    speech = [read_audio(corpus.train[i].path).numpy().astype(np.float64) for i in talkers]
    for take in range(_TAKES):
        for name, clip in make_noises(rng, speech, _SECONDS).items():
            with atomic_file(folder / f"{name}-{take}.flac") as file:
                soundfile.write(file, clip.clip(-1, 1), SAMPLE_RATE, format="FLAC")
    complete.touch()
    return folder


def copy_recordings(files: Sequence[Path], folder: Path, already_trained: bool) -> None:
    """Copy recordings into ``folder``, once, and write their names and sizes to ``list.json``.

    Args:
        files: recordings; names and sizes are compared, not paths or order.
        folder: ``ZOO/recorded_noise``.
        already_trained: a stage with distorted input has a checkpoint.

    Raises:
        ConfigError: the recordings have changed.
        DataError: a file is not audio.
    """
    recordings = [[path.name, path.stat().st_size] for path in sorted(files, key=lambda p: p.name)]
    listed = folder / RECORDINGS_LIST
    copied = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    if copied == recordings:
        return
    if copied or already_trained:
        raise ConfigError(
            f"{folder.parent}: --noise has changed ({len(copied)} recordings before, "
            f"{len(recordings)} now); use the same ones, or another folder with -o"
        )
    for path in files:
        read_audio(path)  # raise before anything is written
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted copy
    folder.mkdir(parents=True)
    for path in files:
        with atomic_file(folder / path.name) as file:
            file.write(path.read_bytes())
    with atomic_file(listed) as file:  # last: without it the folder is not used
        file.write(json.dumps(recordings, indent=1).encode())


def find_noise(paths: Sequence[str | Path]) -> list[Path]:
    """Find the audio files in ``paths``: files, and folders searched recursively.

    Raises:
        ConfigError: a path is missing, a folder has no audio, or two files have the same name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ConfigError(f"--noise {path}: no such file or folder")
        audio = [path / name for name in find_audio(path)] if path.is_dir() else [path]
        if not audio:
            raise ConfigError(f"--noise {path}: no .flac, .wav, .ogg or .opus file in it")
        files += audio
    names = [path.name for path in files]
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise ConfigError(f"--noise: two files have the name {min(duplicates)}; rename one")
    return files


def make_distorter(folder: Path, recipe: TeacherRecipe) -> Distorter:
    """The distorter of RobustHuBERT's input.

    Noise on 5 of 6 waveforms; on 9 of 10 if there are recordings, which are drawn as often as the
    clips of ``folder``. A simulated room on 1 of 2.
    """
    recorded = folder.with_name(RECORDED_NOISE)
    settings = DistortionSettings(
        setup="same",
        noise=(str(folder), *([str(recorded)] if (recorded / RECORDINGS_LIST).is_file() else [])),
        snr_min=recipe.snr_min,
        snr_max=recipe.snr_max,
        additive_weights=AdditiveWeights(noise=4.0, gaussian=1.0, clean=1.0),
        pitch_cents=0.0,  # a pitch shift changes the speaker, not the room
        convolutive_weights=ConvolutiveWeights(reverb=1.0, band_reject=0.0, clean=1.0),
    )
    return Distorter(settings, recipe.seed)
