"""``s3prl-ekd COMMAND``: everything around the two scripts of s3prl."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from . import __version__
from .files import trust
from .system.terminal import errors_shown, log_to_stderr, plain_stdout, prepare_streams, quiet_s3prl

# name -> the line that `s3prl-ekd --help` shows. The module commands/NAME.py has
# `configure(parser)` and `main(args)`; it is imported only when its command is called,
# so that `--help` never waits for torch.
COMMANDS = {
    "init": "write what s3prl reads from the working folder: configs and recipes",
    "doctor": "versions, shims, audio, devices, and which recipes could run here",
    "lengths": "write length tables (len_for_bucket) for a folder of audio",
    "prepare": "turn a manifest (TSV) or a public corpus into what s3prl's recipes read",
    "superb": "train and evaluate PR, SID, ER, ASR on students, teachers and baselines",
    "report": "tables and plots of what superb has run, with bootstrap intervals",
    "predictions": "pack predict.zip for SUPERB's public leaderboard",
    "matrix": "distil with several configs and seeds, and compare them in a table",
    "export": "write a student as a file or folder that others can use",
    "validate": "check a package for SUPERB's hidden set, in a process that has only torch",
    "cost": "parameters and MACs of an upstream or a package, as SUPERB's board counts them",
    "features": "write the hidden states of audio files into one safetensors file",
    "teachers": "list the teachers there are, or look into those of a config",
    "layers": "find groups of layers to distil, by clustering each teacher's layers (SKILL)",
    "cache": "run the teachers once over a corpus and store their targets for all later steps",
    "units": "fit k-means units on the frames of one teacher's layer",
    "essence": "distil finished downstream models into one: the essential soft outputs and labels",
    "demo": "the whole way on a synthetic corpus: three teachers, one student, four tasks",
}

# Those that read runs, students or upstreams; see files/trust.py.
TRUSTING = {"superb", "matrix", "export", "features", "cost", "teachers", "layers", "cache"}
TRUSTING |= {"units", "essence"}

EXAMPLE = """\
example:
  s3prl-ekd doctor
  s3prl-ekd init .
  run_pretrain.py -u ekd -n my_student
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands named, and only the chosen one's options loaded."""
    parser = argparse.ArgumentParser(
        prog="s3prl-ekd",
        description="Distil several speech SSL teachers into one student, inside s3prl.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"s3prl-ekd {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (2 for a user's mistake)."""
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    if wanted == "bench":
        parser.error("bench is no command any more; in a checkout, type: python -m tools.bench")
    for name, help_line in COMMANDS.items():
        command = None
        if name == wanted:
            command = importlib.import_module(f"s3prl_ekd.commands.{name}")
            # of the others the parser says that they have no such option
            argv = trust.take(argv) if name in TRUSTING else [*trust.take([]), *argv]
        subparser = subparsers.add_parser(
            name,
            help=help_line,
            description=command.__doc__ if command else help_line,
            epilog=trust.HELP if name in TRUSTING else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command:
            command.configure(subparser)
            subparser.set_defaults(run=command.main)
    args = parser.parse_args(argv)
    log_to_stderr(logging.INFO)
    quiet_s3prl()
    with errors_shown(), plain_stdout():
        return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
