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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.audio_files import is_hidden_or_system
from ..errors import DataError
from ..files.text import read_text
from .common import (
    PREPARED,
    PreparedAudio,
    PrepareTask,
    add_convert_option,
    audio_lengths,
    link_folder,
    manifest_of,
    new_folder,
    placing,
    read_audio_parts,
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
OUT/audio, a symlink to the audio, and OUT/prepared.tsv. If the manifest has segments of files, or
--convert is needed, OUT/audio is a folder with a file for each utterance.

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
class EmotionUtterance:
    """An utterance and its emotion label."""

    path: str  # below the corpus, separated by /
    label: str
    speaker: str
    part: str  # the part of the corpus that it belongs to, such as Session1
    audio: PreparedAudio | None = None  # if files are written and `path` is to be the new one


def choose_labels(
    occurring: Iterable[str], selected: Sequence[str] | None, source: str
) -> list[str]:
    """Return the classes in order: ``selected``, or all labels that occur, sorted."""
    known = sorted({label for label in occurring if label})
    labels = known if selected is None else list(selected)
    for label in labels:
        if label not in known:
            names = ", ".join(known) or "none"
            raise DataError(f"{source} has no line with the label {label!r}; labels: {names}")
        if labels.count(label) > 1:
            raise DataError(f"--labels has {label} twice")
        if len(label.split()) != 1:  # a space ends the label in s3prl's prediction files
            raise DataError(f"{source}: the label {label!r} has white space; use a single word")
    if len(labels) < 2:
        names = ", ".join(labels) or "no label"
        raise DataError(f"{source} has {len(labels)} class(es) ({names}); expected 2 or more")
    return labels


def natural_sort_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that orders digits as numbers: fold9 before fold10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def parts_of(items: Iterable[EmotionUtterance]) -> list[str]:
    """The parts of the corpus in natural order."""
    return sorted({item.part for item in items}, key=natural_sort_key)


def check_classes(
    source: str | Path,
    items: Sequence[EmotionUtterance],
    tested: Sequence[str],
    labels: Sequence[str],
) -> None:
    """Check that each fold has training utterances of all classes."""
    for part in tested:
        missing = set(labels) - {item.label for item in items if item.part != part}
        if missing:
            raise DataError(
                f"{source}: the fold that tests {part} has no training utterance of "
                f"{', '.join(sorted(missing))}; use other folds, or fewer classes (--labels)"
            )


def write_folds(
    args: argparse.Namespace,
    root: Path,
    items: Sequence[EmotionUtterance],
    tested: Sequence[str],
    labels: Sequence[str],
) -> None:
    """Write a fold for each part that is ``tested``, with the other parts as train; print them.

    ``OUT/meta_data/SessionN/{train,test}_meta_data.json`` are the lists of fold N, ``OUT/audio`` is
    a link to ``root``, and ``OUT/prepared.tsv`` lists the fold that tests each utterance. If there
    are segments or converted files, ``OUT/audio`` has a file for each utterance instead.
    """
    classes = {label: index for index, label in enumerate(labels)}
    rows = ["path\tlabel\tspeaker\tfold\ttest_fold"]
    summary = []
    counts: Counter[str] = Counter()
    with new_folder(args.out, replace=args.replace) as folder:
        if any(item.audio is not None and item.audio.write for item in items):
            items = _write_files(folder / AUDIO, items)
        else:
            link_folder(root, folder / AUDIO)
        for number, part in enumerate(tested, start=1):
            session = folder / META / f"Session{number}"
            session.mkdir(parents=True)
            train = [item for item in items if item.part != part]
            test = [item for item in items if item.part == part]
            for name, utterances in (("train", train), ("test", test)):
                entries = [
                    {"path": item.path, "label": item.label, "speaker": item.speaker}
                    for item in utterances
                ]
                text = json.dumps({"labels": classes, "meta_data": entries}, indent=1)
                write_lines(session / f"{name}_meta_data.json", [text])
            for item in test:
                cells = (item.path, item.label, item.speaker, item.part, f"fold{number}")
                rows.append("\t".join(cells))
            counts.update(item.label for item in test)
            sizes = f"{len(train)} training and {len(test)} test utterances"
            summary.append(f"fold{number}: {sizes} ({part})")
        write_lines(folder / PREPARED, rows)
    print("\n".join(summary))
    sizes = ", ".join(f"{label} {counts[label]}" for label in labels)
    majority = 100 * max(counts.values()) / counts.total()
    print(f"{len(labels)} classes: {sizes}; majority class: {majority:.1f} %")
    print(f"wrote {args.out}; in the YAML: root: {args.out / AUDIO}")
    print(f"               meta_data: {args.out / META}")


def _write_files(folder: Path, items: Sequence[EmotionUtterance]) -> list[EmotionUtterance]:
    """Link or write a file for each utterance, numbered in their order."""
    folder.mkdir()
    result = []
    for number, item in enumerate(placing(items), start=1):
        assert item.audio is not None
        name = f"{number:06d}{item.audio.suffix}"
        item.audio.place(folder / name)
        result.append(replace(item, path=name))
    return result


def read_iemocap(root: Path) -> list[EmotionUtterance]:
    """Read the utterances of the four classes, ordered by session, dialog and line."""
    check_iemocap(root)
    items: list[EmotionUtterance] = []
    for session in SESSIONS:
        start, folder = len(items), root / session / "dialog" / "EmoEvaluation"
        for file in sorted(folder.glob("*.txt")):
            if not is_hidden_or_system(file.name):
                items += _read_labels(file, session)
        if len(items) == start:
            labels = ", ".join((*LABELS, *MERGED_LABELS))
            raise DataError(f"{folder} has no line with one of the labels {labels}")
    missing = [item.path for item in items if not (root / item.path).is_file()]
    if missing:
        raise DataError(
            f"{root} lacks the audio of {len(missing)} of {len(items)} labelled utterances: "
            f"{', '.join(missing[:3])}{', …' * (len(missing) > 3)}"
        )
    return items


def _read_labels(file: Path, session: str) -> Iterator[EmotionUtterance]:
    """Read the utterances of a dialog; skip those of other classes."""
    for number, line in enumerate(read_text(file, "label file", DataError).splitlines(), start=1):
        if not line.startswith("["):
            continue
        cells = line.split("\t")
        if len(cells) < 3 or "_" not in cells[1]:
            raise DataError(
                f"{file}: line {number}: expected time, name, label, [v, a, d], separated by tabs"
            )
        name, label = cells[1], MERGED_LABELS.get(cells[2], cells[2])
        if label in LABELS:
            path = f"{session}/sentences/wav/{name.rpartition('_')[0]}/{name}.wav"
            yield EmotionUtterance(path, label, name.split("_")[0], session)


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
        action="extend",
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
    add_convert_option(parser)


def _prepare_er(args: argparse.Namespace) -> None:
    column = args.fold_column or "split"
    manifest = manifest_of(args, ["path", "split", args.label_column, column])
    entries, source = manifest.entries, manifest.source
    occurring = (entry.cells[args.label_column] for entry in entries)
    labels = choose_labels(occurring, args.labels, source)
    labelled = [entry for entry in entries if entry.cells[args.label_column] in labels]
    items = []
    for entry in labelled:
        part = entry.split if column == "split" else entry.cells[column]
        if not part:
            raise DataError(f"{entry.location} has no {column}")
        label, speaker = entry.cells[args.label_column], entry.cells.get("speaker", "")
        items.append(EmotionUtterance(entry.path, label, speaker, part))
    parts = parts_of(items)
    if args.fold_column and len(parts) < 2:
        raise DataError(f"{source}: the column {column} needs 2 values or more")
    if not args.fold_column:
        if "test" not in parts:
            raise DataError(
                f"{source} has no labelled line of the split test; add one or --fold-column"
            )
        parts = ["test"]
    check_classes(source, items, parts, labels)
    audio = read_audio_parts(args, manifest, labelled)
    items = [replace(item, audio=one) for item, one in zip(items, audio, strict=True)]
    if len(labelled) < len(entries):
        print(f"{len(entries) - len(labelled)} lines without a selected label skipped")
    write_folds(args, manifest.root, items, parts, labels)


def _prepare_iemocap(args: argparse.Namespace) -> None:
    items = read_iemocap(args.root)
    check_classes(args.root, items, parts_of(items), LABELS)
    audio_lengths(args.root, [item.path for item in items], args.jobs)
    write_folds(args, args.root, items, parts_of(items), LABELS)
    if Counter(item.part for item in items) != FULL_COUNTS:
        print(
            f"note: {len(items)} utterances; the full IEMOCAP has {sum(FULL_COUNTS.values())}, "
            f"so scores are not comparable with SUPERB's"
        )


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
