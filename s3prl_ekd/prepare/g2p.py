"""Pronunciations of words that no lexicon has, guessed from their letters by a model.

The model is g2p_en's, which learned from CMUdict and writes its phones, stress included: the
vocabulary of :mod:`.phones` needs no mapping. The maintained package is ``espnet-g2p-en``. It looks
words up in NLTK's data before it guesses, and fetches that data when it is imported; we look up
in the user's lexicon, so nothing is fetched and the guessing alone is used.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

from ..errors import SetupError
from .lexicon import Pronunciations
from .phones import PHONES

LONGEST = 20  # phones; g2p_en stops there, so that many may be a cut word
_LETTERS = re.compile(r"[A-Z']*[A-Z][A-Z']*")


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
    with _without_downloads(nltk):
        try:
            from g2p_en import g2p
        except ImportError:
            raise SetupError("--g2p needs a model: pip install 's3prl_ekd[g2p]'") from None
    dictionary = g2p.cmudict
    g2p.cmudict = SimpleNamespace(dict=dict)  # NLTK's, which need not be there
    try:
        return g2p.G2p().predict
    finally:
        g2p.cmudict = dictionary


@contextlib.contextmanager
def _without_downloads(nltk) -> Iterator[None]:
    download = nltk.download
    nltk.download = lambda *args, **kwargs: False
    try:
        yield
    finally:
        nltk.download = download
