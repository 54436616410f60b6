"""``prepare librispeech``: what ASR and PR need beside the real LibriSpeech.

LibriSpeech as it is unpacked: ``SPLIT/SPK/CHAP/SPK-CHAP-NNNN.flac``, with a line for each utterance
in ``SPK-CHAP.trans.txt`` beside them. ASR and PR as SUPERB does them train on 100 h and need three
of the seven splits.
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
from .common import Task, print_splits
from .lexicon import LEXICON, Pronunciations, lexicon_options, pronounce, some, write_lexicon
from .new_folder import PREPARED, check_free, link, new_folder

NEEDED = ("train-clean-100", "dev-clean", "test-clean")  # by SUPERB's ASR and PR
SPLITS = (*NEEDED, "train-clean-360", "train-other-500", "dev-other", "test-other")

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


def check_shape(root: Path) -> list[str]:
    """The splits that are there, those of :data:`NEEDED` first.

    Raises:
        DataError: one of :data:`NEEDED` is missing; all that are missing are named.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one with {', '.join(NEEDED)} in it")
    missing = [split for split in NEEDED if not (root / split).is_dir()]
    if not missing:
        return [split for split in SPLITS if (root / split).is_dir()]
    inside = root / "LibriSpeech"  # the folder that is in the archives
    if all((inside / split).is_dir() for split in NEEDED):
        why = f"has none of its splits directly in it; give {inside}"
    elif root.name in SPLITS:
        why = f"is one split; give the folder above, {root.resolve().parent}"
    else:
        archives = ", ".join(f"{split}.tar.gz" for split in missing)
        why = f"lacks {', '.join(f'{split}/' for split in missing)}; unpack {archives} there"
    raise DataError(f"{root} {why}")


def read_texts(root: Path, folders: Sequence[str]) -> dict[Path, list[str]]:
    """The words, in upper case, of each audio file in ``folders`` below ``root``, by path.

    Raises:
        DataError: a folder is not there or has no audio, or a file has no text.
    """
    texts: dict[Path, list[str]] = {}
    transcripts: dict[Path, dict[str, str]] = {}
    for folder in folders:
        names = find_audio(root / folder)
        if not names:
            raise DataError(f"{root / folder} has no audio (.flac .wav .ogg .opus) in it")
        for name in names:
            file = root / folder / name
            utterance = file.name.partition(".")[0]
            source = file.with_name(utterance.rpartition("-")[0] + ".trans.txt")
            if source not in transcripts:
                transcripts[source] = _read_transcript(source, file)
            words = transcripts[source].get(utterance, "").upper().split()
            if not words:
                raise DataError(f"{source} has no text for the utterance {utterance}")
            texts[file] = words
    return texts


def _read_transcript(source: Path, file: Path) -> dict[str, str]:
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError:
        raise DataError(f"{file} has no transcript: {source} is not there") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {error.start})") from None
    return {name: text for name, _, text in (line.partition(" ") for line in lines)}


def measure_splits(
    root: Path,
    splits: Sequence[str],
    *,
    jobs: int = 8,
    progress: Callable[[int], Callable[[int], object]] = lambda total: lambda done: None,
) -> dict[str, list[LengthRow]]:
    """Path below ``root`` and length in samples of each utterance of ``splits``.

    Args:
        jobs: threads that read headers.
        progress: given the number of files, returns what is told how many more are done.

    Raises:
        DataError: a file cannot be read or is not 16 kHz mono; the first of a split are named.
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
                bad.append(f"{path} is {header.rate} Hz with {header.channels} channels")
            else:
                rows[split].append((path, header.frames))
        if bad:
            raise DataError(
                f"{root}: {len(bad)} of the {len(paths)} files of {split} cannot be used; unpack "
                f"them again: {'; '.join(bad[:3])}{'; …' * (len(bad) > 3)}"
            )
    return rows


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


def _bar(total: int) -> Callable[[int], object]:
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
