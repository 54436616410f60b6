"""ASV: speaker verification on VoxCeleb1: trials of two recordings, of one speaker or of two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ...files.config import override_option, value_at
from ...prepare.asv import (
    MIN_SAMPLES,
    PREPARED,
    TEST,
    TRAIN,
    read_lengths,
    read_trials,
    subfolders,
)
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder
from .task import Metric, Task

if TYPE_CHECKING:
    from ..metrics.sample import Sample

_DATA = f"{EXPERT}.datarc"
_ROOT, _TRIALS = f"{_DATA}.file_path", f"{_DATA}.test_meta_data"
_LONGER_THAN, _EXCERPT = f"{_DATA}.vad_config.min_sec", f"{_DATA}.max_timestep"
_PREDICTIONS = ("test_predict.txt", "test_truth.txt")


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    path = recipe.path(_TRIALS)
    try:
        trials = read_trials(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{recipe.source}: {error}") from None
    names = sorted({name for trial in trials for name in trial[1:]})
    has_file = file_finder()
    yield FileLookup(
        _ROOT, names, str(path), lambda root, name: has_file(root / TEST, name), f"{TEST}/{{}}"
    )
    root = recipe.path(_ROOT)
    speakers = subfolders(root / TRAIN) if (root / TRAIN).is_dir() else []
    if len(speakers) < 2:
        raise recipe.error(
            _ROOT, f"{root}, which has {len(speakers)} folder(s) of speakers in {TRAIN}, not 2"
        )
    if recipe.split is None:
        _check_lengths(recipe, root)
        _check_checkpoints(recipe)


def _check_checkpoints(recipe: RecipeFiles) -> None:
    """Check that the training leaves checkpoints, which are tested in the end."""
    keys = ("save_step", "max_keep", "total_steps")
    values = {key: value_at(recipe.config, f"runner.{key}") for key in keys}
    for key, value in values.items():
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{recipe.source}: runner.{key} must be an integer above 0, got {value!r:.40}"
            )
    if values["save_step"] > values["total_steps"]:
        raise ConfigError(
            f"{recipe.source}: runner.save_step is {values['save_step']}, more than the "
            f"{values['total_steps']} steps: there would be no checkpoint to test; edit it or add "
            f"{override_option('runner.save_step', str(values['total_steps']))}"
        )


def _check_lengths(recipe: RecipeFiles, root: Path) -> None:
    """Check that there are recordings for training, and that none is too short for XVector."""
    longer_than = value_at(recipe.config, _LONGER_THAN)
    for key, value, least in (
        (_LONGER_THAN, longer_than, MIN_SAMPLES - 1),
        (_EXCERPT, value_at(recipe.config, _EXCERPT), MIN_SAMPLES),
    ):
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"{recipe.source}: {key} must be {least} samples or more, got {value!r:.40}; edit "
                f"it or add {override_option(key, str(least))}"
            )
    table = read_lengths(root, ConfigError)
    if table is not None and not any(samples > longer_than for _, samples in table.values()):
        longest = max((samples for _, samples in table.values()), default=0)
        raise ConfigError(
            f"{recipe.source}: {_LONGER_THAN} is {longer_than}, and no recording for training has "
            f"more samples without silence (the longest has {longest}, {root / PREPARED}); edit it "
            f"or add {override_option(_LONGER_THAN, str(MIN_SAMPLES))}"
        )


def _measure(folder: Path, fold: str | None) -> tuple[Sample, ...]:
    from ..metrics.eer import read_scored_trials

    predictions, truth = (folder / name for name in _PREDICTIONS)
    return (read_scored_trials(predictions, truth),)


ASV = Task(
    name="asv",
    full_name="speaker verification",
    hub_type="audio-classification",
    downstream="sv_voxceleb1",
    full="downstream/sv_voxceleb1/config.yaml",
    tiny="downstream/sv_voxceleb1/tiny.yaml",
    metrics=(Metric("eer", (9.56, 5.11)),),
    measure=_measure,
    predictions=_PREDICTIONS,
    archive={"test_predict.txt": "sv_public/predict.txt"},
    folders=(_ROOT,),
    lists=(_TRIALS, f"{_DATA}.dev_meta_data"),
    find_files=_find_files,
    batch_seconds=0.09,
    parameters=6e6,
    unit="speakers",
    selection="checkpoints",
)
