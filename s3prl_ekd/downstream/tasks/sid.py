"""SID: speaker identification on VoxCeleb1."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ...errors import ConfigError
from .lookup import EXPERT, FileLookup, RecipeFiles, folder_listing, read_list
from .task import Metric, Task, text_metric


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    path = recipe.path(f"{EXPERT}.datarc.meta_data")
    names = []
    for number, line in enumerate(read_list(path).splitlines(), start=1):
        fields = line.split()
        if len(fields) < 2 or not fields[0].isdecimal() or fields[1].count("/") != 2:
            raise ConfigError(
                f"{recipe.source}: {path} line {number}: expected '1 id10001/VIDEO/UTTERANCE.wav', "
                f"got {line.strip()[:60]!r}"
            )
        if fields[0] in ("1", "2", "3"):  # s3prl ignores other numbers
            names.append(fields[1])
    listing = folder_listing()

    @cache
    def parts(root: Path) -> list[Path]:
        wavs = (root / name / "wav" for name in sorted(listing(root)))
        return [wav for wav in wavs if wav.is_dir()]

    def has_file(root: Path, name: str) -> bool:
        video, _, file = name.rpartition("/")
        return any(file in listing(part / video) for part in parts(root))

    yield FileLookup(f"{EXPERT}.datarc.file_path", names, str(path), has_file, "*/wav/{}")


_PREDICTIONS = ("test_predict.txt", "test_truth.txt")

SID = Task(
    name="sid",
    full_name="speaker identification",
    hub_type="audio-classification",
    downstream="voxceleb1",
    full="downstream/voxceleb1/config.yaml",
    tiny="downstream/voxceleb1/tiny.yaml",
    metrics=(Metric("acc", (20.058174, 90.3), higher_is_better=True),),
    measure=text_metric(*_PREDICTIONS, "label"),
    predictions=_PREDICTIONS,
    archive={"test_predict.txt": "sid_public/predict.txt"},
    folders=(f"{EXPERT}.datarc.file_path",),
    lists=(f"{EXPERT}.datarc.meta_data",),
    find_files=_find_files,
    published_rates=(5e-3,),  # LightHuBERT, small students
    batch_seconds=0.06,
    parameters=0.6e6,  # 1,251 speakers
)
