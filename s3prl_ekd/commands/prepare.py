"""Convert a manifest (TSV) or a public corpus to the files that s3prl's recipes read.

A manifest is a tab-separated UTF-8 table with a header line. It needs the columns path
(relative to the manifest's folder, or to --audio-root) and split (train, dev, test); most tasks
need more columns. The audio must be 16 kHz, mono.

example:
  s3prl-ekd prepare asr my_corpus/asr.tsv -o data/corpus
  s3prl-ekd prepare pr my_corpus/pr.tsv -o data/corpus_pr --lexicon cmudict.dict
  s3prl-ekd prepare unlabeled my_corpus/all.tsv -o data/unlabeled
  s3prl-ekd prepare librispeech /data/LibriSpeech -o data/librispeech --lexicon cmudict.dict
  s3prl-ekd prepare asr --help
"""

from __future__ import annotations

import argparse

from ..data.manifest import read_manifest
from ..prepare import asr, er, pr, sid
from ..prepare.asr import TABLES, write_split_tables
from ..prepare.common import PrepareTask, add_common_options, audio_root, print_splits, read_lengths
from ..prepare.librispeech import LIBRISPEECH

UNLABELED = """\
Write length tables for distillation: OUT/len_for_bucket/{train,dev,test}.csv, with paths relative
to the manifest's folder (or --audio-root). Needs the columns path and split. No audio is copied.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each of :data:`TASKS`."""
    subparsers = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        subparser = subparsers.add_parser(
            name,
            help=task.help,
            description=task.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_common_options(subparser, manifest=task.manifest)
        task.configure(subparser)


def main(args: argparse.Namespace) -> int:
    """Run the subcommand ``args.task``."""
    return TASKS[args.task].run(args)


def _prepare_unlabeled(args: argparse.Namespace) -> int:
    entries = read_manifest(args.manifest)
    samples = read_lengths(args.manifest, audio_root(args), entries, args.jobs)
    folder = args.out / TABLES
    print_splits(write_split_tables(folder, entries, samples))
    print(f"wrote {folder}; in the YAML: libri_root: {audio_root(args)}")
    print(f"               file_path: {folder}")
    return 0


TASKS = {
    "asr": PrepareTask(
        "LibriSpeech layout with transcripts, for -d asr",
        asr.DESCRIPTION,
        asr.configure,
        asr.prepare_asr,
    ),
    "pr": PrepareTask(
        "LibriSpeech layout with a lexicon, for -d ctc",
        pr.DESCRIPTION,
        pr.configure,
        pr.prepare_pr,
    ),
    "librispeech": LIBRISPEECH,
    "sid": sid.SID,
    "voxceleb1": sid.VOXCELEB1,
    "er": er.ER,
    "iemocap": er.IEMOCAP,
    "unlabeled": PrepareTask(
        "length tables only, for distillation",
        UNLABELED,
        lambda parser: None,
        _prepare_unlabeled,
    ),
}
