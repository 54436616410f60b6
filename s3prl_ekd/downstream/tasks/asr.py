"""ASR: speech recognition on LibriSpeech, 100 hours, without a language model."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

from ...errors import ConfigError
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder, read_list
from .task import Metric, Task, text_metric


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    key = f"{EXPERT}.datarc.bucket_file"
    tables = [f"{name}.csv" for name in recipe.sets("datarc")]
    has_file = file_finder()
    yield FileLookup(key, tables, f"the sets of {', '.join(recipe.splits)}", has_file)
    for path in (recipe.path(key) / table for table in tables):
        rows = csv.DictReader(read_list(path).splitlines())
        if "file_path" not in (rows.fieldnames or ()):
            raise ConfigError(
                f"{recipe.source}: {path} has no column file_path; create it again with s3prl-ekd "
                "prepare asr or librispeech"
            )
        names = [row["file_path"] or "" for row in rows]
        folders = {os.path.dirname(name): None for name in names}
        transcripts = [f"{name}/{'-'.join(name.split('/')[-2:])}.trans.txt" for name in folders]
        yield FileLookup(f"{EXPERT}.datarc.libri_root", [*names, *transcripts], str(path), has_file)


_PREDICTIONS = ("test-clean-noLM-hyp.ark", "test-clean-noLM-ref.ark")

ASR = Task(
    name="asr",
    full_name="speech recognition",
    hub_type="automatic-speech-recognition",
    downstream="asr",
    full="downstream/asr/config.yaml",
    tiny="downstream/asr/tiny.yaml",
    split="test-clean",
    best="dev-clean-best.ckpt",
    metrics=(Metric("wer", (23.18, 3.62)),),
    measure=text_metric(*_PREDICTIONS, "word"),
    predictions=_PREDICTIONS,
    scale=1.0,
    archive={"test-clean-noLM-hyp.ark": "asr_public/predict.ark"},
    recipe_files=(f"{EXPERT}.datarc.dict_path",),
    folders=(f"{EXPERT}.datarc.libri_root", f"{EXPERT}.datarc.bucket_file"),
    find_files=_find_files,
    batch_seconds=0.65,  # "one to two days" for 200,000 batches, the comment in its recipe
    parameters=43e6,  # two bidirectional LSTM layers of 1024 on 1024 inputs
)
