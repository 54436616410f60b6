"""``prepare qbe`` and ``prepare quesst14``: QUESST 2014's folder, for QbE.

s3prl reads lists of audio below ROOT, with lines of ``FIRST/PATH LANGUAGE``: the audio is
``ROOT/PATH``, and only lines with the language ``nnenglish`` (non-native English) are used. The
queries of each split are searched in the documents of ``language_key_utterances.lst``. Which
documents contain a query is in an RTTM file, which s3prl does not read: lines of
``LEXEME DOCUMENT CHANNEL START DURATION QUERY ...``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..data.audio_files import AudioPart
from ..data.lengths import measure_audio
from ..data.manifest import MAX_LIST, ManifestEntry
from ..errors import DataError, EkdError
from ..files.text import read_text
from .common import (
    PREPARED,
    PrepareTask,
    add_convert_option,
    link_folder,
    manifest_of,
    new_folder,
    placing,
    print_splits,
    read_audio_parts,
    write_lines,
)

LANGUAGE = "nnenglish"
SCORING = "scoring"
DOCUMENTS = f"{SCORING}/language_key_utterances.lst"
# s3prl's and QUESST's name of the split test is eval
_NAMES = {"dev": "dev", "test": "eval"}
QUERIES = {split: f"{SCORING}/language_key_{name}.lst" for split, name in _NAMES.items()}
TRUTH = {split: f"{SCORING}/groundtruth_quesst14_{name}" for split, name in _NAMES.items()}
_NO_QUERY = "NO_KEYWORD"  # in the RTTM, of documents without any query
_AUDIO, _QUERY_AUDIO = "Audio", {split: f"{name}_queries" for split, name in _NAMES.items()}
MIN_QUERY = 1680  # samples of five frames of HuBERT; s3prl does not search shorter queries

QBE_DESCRIPTION = """\
Write a corpus in QUESST 2014's layout for `run_downstream.py -d quesst14_dtw`: OUT/Audio with the
documents and OUT/dev_queries, OUT/eval_queries (symlinks), OUT/scoring with s3prl's lists and the
ground truth, and OUT/prepared.tsv.

Needs the columns path, text and split. The queries are the utterances of dev and test, of a word or
a few. The documents are those of train, and are searched for the queries of both: a document
contains a query if the words of its text are in the document's text, one after another; case does
not matter. Nothing is trained.
"""
QUESST14_DESCRIPTION = """\
Check QUESST 2014 for `run_downstream.py -d quesst14_dtw`: ROOT is the unpacked quesst14Database,
with Audio, dev_queries, eval_queries and scoring. Only its English part is used. Writes symlinks to
these folders.
"""


@dataclass(frozen=True)
class ListedAudio:
    """A line of a list of QUESST: its place, for messages, and the audio's path below ROOT."""

    location: str
    path: str
    language: str

    @property
    def name(self) -> str:
        """As in the RTTM and in s3prl's results."""
        return PurePosixPath(self.path).stem


def read_audio_list(path: Path, error: type[EkdError]) -> list[ListedAudio]:
    """Read a list of audio, of all languages.

    Raises:
        EkdError: of class ``error``: s3prl cannot read a line or would mix up two files, or the
            list has no English.
    """
    lines: list[ListedAudio] = []
    first: dict[str, str] = {}
    text = read_text(path, "list of audio", error, MAX_LIST)
    for number, line in enumerate(text.splitlines(), start=1):
        location, fields = f"{path}: line {number}", line.split()
        if len(fields) != 2:
            raise error(f"{location}: expected 'FOLDER/PATH LANGUAGE', got {line[:60]!r}")
        before, slash, after = fields[0].partition("/")  # s3prl removes the first folder
        audio = ListedAudio(location, after if slash else before, fields[1])
        own = PurePosixPath(audio.path)
        if not audio.name or own.is_absolute() or {"..", PREPARED} & {*own.parts}:
            raise error(f"{location}: expected a path below the corpus, got {fields[0][:60]!r}")
        other = first.setdefault(audio.name, f"line {number}")
        if other != f"line {number}":
            raise error(f"{location} repeats the name {audio.name} of {other}")
        lines.append(audio)
    if not english(lines):
        raise error(f"{path} has no line with the language {LANGUAGE}, which s3prl uses")
    return lines


def english(lines: Iterable[ListedAudio]) -> list[ListedAudio]:
    """The lines that s3prl uses."""
    return [line for line in lines if line.language == LANGUAGE]


def read_truth(folder: Path, error: type[EkdError]) -> dict[str, frozenset[str]]:
    """Read which documents contain a query, from the RTTM file in ``folder``.

    Returns:
        query -> documents, sorted, of all languages; queries that are in no document are left out.

    Raises:
        EkdError: of class ``error``: the folder has no RTTM file or several, or a line is damaged.
    """
    files = sorted(folder.glob("*.rttm"))
    if len(files) != 1:
        raise error(f"{folder} must have one file *.rttm, the ground truth, got {len(files)}")
    text = read_text(files[0], "ground truth", error, MAX_LIST)
    truth: dict[str, set[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0] != "LEXEME":  # a comment, or another kind of event
            continue
        if len(fields) < 6:
            raise error(
                f"{files[0]}: line {number}: expected 'LEXEME DOCUMENT CHANNEL START DURATION "
                f"QUERY', got {line[:60]!r}"
            )
        if fields[5] != _NO_QUERY:
            truth.setdefault(fields[5], set()).add(fields[1])
    return {query: frozenset(truth[query]) for query in sorted(truth)}


def check_truth(
    truth: dict[str, frozenset[str]],
    queries: Sequence[ListedAudio],
    documents: Sequence[ListedAudio],
    source: Path,
    error: type[EkdError],
) -> None:
    """Raise ``error`` if no English query is in an English document."""
    names = {line.name for line in english(documents)}
    if not any(names & truth.get(line.name, frozenset()) for line in english(queries)):
        raise error(f"{source}: no {LANGUAGE} query is in a {LANGUAGE} document; MTWV needs one")


def _words(entry: ManifestEntry) -> list[str]:
    words = entry.cells["text"].casefold().split()
    if not words:
        raise DataError(f"{entry.location} has no text")
    return words


def _contains(document: Sequence[str], query: Sequence[str]) -> bool:
    starts = range(len(document) - len(query) + 1)
    return any(document[start : start + len(query)] == query for start in starts)


def _prepare_qbe(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "split", "text"))
    entries = manifest.entries
    words = [_words(entry) for entry in entries]
    for split, kind in (("train", "documents"), ("dev", "queries"), ("test", "queries")):
        if not any(entry.split == split for entry in entries):
            raise DataError(f"{manifest.source} has no {split} utterances, the {kind}")
    parts = read_audio_parts(args, manifest, entries)
    for entry, audio in zip(entries, parts, strict=True):
        if entry.split != "train" and audio.samples < MIN_QUERY:
            raise DataError(
                f"{entry.location}: a query needs {MIN_QUERY} samples at 16 kHz (0.105 s), got "
                f"{audio.samples}; s3prl does not search shorter ones"
            )
    folders = {"train": _AUDIO, **_QUERY_AUDIO}
    lists: dict[str, list[str]] = {split: [] for split in folders}
    names: dict[str, list[str]] = {split: [] for split in folders}
    lengths: dict[str, list[int]] = {split: [] for split in folders}
    prepared = ["id\tpath\ttext\tsplit\tsamples"]
    with new_folder(args.out, replace=args.replace) as folder:
        for entry, audio in placing(list(zip(entries, parts, strict=True))):
            split = entry.split
            kind = "document" if split == "train" else f"query_{_NAMES[split]}"
            name = f"{kind}_{len(names[split]) + 1:06d}"
            path = f"{folders[split]}/{name}.wav"
            audio.place(folder / path)
            names[split].append(name)
            lists[split].append(f"corpus/{path} {LANGUAGE}")
            lengths[split].append(audio.samples)
            cells = [path, entry.name, entry.cells["text"], split, str(audio.samples)]
            prepared.append("\t".join(cells))
        (folder / SCORING).mkdir()
        write_lines(folder / DOCUMENTS, lists["train"])
        texts = {
            split: [own for entry, own in zip(entries, words, strict=True) if entry.split == split]
            for split in folders
        }
        for split in QUERIES:
            write_lines(folder / QUERIES[split], lists[split])
            lines = [
                f"LEXEME {document} 1 0.00 0.00 {query} lex <NA> <NA>"
                for query, query_words in zip(names[split], texts[split], strict=True)
                for document, text in zip(names["train"], texts["train"], strict=True)
                if _contains(text, query_words)
            ]
            if not lines:
                raise DataError(f"{manifest.source}: no query of {split} is in a document of train")
            (folder / TRUTH[split]).mkdir()
            write_lines(folder / TRUTH[split] / f"{_NAMES[split]}.rttm", lines)
            found = len({line.split()[5] for line in lines})
            print(f"{split}: {found} of {len(names[split])} queries are in a document")
        write_lines(folder / PREPARED, prepared)
    print_splits({"documents": lengths.pop("train"), **lengths})
    print(f"wrote {args.out}; in the YAML: dataset_root: {args.out}")


def _prepare_quesst14(args: argparse.Namespace) -> None:
    root: Path = args.root
    if not (root / SCORING).is_dir():
        raise DataError(f"{root} has no {SCORING}; use the unpacked quesst14Database")
    documents = read_audio_list(root / DOCUMENTS, DataError)
    lists = {"documents": english(documents)}
    for split in QUERIES:
        queries = read_audio_list(root / QUERIES[split], DataError)
        truth = read_truth(root / TRUTH[split], DataError)
        check_truth(truth, queries, documents, root / TRUTH[split], DataError)
        lists[split] = english(queries)
    lines = [line for own in lists.values() for line in own]
    parts = [AudioPart(line.path) for line in lines]
    measured = measure_audio(root, parts, jobs=args.jobs, bar=True)
    samples: dict[str, int] = {}
    for line, audio in zip(lines, measured, strict=True):
        if isinstance(audio, DataError):
            raise DataError(f"{line.location}: {audio}")
        samples[line.path] = audio.samples
    prepared = ["split\tpath"]
    prepared += [f"{split}\t{line.path}" for split, own in lists.items() for line in own]
    with new_folder(args.out, replace=args.replace) as folder:
        for name in sorted({SCORING, *(PurePosixPath(line.path).parts[0] for line in lines)}):
            link_folder(root / name, folder / name)
        write_lines(folder / PREPARED, prepared)
    print_splits({split: [samples[line.path] for line in own] for split, own in lists.items()})
    print(f"wrote {args.out}; in the YAML: dataset_root: {args.out}")


QBE = PrepareTask(
    "QUESST 2014's layout from a manifest, for -d quesst14_dtw",
    QBE_DESCRIPTION,
    _prepare_qbe,
    add_convert_option,
)
QUESST14 = PrepareTask(
    "check QUESST 2014, for -d quesst14_dtw",
    QUESST14_DESCRIPTION,
    _prepare_quesst14,
    inputs=(("root", "ROOT"),),
)
