"""``prepare librispeech``: length tables and a lexicon for ASR and PR on LibriSpeech.

The audio is read as unpacked: ``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac``, with each transcript a line of
``SPK-CHAP.trans.txt`` in the same folder. SUPERB's ASR and PR train on 100 h and need three of the
seven splits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..data.audio_files import SAMPLE_RATE, find_audio, read_headers
from ..data.lengths import LengthRow, write_table
from ..errors import DataError
from ..files.atomic import write_text
from .asr import TABLES
from .common import PrepareTask, print_splits
from .lexicon import (
    LEXICON,
    Pronunciations,
    add_lexicon_options,
    collect_pronunciations,
    shorten_list,
    write_lexicon,
)
from .new_folder import PREPARED, check_replaceable, link, new_folder

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
    """Return the splits in ``root``, those of :data:`NEEDED` first.

    Raises:
        DataError: one of :data:`NEEDED` is missing; the message lists all that are.
    """
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
    """Map each audio file in ``folders`` below ``root`` to its transcript: words in upper case.

    Raises:
        DataError: a folder is missing or has no audio, or a file has no transcript.
    """
    texts: dict[Path, list[str]] = {}
    transcripts: dict[Path, dict[str, str]] = {}
    for folder in folders:
        names = find_audio(root / folder)
        if not names:
            raise DataError(f"{root / folder} has no audio files (.flac .wav .ogg .opus)")
        for name in names:
            file = root / folder / name
            utterance = file.name.partition(".")[0]
            source = file.with_name(utterance.rpartition("-")[0] + ".trans.txt")
            if source not in transcripts:
                transcripts[source] = _read_transcript(source, file)
            words = transcripts[source].get(utterance, "").upper().split()
            if not words:
                raise DataError(f"{source} has no transcript of the utterance {utterance}")
            texts[file] = words
    return texts


def _read_transcript(source: Path, file: Path) -> dict[str, str]:
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError:
        raise DataError(f"{file} has no transcript: cannot read {source}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {error.start})") from None
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def measure_splits(
    root: Path,
    splits: Sequence[str],
    *,
    jobs: int = 8,
    progress: Callable[[int], Callable[[int], object]] = lambda total: lambda count: None,
) -> dict[str, list[LengthRow]]:
    """Return the path below ``root`` and the length in samples of each utterance, by split.

    Args:
        jobs: threads that read headers.
        progress: takes the number of files; returns a function to call with each increment.

    Raises:
        DataError: a file cannot be read or is not 16 kHz mono; the message lists the first ones.
    """
    names = {split: [f"{split}/{name}" for name in find_audio(root / split)] for split in splits}
    advance = progress(sum(map(len, names.values())))
    rows: dict[str, list[LengthRow]] = {}
    for split, paths in names.items():
        rows[split], bad = [], []
        for path, header in zip(
            paths, read_headers(root, paths, jobs=jobs, advance=advance), strict=True
        ):
            if isinstance(header, DataError):
                bad.append(str(header))
            elif (header.rate, header.channels) != (SAMPLE_RATE, 1):
                bad.append(f"{path} has {header.rate} Hz and {header.channels} channels")
            else:
                rows[split].append((path, header.frames))
        if bad:
            raise DataError(
                f"{root}: {len(bad)} of {len(paths)} files of {split} are invalid; unpack {split} "
                f"again: {'; '.join(bad[:3])}{'; …' * (len(bad) > 3)}"
            )
    return rows


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="DIR", type=Path)
    add_lexicon_options(parser)
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _prepare_librispeech(args: argparse.Namespace) -> int:
    check_replaceable(args.out, replace=args.replace)  # before minutes of reading
    splits = check_librispeech(args.root)
    texts = read_texts(args.root, NEEDED)
    words = {word for line in texts.values() for word in line}
    make_lexicon = bool(args.lexicon or args.g2p)
    pronunciations = collect_pronunciations(args, words) if make_lexicon else {}
    rows = measure_splits(args.root, splits, jobs=args.jobs, progress=_progress_bar)
    missing = sorted(words - pronunciations.keys()) if make_lexicon else []
    with new_folder(args.out, replace=args.replace) as folder:
        (folder / TABLES).mkdir()
        for split in splits:
            write_table(folder / TABLES / f"{split}.csv", rows[split])
        if make_lexicon:
            write_lexicon(folder / LEXICON, pronunciations)
        if missing:
            write_text(folder / MISSING, "".join(f"{word}\n" for word in missing))
        link(args.root, folder / AUDIO)  # optional: a file system may have no symlinks
        lines = [f"{split}\t{len(rows[split])}\n" for split in splits]
        write_text(folder / PREPARED, "".join(["split\tutterances\n", *lines]))
    print_splits({split: [length for _, length in rows[split]] for split in splits})
    if missing:
        print(_missing_words_note(texts, pronunciations, missing, args))
    print(f"wrote {args.out}; in the YAML of ASR: libri_root: {args.root}")
    print(f"                      bucket_file: {args.out / TABLES}")
    if make_lexicon:
        print(f"of PR: path: {args.root}\n       lexicon: ['{args.out / LEXICON}']")
    else:
        print(f"no {LEXICON} written; for PR add --lexicon FILE (such as CMUdict), --g2p, or both")
    return 0


def _progress_bar(total: int) -> Callable[[int], object]:
    return tqdm(total=total, unit=" files", desc="headers", delay=0.3, dynamic_ncols=True).update


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
    _configure,
    _prepare_librispeech,
    manifest=False,
)
