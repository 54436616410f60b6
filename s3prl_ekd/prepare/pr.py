"""``s3prl-ekd prepare pr``: the layout of ``asr``, and the pronunciations of its words."""

from __future__ import annotations

import argparse

from ..data.manifest import read_manifest
from ..errors import DataError, SetupError
from .asr import layout_options, normalise, write_layout
from .lexicon import LEXICON, Pronunciations, lexicon_options, pronounce, some, write_lexicon
from .new_folder import check_free

DESCRIPTION = """\
A LibriSpeech layout for `run_downstream.py -d ctc -c downstream/ctc/libriphone.yaml`: as prepare
asr writes it, and OUT/lexicon.txt with the words of its texts, WORD<tab>PHONES.

Needs the columns path, speaker, text, split, and a lexicon: lines of a word and its ARPAbet
phones with stress, as in CMUdict or in LibriSpeech's lexicons. The first pronunciation of a word
counts. Texts may hold whatever words the lexicon has; --g2p guesses the phones of other words that
are of letters. A column of phones is not read.
"""
FAULTY = "lines with words that the lexicon lacks"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prepare pr``."""
    lexicon_options(parser)
    layout_options(parser, FAULTY)


def run(args: argparse.Namespace) -> int:
    """Write the layout and its lexicon; the exit code is 0."""
    if not args.lexicon and not args.g2p:
        raise SetupError(
            "PR needs pronunciations: --lexicon FILE (such as CMUdict), --g2p, or both"
        )
    check_free(args.out, replace=args.replace)  # before the lexicon, which may be large
    entries = read_manifest(args.manifest, columns=("path", "speaker", "text", "split"))
    words = {word for entry in entries for word in normalise(entry.cells["text"]).split()}
    pronunciations = pronounce(args, words)
    missing = sorted(words - pronunciations.keys())
    if missing and not args.drop_bad:
        raise DataError(_missing(args, missing))
    utterances = write_layout(args, lambda text: _fault(text, pronunciations), FAULTY)
    if missing:
        print(f"{len(missing)} words without a pronunciation: {some(missing)}")
    used = {word for utterance in utterances for word in utterance.text.split()}
    write_lexicon(args.out / LEXICON, {word: pronunciations[word] for word in used})
    print(f"{LEXICON}: {len(used)} words")
    if any(utterance.source.suffix.lower() != ".flac" for utterance in utterances):
        print("note: in a checkout of s3prl its own corpus module runs, which finds .flac only")
    print(f"wrote {args.out}; in the YAML: path: {args.out}")
    print(f"               lexicon: ['{args.out / LEXICON}']")
    return 0


def _fault(text: str, pronunciations: Pronunciations) -> str:
    missing = [word for word in text.split() if word not in pronunciations]
    return f"has words that the lexicon lacks: {some(missing)}" if missing else ""


def _missing(args: argparse.Namespace, words: list[str]) -> str:
    named = ", ".join(map(str, args.lexicon)) or "(none given)"
    help_ = "add them" if args.g2p else "add them, let --g2p guess them"
    return (
        f"the lexicon {named} lacks {len(words)} word{'s' * (len(words) > 1)} of {args.manifest}: "
        f"{some(words)}; {help_}, or leave their lines out with --drop-bad"
    )
