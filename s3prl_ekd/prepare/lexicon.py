"""``prepare lexicon``: pronunciations of words, from files and by a model.

One entry a line, a word and its phones with tabs or spaces between. That covers the LibriSpeech
lexicons (``WORD<tab>PHONES``) and CMUdict in both of its shapes: ``;;;`` starts a comment line, a
token that starts with ``#`` behind the phones starts a comment, ``WORD(1)`` is another
pronunciation of ``WORD``, and words are in either case. Of several pronunciations the first in the
file is taken, as s3prl's PR does, so that a text has one sequence of phones.

Words that no lexicon has are guessed from their letters by g2p_en's model, which learned from
CMUdict and writes its phones. The maintained package is ``espnet-g2p-en``. It looks words up in
NLTK's data before it guesses, and fetches that data when it is imported; here words are looked up
in the user's lexicon, so nothing is fetched and only the guessing is used.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from ..compat.replaced import replaced
from ..errors import DataError, SetupError
from ..files.atomic import write_text
from ..files.text import check_regular

VOWELS = tuple("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split())
CONSONANTS = tuple("B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split())
STRESSES = "012"

PHONES = frozenset(CONSONANTS) | {vowel + digit for vowel in VOWELS for digit in STRESSES}

Pronunciations = dict[str, tuple[str, ...]]  # word in upper case -> phones

_VARIANT = re.compile(r"\(\d+\)$")

LONGEST = 20  # phones; g2p_en stops there, so that many may be a cut word
_LETTERS = re.compile(r"[A-Z']*[A-Z][A-Z']*")
LEXICON = "lexicon.txt"
_NAMED = 10  # missing words in a message


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


def guess(
    words: Iterable[str], advance: Callable[[int], object] = lambda done: None
) -> Pronunciations:
    """Phones of ``words`` (in upper case); those it has no good guess for are absent.

    No guess is made for a word with other characters than A to Z and the apostrophe. The same word
    gives the same phones everywhere.

    Args:
        words: none twice.
        advance: called with 1 after each word, for a progress bar.

    Raises:
        SetupError: g2p_en is not installed.
    """
    predict = _model()
    found: Pronunciations = {}
    for word in words:
        if _LETTERS.fullmatch(word):
            # among g2p_en's classes is one UW without a stress, from a slip in its training data
            phones = tuple("UW1" if phone == "UW" else phone for phone in predict(word.lower()))
            if 0 < len(phones) < LONGEST and PHONES.issuperset(phones):
                found[word] = phones
        advance(1)
    return found


def _model() -> Callable[[str], list[str]]:
    try:
        import nltk
    except ImportError:
        raise SetupError("--g2p needs a model: pip install 's3prl_ekd[g2p]'") from None
    with replaced(nltk, "download", lambda *args, **kwargs: False):
        try:
            from g2p_en import g2p
        except ImportError:
            raise SetupError("--g2p needs a model: pip install 's3prl_ekd[g2p]'") from None
    with replaced(g2p, "cmudict", SimpleNamespace(dict=dict)):  # NLTK's, which need not be there
        return g2p.G2p().predict


def lexicon_options(parser: argparse.ArgumentParser) -> None:
    """``--lexicon`` and ``--g2p``."""
    parser.add_argument(
        "--lexicon",
        metavar="FILE",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="pronunciations, as in CMUdict or LibriSpeech's lexicons; of several the first wins",
    )
    parser.add_argument(
        "--g2p",
        action="store_true",
        help="guess those of words that no lexicon has (pip install 's3prl_ekd[g2p]')",
    )


def pronounce(args: argparse.Namespace, words: Collection[str]) -> Pronunciations:
    """The phones of ``words`` by :func:`lexicon_options`; says how many came from where.

    Words that neither a lexicon nor the model knows are absent.

    Raises:
        DataError: a lexicon cannot be read or has a phone that the vocabulary lacks.
        SetupError: ``--g2p`` without its package.
    """
    found: Pronunciations = {}
    sources = []
    for path in args.lexicon:
        new = read_lexicon([path], words - found.keys())
        sources.append(f"{len(new)} from {path}")
        found.update(new)
    rest = sorted(words - found.keys())
    if args.g2p:
        with tqdm(total=len(rest), unit=" words", desc="g2p", delay=0.3) as bar:
            new = guess(rest, bar.update) if rest else {}
        sources.append(f"{len(new)} guessed by g2p")
        found.update(new)
    sources.append(f"{len(words - found.keys())} without")
    print(f"pronunciations of {len(words)} words: {', '.join(sources)}")
    return found


def some(words: list[str]) -> str:
    """The first few of ``words``, for a message."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more
