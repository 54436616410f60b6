"""The command ``s3prl-ekd COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from . import __version__
from .files import trust
from .files.renamed_keys import renamed_text
from .system.s3prl_distribution import announce_s3prl
from .system.terminal import (
    log_to_stderr,
    prepare_streams,
    printable_stdout,
    quiet_s3prl,
    show_errors,
)

logger = logging.getLogger(__name__)

# Command -> its line in `s3prl-ekd --help`. The module commands/NAME.py (with _ for -) has
# `configure(parser)` and `main(args)`. It is imported only for its own command, so that `--help`
# does not import torch.
COMMANDS = {
    "init": "write the configs and recipes that s3prl reads into a working folder",
    "doctor": "check versions, audio, devices, and which recipes can run here",
    "length-tables": "write the length tables (len_for_bucket) of folders and manifests",
    "prepare": "convert a manifest or a public corpus to the files of s3prl's recipes",
    "superb": "train and evaluate tasks of SUPERB on students, teachers and baselines",
    "report": "write tables and plots of the results of superb, with bootstrap intervals",
    "predict-zip": "pack predict.zip for SUPERB's public leaderboard",
    "probe": "probe upstreams in closed form: phones, speakers, emotions in minutes",
    "sweep": "train several configs with several seeds and compare them in a table",
    "prune": "cut a student to the units that its gates keep (DPHuBERT)",
    "merge": "average students that were distilled from different teachers",
    "export": "write a student as a file or folder for other software",
    "push": "upload a student to the Hugging Face Hub, with a model card",
    "validate": "check a package for SUPERB's hidden set in a process with torch only",
    "cost": "count parameters and MACs of an upstream or a package as SUPERB does",
    "features": "write the hidden states of audio files into one safetensors file",
    "teachers": "list the known teachers, or compare those of a config",
    "group-layers": "find groups of layers to distil by clustering each teacher's layers (SKILL)",
    "cache": "run the teachers once over a corpus and store their targets",
    "fit-units": "fit k-means units to the frames of one teacher's layer",
    "essence": "distil trained ASR models into a new one (Essence KD)",
    "recipe": "run a whole study: distillations, tasks, report; prints hours and disk first",
    "demo": "distil three teachers into a student on a synthetic corpus and evaluate four tasks",
}

# Commands of version 0.1; they work in this release, with a warning.
RENAMED = {
    "lengths": "length-tables",
    "matrix": "sweep",
    "predictions": "predict-zip",
    "layers": "group-layers",
    "units": "fit-units",
}

# Commands that read checkpoints, students or upstreams and take --trust-checkpoint.
TRUSTING = {"superb", "sweep", "export", "features", "cost", "teachers", "group-layers", "cache"}
TRUSTING |= {"probe", "fit-units", "essence", "prune", "merge", "push"}

# Commands that need s3prl in any case, which is checked first. Others may need it later.
NEED_S3PRL = (TRUSTING - {"cost"}) | {"demo", "recipe"}

EXAMPLE = """\
example:
  s3prl-ekd doctor
  s3prl-ekd init .
  run_pretrain.py -u ekd -n my_student

any other module, with ekd_student registered in s3prl:
  python -m s3prl_ekd espnet2.bin.asr_train --config train.yaml
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``s3prl-ekd``, without its commands."""
    parser = argparse.ArgumentParser(
        prog="s3prl-ekd",
        description="Distil several speech SSL teachers into one student, inside s3prl.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"s3prl-ekd {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 2 is a user's mistake."""
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    index = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    old = None
    if index is not None and argv[index] in RENAMED:
        old, argv[index] = argv[index], RENAMED[argv[index]]
    name = None if index is None else argv[index]
    log_to_stderr(logging.INFO)
    if old:
        logger.warning("command %s", renamed_text(old, RENAMED[old]))
    if name == "bench":
        parser.error("bench is not a command; in a checkout, type: python -m tools.bench")
    quiet_s3prl()
    with show_errors(), printable_stdout():
        return _run(parser, subparsers, name, argv)


def _run(
    parser: argparse.ArgumentParser,
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str | None,
    argv: list[str],
) -> int:
    """Import the module of the command ``name``, parse ``argv`` and run it."""
    for command, help_line in COMMANDS.items():
        module = None
        if command == name:
            module = importlib.import_module(f"s3prl_ekd.commands.{command.replace('-', '_')}")
            # other commands leave --trust-checkpoint to the parser, which rejects it
            argv = (
                trust.read_option(argv) if command in TRUSTING else [*trust.read_option([]), *argv]
            )
        subparser = subparsers.add_parser(
            command,
            help=help_line,
            description=module.__doc__ if module else help_line,
            epilog=trust.HELP if command in TRUSTING else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module:
            module.configure(subparser)
            subparser.set_defaults(run=module.main)
    args = parser.parse_args(argv)  # prints --help, too
    if name in NEED_S3PRL:
        announce_s3prl()
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
