"""``s3prl-ekd prepare librispeech``: what ASR and PR need beside the real LibriSpeech."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ..data.lengths import write_table
from ..files.atomic import write_text
from .asr import TABLES
from .commands_lexicon import LEXICON, lexicon_options, pronounce, some
from .common import Task, print_splits
from .lexicon import Pronunciations, write_lexicon
from .librispeech import NEEDED, check_shape, measure_splits, read_texts
from .new_folder import PREPARED, check_free, link, new_folder

DESCRIPTION = f"""\
Check the real LibriSpeech for `run_downstream.py -d asr` and `-d ctc`: DIR has {", ".join(NEEDED)}
in it, and each utterance its text. Writes OUT/len_for_bucket, the length tables of every split that
is there (they serve distillation too), OUT/LibriSpeech, a link to DIR, and with --lexicon or --g2p
OUT/lexicon.txt, the words of those three splits and their phones, for PR.

A lexicon is a text file with a word and its ARPAbet phones on each line, stress included, as in
CMUdict. SUPERB's own are in s3prl's repository (downstream/ctc/lexicon); with them scores compare.

example:
  s3prl-ekd prepare librispeech /data/LibriSpeech -o data/librispeech --lexicon cmudict.dict --g2p
"""
AUDIO = "LibriSpeech"
MISSING = "words_without.txt"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="DIR", type=Path)
    lexicon_options(parser)
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _run(args: argparse.Namespace) -> int:
    check_free(args.out, replace=args.replace)  # before minutes of reading
    splits = check_shape(args.root)
    texts = read_texts(args.root, NEEDED)
    words = {word for line in texts.values() for word in line}
    wanted = bool(args.lexicon or args.g2p)
    pronunciations = pronounce(args, words) if wanted else {}
    rows = measure_splits(args.root, splits, jobs=args.jobs, progress=_bar)
    missing = sorted(words - pronunciations.keys()) if wanted else []
    with new_folder(args.out, replace=args.replace) as folder:
        (folder / TABLES).mkdir()
        for split in splits:
            write_table(folder / TABLES / f"{split}.csv", rows[split])
        if wanted:
            write_lexicon(folder / LEXICON, pronunciations)
        if missing:
            write_text(folder / MISSING, "".join(f"{word}\n" for word in missing))
        link(args.root, folder / AUDIO)  # a file system without links does without
        lines = [f"{split}\t{len(rows[split])}\n" for split in splits]
        write_text(folder / PREPARED, "".join(["split\tutterances\n", *lines]))
    print_splits({split: [length for _, length in rows[split]] for split in splits})
    if missing:
        print(_about_missing(texts, pronunciations, missing, args))
    print(f"wrote {args.out}; in the YAML of ASR: libri_root: {args.root}")
    print(f"                      bucket_file: {args.out / TABLES}")
    if wanted:
        print(f"of PR: path: {args.root}\n       lexicon: ['{args.out / LEXICON}']")
    else:
        print(f"no {LEXICON}: for PR add --lexicon FILE (such as CMUdict), --g2p, or both")
    return 0


def _bar(total: int):
    return tqdm(total=total, unit=" files", desc="headers", delay=0.3, dynamic_ncols=True).update


def _about_missing(
    texts: dict[Path, list[str]],
    pronunciations: Pronunciations,
    missing: list[str],
    args: argparse.Namespace,
) -> str:
    bad = sum(any(word not in pronunciations for word in line) for line in texts.values())
    remedy = "" if args.g2p else "add --g2p, or "
    return (
        f"note: {len(missing)} words of {bad} utterances have no pronunciation ({some(missing)}; "
        f"all of them: {args.out / MISSING}); {remedy}set downstream_expert.corpus."
        "skip_unknown_words: true in PR's YAML, which leaves those utterances out"
    )


LIBRISPEECH = Task(
    "check the real LibriSpeech; tables and a lexicon, for -d asr and -d ctc",
    DESCRIPTION,
    _configure,
    _run,
    manifest=False,
)
