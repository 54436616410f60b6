"""The phones of s3prl's PR recipe, and the vocabulary file that lists them.

The inventory is ARPAbet as CMUdict writes it: 39 phones, of which the 15 vowels carry a stress
digit (0 none, 1 primary, 2 secondary). SUPERB's phone error rate counts the digits: AH0 for AH1
is an error. s3prl's word encoder puts ``<pad>`` (the CTC blank), ``<eos>`` and ``<unk>`` before
the lines of the file, which makes 74 classes. s3prl's PyPI package does not carry the file, so it
is made here from the inventory, with the same lines in the same order: a model trained with
either file fits the other.
"""

from __future__ import annotations

from pathlib import Path

VOWELS = tuple("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split())
CONSONANTS = tuple("B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split())
STRESSES = "012"
SILENCES = ("SIL", "SPN")  # silence and spoken noise: classes of s3prl's that no lexicon writes

PHONES = frozenset(CONSONANTS) | {vowel + digit for vowel in VOWELS for digit in STRESSES}


def vocabulary_text() -> str:
    """The whole vocabulary file: one phone a line, 71 lines."""
    return "".join(f"{phone}\n" for phone in (*SILENCES, *sorted(PHONES)))


def write_vocabulary(path: str | Path) -> None:
    """Write the vocabulary file, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(vocabulary_text(), encoding="utf-8")
