"""SD: speaker diarisation on Libri2Mix, two speakers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.audio_files import SAMPLE_RATE
from ...data.diarization_folder import check_audio, check_reference, chunk_problem, read_folder
from ...data.rttm import MAX_SPEAKERS
from ...errors import ConfigError, DataError
from ...files.atomic import write_text
from ...files.config import override_option, value_at
from ...files.text import read_text
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder
from .task import Metric, Task

if TYPE_CHECKING:
    from ..metrics.sample import Sample  # which imports numpy

_DATARC = f"{EXPERT}.datarc"
_FOLDERS = {split: f"{EXPERT}.loaderrc.{split}_dir" for split in ("train", "dev", "test")}
_SHIFTS = (160, 320)  # samples of a frame of most upstreams

_SCORING, _FRAME_SHIFT, _REFERENCE = "scoring/predictions", "frame_shift", "reference.rttm"


def _count(recipe: RecipeFiles, name: str) -> int:
    value = value_at(recipe.config, f"{_DATARC}.{name}")
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{recipe.source}: {_DATARC}.{name} must be a number from 1 on, got {value!r:.40}"
        )
    return value


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    if importlib.util.find_spec("h5py") is None:
        raise ConfigError(
            f"{recipe.source}: s3prl writes predictions of SD with h5py, which is not installed; "
            "type: pip install h5py"
        )
    speakers, frames = _count(recipe, "num_speakers"), _count(recipe, "chunk_size")
    if speakers > MAX_SPEAKERS:
        raise ConfigError(
            f"{recipe.source}: {_DATARC}.num_speakers must be at most {MAX_SPEAKERS}, got "
            f"{speakers}"
        )
    if _count(recipe, "rate") != SAMPLE_RATE:
        raise ConfigError(
            f"{recipe.source}: {_DATARC}.rate must be {SAMPLE_RATE}, the rate of all upstreams; "
            f"edit it or add {override_option(f'{_DATARC}.rate', SAMPLE_RATE)}"
        )
    shift = value_at(recipe.config, f"{_DATARC}.frame_shift")  # null: the upstream's
    shifts = (shift,) if type(shift) is int and shift > 0 else _SHIFTS
    has_file = file_finder()
    # of a training also the test set, on which it will be tested hours later
    for split in [recipe.split] if recipe.split in _FOLDERS else _FOLDERS:
        key = _FOLDERS[split]
        folder = recipe.path(key)
        try:
            recordings = read_folder(folder, speakers)
            if split == "test":
                check_reference(folder, recordings)
            first = next(iter(recordings.values()))
            if has_file(recipe.folder, first.path):  # reading all headers could take minutes
                check_audio([first], recipe.folder)
        except DataError as error:
            raise ConfigError(f"{recipe.source}: {key}: {error}") from None
        for name, recording in recordings.items():
            if not has_file(recipe.folder, recording.path):
                raise ConfigError(
                    f"{recipe.source}: {key}: {recording.location}: {recording.path} does not "
                    "exist; create the folder again with s3prl-ekd prepare sd or libri2mix"
                )
            for shift in shifts:
                if problem := chunk_problem(recording, frames, shift):
                    raise ConfigError(
                        f"{recipe.source}: {key}: {name}, in frames of {shift} samples and chunks "
                        f"of {frames}: {problem}; use a larger {_DATARC}.chunk_size"
                    )
    yield from ()


def _measure(folder: Path, fold: str | None) -> tuple[Sample, ...]:
    from ..metrics.diarization import measure

    return (measure(folder / _SCORING, folder / _FRAME_SHIFT, folder / _REFERENCE),)


def _write_reference(config: Mapping[str, Any], split: str, folder: Path) -> None:
    path = Path(str(value_at(config, _FOLDERS[split]))) / "rttm"
    write_text(folder / _REFERENCE, read_text(path, "RTTM file", DataError, 1 << 28))


SD = Task(
    name="sd",
    full_name="speaker diarisation",
    hub_type="audio-classification",
    downstream="diarization",
    full="downstream/diarization/config.yaml",
    tiny="downstream/diarization/tiny.yaml",
    metrics=(Metric("der", (10.05, 5.62)),),
    measure=_measure,
    unit="recordings",
    predictions=(_SCORING, _FRAME_SHIFT, _REFERENCE),
    archive={
        f"{_SCORING}/*.h5": "sd_public/scoring/predictions",
        _FRAME_SHIFT: "sd_public/frame_shift",
    },
    folders=tuple(_FOLDERS.values()),
    find_files=_find_files,
    batch_seconds=0.1,
    parameters=2.6e6,  # an LSTM layer of 512 on 768 inputs
    best="best-states-dev.ckpt",
    dev_metric=Metric("acc", None, higher_is_better=True),
    write_reference=_write_reference,
)
