"""``prepare er`` and ``prepare iemocap``: what `run_downstream.py -d emotion` reads."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data.manifest import Entry, read_manifest
from ..errors import DataError
from .common import Task, audio_root, measure_all
from .er import (
    AUDIO,
    META,
    Fold,
    Item,
    check_folds,
    choose_labels,
    leave_one_out,
    summary,
    write_folds,
)
from .iemocap import LABELS, WHOLE, read_iemocap
from .new_folder import check_free

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


def _folds(args: argparse.Namespace, entries: Sequence[Entry]) -> list[Fold]:
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
    entries = [Entry(number, item.path, "train", {}) for number, item in enumerate(items, 1)]
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
