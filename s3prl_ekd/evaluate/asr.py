"""Word and character error rates from the prediction files of s3prl's ``-d asr``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..superb.metrics import count_characters, count_errors, read_pairs


@dataclass(frozen=True)
class ErrorRates:
    """Per cent of reference words and characters, and the number of utterances."""

    wer: float
    cer: float
    utterances: int


def error_rates(folder: str | Path, split: str) -> ErrorRates:
    """Rates over ``SPLIT-noLM-{hyp,ref}.ark`` in a run's folder (editdistance).

    Raises:
        DataError: a file is missing, the two do not hold the same utterances, or a reference is
            empty.
    """
    folder = Path(folder)
    pairs = read_pairs(folder / f"{split}-noLM-hyp.ark", folder / f"{split}-noLM-ref.ark")
    words, characters = count_errors(pairs, labels=False), count_characters(pairs)
    return ErrorRates(words.rate, characters.rate, len(pairs))
