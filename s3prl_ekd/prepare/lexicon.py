"""Pronunciations of words, from lexicon files or from a grapheme-to-phoneme (G2P) model.

A line of a lexicon is a word and its phones, separated by tabs or spaces. This covers the
LibriSpeech lexicons (``WORD<tab>PHONES``) and both forms of CMUdict: ``;;;`` starts a comment line,
a token that starts with ``#`` starts a comment after the phones, ``WORD(1)`` is another
pronunciation of ``WORD``, and words may be in upper or lower case. The first pronunciation in the
file is used, as in s3prl's PR, so a text has one phone sequence.

Phones of words that no lexicon has can be predicted from their letters by g2p_en's model, which was
trained on CMUdict. The maintained package is ``espnet-g2p-en``. It looks words up in NLTK's data
first and downloads that data on import; we look words up in the user's lexicon, so we block the
download and use the model only.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from ..compat.replaced import replaced
from ..errors import DataError, SetupError
from ..files.atomic import write_text
from ..files.text import check_regular

_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
PHONES = frozenset(_CONSONANTS) | {vowel + stress for vowel in _VOWELS for stress in "012"}

Pronunciations = dict[str, tuple[str, ...]]  # word in upper case -> phones

_VARIANT = re.compile(r"\(\d+\)$")

MAX_PHONES = 20  # g2p_en stops there, so a prediction of this length may be truncated
_LETTERS = re.compile(r"[A-Z']*[A-Z][A-Z']*")
LEXICON = "lexicon.txt"
_MAX_LISTED = 10  # words in a message


def read_lexicon(
    paths: Sequence[str | Path],
    words: Collection[str],
    is_phone: Callable[[str], bool] = PHONES.__contains__,
) -> Pronunciations:
    """Look up ``words``; words that no file has are absent from the result.

    Only the lines of ``words`` are checked; the phones of other words may be invalid.

    Args:
        paths: lexicons; the first one that has a word is used.
        words: words in upper case.
        is_phone: whether the recipe's vocabulary has a phone.

    Raises:
        DataError: a file cannot be read, or one of ``words`` has no phones or a phone that the
            vocabulary lacks. The message names the line.
    """
    pronunciations: Pronunciations = {}
    for path in map(Path, paths):
        for number, line in enumerate(_lines(path), start=1):
            cells = line.split()
            if not cells or line.startswith(";;;"):
                continue
            word = _VARIANT.sub("", cells[0]).upper()
            if word not in words or word in pronunciations:
                continue
            phones = tuple(itertools.takewhile(lambda cell: not cell.startswith("#"), cells[1:]))
            if not phones:
                raise DataError(f"{path}: line {number}: the word {word} has no phones")
            for phone in phones:
                if not is_phone(phone):
                    raise DataError(
                        f"{path}: line {number}: the vocabulary has no phone {phone!r}; expected "
                        "ARPAbet, vowels with stress, such as AH0"
                    )
            pronunciations[word] = phones
    return pronunciations


def _lines(path: Path) -> list[str]:
    check_regular(path, "lexicon", DataError)
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        return data.decode("latin-1").split("\n")  # CMUdict 0.7b
    except OSError as error:
        raise DataError(f"cannot read the lexicon {path}: {error.strerror}") from None


def write_lexicon(path: str | Path, pronunciations: Mapping[str, Sequence[str]]) -> None:
    """Write ``WORD<tab>PHONES`` lines, sorted by word, the format that s3prl's PR reads."""
    lines = [f"{word}\t{' '.join(phones)}\n" for word, phones in sorted(pronunciations.items())]
    write_text(path, "".join(lines))


def predict_phones(
    words: Iterable[str], advance: Callable[[int], object] = lambda count: None
) -> Pronunciations:
    """Predict the phones of unique words in upper case with g2p_en; deterministic.

    Words with characters other than A to Z and the apostrophe, and words with an invalid or
    truncated prediction, are absent from the result. ``advance`` is called with 1 after each word.

    Raises:
        SetupError: g2p_en is not installed.
    """
    predict = _model()
    pronunciations: Pronunciations = {}
    for word in words:
        if _LETTERS.fullmatch(word):
            # g2p_en has a class UW without stress, from an error in its training data
            phones = tuple("UW1" if phone == "UW" else phone for phone in predict(word.lower()))
            if 0 < len(phones) < MAX_PHONES and PHONES.issuperset(phones):
                pronunciations[word] = phones
        advance(1)
    return pronunciations


def _model() -> Callable[[str], list[str]]:
    try:
        import nltk

        with replaced(nltk, "download", lambda *args, **kwargs: False):
            from g2p_en import g2p
    except ImportError:
        raise SetupError("--g2p needs a model: pip install espnet-g2p-en") from None
    with replaced(g2p, "cmudict", SimpleNamespace(dict=dict)):  # NLTK's, which may not be installed
        return g2p.G2p().predict


def add_lexicon_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--lexicon`` and ``--g2p``."""
    parser.add_argument(
        "--lexicon",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="pronunciations, as in CMUdict or LibriSpeech's lexicons; a word's first one is used",
    )
    parser.add_argument(
        "--g2p",
        action="store_true",
        help="predict the phones of other words (pip install espnet-g2p-en)",
    )


def collect_pronunciations(args: argparse.Namespace, words: Collection[str]) -> Pronunciations:
    """Find the phones of ``words`` by ``--lexicon`` and ``--g2p``; print counts by source.

    Words that have no pronunciation are absent from the result.
    """
    pronunciations: Pronunciations = {}
    sources = []
    for path in args.lexicon:
        from_file = read_lexicon([path], words - pronunciations.keys())
        sources.append(f"{len(from_file)} from {path}")
        pronunciations.update(from_file)
    remaining = sorted(words - pronunciations.keys())
    if args.g2p:
        with tqdm(total=len(remaining), unit=" words", desc="g2p", delay=0.3) as bar:
            predicted = predict_phones(remaining, bar.update) if remaining else {}
        sources.append(f"{len(predicted)} predicted by g2p")
        pronunciations.update(predicted)
    sources.append(f"{len(words - pronunciations.keys())} missing")
    print(f"pronunciations of {len(words)} words: {', '.join(sources)}")
    return pronunciations


def shorten_list(words: list[str]) -> str:
    """Join the first words for a message; count the rest."""
    more = f" and {len(words) - _MAX_LISTED} more" if len(words) > _MAX_LISTED else ""
    return ", ".join(words[:_MAX_LISTED]) + more
