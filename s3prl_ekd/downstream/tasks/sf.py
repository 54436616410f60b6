"""SF: slot filling on Audio SNIPS (s3prl's recipe `ctc` with `snips`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError, DataError
from ...prepare import sf as snips
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder
from .task import Metric, Task

if TYPE_CHECKING:
    from ..metrics.sample import Sample  # which imports numpy

_ROOT = f"{EXPERT}.corpus.path"
_MODE = f"{EXPERT}.text.mode"
_VOCABULARY = f"{EXPERT}.text.vocab_file"
_SLOTS = f"{EXPERT}.text.slots_file"


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    root = recipe.path(_ROOT)
    yield FileLookup(_ROOT, [snips.TEXTS], "Audio SNIPS", file_finder())
    mode = recipe.value(_MODE)
    if mode != "character-slot":
        raise ConfigError(f"{recipe.source}: {_MODE} must be 'character-slot', got {mode!r:.60}")
    speakers = {split: _speakers(recipe, split) for split in recipe.splits}
    try:
        snips.check_vocabulary(recipe.path(_VOCABULARY))
        slots = snips.read_slots(recipe.path(_SLOTS))
        texts = snips.read_texts(root)
        for folders, names in speakers.values():
            found = snips.find_utterances(root, folders, names, texts)
            snips.check_texts(root, found, slots)
    except DataError as error:
        raise ConfigError(f"{recipe.source}: {error}") from None


def _speakers(recipe: RecipeFiles, split: str) -> tuple[list[str], list[str]]:
    """The folders of a split, and its speakers, whose key has the name of the first folder."""
    folders = replace(recipe, split=split).sets("corpus")
    if not folders:
        raise recipe.error(f"{EXPERT}.corpus.{split}", "empty")
    key = f"{EXPERT}.corpus.{folders[0]}_speakers"
    speakers = recipe.value(key)
    if not isinstance(speakers, list) or not all(isinstance(name, str) for name in speakers):
        raise ConfigError(f"{recipe.source}: {key} is {speakers!r:.80}, expected a list of names")
    return folders, speakers


_PREDICTIONS = ("test-hyp.ark", "test-ref.ark")


def _measure(folder: Path, fold: str | None) -> tuple[Sample, ...]:
    from ..metrics.predictions import read_pairs
    from ..metrics.slots import count_slots

    hypotheses, references = (folder / name for name in _PREDICTIONS)
    f1, cer = count_slots(read_pairs(hypotheses, references))
    if not cer.lengths.any():
        raise DataError(f"{references}: no reference has a slot; evaluate another test set")
    return f1, cer


SF = Task(
    name="sf",
    full_name="slot filling",
    hub_type="automatic-speech-recognition",
    downstream="ctc",
    corpus_name="snips",
    ctc_metric="slot_type_f1",
    full="downstream/ctc/snips.yaml",
    tiny="downstream/ctc/snips_tiny.yaml",
    metrics=(
        Metric("f1", (69.64, 89.81), higher_is_better=True),
        Metric("cer", (52.94, 21.76)),
    ),
    measure=_measure,
    predictions=_PREDICTIONS,
    archive={"test-hyp.ark": "sf_public/predict.ark"},
    recipe_files=(_VOCABULARY,),
    folders=(_ROOT,),
    lists=(_SLOTS,),
    find_files=_find_files,
    batch_seconds=0.25,
    parameters=43e6,  # two bidirectional LSTM layers of 1024 on 1024 inputs
    # imported with the first data loader; see requirements.provide_ctc_corpus
    modules=("s3prl.downstream.ctc.corpus.snips",),
)
