"""Write length tables (len_for_bucket), which s3prl's datasets read, for a folder of audio.

Every FLAC, WAV, Ogg and Opus file below DIR gets a row: its path relative to DIR and its
length in samples at 16 kHz. If all audio is in folders with names of splits (LibriSpeech:
train-clean-100, dev-clean, ...), each folder gets a table; otherwise there is a single table.
Unusable files are listed in OUT/skipped.txt.

example:
  s3prl-ekd length-tables /data/LibriSpeech -o data/len_for_bucket
  s3prl-ekd length-tables /data/my_audio -o data/len_for_bucket --name train

Then set in the YAML: libri_root: DIR, and file_path (or bucket_file): OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.lengths import write_length_tables


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="folder of audio")
    add("-o", "--out", metavar="OUT", type=Path, required=True, help="folder for the tables")
    add("--jobs", metavar="N", type=int, default=8, help="threads (default: %(default)s)")
    add("--name", help="write a single table, NAME.csv")
    add("--single", action="store_true", help="always write a single table, named after DIR")


def main(args: argparse.Namespace) -> int:
    """Write the tables and print a summary; see :func:`write_length_tables`."""
    tables = write_length_tables(
        args.folder, args.out, name=args.name, single=args.single, jobs=args.jobs, bar=True
    )
    print(tables.summary())
    print(f"wrote {args.out}")
    return 0
