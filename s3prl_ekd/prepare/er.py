"""``prepare er`` and ``prepare iemocap``: what ``run_downstream.py -d emotion`` reads.

``test_fold: foldN`` makes the recipe read ``META/SessionN/train_meta_data.json`` and
``test_meta_data.json``: ``labels`` (name to class) and ``meta_data`` (path below the corpus,
label, speaker). The name Session is IEMOCAP's; the number of folds is free. The recipe draws its
dev set from train by itself (``valid_ratio``), over utterances and not over speakers, and always
with the same seed: so the order of the lines decides which ones are dev.

In IEMOCAP, ``SessionN/dialog/EmoEvaluation/DIALOG.txt`` has for each utterance a line of its time,
name, label and valence, activation, dominance, separated by tabs; lines of single annotators
follow it::

    [6.2901 - 8.2357]   Ses01F_impro01_F000     neu     [2.5000, 2.5000, 2.5000]

Its audio is ``SessionN/sentences/wav/DIALOG/NAME.wav``. SUPERB keeps neutral, happy, angry and sad,
takes excited for happy, and leaves out the rest. In the whole corpus that makes 5531 utterances:
1085, 1023, 1151, 1031 and 1241 in sessions 1 to 5.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.audio_files import is_hidden_or_system
from ..data.manifest import ManifestEntry, read_manifest
from ..errors import DataError
from .common import Task, audio_root, measure_all
from .new_folder import PREPARED, check_free, link_folder, new_folder

AUDIO = "audio"  # in the folder written: what root in the YAML points to
META = "meta_data"  # and meta_data

LABELS = ("neu", "hap", "ang", "sad")  # s3prl's order
MERGED = {"exc": "hap"}
SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
WHOLE = dict(zip(SESSIONS, (1085, 1023, 1151, 1031, 1241), strict=True))
ABOUT_ER = """\
Folds for `run_downstream.py -d emotion`: OUT/meta_data/SessionN with the lists of fold N,
OUT/audio, a link to the audio, and OUT/prepared.tsv.

Needs the columns path and split, and one with labels. Lines with another label, or none, are left
out and counted. With --fold-column, each value of that column is tested once and the rest trained
on, whatever the split; without, there is one fold: test is tested, train and dev are trained on
(the recipe draws its own dev set from them).
"""
ABOUT_IEMOCAP = """\
The five folds of IEMOCAP for `run_downstream.py -d emotion`, as SUPERB makes them: ROOT has
Session1 to Session5 in it; neu, hap, ang and sad are kept, exc counts as hap. The lines are sorted;
s3prl's repository carries lists in another order, which give another dev set and the same test set.
"""


@dataclass(frozen=True)
class Item:
    """One utterance with its label."""

    path: str  # below the corpus, with / between the parts
    label: str
    speaker: str
    fold: str  # the part of the corpus that it is tested in


@dataclass(frozen=True)
class Fold:
    """What is trained on and tested on together."""

    name: str  # the part that is tested, as the corpus calls it
    train: list[Item]
    test: list[Item]


def choose_labels(found: Iterable[str], wanted: Sequence[str] | None, where: Path) -> list[str]:
    """The classes in their order: as ``wanted``, else all that were ``found``, sorted.

    Raises:
        DataError: fewer than two, one twice, one that does not occur, or one with white space,
            which s3prl's lists of predictions could not tell from the file name before it.
    """
    found = {label for label in found if label}
    labels = sorted(found) if wanted is None else list(wanted)
    for label in labels:
        if label not in found:
            known = ", ".join(sorted(found)) or "nothing"
            raise DataError(f"{where} has no line with the label {label!r}; it has: {known}")
        if labels.count(label) > 1:
            raise DataError(f"--labels names {label} twice")
        if len(label.split()) != 1:
            raise DataError(f"{where} has the label {label!r}; a label is a word without spaces")
    if len(labels) < 2:
        raise DataError(
            f"{where} gives {len(labels)} class(es) ({', '.join(labels) or 'no label'}); two or "
            "more are needed"
        )
    return labels


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which fold10 comes after fold9."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def leave_one_out(items: Sequence[Item]) -> list[Fold]:
    """For each part of a corpus a fold that tests it and trains on all the others."""
    return [
        Fold(
            name,
            [item for item in items if item.fold != name],
            [item for item in items if item.fold == name],
        )
        for name in sorted({item.fold for item in items}, key=natural)
    ]


def check_folds(folds: Sequence[Fold], labels: Sequence[str], where: Path) -> None:
    """Raise :class:`DataError` unless each fold has something to test and all classes in train."""
    for fold in folds:
        if not fold.test:
            raise DataError(f"{where} has nothing to test in {fold.name}")
        absent = set(labels) - {item.label for item in fold.train}
        if absent:
            raise DataError(
                f"{where} has no training utterance of {', '.join(sorted(absent))} when "
                f"{fold.name} is tested; use other folds, or fewer classes (--labels)"
            )


def write_folds(
    out: Path, root: Path, folds: Sequence[Fold], labels: Sequence[str], *, replace: bool
) -> None:
    """``out/meta_data/SessionN/{train,test}_meta_data.json`` and ``out/audio``, a link to ``root``.

    ``out/prepared.tsv`` says which session each utterance is tested in.
    """
    classes = {label: index for index, label in enumerate(labels)}
    rows = ["path\tlabel\tspeaker\tfold\ttest_fold"]
    with new_folder(out, replace=replace) as folder:
        link_folder(root, folder / AUDIO)
        for number, fold in enumerate(folds, start=1):
            session = folder / META / f"Session{number}"
            session.mkdir(parents=True)
            for part in ("train", "test"):
                items = [
                    {"path": item.path, "label": item.label, "speaker": item.speaker}
                    for item in getattr(fold, part)
                ]
                text = json.dumps({"labels": classes, "meta_data": items}, indent=1)
                (session / f"{part}_meta_data.json").write_text(text + "\n", encoding="utf-8")
            for item in fold.test:
                cells = (item.path, item.label, item.speaker, item.fold, f"fold{number}")
                rows.append("\t".join(cells))
        (folder / PREPARED).write_text("\n".join(rows) + "\n", encoding="utf-8")


def summary(folds: Sequence[Fold], labels: Sequence[str]) -> list[str]:
    """A line for each fold, and one for the classes with the accuracy that guessing gives."""
    lines = [
        f"fold{number}: {len(fold.train)} utterances to train and {len(fold.test)} to test "
        f"({fold.name})"
        for number, fold in enumerate(folds, start=1)
    ]
    tested = Counter(item.label for fold in folds for item in fold.test)
    counts = ", ".join(f"{label} {tested[label]}" for label in labels)
    guess = 100 * max(tested.values()) / tested.total()
    lines.append(f"{len(labels)} classes: {counts}; always guessing one: {guess:.1f} %")
    return lines


def read_iemocap(root: Path) -> list[Item]:
    """The utterances of the four classes, by session, dialog and place in the dialog.

    Raises:
        DataError: ``root`` is not IEMOCAP's folder, a session has no labels, or audio is missing.
    """
    check_shape(root)
    items: list[Item] = []
    missing = []
    for session in SESSIONS:
        before = len(items)
        for file in sorted((root / session / "dialog" / "EmoEvaluation").glob("*.txt")):
            if is_hidden_or_system(file.name):
                continue
            for name, label in _labels(file):
                path = f"{session}/sentences/wav/{name.rpartition('_')[0]}/{name}.wav"
                if not (root / path).is_file():
                    missing.append(path)
                items.append(Item(path, label, name.split("_")[0], session))
        if len(items) == before:
            raise DataError(
                f"{root / session / 'dialog' / 'EmoEvaluation'} has no line with a label of "
                f"{', '.join((*LABELS, *MERGED))}"
            )
    if missing:
        raise DataError(
            f"{root} lacks the audio of {len(missing)} of {len(items)} labelled utterances: "
            f"{', '.join(missing[:3])}{', …' * (len(missing) > 3)}"
        )
    return items


def _labels(file: Path) -> list[tuple[str, str]]:
    """Name and label of each utterance of one dialog that is of one of the classes."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("["):
            continue
        cells = line.split("\t")
        if len(cells) < 3 or "_" not in cells[1]:
            raise DataError(
                f"{file}: line {number} is not time, name, label and [v, a, d], separated by tabs"
            )
        label = MERGED.get(cells[2], cells[2])
        if label in LABELS:
            found.append((cells[1], label))
    return found


def check_shape(root: Path) -> None:
    """Raise :class:`DataError` unless the folders of IEMOCAP's five sessions are in ``root``."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one with Session1 to Session5 in it")
    for session in SESSIONS:
        for below in ("dialog/EmoEvaluation", "sentences/wav"):
            if not (root / session / below).is_dir():
                found = (path.parent for path in root.glob("*/Session1"))
                inside = next((path for path in found if not is_hidden_or_system(path.name)), None)
                hint = f"; is it {inside}?" if inside else ""
                raise DataError(f"{root} is not IEMOCAP: it has no {session}/{below}{hint}")


def _configure_er(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels", metavar="NAME", nargs="+", help="the classes, in this order (default: all)"
    )
    parser.add_argument(
        "--label-column", metavar="NAME", default="emotion", help="(default: emotion)"
    )
    parser.add_argument("--fold-column", metavar="NAME", help="e.g. speaker, or fold")
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _configure_iemocap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", type=Path)
    parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


def _prepare_er(args: argparse.Namespace) -> int:
    check_free(args.out, replace=args.replace)
    columns = ["path", "split", args.label_column]
    if args.fold_column:
        columns.append(args.fold_column)
    entries = read_manifest(args.manifest, columns=columns)
    found = (entry.cells[args.label_column] for entry in entries)
    labels = choose_labels(found, args.labels, args.manifest)
    kept = [entry for entry in entries if entry.cells[args.label_column] in labels]
    folds = _folds(args, kept)
    check_folds(folds, labels, args.manifest)
    root = audio_root(args)
    measure_all(args.manifest, root, kept, args.jobs)  # of 16 kHz, mono, and readable
    if len(kept) < len(entries):
        print(f"{len(entries) - len(kept)} lines with another label or none left out")
    _write(args, root, folds, labels)
    return 0


def _folds(args: argparse.Namespace, entries: Sequence[ManifestEntry]) -> list[Fold]:
    items = []
    for entry in entries:
        fold = entry.cells[args.fold_column] if args.fold_column else entry.split
        if not fold:
            raise DataError(f"{args.manifest}: line {entry.line} has no {args.fold_column}")
        label, speaker = entry.cells[args.label_column], entry.cells.get("speaker", "")
        items.append(Item(entry.path, label, speaker, fold))
    folds = leave_one_out(items)
    if not args.fold_column:
        folds = [fold for fold in folds if fold.name == "test"]
        if not folds:
            raise DataError(
                f"{args.manifest} has no labelled line in the split test; add one, or --fold-column"
            )
    elif len(folds) < 2:
        raise DataError(f"{args.manifest}: the column {args.fold_column} has one value only")
    return folds


def _prepare_iemocap(args: argparse.Namespace) -> int:
    check_free(args.out, replace=args.replace)
    items = read_iemocap(args.root)
    folds = leave_one_out(items)
    check_folds(folds, LABELS, args.root)
    entries = [
        ManifestEntry(number, item.path, "train", {}) for number, item in enumerate(items, 1)
    ]
    measure_all(args.root, args.root, entries, args.jobs)
    _write(args, args.root, folds, LABELS)
    counts = Counter(item.fold for item in items)
    if counts != WHOLE:
        print(
            f"note: {len(items)} utterances; the whole IEMOCAP gives {sum(WHOLE.values())}, "
            f"so scores are not comparable with SUPERB's"
        )
    return 0


def _write(args: argparse.Namespace, root: Path, folds: list[Fold], labels: Sequence[str]) -> None:
    write_folds(args.out, root, folds, labels, replace=args.replace)
    print("\n".join(summary(folds, labels)))
    print(f"wrote {args.out}; in the YAML: root: {args.out / AUDIO}")
    print(f"               meta_data: {args.out / META}")


ER = Task("folds with emotion labels, for -d emotion", ABOUT_ER, _configure_er, _prepare_er)
IEMOCAP = Task(
    "the five folds of IEMOCAP, for -d emotion",
    ABOUT_IEMOCAP,
    _configure_iemocap,
    _prepare_iemocap,
    manifest=False,
)
