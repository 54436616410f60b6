"""KS: keyword spotting on Speech Commands v0.01, twelve classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigError, DataError
from ...files.config import override_option, value_at
from ...prepare.ks import NOISE, count_recordings
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder
from .task import Metric, Task, text_metric

_TRAIN = f"{EXPERT}.datarc.speech_commands_root"
_TEST = f"{EXPERT}.datarc.speech_commands_test_root"
_BATCH = f"{EXPERT}.datarc.batch_size"


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    try:
        counts = count_recordings(recipe.path(_TRAIN), recipe.path(_TEST))
    except DataError as error:
        keys = f"{_TRAIN} and {Path(_TEST).suffix[1:]}"
        raise ConfigError(f"{recipe.source}: {keys}: {error}") from None
    batch, count = value_at(recipe.config, _BATCH), counts["train"] + counts[NOISE]
    if isinstance(batch, int) and count < batch:  # s3prl drops the last batch, and waits for ever
        raise ConfigError(
            f"{recipe.source}: {_BATCH} is {batch}, more than the {count} recordings for training; "
            f"edit it or add {override_option(_BATCH, str(count))}"
        )
    yield FileLookup(_TRAIN, [NOISE], "the class _silence_", file_finder())


_PREDICTIONS = ("test_predict.txt", "test_truth.txt")

KS = Task(
    name="ks",
    full_name="keyword spotting",
    hub_type="audio-classification",
    downstream="speech_commands",
    full="downstream/speech_commands/config.yaml",
    tiny="downstream/speech_commands/tiny.yaml",
    metrics=(Metric("acc", (41.3826674, 96.66), higher_is_better=True),),
    measure=text_metric(*_PREDICTIONS, "label"),
    predictions=_PREDICTIONS,
    archive={"test_predict.txt": "ks_public/predict.txt"},
    folders=(_TRAIN, _TEST),
    find_files=_find_files,
    batch_seconds=0.05,
    parameters=0.2e6,
)
