"""Options, reading of audio headers and printing, shared by the subcommands of ``prepare``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.audio_files import total_hours
from ..data.manifest import ManifestEntry, audio_lengths


@dataclass(frozen=True)
class PrepareTask:
    """One subcommand of ``prepare``.

    Attributes:
        help: one line for the list of subcommands.
        description: the text of its ``--help``.
        configure: adds its options.
        run: runs it and returns the exit code.
        manifest: whether it reads a manifest; if not, ``configure`` adds its input arguments.
    """

    help: str
    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    manifest: bool = True


def add_common_options(parser: argparse.ArgumentParser, *, manifest: bool) -> None:
    """Add OUT and --jobs; if ``manifest``, also MANIFEST.tsv and --audio-root."""
    if manifest:
        parser.add_argument("manifest", metavar="MANIFEST.tsv", type=Path)
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


def audio_root(args: argparse.Namespace) -> Path:
    """Return the folder that the manifest's paths are relative to."""
    return args.audio_root or args.manifest.parent


def read_lengths(table: Path, root: Path, entries: list[ManifestEntry], jobs: int) -> list[int]:
    """Read the lengths in samples (:func:`..data.manifest.audio_lengths`) with a progress bar."""
    with tqdm(
        total=len(entries), unit=" files", desc="headers", delay=0.3, dynamic_ncols=True
    ) as bar:
        return audio_lengths(table, root, entries, jobs=jobs, advance=bar.update)


def print_splits(splits: dict[str, list[int]]) -> None:
    """Print the utterances and hours of each split; ``splits`` has lengths in samples, 16 kHz."""
    for name, lengths in splits.items():
        print(f"{name}: {len(lengths)} utterances, {total_hours(lengths):.2f} h")
