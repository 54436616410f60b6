"""Word and character error rates from the prediction files of s3prl's ``-d asr``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import editdistance

from ..errors import DataError


@dataclass(frozen=True)
class ErrorRates:
    """Per cent of reference words and characters, and the number of utterances."""

    wer: float
    cer: float
    utterances: int


def read_ark(path: str | Path) -> dict[str, str]:
    """``utterance text`` lines -> text by utterance; an empty text is allowed."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read the predictions {path}: {error.strerror}") from None
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def error_rates(folder: str | Path, split: str) -> ErrorRates:
    """Rates over ``SPLIT-noLM-{hyp,ref}.ark`` in a run's folder (editdistance).

    Raises:
        DataError: a file is missing, or the two do not hold the same utterances.
    """
    folder = Path(folder)
    hyp = read_ark(folder / f"{split}-noLM-hyp.ark")
    ref = read_ark(folder / f"{split}-noLM-ref.ark")
    if hyp.keys() != ref.keys() or not ref:
        raise DataError(f"{folder}: the hypotheses and references of {split} do not match")
    words = chars = word_errors = char_errors = 0
    for name, text in ref.items():
        words += len(text.split())
        chars += len(text)
        word_errors += editdistance.eval(hyp[name].split(), text.split())
        char_errors += editdistance.eval(hyp[name], text)
    return ErrorRates(100 * word_errors / words, 100 * char_errors / chars, len(ref))
