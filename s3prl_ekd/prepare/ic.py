"""``prepare ic`` and ``prepare fluent_commands``: Fluent Speech Commands' tables, for IC.

s3prl reads ``ROOT/data/{train,valid,test}_data.csv`` with the columns path (below ROOT), action,
object and location. An utterance is right if all three are.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

from ..data.manifest import MAX_LIST, SPLITS, read_manifest
from ..errors import DataError
from ..files.text import read_text
from .common import (
    PREPARED,
    PrepareTask,
    audio_lengths,
    audio_root,
    link_folder,
    new_folder,
    print_splits,
    read_lengths,
    write_lines,
)

SLOTS = ("action", "object", "location")
TABLES = {
    "train": "data/train_data.csv",
    "dev": "data/valid_data.csv",
    "test": "data/test_data.csv",
}
AUDIO = "audio"

IC_DESCRIPTION = """\
Write a corpus in Fluent Speech Commands' layout for `run_downstream.py -d fluent_commands`:
OUT/data/{train,valid,test}_data.csv, OUT/audio (a symlink) and OUT/prepared.tsv.

Needs the columns path, split, action, object and location. Each value of dev and test must be in
train.
"""
FLUENT_COMMANDS_DESCRIPTION = """\
Check Fluent Speech Commands for `run_downstream.py -d fluent_commands`: ROOT contains data/ and
wavs/. Writes symlinks to them.
"""


def _check_values(source: Path, lines: list[tuple[int, str, dict[str, str]]]) -> None:
    """Check ``(line, split, values)`` of a corpus."""
    for split in SPLITS:
        if not any(name == split for _, name, _ in lines):
            raise DataError(f"{source} has no {split} utterances; IC needs {', '.join(SPLITS)}")
    known = {slot: {v[slot] for _, split, v in lines if split == "train"} for slot in SLOTS}
    for line, split, values in lines:
        for slot in SLOTS:
            value = values[slot]
            if not value or any(mark in value for mark in ',"\n'):
                raise DataError(
                    f"{source}: line {line}: {slot} must not be empty or have a comma or quote, "
                    f"got {value!r:.40}"
                )
            if value not in known[slot]:
                raise DataError(
                    f"{source}: line {line}: the {slot} {value!r:.40} is in {split} but not in "
                    "train; IC needs every value in train"
                )


def _prepare_ic(args: argparse.Namespace) -> None:
    entries = read_manifest(args.manifest, columns=("path", "split", *SLOTS))
    _check_values(args.manifest, [(e.line, e.split, e.cells) for e in entries])
    root = audio_root(args)
    samples = read_lengths(args.manifest, root, entries, args.jobs)
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    rows: dict[str, list[list[str]]] = {split: [["path", *SLOTS]] for split in SPLITS}
    prepared = ["\t".join(["path", "split", *SLOTS, "samples"])]
    for entry, length in zip(entries, samples, strict=True):
        values = [entry.cells[slot] for slot in SLOTS]
        rows[entry.split].append([f"{AUDIO}/{entry.path}", *values])
        lengths[entry.split].append(length)
        prepared.append("\t".join([entry.path, entry.split, *values, str(length)]))
    with new_folder(args.out, replace=args.replace) as folder:
        (folder / "data").mkdir()
        link_folder(root, folder / AUDIO)
        for split, name in TABLES.items():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows[split])
            (folder / name).write_text(text.getvalue(), encoding="utf-8")
        write_lines(folder / PREPARED, prepared)
    print_splits(lengths)
    print(f"wrote {args.out}; in the YAML: file_path: {args.out}")


def _prepare_fluent_commands(args: argparse.Namespace) -> None:
    for name in (*TABLES.values(), "wavs"):
        if not (args.root / name).exists():
            raise DataError(
                f"{args.root} has no {name}; use the unpacked fluent_speech_commands_dataset"
            )
    lines, prepared = [], ["split\tpath"]
    lengths: dict[str, list[int]] = {}
    for split, name in TABLES.items():
        table = args.root / name
        rows = list(csv.DictReader(read_text(table, "table", DataError, MAX_LIST).splitlines()))
        for number, row in enumerate(rows, start=2):
            for column in ("path", *SLOTS):
                if not row.get(column):
                    raise DataError(f"{table}: line {number} has no {column}")
            lines.append((number, split, {slot: row[slot] for slot in SLOTS}))
            prepared.append(f"{split}\t{row['path']}")
        lengths[split] = []
        paths = [row["path"] for row in rows]
        for path, length in zip(paths, audio_lengths(args.root, paths, args.jobs), strict=True):
            if isinstance(length, DataError):
                raise DataError(f"{table}: {path}: {length}")
            lengths[split].append(length)
    _check_values(args.root / "data", lines)
    with new_folder(args.out, replace=args.replace) as folder:
        for name in ("data", "wavs"):
            link_folder(args.root / name, folder / name)
        write_lines(folder / PREPARED, prepared)
    print_splits(lengths)
    print(f"wrote {args.out}; in the YAML: file_path: {args.out}")


IC = PrepareTask(
    "Fluent Speech Commands' tables from a manifest, for -d fluent_commands",
    IC_DESCRIPTION,
    _prepare_ic,
)
FLUENT_COMMANDS = PrepareTask(
    "check Fluent Speech Commands, for -d fluent_commands",
    FLUENT_COMMANDS_DESCRIPTION,
    _prepare_fluent_commands,
    inputs=(("root", "ROOT"),),
)
