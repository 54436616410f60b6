"""Folds with emotion labels, as s3prl's ER recipe reads them.

``test_fold: foldN`` makes the recipe read ``META/SessionN/train_meta_data.json`` and
``test_meta_data.json``: ``labels`` (name to class) and ``meta_data`` (path below the corpus,
label, speaker). The name Session is IEMOCAP's; the number of folds is free. The recipe draws its
dev set from train by itself (``valid_ratio``), over utterances and not over speakers, and always
with the same seed: so the order of the lines decides which ones are dev.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .new_folder import PREPARED, link_folder, new_folder

AUDIO = "audio"  # in the folder written: what root in the YAML points to
META = "meta_data"  # and meta_data


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
