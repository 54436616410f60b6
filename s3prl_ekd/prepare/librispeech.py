"""``prepare librispeech``: length tables and a lexicon for ASR and PR on LibriSpeech.

The audio is read as unpacked: ``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac``, with each transcript a line of
``SPK-CHAP.trans.txt`` in the same folder. SUPERB's ASR and PR train on 100 h and need three of the
seven splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..data.audio_files import SUFFIXES, find_audio
from ..data.lengths import write_table
from ..data.manifest import MAX_LIST
from ..data.tables import Utterance
from ..errors import DataError
from ..files.text import read_text
from .asr import TABLES
from .common import (
    PREPARED,
    PrepareTask,
    checked_lengths,
    link,
    new_folder,
    print_splits,
    write_lines,
)
from .lexicon import (
    LEXICON,
    Pronunciations,
    add_lexicon_options,
    collect_pronunciations,
    shorten_list,
    write_lexicon,
)

NEEDED = ("train-clean-100", "dev-clean", "test-clean")  # for SUPERB's ASR and PR
SPLITS = (*NEEDED, "train-clean-360", "train-other-500", "dev-other", "test-other")

DESCRIPTION = f"""\
Check LibriSpeech for `run_downstream.py -d asr` and `-d ctc`: DIR must contain
{", ".join(NEEDED)}, and each utterance must have a transcript.
Writes OUT/len_for_bucket, the length tables of all splits found (also used for distillation), and
OUT/LibriSpeech, a symlink to DIR. With --lexicon or --g2p, also writes OUT/lexicon.txt for PR, with
the words of these three splits and their phones.

A lexicon is a text file with a word and its ARPAbet phones with stress on each line, as in CMUdict.
For scores comparable with SUPERB's, use its lexicons, downstream/ctc/lexicon in s3prl's repository.

example:
  s3prl-ekd prepare librispeech /data/LibriSpeech -o data/librispeech --lexicon cmudict.dict --g2p
"""
AUDIO = "LibriSpeech"
MISSING = "words_without.txt"  # words that have no pronunciation


def check_librispeech(root: Path) -> list[str]:
    """Return the splits in ``root``, those of :data:`NEEDED` first."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; use the one that contains {', '.join(NEEDED)}")
    missing = [split for split in NEEDED if not (root / split).is_dir()]
    if not missing:
        return [split for split in SPLITS if (root / split).is_dir()]
    inside = root / "LibriSpeech"  # the top folder of the archives
    if all((inside / split).is_dir() for split in NEEDED):
        reason = f"is the parent of the corpus; use {inside}"
    elif root.name in SPLITS:
        reason = f"is a single split; use its parent, {root.resolve().parent}"
    else:
        archives = ", ".join(f"{split}.tar.gz" for split in missing)
        reason = f"lacks {', '.join(f'{split}/' for split in missing)}; unpack {archives} there"
    raise DataError(f"{root} {reason}")


def read_texts(root: Path, folders: Sequence[str]) -> dict[Path, list[str]]:
    """Map each audio file in ``folders`` below ``root`` to its transcript: words in upper case."""
    texts: dict[Path, list[str]] = {}
    transcripts: dict[Path, dict[str, str]] = {}
    for folder in folders:
        names = find_audio(root / folder)
        if not names:
            raise DataError(f"{root / folder} has no audio files ({' '.join(SUFFIXES)})")
        for name in names:
            file = root / folder / name
            utterance = file.name.partition(".")[0]
            source = file.with_name(utterance.rpartition("-")[0] + ".trans.txt")
            if source not in transcripts:
                text = read_text(source, f"transcripts (of {file.name})", DataError, MAX_LIST)
                transcripts[source] = {line.partition(" ")[0]: line for line in text.split("\n")}
            words = transcripts[source].get(utterance, "").upper().split()[1:]
            if not words:
                raise DataError(f"{source} has no transcript of the utterance {utterance}")
            texts[file] = words
    return texts


def measure_splits(root: Path, splits: Sequence[str], jobs: int) -> dict[str, list[Utterance]]:
    """Return the path below ``root`` and the length in samples of each utterance, by split."""
    paths = [f"{split}/{name}" for split in splits for name in find_audio(root / split)]
    rows: dict[str, list[Utterance]] = {split: [] for split in splits}
    bad = []
    for path, length in zip(paths, checked_lengths(root, paths, jobs), strict=True):
        if isinstance(length, DataError):
            bad.append(str(length))
        else:
            rows[path.partition("/")[0]].append(Utterance(path, length))
    if bad:
        raise DataError(
            f"{root}: {len(bad)} of {len(paths)} files are invalid; if they are damaged, unpack "
            f"their archives again: {'; '.join(bad[:3])}{'; …' * (len(bad) > 3)}"
        )
    return rows


def _prepare_librispeech(args: argparse.Namespace) -> None:
    splits = check_librispeech(args.root)
    texts = read_texts(args.root, NEEDED)
    words = {word for line in texts.values() for word in line}
    make_lexicon = bool(args.lexicon or args.g2p)
    pronunciations = collect_pronunciations(args, words) if make_lexicon else {}
    rows = measure_splits(args.root, splits, args.jobs)
    missing = sorted(words - pronunciations.keys()) if make_lexicon else []
    with new_folder(args.out, replace=args.replace) as folder:
        (folder / TABLES).mkdir()
        for split in splits:
            write_table(folder / TABLES / f"{split}.csv", rows[split])
        if make_lexicon:
            write_lexicon(folder / LEXICON, pronunciations)
        if missing:
            write_lines(folder / MISSING, missing)
        link(args.root, folder / AUDIO)  # optional: a file system may have no symlinks
        lines = [f"{split}\t{len(rows[split])}" for split in splits]
        write_lines(folder / PREPARED, ["split\tutterances", *lines])
    print_splits({split: [row[1] for row in rows[split]] for split in splits})
    if missing:
        print(_missing_words_note(texts, pronunciations, missing, args))
    print(f"wrote {args.out}; in the YAML of ASR: libri_root: {args.root}")
    print(f"                      bucket_file: {args.out / TABLES}")
    if make_lexicon:
        print(f"of PR: path: {args.root}\n       lexicon: ['{args.out / LEXICON}']")
    else:
        print(f"no {LEXICON} written; for PR add --lexicon FILE (such as CMUdict), --g2p, or both")


def _missing_words_note(
    texts: dict[Path, list[str]],
    pronunciations: Pronunciations,
    missing: list[str],
    args: argparse.Namespace,
) -> str:
    count = sum(any(word not in pronunciations for word in line) for line in texts.values())
    remedy = "" if args.g2p else "add --g2p, or "
    return (
        f"note: {len(missing)} words of {count} utterances have no pronunciation "
        f"({shorten_list(missing)}; full list: {args.out / MISSING}); {remedy}to skip "
        "these utterances, set downstream_expert.corpus.skip_unknown_words: true in PR's YAML"
    )


LIBRISPEECH = PrepareTask(
    "check LibriSpeech; length tables and a lexicon, for -d asr and -d ctc",
    DESCRIPTION,
    _prepare_librispeech,
    add_lexicon_options,
    inputs=(("root", "DIR"),),
)
