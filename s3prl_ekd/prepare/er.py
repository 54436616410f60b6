"""``prepare er`` and ``prepare iemocap``: cross-validation folds for ``-d emotion``.

With ``test_fold: foldN``, s3prl's recipe reads ``META/SessionN/train_meta_data.json`` and
``test_meta_data.json``: ``labels`` (name to class) and ``meta_data`` (path below the corpus, label,
speaker). The name Session is IEMOCAP's; there may be any number of folds. The recipe draws its dev
set from train (``valid_ratio``), by utterance and not by speaker, always with the same seed. So the
order of the utterances determines the dev set.

In IEMOCAP, ``SessionN/dialog/EmoEvaluation/DIALOG.txt`` has a line for each utterance: time, name,
label, and [valence, activation, dominance], separated by tabs. The lines of single annotators
follow::

    [6.2901 - 8.2357]   Ses01F_impro01_F000     neu     [2.5000, 2.5000, 2.5000]

The audio is ``SessionN/sentences/wav/DIALOG/NAME.wav``. SUPERB uses neutral, happy, angry and sad,
merges excited into happy, and ignores other labels. The full corpus then has 5531 utterances: 1085,
1023, 1151, 1031 and 1241 in sessions 1 to 5.
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
from ..files.text import read_text
from .common import (
    PREPARED,
    PrepareTask,
    audio_root,
    link_folder,
    new_folder,
    read_lengths,
    write_lines,
)

# Names in the output folder, for the YAML keys `root` and `meta_data`.
AUDIO = "audio"
META = "meta_data"

LABELS = ("neu", "hap", "ang", "sad")  # s3prl's order
MERGED_LABELS = {"exc": "hap"}
SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
FULL_COUNTS = dict(zip(SESSIONS, (1085, 1023, 1151, 1031, 1241), strict=True))
ER_DESCRIPTION = """\
Write folds for `run_downstream.py -d emotion`: OUT/meta_data/SessionN with the lists of fold N,
OUT/audio, a symlink to the audio, and OUT/prepared.tsv.

Needs the columns path and split, and one with labels. Lines without a label, or with one that is
not in --labels, are skipped and counted. With --fold-column, there is a fold for each value of that
column: it is the test set, the other values are the training set, and the split is ignored. Without
it there is one fold, which trains on train and dev and tests on test. In both cases the recipe
draws its own dev set from the training set.
"""
IEMOCAP_DESCRIPTION = """\
Write the five folds of IEMOCAP for `run_downstream.py -d emotion`, as in SUPERB: ROOT contains
Session1 to Session5; the labels neu, hap, ang and sad are used, and exc is merged into hap.
Utterances are sorted by name. The lists in s3prl's repository have another order, so their dev sets
differ from ours; the test sets are the same.
"""


@dataclass(frozen=True)
class LabelledUtterance:
    """An utterance and its emotion label."""

    path: str  # below the corpus, separated by /
    label: str
    speaker: str
    fold: str  # the part of the corpus that it belongs to, such as Session1


@dataclass(frozen=True)
class Fold:
    """The training and test set of one fold of cross-validation."""

    name: str  # the part of the corpus that is tested, such as Session1
    train: list[LabelledUtterance]
    test: list[LabelledUtterance]


def choose_labels(
    occurring: Iterable[str], selected: Sequence[str] | None, source: Path
) -> list[str]:
    """Return the classes in order: ``selected``, or all labels that occur, sorted.

    Raises:
        DataError: there are fewer than two classes, a duplicate, one that does not occur, or one
            with white space (s3prl's prediction files separate label and file name by a space).
    """
    occurring = {label for label in occurring if label}
    labels = sorted(occurring) if selected is None else list(selected)
    for label in labels:
        if label not in occurring:
            names = ", ".join(sorted(occurring)) or "none"
            raise DataError(f"{source} has no line with the label {label!r}; labels: {names}")
        if labels.count(label) > 1:
            raise DataError(f"--labels has {label} twice")
        if len(label.split()) != 1:
            raise DataError(f"{source}: the label {label!r} has white space; use a single word")
    if len(labels) < 2:
        raise DataError(
            f"{source} has {len(labels)} class(es) ({', '.join(labels) or 'no label'}); expected 2 "
            "or more"
        )
    return labels


def natural_sort_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that orders digits as numbers: fold9 before fold10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def leave_one_out(items: Sequence[LabelledUtterance]) -> list[Fold]:
    """Make one fold per part of the corpus, with that part as test set and the others as train."""
    return [
        Fold(
            name,
            [item for item in items if item.fold != name],
            [item for item in items if item.fold == name],
        )
        for name in sorted({item.fold for item in items}, key=natural_sort_key)
    ]


def check_folds(folds: Sequence[Fold], labels: Sequence[str], source: Path) -> None:
    """Raise :class:`DataError` unless each fold has all classes in train."""
    for fold in folds:
        missing = set(labels) - {item.label for item in fold.train}
        if missing:
            raise DataError(
                f"{source}: the fold that tests {fold.name} has no training utterance of "
                f"{', '.join(sorted(missing))}; use other folds, or fewer classes (--labels)"
            )


def write_folds(
    out: Path, root: Path, folds: Sequence[Fold], labels: Sequence[str], *, replace: bool
) -> None:
    """Write ``out/meta_data/SessionN/{train,test}_meta_data.json``, and link ``out/audio`` to root.

    ``out/prepared.tsv`` lists the fold that tests each utterance.
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
                write_lines(session / f"{part}_meta_data.json", [text])
            for item in fold.test:
                cells = (item.path, item.label, item.speaker, item.fold, f"fold{number}")
                rows.append("\t".join(cells))
        write_lines(folder / PREPARED, rows)


def read_iemocap(root: Path) -> list[LabelledUtterance]:
    """Read the utterances of the four classes, ordered by session, dialog and line.

    Raises:
        DataError: ``root`` is not IEMOCAP's folder, a session has no labels, or audio is missing.
    """
    check_iemocap(root)
    items: list[LabelledUtterance] = []
    missing = []
    for session in SESSIONS:
        start = len(items)
        for file in sorted((root / session / "dialog" / "EmoEvaluation").glob("*.txt")):
            if is_hidden_or_system(file.name):
                continue
            for name, label in _read_labels(file):
                path = f"{session}/sentences/wav/{name.rpartition('_')[0]}/{name}.wav"
                if not (root / path).is_file():
                    missing.append(path)
                items.append(LabelledUtterance(path, label, name.split("_")[0], session))
        if len(items) == start:
            raise DataError(
                f"{root / session / 'dialog' / 'EmoEvaluation'} has no line with one of the "
                f"labels {', '.join((*LABELS, *MERGED_LABELS))}"
            )
    if missing:
        raise DataError(
            f"{root} lacks the audio of {len(missing)} of {len(items)} labelled utterances: "
            f"{', '.join(missing[:3])}{', …' * (len(missing) > 3)}"
        )
    return items


def _read_labels(file: Path) -> list[tuple[str, str]]:
    """Read name and label of a dialog's utterances; skip those of other classes."""
    labels = []
    for number, line in enumerate(read_text(file, "label file", DataError).splitlines(), start=1):
        if not line.startswith("["):
            continue
        cells = line.split("\t")
        if len(cells) < 3 or "_" not in cells[1]:
            raise DataError(
                f"{file}: line {number}: expected time, name, label, [v, a, d], separated by tabs"
            )
        label = MERGED_LABELS.get(cells[2], cells[2])
        if label in LABELS:
            labels.append((cells[1], label))
    return labels


def check_iemocap(root: Path) -> None:
    """Raise :class:`DataError` unless the folders of IEMOCAP's five sessions are in ``root``."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; use the one that contains Session1 to Session5")
    for session in SESSIONS:
        for name in ("dialog/EmoEvaluation", "sentences/wav"):
            if not (root / session / name).is_dir():
                parents = (path.parent for path in root.glob("*/Session1"))
                inside = next(
                    (path for path in parents if not is_hidden_or_system(path.name)), None
                )
                hint = f"; is it {inside}?" if inside else ""
                raise DataError(f"{root} is not IEMOCAP: it has no {session}/{name}{hint}")


def _configure_er(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        metavar="NAME",
        nargs="+",
        help="the classes, in this order (default: all, sorted)",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        default="emotion",
        help="column of the label (default: emotion)",
    )
    parser.add_argument(
        "--fold-column", metavar="NAME", help="cross-validate over this column, e.g. speaker"
    )


def _prepare_er(args: argparse.Namespace) -> None:
    columns = ["path", "split", args.label_column]
    if args.fold_column:
        columns.append(args.fold_column)
    entries = read_manifest(args.manifest, columns=columns)
    occurring = (entry.cells[args.label_column] for entry in entries)
    labels = choose_labels(occurring, args.labels, args.manifest)
    labelled = [entry for entry in entries if entry.cells[args.label_column] in labels]
    folds = _make_folds(args, labelled)
    check_folds(folds, labels, args.manifest)
    root = audio_root(args)
    read_lengths(args.manifest, root, labelled, args.jobs)  # checks for readable, 16 kHz, mono
    if len(labelled) < len(entries):
        print(f"{len(entries) - len(labelled)} lines without a selected label skipped")
    write_folds(args.out, root, folds, labels, replace=args.replace)
    _print_summary(args.out, folds, labels)


def _make_folds(args: argparse.Namespace, entries: Sequence[ManifestEntry]) -> list[Fold]:
    items = []
    for entry in entries:
        fold = entry.cells[args.fold_column] if args.fold_column else entry.split
        if not fold:
            raise DataError(f"{args.manifest}: line {entry.line} has no {args.fold_column}")
        label, speaker = entry.cells[args.label_column], entry.cells.get("speaker", "")
        items.append(LabelledUtterance(entry.path, label, speaker, fold))
    folds = leave_one_out(items)
    if not args.fold_column:
        folds = [fold for fold in folds if fold.name == "test"]
        if not folds:
            raise DataError(
                f"{args.manifest} has no labelled line of the split test; add one or --fold-column"
            )
    elif len(folds) < 2:
        raise DataError(f"{args.manifest}: the column {args.fold_column} needs 2 values or more")
    return folds


def _prepare_iemocap(args: argparse.Namespace) -> None:
    items = read_iemocap(args.root)
    folds = leave_one_out(items)
    check_folds(folds, LABELS, args.root)
    entries = [
        ManifestEntry(number, item.path, "train", {}) for number, item in enumerate(items, 1)
    ]
    read_lengths(args.root, args.root, entries, args.jobs)
    write_folds(args.out, args.root, folds, LABELS, replace=args.replace)
    _print_summary(args.out, folds, LABELS)
    counts = Counter(item.fold for item in items)
    if counts != FULL_COUNTS:
        print(
            f"note: {len(items)} utterances; the full IEMOCAP has {sum(FULL_COUNTS.values())}, "
            f"so scores are not comparable with SUPERB's"
        )


def _print_summary(out: Path, folds: Sequence[Fold], labels: Sequence[str]) -> None:
    """Print the size of each fold; the classes, with the accuracy of the majority class; paths."""
    for number, fold in enumerate(folds, start=1):
        sizes = f"{len(fold.train)} training and {len(fold.test)} test utterances"
        print(f"fold{number}: {sizes} ({fold.name})")
    tested = Counter(item.label for fold in folds for item in fold.test)
    counts = ", ".join(f"{label} {tested[label]}" for label in labels)
    majority = 100 * max(tested.values()) / tested.total()
    print(f"{len(labels)} classes: {counts}; majority class: {majority:.1f} %")
    print(f"wrote {out}; in the YAML: root: {out / AUDIO}")
    print(f"               meta_data: {out / META}")


ER = PrepareTask(
    "folds from a manifest with emotion labels, for -d emotion",
    ER_DESCRIPTION,
    _prepare_er,
    _configure_er,
)
IEMOCAP = PrepareTask(
    "the five folds of IEMOCAP, for -d emotion",
    IEMOCAP_DESCRIPTION,
    _prepare_iemocap,
    inputs=(("root", "ROOT"),),
)
