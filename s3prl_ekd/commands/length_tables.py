"""Write length tables (len_for_bucket), which s3prl's datasets read, for audio or manifests.

Every FLAC, WAV, Ogg, Opus and MP3 file below the folder DATA gets a row: its path relative to DATA
and its length in samples at 16 kHz. If all audio is in folders with names of splits (LibriSpeech:
train-clean-100, dev-clean, ...), each folder gets a table; otherwise there is a single table.
Unusable files are listed in OUT/skipped.txt.

DATA may also be one or more manifests: tables (.tsv; Common Voice's too), Kaldi folders with
wav.scp, or lhotse's cuts (.jsonl.gz). Segments of files get a row each, with the column offset.
There is a table for each split of a manifest, or for each Kaldi folder.

example:
  s3prl-ekd length-tables /data/LibriSpeech -o data/len_for_bucket
  s3prl-ekd length-tables /data/my_audio -o data/len_for_bucket --name train
  s3prl-ekd length-tables /data/kaldi/train /data/kaldi/dev -o data/len_for_bucket

Then set in the YAML: libri_root: DATA (or the folder printed), and file_path (or bucket_file): OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.lengths import write_length_tables
from ..errors import printable


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("data", metavar="DATA", nargs="+", help="a folder of audio, or manifests")
    add("--audio-root", metavar="ROOT", type=Path, help="folder that a manifest's paths are below")
    add("-o", "--out", metavar="OUT", type=Path, required=True, help="folder for the tables")
    add("--jobs", metavar="N", type=int, default=8, help="threads (default: %(default)s)")
    add("--name", help="write a single table, NAME.csv")
    add("--single", action="store_true", help="always write a single table")


def main(args: argparse.Namespace) -> int:
    """Write the tables and print a summary; see :func:`write_length_tables`."""
    tables = write_length_tables(
        args.data,
        args.out,
        name=args.name,
        single=args.single,
        audio_root=args.audio_root,
        jobs=args.jobs,
        bar=True,
    )
    print(tables.summary())
    print(f"wrote {args.out}; in the YAML: libri_root: {printable(str(tables.root))}")
    print(f"               file_path: {args.out}")
    return 0
