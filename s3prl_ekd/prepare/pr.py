"""``prepare pr``: the layout of ``prepare asr``, and a lexicon of its words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError, SetupError
from .asr import COLUMNS, TranscribedUtterance, add_layout_options, normalise, write_layout
from .common import PrepareTask, manifest_of
from .lexicon import (
    LEXICON,
    add_lexicon_options,
    collect_pronunciations,
    shorten_list,
    write_lexicon,
)

DESCRIPTION = """\
Write a LibriSpeech layout for `run_downstream.py -d ctc -c downstream/ctc/libriphone.yaml`, as
prepare asr does, and OUT/lexicon.txt with the words of its texts, WORD<tab>PHONES.

Needs the columns path, speaker, text, split, and a lexicon: a word and its ARPAbet phones with
stress on each line, as in CMUdict or LibriSpeech's lexicons. The first pronunciation of a word is
used. Texts may have any word of the lexicon; --g2p predicts the phones of other words that have
letters only. A column of phones is not read.
"""
INVALID_LINES = "lines with words that the lexicon lacks"


def _configure(parser: argparse.ArgumentParser) -> None:
    add_lexicon_options(parser)
    add_layout_options(parser, INVALID_LINES)


def _prepare_pr(args: argparse.Namespace) -> None:
    if not args.lexicon and not args.g2p:
        raise SetupError(
            "PR needs pronunciations: add --lexicon FILE (such as CMUdict), --g2p, or both"
        )
    manifest = manifest_of(args, COLUMNS)
    texts = (normalise(e.cells["text"], args.strip_punctuation) for e in manifest.entries)
    words = {word for text in texts for word in text.split()}
    pronunciations = collect_pronunciations(args, words)
    missing = sorted(words - pronunciations.keys())
    if missing and not args.drop_bad:
        raise DataError(_missing_words(args, manifest.source, missing))

    def check_words(text: str) -> str:
        unknown = [word for word in text.split() if word not in pronunciations]
        return f"the lexicon lacks {shorten_list(unknown)}" if unknown else ""

    def write_words(folder: Path, utterances: Sequence[TranscribedUtterance]) -> None:
        used = {word for utterance in utterances for word in utterance.text.split()}
        write_lexicon(folder / LEXICON, {word: pronunciations[word] for word in used})
        print(f"{LEXICON}: {len(used)} words")

    utterances = write_layout(args, manifest, check_words, INVALID_LINES, write_words)
    if missing:
        print(f"{len(missing)} words without a pronunciation: {shorten_list(missing)}")
    if any(utterance.audio.suffix != ".flac" for utterance in utterances):
        print("note: a checkout of s3prl uses its own corpus module, which reads .flac only")
    print(f"wrote {args.out}; in the YAML: path: {args.out}")
    print(f"               lexicon: ['{args.out / LEXICON}']")


def _missing_words(args: argparse.Namespace, source: str, words: list[str]) -> str:
    files = ", ".join(map(str, args.lexicon)) or "(none given)"
    g2p = "" if args.g2p else ", predict their phones with --g2p"
    return (
        f"the lexicon {files} lacks {len(words)} word{'s' * (len(words) > 1)} of {source}: "
        f"{shorten_list(words)}; add them to a lexicon{g2p}, or skip their lines with --drop-bad"
    )


PR = PrepareTask(
    "LibriSpeech layout with a lexicon, for -d ctc", DESCRIPTION, _prepare_pr, _configure
)
