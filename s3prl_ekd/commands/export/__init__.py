"""Export a trained student to another format.

example:
  s3prl-ekd export student result/pretrain/my_student/states-10000.ckpt -o student.safetensors
  s3prl-ekd export superb student.safetensors -o my_package
  s3prl-ekd export superb --help
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...teachers.student_source import StudentSource, check_student, find_student

if TYPE_CHECKING:
    from ...student_file import LoadedStudent

# KIND -> what it writes, and its line in `export --help`. Each module KIND.py has a docstring and
# `main(args)`, like a command; it imports torch inside `main`, so that `--help` is fast.
KINDS = {
    "student": ("FILE", "a student file for -u ekd_student"),
    "superb": ("DIR", "a package for SUPERB's hidden set: a folder that needs only torch"),
    "hf": ("DIR", "a folder for transformers: AutoModel.from_pretrained(FOLDER)"),
    "onnx": ("FILE", "an ONNX file with dynamic batch and time"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each of :data:`KINDS`."""
    subparsers = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (output, line) in KINDS.items():
        module = importlib.import_module(f"{__package__}.{name}")
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_checkpoint(subparser)
        subparser.add_argument("-o", "--output", metavar=output, type=Path, required=True)
        module.configure(subparser)
        subparser.add_argument("--force", action="store_true", help=f"replace an existing {output}")
        subparser.set_defaults(export=module.main)


def main(args: argparse.Namespace) -> int:
    """Run the export of the given KIND; return its exit code."""
    check_student(args.checkpoint)
    return args.export(args)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``CKPT``; :func:`load_checkpoint` reads it."""
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help="a student file, states-*.ckpt, a run's folder (its newest checkpoint), a Hugging "
        "Face folder, or an id on the Hugging Face Hub (ORG/NAME or ORG/NAME@REVISION)",
    )


def add_heads(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the option ``--heads keep|drop``."""
    parser.add_argument(
        "--heads", choices=("keep", "drop"), default="keep", help=f"{help_text} (default: keep)"
    )


def check_output(path: Path, force: bool) -> None:
    """Raise CheckpointError if a file exists and may not be replaced."""
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; add --force to write over it")


def heads_text(loaded: LoadedStudent, kept: bool) -> str:
    """What became of the prediction heads of a file."""
    return "no heads" if loaded.heads is None else f"heads {'kept' if kept else 'dropped'}"


def load_checkpoint(checkpoint: Path) -> tuple[StudentSource, LoadedStudent]:
    """Find and load a student.

    Raises:
        CheckpointError: see :func:`.find_student`, or it has no student.
    """
    source = find_student(checkpoint)
    return source, source.load()
