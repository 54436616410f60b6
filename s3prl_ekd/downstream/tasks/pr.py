"""PR: phone recognition on LibriSpeech (s3prl's recipe `ctc` with `libriphone`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .lookup import EXPERT, FileLookup, RecipeFiles
from .task import Metric, Task, text_metric

_MAX_DEPTH = 3  # levels below a LibriSpeech set: speaker, chapter, and one more


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    def has_file(root: Path, name: str) -> bool:
        top = root / name
        for folder, subfolders, files in os.walk(top, followlinks=True):
            if any(file.endswith(".trans.txt") for file in files):
                return True
            if len(Path(folder).relative_to(top).parts) >= _MAX_DEPTH:
                subfolders.clear()
        return False

    sets, listed_in = recipe.sets("corpus"), f"the sets of {', '.join(recipe.splits)}"
    yield FileLookup(f"{EXPERT}.corpus.path", sets, listed_in, has_file, "{}/*/*/*.trans.txt")


_PREDICTIONS = ("test-hyp.ark", "test-ref.ark")

PR = Task(
    name="pr",
    full_name="phone recognition",
    hub_type="automatic-speech-recognition",
    downstream="ctc",
    corpus_name="libriphone",
    ctc_metric="per",
    full="downstream/ctc/libriphone.yaml",
    tiny="downstream/ctc/tiny.yaml",
    split="test",
    metrics=(Metric("per", (82.01, 3.53)),),
    measure=text_metric(*_PREDICTIONS, "word"),
    predictions=_PREDICTIONS,
    archive={"test-hyp.ark": "pr_public/predict.ark"},
    recipe_files=(f"{EXPERT}.text.vocab_file",),
    folders=(f"{EXPERT}.corpus.path",),
    lists=(f"{EXPERT}.corpus.lexicon",),
    find_files=_find_files,
    published_rates=(5e-4,),  # LightHuBERT, small students
    batch_seconds=0.1,
    parameters=0.3e6,
    # imported with the first data loader; see requirements.provide_ctc_corpus
    modules=("s3prl.downstream.ctc.corpus.libriphone",),
    demo_steps=2.0,
)
