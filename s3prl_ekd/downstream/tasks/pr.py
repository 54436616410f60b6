"""PR: phone recognition on LibriSpeech (s3prl's recipe `ctc` with `libriphone`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigError, DataError
from ...files.config import value_at
from ...prepare.lexicon import read_lexicon, shorten_list
from ...prepare.librispeech import read_texts
from .lookup import EXPERT, FileLookup, RecipeFiles, read_list
from .task import Metric, Task, text_metric

_ROOT = f"{EXPERT}.corpus.path"
_LEXICON = f"{EXPERT}.corpus.lexicon"
_SKIP = f"{EXPERT}.corpus.skip_unknown_words"
_VOCABULARY = f"{EXPERT}.text.vocab_file"
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
    yield FileLookup(_ROOT, sets, listed_in, has_file, "{}/*/*/*.trans.txt")
    if value_at(recipe.config, _SKIP) is not True:
        _check_words(recipe, sets)


def _check_words(recipe: RecipeFiles, sets: list[str]) -> None:
    """Check that the lexicon has all words: s3prl reads dev and test only when it needs them."""
    phones = frozenset(read_list(recipe.path(_VOCABULARY)).split())
    try:
        texts = read_texts(recipe.path(_ROOT), sets)
        words = {word for text in texts.values() for word in text}
        known = read_lexicon(recipe.paths(_LEXICON), words, is_phone=phones.__contains__)
    except DataError as error:
        raise ConfigError(f"{recipe.source}: {error}") from None
    if unknown := sorted(words - known.keys()):
        raise ConfigError(
            f"{recipe.source}: {_LEXICON} lacks {len(unknown)} of the {len(words):,} words of "
            f"{', '.join(sets)}: {shorten_list(unknown)}; add them, or set {_SKIP}: true"
        )


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
    metrics=(Metric("per", (82.01, 3.53)),),
    measure=text_metric(*_PREDICTIONS, "word"),
    predictions=_PREDICTIONS,
    archive={"test-hyp.ark": "pr_public/predict.ark"},
    recipe_files=(_VOCABULARY,),
    folders=(_ROOT,),
    lists=(_LEXICON,),
    find_files=_find_files,
    published_rates=(5e-4,),  # LightHuBERT, small students
    batch_seconds=0.1,
    parameters=0.3e6,
    # imported with the first data loader; see requirements.provide_ctc_corpus
    modules=("s3prl.downstream.ctc.corpus.libriphone",),
)
