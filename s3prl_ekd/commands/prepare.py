"""Convert a manifest or a public corpus to the files that s3prl's recipes read.

A manifest is a tab-separated UTF-8 table with a header line. It needs the columns path
(relative to the manifest's folder, or to --audio-root) and split (train, dev, test); most tasks
need more columns. With the columns offset and duration (seconds), a line is a segment of a file.
Common Voice's tables, Kaldi folders and lhotse's cuts (.jsonl.gz) are manifests, too; give one for
each split. The recipes need 16 kHz mono: other audio is converted with --convert.

example:
  s3prl-ekd prepare asr my_corpus/asr.tsv -o data/corpus
  s3prl-ekd prepare asr kaldi/train kaldi/dev kaldi/test -o data/corpus
  s3prl-ekd prepare pr my_corpus/pr.tsv -o data/corpus_pr --lexicon cmudict.dict
  s3prl-ekd prepare unlabeled my_corpus/all.tsv -o data/unlabeled
  s3prl-ekd prepare librispeech /data/LibriSpeech -o data/librispeech --lexicon cmudict.dict
  s3prl-ekd prepare asr --help
"""

from __future__ import annotations

import argparse

from ..data.lengths import measure_audio, write_table
from ..data.manifest import SPLITS
from ..data.tables import Utterance
from ..errors import DataError, printable
from ..files.atomic import make_folder
from ..prepare.alignments import ALIGNMENTS
from ..prepare.asr import ASR, TABLES
from ..prepare.asv import ASV, VOXCELEB1_ASV
from ..prepare.common import (
    PrepareTask,
    add_options,
    check_replaceable,
    manifest_of,
    print_splits,
)
from ..prepare.er import ER, IEMOCAP
from ..prepare.ic import FLUENT_COMMANDS, IC
from ..prepare.ks import KS, SPEECH_COMMANDS
from ..prepare.librispeech import LIBRISPEECH
from ..prepare.pr import PR
from ..prepare.qbe import QBE, QUESST14
from ..prepare.sd import LIBRI2MIX, SD
from ..prepare.sf import SF, SNIPS
from ..prepare.sid import SID, VOXCELEB1

UNLABELED = """\
Write length tables for distillation: OUT/len_for_bucket/{train,dev,test}.csv, with paths relative
to the manifest's folder (or --audio-root). Needs the columns path and split. No audio is copied;
training resamples other rates than 16 kHz. Unlike length-tables, a bad file is an error.
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
        add_options(subparser, task)


def main(args: argparse.Namespace) -> int:
    """Run the subcommand ``args.task``."""
    task = TASKS[args.task]
    if task.replace:  # checked here already, before minutes of reading
        check_replaceable(args.out, replace=args.replace)
    task.run(args)
    return 0


def _prepare_unlabeled(args: argparse.Namespace) -> None:
    manifest = manifest_of(args, ("path", "split"))
    parts = [entry.part("") for entry in manifest.entries]
    rows: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    measured = measure_audio(manifest.root, parts, jobs=args.jobs, bar=True)
    for entry, audio in zip(manifest.entries, measured, strict=True):
        if isinstance(audio, DataError):
            raise DataError(f"{entry.location}: {audio}") from audio
        rows[entry.split].append(Utterance(entry.path, audio.samples, entry.offset))
    folder = args.out / TABLES
    make_folder(folder)
    for split, own in rows.items():
        if own:
            write_table(folder / f"{split}.csv", own)
            print_splits({split: [row.length for row in own]})
    print(f"wrote {folder}; in the YAML: libri_root: {printable(str(manifest.root))}")
    print(f"               file_path: {folder}")


TASKS = {
    "asr": ASR,
    "pr": PR,
    "librispeech": LIBRISPEECH,
    "sid": SID,
    "voxceleb1": VOXCELEB1,
    "er": ER,
    "iemocap": IEMOCAP,
    "ks": KS,
    "speech_commands": SPEECH_COMMANDS,
    "ic": IC,
    "fluent_commands": FLUENT_COMMANDS,
    "sf": SF,
    "snips": SNIPS,
    "sd": SD,
    "libri2mix": LIBRI2MIX,
    "asv": ASV,
    "voxceleb1_asv": VOXCELEB1_ASV,
    "qbe": QBE,
    "quesst14": QUESST14,
    "alignments": ALIGNMENTS,
    "unlabeled": PrepareTask(
        "length tables only, for distillation", UNLABELED, _prepare_unlabeled, replace=False
    ),
}
