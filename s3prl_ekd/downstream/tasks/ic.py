"""IC: intent classification on Fluent Speech Commands: action, object and location."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ...errors import ConfigError
from ...prepare.ic import SLOTS, TABLES
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder, read_list
from .task import Metric, Task

_ROOT = f"{EXPERT}.datarc.file_path"


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    root, has_file = recipe.path(_ROOT), file_finder()
    yield FileLookup(_ROOT, list(TABLES.values()), "the corpus's tables", has_file)
    values: dict[str, set[str]] = {}
    for split, name in TABLES.items():
        rows = list(csv.DictReader(read_list(root / name).splitlines()))
        for number, row in enumerate(rows, start=2):
            for column in ("path", *SLOTS):
                if not row.get(column):
                    raise ConfigError(
                        f"{recipe.source}: {root / name}: line {number} has no {column}; a table "
                        f"needs the columns path, {', '.join(SLOTS)}; create it again with "
                        "s3prl-ekd prepare ic or fluent_commands"
                    )
            for slot in SLOTS:
                known = values.setdefault(slot, set())
                if split == "train":
                    known.add(row[slot])
                elif row[slot] not in known:
                    raise ConfigError(
                        f"{recipe.source}: {root / name}: line {number}: {slot} {row[slot]!r:.40} "
                        "is not in the table for training"
                    )
        yield FileLookup(_ROOT, [row["path"] for row in rows], str(root / name), has_file)


IC = Task(
    name="ic",
    downstream="fluent_commands",
    full="downstream/fluent_commands/config.yaml",
    tiny="downstream/fluent_commands/tiny.yaml",
    split="test",
    best="dev-best.ckpt",
    main=Metric("acc", "label", anchors=(9.649354219, 98.76)),
    scale=100.0,
    hyp="test_predict.csv",
    ref="test_truth.csv",
    archive="ic_public/predict.csv",
    recipe_files=(),
    folders=(_ROOT,),
    lists=(),
    find_files=_find_files,
    batch_seconds=0.06,
    parameters=0.2e6,
    separator=",",
    demo_steps=0.5,
)
