"""What ``prepare pr`` and ``prepare librispeech`` share: where the phones of words come from."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from .g2p import guess
from .lexicon import Pronunciations, read_lexicon

LEXICON = "lexicon.txt"
_NAMED = 10  # missing words in a message


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
