"""SF's metrics as s3prl computes them: F1 of slot types, and CER of slot values.

A text contains its slots: ``PLAY B-artist ADELE E-artist`` has the slot type ``artist`` with the
value ``ADELE``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import editdistance
import numpy as np

from .error_counts import ErrorCounts
from .predictions import reference_digest

Slots = dict[str, list[str]]  # type -> values, in the order of the text

_SLOT = re.compile(r"B-(\S+) (.+?) E-\1")
_MARK = re.compile(r"B-\S+ "), re.compile(r" E-\S+")
_MAX_RATE = 100  # edits per character; a worse value counts as empty


def read_slots(text: str) -> Slots:
    """The slots of a text. Marks of other slots inside a slot are part of its value."""
    slots: Slots = {}
    for slot, value in _SLOT.findall(re.sub(" +", " ", text)):
        slots.setdefault(slot, []).append(value)
    return slots


def _without_marks(value: str) -> str:
    for mark in _MARK:
        value = mark.sub("", value)
    return value


def slot_type_f1(hyp: Slots, ref: Slots) -> float:
    """F1 of an utterance's set of slot types; 1 if neither text has a slot."""
    if not hyp and not ref:
        return 1.0
    return 2 * len(hyp.keys() & ref.keys()) / (len(hyp) + len(ref))


def value_edits(hyp: Slots, ref: Slots) -> tuple[int, int]:
    """Edits and characters of an utterance's slot values.

    Each reference value is compared with the closest hypothesis of its type, which may serve
    several; other hypotheses do not count.
    """
    edits = characters = 0
    for slot, values in ref.items():
        for value in values:
            counts = [editdistance.eval(text, value) for text in hyp.get(slot, ())]
            best = min(counts, default=len(value))
            edits += best if best < _MAX_RATE * len(value) else len(value)
            characters += len(value)
    return edits, characters


def count_slots(pairs: Sequence[tuple[str, str, str]]) -> tuple[ErrorCounts, ErrorCounts]:
    """F1 and CER of ``pairs`` (:func:`.predictions.read_pairs`).

    F1 is the mean over utterances. An utterance without a slot in its reference has no part in CER.
    """
    names, errors, counts = [], [], []
    for name, hypothesis, reference in pairs:
        hyp, ref = read_slots(hypothesis), read_slots(reference)
        hyp = {slot: list(map(_without_marks, values)) for slot, values in hyp.items()}
        names.append(name)
        errors.append(1 - slot_type_f1(hyp, ref))
        counts.append(value_edits(hyp, ref))
    edits, characters = np.array(counts, dtype=np.int64).T
    texts = reference_digest(pairs)
    ones = np.ones(len(names))
    f1 = ErrorCounts(tuple(names), np.array(errors), ones, accuracy=True, texts=texts)
    return f1, ErrorCounts(tuple(names), edits, characters, texts=texts)
