"""IC: intent classification on Fluent Speech Commands: action, object and location."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import ConfigError
from ...prepare.ic import TABLES, read_tables
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder
from .task import Metric, Task, text_metric

_ROOT = f"{EXPERT}.datarc.file_path"


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    root, has_file = recipe.path(_ROOT), file_finder()
    yield FileLookup(_ROOT, list(TABLES.values()), "the corpus's tables", has_file)
    try:
        lines = read_tables(root, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{recipe.source}: {error}") from None
    paths = [row["path"] for _, _, row in lines]
    yield FileLookup(_ROOT, paths, str(root / "data"), has_file)


_PREDICTIONS = ("test_predict.csv", "test_truth.csv")

IC = Task(
    name="ic",
    full_name="intent classification",
    hub_type="audio-classification",
    downstream="fluent_commands",
    full="downstream/fluent_commands/config.yaml",
    tiny="downstream/fluent_commands/tiny.yaml",
    metrics=(Metric("acc", (9.649354219, 98.76), higher_is_better=True),),
    measure=text_metric(*_PREDICTIONS, "label", separator=","),
    predictions=_PREDICTIONS,
    archive={"test_predict.csv": "ic_public/predict.csv"},
    folders=(_ROOT,),
    find_files=_find_files,
    batch_seconds=0.06,
    parameters=0.2e6,
)
