"""``prepare ic`` and ``prepare fluent_commands``: Fluent Speech Commands' tables, for IC.

s3prl reads ``ROOT/data/{train,valid,test}_data.csv`` with the columns path (below ROOT), action,
object and location. An utterance is right if all three are.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ..data.manifest import MAX_LIST, SPLITS
from ..errors import DataError, EkdError
from ..files.text import read_text
from .common import (
    PREPARED,
    PrepareTask,
    add_convert_option,
    audio_lengths,
    link_folder,
    manifest_of,
    new_folder,
    placing,
    print_splits,
    read_audio_parts,
    write_lines,
)

SLOTS = ("action", "object", "location")
TABLES = {
    "train": "data/train_data.csv",
    "dev": "data/valid_data.csv",
    "test": "data/test_data.csv",
}
AUDIO = "audio"
# What pandas reads as a missing value
_MISSING = frozenset(
    "#N/A;#N/A N/A;#NA;-1.#IND;-1.#QNAN;-NaN;-nan;1.#IND;1.#QNAN;<NA>;N/A;NA;NULL;NaN;None;n/a;nan;"
    "null".split(";")
)

IC_DESCRIPTION = """\
Write a corpus in Fluent Speech Commands' layout for `run_downstream.py -d fluent_commands`:
OUT/data/{train,valid,test}_data.csv, OUT/audio with symlinks to the audio, and OUT/prepared.tsv.

Needs the columns path, split, action, object and location. Each value of dev and test must be in
train.
"""
FLUENT_COMMANDS_DESCRIPTION = """\
Check Fluent Speech Commands for `run_downstream.py -d fluent_commands`: ROOT contains data/ and
wavs/. Writes symlinks to them.
"""


Line = tuple[str, str, dict[str, str]]  # location, split, cells


def read_tables(root: Path, error: type[EkdError]) -> list[Line]:
    """Read and check the tables of Fluent Speech Commands.

    Raises:
        EkdError: of class ``error``: a table or column is missing, or a value cannot be used.
    """
    lines: list[Line] = []
    for split, name in TABLES.items():
        table = root / name
        text = read_text(table, "table", error, MAX_LIST, "utf-8-sig")
        try:
            rows = list(csv.DictReader(text.splitlines()))
        except csv.Error as failure:  # such as a quote that is never closed
            raise error(f"{table} is damaged: {failure}") from None
        for number, row in enumerate(rows, start=2):
            location = f"{table}: line {number}"
            for column in ("path", *SLOTS):
                if not row.get(column):
                    raise error(
                        f"{location} has no {column}; a table needs the columns path, "
                        f"{', '.join(SLOTS)}"
                    )
            lines.append((location, split, row))
    check_values(str(root / "data"), lines, error)
    return lines


def check_values(source: str, lines: Sequence[Line], error: type[EkdError]) -> None:
    """Check that s3prl, which reads the tables with pandas, sees the values as they are.

    Raises:
        EkdError: of class ``error``.
    """
    for split in SPLITS:
        if not any(name == split for _, name, _ in lines):
            raise error(f"{source} has no {split} utterances; IC needs {', '.join(SPLITS)}")
    known = {slot: {v[slot] for _, split, v in lines if split == "train"} for slot in SLOTS}
    for location, split, values in lines:
        for slot in SLOTS:
            value = values[slot]
            if not value or any(mark in value for mark in ',"\n'):
                raise error(
                    f"{location}: {slot} must not be empty or have a comma or quote, got "
                    f"{value!r:.40}"
                )
            if _is_converted(value):
                raise error(
                    f"{location}: {slot} must be a word, not a number, yes or no in pandas' sense "
                    f"(true, false) or a missing value (NA, None), got {value!r:.40}"
                )
            if value not in known[slot]:
                raise error(
                    f"{location}: the {slot} {value!r:.40} is in {split} but not in train; IC "
                    "needs every value in train"
                )


def _is_converted(value: str) -> bool:
    """Whether pandas may read a value as something else than text."""
    word = value.strip().lower().lstrip("+-")
    if word in ("true", "false", "inf", "infinity") or value.strip() in _MISSING:
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True


def _prepare_ic(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "split", *SLOTS))
    entries = manifest.entries
    check_values(manifest.source, [(e.location, e.split, e.cells) for e in entries], DataError)
    parts = read_audio_parts(args, manifest, entries)
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    rows: dict[str, list[list[str]]] = {split: [["path", *SLOTS]] for split in SPLITS}
    prepared = ["\t".join(["id", "path", "split", *SLOTS, "samples"])]
    with new_folder(args.out, replace=args.replace) as folder:
        for entry, audio in placing(list(zip(entries, parts, strict=True))):
            values = [entry.cells[slot] for slot in SLOTS]
            name = f"{AUDIO}/{len(prepared):06d}.wav"
            audio.place(folder / name)
            rows[entry.split].append([name, *values])
            lengths[entry.split].append(audio.samples)
            cells = [name, entry.name, entry.split, *values, str(audio.samples)]
            prepared.append("\t".join(cells))
        (folder / "data").mkdir()
        for split, table in TABLES.items():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows[split])
            (folder / table).write_text(text.getvalue(), encoding="utf-8")
        write_lines(folder / PREPARED, prepared)
    print_splits(lengths)
    print(f"wrote {args.out}; in the YAML: file_path: {args.out}")


def _prepare_fluent_commands(args: argparse.Namespace) -> None:
    for name in (*TABLES.values(), "wavs"):
        if not (args.root / name).exists():
            raise DataError(
                f"{args.root} has no {name}; use the unpacked fluent_speech_commands_dataset"
            )
    lines = read_tables(args.root, DataError)
    paths = [row["path"] for _, _, row in lines]
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    locations = [location for location, _, _ in lines]
    measured = audio_lengths(args.root, paths, args.jobs, locations)
    for (_, split, _), length in zip(lines, measured, strict=True):
        lengths[split].append(length)
    prepared = ["split\tpath", *(f"{split}\t{row['path']}" for _, split, row in lines)]
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
    add_convert_option,
)
FLUENT_COMMANDS = PrepareTask(
    "check Fluent Speech Commands, for -d fluent_commands",
    FLUENT_COMMANDS_DESCRIPTION,
    _prepare_fluent_commands,
    inputs=(("root", "ROOT"),),
)
