"""Write length tables (len_for_bucket) for a folder of audio, as s3prl's datasets read them.

Every FLAC, WAV, Ogg and Opus file below DIR gets a row: its path relative to DIR and its
length in samples at 16 kHz. Where all audio lies in folders called like splits (LibriSpeech:
train-clean-100, dev-clean, ...) each gets a table of its own; otherwise there is one table.
Files that cannot be read are named in OUT/skipped.txt.

example:
  s3prl-ekd lengths /data/LibriSpeech -o data/len_for_bucket
  s3prl-ekd lengths /data/my_audio -o data/len_for_bucket --name train

Then, in the YAML: libri_root is DIR, file_path (or bucket_file) is OUT.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..data.lengths import write_length_tables


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with audio below it")
    parser.add_argument(
        "-o", "--out", metavar="OUT", type=Path, required=True, help="folder for the tables"
    )
    parser.add_argument("--jobs", metavar="N", type=int, default=8, help="threads (default: 8)")
    parser.add_argument("--name", help="write one table, called NAME.csv")
    parser.add_argument(
        "--single", action="store_true", help="write one table, called like DIR, in any case"
    )


def main(args: argparse.Namespace) -> int:
    """Write the tables and print what is in them; see :func:`write_length_tables`."""
    with contextlib.ExitStack() as stack:

        def start(total: int) -> Callable[[int], object]:
            bar = tqdm(total=total, unit=" files", desc="headers", delay=0.3, dynamic_ncols=True)
            return stack.enter_context(bar).update

        tables = write_length_tables(
            args.folder,
            args.out,
            name=args.name,
            single=args.single,
            jobs=args.jobs,
            progress=start,
        )
    print(tables.summary())
    print(f"wrote {args.out}")
    return 0
