"""What the subcommands of ``prepare`` share: their options, the headers, the lines they print."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.audio_files import total_hours
from ..data.manifest import ManifestEntry, audio_lengths


@dataclass(frozen=True)
class Task:
    """One subcommand of ``prepare``.

    Attributes:
        help: its line in the list of tasks.
        description: what its own ``--help`` says.
        configure: adds its options.
        run: does it, and returns the exit code.
        manifest: it reads a manifest; else ``configure`` adds what it reads instead.
    """

    help: str
    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    manifest: bool = True


def add_common_options(parser: argparse.ArgumentParser, *, manifest: bool) -> None:
    """OUT and --jobs, and before them the manifest and its root where the task reads one."""
    if manifest:
        parser.add_argument("manifest", metavar="MANIFEST.tsv", type=Path)
        parser.add_argument(
            "--audio-root",
            metavar="ROOT",
            type=Path,
            help="folder that the paths are relative to (default: the manifest's folder)",
        )
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True)
    parser.add_argument("--jobs", metavar="N", type=int, default=8, help="threads (default: 8)")


def audio_root(args: argparse.Namespace) -> Path:
    """The folder that the manifest's paths are relative to."""
    return args.audio_root or args.manifest.parent


def measure_all(table: Path, root: Path, entries: list[ManifestEntry], jobs: int) -> list[int]:
    """Lengths in samples, behind a progress bar; see :func:`..data.manifest.audio_lengths`."""
    with tqdm(
        total=len(entries), unit=" files", desc="headers", delay=0.3, dynamic_ncols=True
    ) as bar:
        return audio_lengths(table, root, entries, jobs=jobs, advance=bar.update)


def print_splits(splits: dict[str, list[int]]) -> None:
    """Utterances and hours of each split; lengths are in samples at 16 kHz."""
    for name, lengths in splits.items():
        print(f"{name}: {len(lengths)} utterances, {total_hours(lengths):.2f} h")
