"""The characters of s3prl's ASR recipe, and the dictionary file that lists them.

The file has fairseq's format, one ``SYMBOL COUNT`` a line; s3prl adds four symbols of its own
(``<s> <pad> </s> <unk>``), which makes 32 classes. s3prl's PyPI package does not carry the file,
so it is made here from the alphabet. The counts are 1: nothing reads them. The order is ours (the
boundary, A to Z, the apostrophe), so the output layer of a model trained with another dictionary
does not fit this one, although both have the same symbols.
"""

from __future__ import annotations

import re
import string
from pathlib import Path

WORD_BOUNDARY = "|"  # s3prl's ASR dataset writes it for every space and at the end
LETTERS = string.ascii_uppercase + "'"  # all that a transcript may have, besides the space
SYMBOLS = (WORD_BOUNDARY, *LETTERS)

_FOREIGN = re.compile(f"[^{LETTERS} ]")


def dictionary_text() -> str:
    """The whole dictionary file."""
    return "".join(f"{symbol} 1\n" for symbol in SYMBOLS)


def write_char_dict(path: str | Path) -> None:
    """Write the dictionary file, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dictionary_text(), encoding="utf-8")


def normalise(text: str) -> str:
    """Upper case, and one space between words. Nothing is dropped."""
    return " ".join(text.upper().split())


def foreign_characters(text: str) -> str:
    """The characters of a normalised text that the dictionary lacks, each once, sorted."""
    return "".join(sorted(set(_FOREIGN.findall(text))))
