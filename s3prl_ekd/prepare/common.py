"""What the subcommands of ``prepare`` share: options, output folders, lengths of audio files."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.audio_files import SAMPLE_RATE, read_headers, total_hours
from ..data.manifest import ManifestEntry
from ..errors import DataError
from ..files.atomic import atomic_folder

PREPARED = "prepared.tsv"  # marks a folder that `prepare` wrote


@dataclass(frozen=True)
class PrepareTask:
    """One subcommand of ``prepare``.

    Attributes:
        help: one line for the list of subcommands.
        description: the text of its ``--help``.
        run: writes OUT, given the parsed arguments.
        configure: adds its options.
        inputs: names and metavars of its input files and folders.
        replace: whether it writes a new folder (:func:`new_folder`), and so has ``--replace``.
    """

    help: str
    description: str
    run: Callable[[argparse.Namespace], None]
    configure: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    inputs: tuple[tuple[str, str], ...] = (("manifest", "MANIFEST.tsv"),)
    replace: bool = True


def add_options(parser: argparse.ArgumentParser, task: PrepareTask) -> None:
    """Add the arguments of a subcommand."""
    for name, metavar in task.inputs:
        parser.add_argument(name, metavar=metavar, type=Path)
        if name == "manifest":
            parser.add_argument(
                "--audio-root",
                metavar="ROOT",
                type=Path,
                help="folder that the paths are relative to (default: the manifest's folder)",
            )
    parser.add_argument(
        "-o", "--out", metavar="OUT", type=Path, required=True, help="the folder to write"
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=8,
        help="threads that read audio headers (default: 8)",
    )
    task.configure(parser)
    if task.replace:
        parser.add_argument("--replace", action="store_true", help="replace an earlier OUT")


@contextlib.contextmanager
def new_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to ``out`` if the block ends without an exception.

    The block must write a ``prepared.tsv``: only a folder with one can be replaced later.
    """
    check_replaceable(out, replace=replace)
    with atomic_folder(out, DataError) as folder:
        yield folder


def check_replaceable(out: Path, *, replace: bool) -> None:
    """Raise DataError if ``out`` has contents, unless `prepare` wrote it and ``replace`` is set."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / PREPARED).is_file():
        raise DataError(f"{out} exists and was not written by `prepare`; use another output folder")
    if not replace:
        raise DataError(f"{out} exists already; to replace it, add --replace")


def link(source: Path, target: Path) -> bool:
    """Make ``target`` a relative symlink to ``source``; return False where symlinks fail."""
    source = source.resolve()
    try:
        pointer = os.path.relpath(source, target.parent.resolve())
    except ValueError:  # another drive
        pointer = str(source)
    try:
        os.symlink(pointer, target, target_is_directory=source.is_dir())
    except OSError:  # a file system without symlinks
        return False
    return True


def link_or_write(source: Path, target: Path) -> bool:
    """Link an audio file, or write it as WAV where symlinks fail; return whether it is a link.

    Missing folders of ``target`` are created. Readers use the header and not the suffix.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link(source, target):
        return True
    import soundfile

    wave, rate = soundfile.read(source, dtype="int16")
    soundfile.write(target, wave, rate, subtype="PCM_16", format="WAV")
    return False


def link_folder(source: Path, target: Path) -> None:
    """Like :func:`link`, for a corpus, which is too large to copy."""
    if not link(source, target):
        raise DataError(
            f"cannot make a symlink to {source} in {target.parent}; use another file system"
        )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 file into a :func:`new_folder`."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def audio_root(args: argparse.Namespace) -> Path:
    """The folder that the manifest's paths are relative to."""
    return args.audio_root or args.manifest.parent


def speaker_of(table: Path, entry: ManifestEntry) -> str:
    """The speaker of an entry. Raises DataError if the cell is empty."""
    if not entry.cells["speaker"]:
        raise DataError(f"{table}: line {entry.line} has no speaker")
    return entry.cells["speaker"]


def audio_lengths(
    root: Path, paths: Sequence[str], jobs: int, *, bar: bool = True
) -> list[int | DataError]:
    """Read lengths in samples.

    A file that cannot be used, or is not 16 kHz mono, has an error instead.
    """
    headers = read_headers(root, paths, jobs=jobs, bar=bar)
    lengths: list[int | DataError] = []
    for path, header in zip(paths, headers, strict=True):
        if isinstance(header, DataError):
            lengths.append(header)
        elif (header.rate, header.channels) == (SAMPLE_RATE, 1):
            lengths.append(header.frames)
        else:
            problem = f"{header.rate} Hz with {header.channels} channel(s); convert it first"
            rule = f"must be {SAMPLE_RATE} Hz mono for s3prl's recipes"
            lengths.append(DataError(f"{path} {rule}, got {problem}"))
    return lengths


def read_lengths(table: Path, root: Path, entries: Sequence[ManifestEntry], jobs: int) -> list[int]:
    """Read the lengths in samples of the entries of ``table``."""
    lengths = []
    paths = [entry.path for entry in entries]
    for entry, length in zip(entries, audio_lengths(root, paths, jobs), strict=True):
        if isinstance(length, DataError):
            raise DataError(f"{table}: line {entry.line}: {length}") from length
        lengths.append(length)
    return lengths


def print_splits(splits: dict[str, list[int]]) -> None:
    """Print the utterances and hours of each split; ``splits`` has lengths in samples, 16 kHz."""
    for name, lengths in splits.items():
        print(f"{name}: {len(lengths)} utterances, {total_hours(lengths):.2f} h")
