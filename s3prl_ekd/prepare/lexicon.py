"""Pronunciation lexicons: words and their phones, as text.

One entry a line, a word and its phones with tabs or spaces between. That covers the LibriSpeech
lexicons (``WORD<tab>PHONES``) and CMUdict in both of its shapes: ``;;;`` starts a comment line, a
token that starts with ``#`` behind the phones starts a comment, ``WORD(1)`` is another
pronunciation of ``WORD``, and words are in either case. Of several pronunciations the first in the
file is taken, as s3prl's PR does, so that a text has one sequence of phones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from ..files.atomic import write_text
from ..files.text import check_regular
from .phones import PHONES

Pronunciations = dict[str, tuple[str, ...]]  # word in upper case -> phones

_VARIANT = re.compile(r"\(\d+\)$")


def read_lexicon(
    paths: Sequence[str | Path],
    words: Collection[str],
    known: Callable[[str], bool] = PHONES.__contains__,
) -> Pronunciations:
    """The pronunciations of ``words``; those that no file has are absent from the answer.

    Lines of other words are passed over unread, so a lexicon may hold what nobody asks for.

    Args:
        paths: lexicons; an earlier one comes first.
        words: in upper case.
        known: whether the recipe's vocabulary has a phone.

    Raises:
        DataError: a file is missing, a word that is asked for has no phones, or one that the
            vocabulary lacks. The message names the line.
    """
    found: Pronunciations = {}
    for path in map(Path, paths):
        for number, line in enumerate(_lines(path), start=1):
            cells = line.split()
            if not cells or line.startswith(";;;"):
                continue
            word = _VARIANT.sub("", cells[0]).upper()
            if word not in words or word in found:
                continue
            phones = _without_comment(cells[1:])
            if not phones:
                raise DataError(f"{path}: line {number} has the word {word} and no phones")
            for phone in phones:
                if not known(phone):
                    raise DataError(
                        f"{path}: line {number} has the phone {phone!r}, which the vocabulary "
                        "lacks (ARPAbet; vowels carry their stress, as in AH0)"
                    )
            found[word] = phones
    return found


def _lines(path: Path) -> list[str]:
    check_regular(path, "lexicon", DataError)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the lexicon {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # CMUdict 0.7b
    return text.split("\n")


def _without_comment(cells: Sequence[str]) -> tuple[str, ...]:
    end = next((at for at, cell in enumerate(cells) if cell.startswith("#")), len(cells))
    return tuple(cells[:end])


def write_lexicon(path: str | Path, pronunciations: Mapping[str, Sequence[str]]) -> None:
    """Write ``WORD<tab>PHONES`` lines, sorted by word: what s3prl's PR reads."""
    lines = [f"{word}\t{' '.join(phones)}\n" for word, phones in sorted(pronunciations.items())]
    write_text(path, "".join(lines))
