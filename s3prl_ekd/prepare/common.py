"""What the subcommands of ``prepare`` share: options, output folders, lengths of audio files."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ..data.audio_files import SAMPLE_RATE, AudioPart, total_hours
from ..data.audio_writer import write_audio
from ..data.lengths import MeasuredAudio, measure_audio
from ..data.manifest import Manifest, ManifestEntry, read_manifest
from ..errors import DataError
from ..files.atomic import atomic_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")
OVERSHOOT = 1.05  # peak that resampled audio of full scale may have
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
    inputs: tuple[tuple[str, str], ...] = (("manifest", "MANIFEST"),)
    replace: bool = True


def add_options(parser: argparse.ArgumentParser, task: PrepareTask) -> None:
    """Add the arguments of a subcommand."""
    for name, metavar in task.inputs:
        if name != "manifest":
            parser.add_argument(name, metavar=metavar, type=Path)
            continue
        parser.add_argument(
            name,
            metavar=metavar,
            nargs="+",
            help="a table (.tsv), a Kaldi folder or lhotse's cuts; several with a split each",
        )
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


def link_folder(source: Path, target: Path) -> None:
    """Like :func:`link`, for a corpus, which is too large to copy."""
    if not link(source, target):
        raise DataError(
            f"cannot make a symlink to {source} in {target.parent}; use another file system"
        )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a UTF-8 file into a :func:`new_folder`."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def add_convert_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that :func:`read_audio_parts` reads."""
    parser.add_argument(
        "--convert",
        action="store_true",
        help="write audio that is not 16 kHz mono as 16 kHz mono files (default: an error)",
    )


def manifest_of(args: argparse.Namespace, columns: Sequence[str]) -> Manifest:
    """Read the manifests of a command."""
    return read_manifest(args.manifest, columns=columns, audio_root=args.audio_root)


def speaker_of(entry: ManifestEntry) -> str:
    """The speaker of an entry. Raises DataError if the cell is empty."""
    if not entry.cells["speaker"]:
        raise DataError(f"{entry.location} has no speaker")
    return entry.cells["speaker"]


@dataclass(frozen=True)
class PreparedAudio:
    """The audio of an utterance, and how it gets into the folder that `prepare` writes.

    Attributes:
        part: a file, or a segment of one.
        samples: its length at 16 kHz.
        write: whether a new file is written. Otherwise the file itself is linked or copied.
    """

    part: AudioPart
    samples: int
    write: bool = False

    @property
    def suffix(self) -> str:
        """Suffix of the file in the folder, such as ``.flac``."""
        return ".flac" if self.write else Path(self.part.path).suffix.lower()

    def place(self, target: Path, *, copy: bool = False) -> bool:
        """Link, copy or write the audio to ``target``; return whether it is no link.

        Missing folders of ``target`` are created. Readers use the header and not the suffix.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.write:
            convert_audio(self.part, target)
        elif copy or not link(Path(self.part.path), target):
            shutil.copyfile(self.part.path, target)
        else:
            return False
        return True


def placing(items: Sequence[T]) -> Iterable[T]:
    """Iterate over the utterances whose audio is placed, with a progress bar if it takes long."""
    return tqdm(items, desc="audio", unit=" files", delay=1.0, dynamic_ncols=True)


def convert_audio(part: AudioPart, target: Path) -> None:
    """Write a file or segment as 16 kHz mono, 16 bits; exact if the source is.

    Audio beyond full scale, which floating-point files may have, is scaled to it, with a warning.
    """
    from ..data.audio import read_audio  # torch; not for prepare --help

    wave = read_audio(part)
    peak = float(wave.abs().max())
    if peak > OVERSHOOT:
        logger.warning("%s exceeds full scale (peak %.2f): scaled to 1", part, peak)
        wave = wave / peak
    write_audio(target, (wave * 32768).round().clamp(-32768, 32767).short().numpy())


def audio_lengths(
    root: Path, paths: Sequence[str], jobs: int, locations: Sequence[str] = ()
) -> list[int]:
    """Read the lengths in samples of files, with a progress bar.

    Args:
        locations: where each file is listed, for messages; "": the file alone says enough.

    Raises:
        DataError: a file cannot be used, or is not 16 kHz mono.
    """
    lengths = []
    for i, length in enumerate(checked_lengths(root, paths, jobs)):
        if isinstance(length, DataError):
            location = locations[i] if locations else ""
            raise DataError(f"{location}: {length}") if location else length
        lengths.append(length)
    return lengths


def checked_lengths(root: Path, paths: Sequence[str], jobs: int) -> list[int | DataError]:
    """The same as :func:`audio_lengths`, with errors in place of lengths."""
    parts = [AudioPart(path) for path in paths]
    checked = zip(paths, measure_audio(root, parts, jobs=jobs, bar=True), strict=True)
    return [_check_16k_mono(path, audio) for path, audio in checked]


def _check_16k_mono(
    name: str, audio: MeasuredAudio | DataError, advice: str = "convert it first"
) -> int | DataError:
    if isinstance(audio, DataError) or audio.is_16k_mono:
        return audio if isinstance(audio, DataError) else audio.samples
    problem = f"{audio.header.rate} Hz with {audio.header.channels} channel(s); {advice}"
    return DataError(f"{name} must be {SAMPLE_RATE} Hz mono for s3prl's recipes, got {problem}")


def read_audio_parts(
    args: argparse.Namespace, manifest: Manifest, entries: Sequence[ManifestEntry]
) -> list[PreparedAudio]:
    """Read the lengths of entries of a manifest.

    Segments get files of their own, and so does, with ``--convert``, other audio than 16 kHz mono.

    Raises:
        DataError: a file cannot be used, or is not 16 kHz mono.
    """
    parts = [AudioPart(entry.path, entry.offset, entry.length) for entry in entries]
    result = []
    measured = measure_audio(manifest.root, parts, jobs=args.jobs, bar=True)
    for entry, audio in zip(entries, measured, strict=True):
        converts, samples = False, _check_16k_mono(entry.path, audio, "add --convert")
        if args.convert and isinstance(audio, MeasuredAudio):
            converts, samples = not audio.is_16k_mono, audio.samples
        if isinstance(samples, DataError):
            raise DataError(f"{entry.location}: {samples}") from samples
        part = entry.part(manifest.root)
        if part.offset is not None:
            part = part._replace(length=samples)  # it may have ended after its file
        result.append(PreparedAudio(part, samples, converts or part.offset is not None))
    return result


def print_splits(splits: dict[str, list[int]]) -> None:
    """Print the utterances and hours of each split; ``splits`` has lengths in samples, 16 kHz."""
    for name, lengths in splits.items():
        print(f"{name}: {len(lengths)} utterances, {total_hours(lengths):.2f} h")
