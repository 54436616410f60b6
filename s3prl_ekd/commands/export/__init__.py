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
    check_exists(args.checkpoint)
    return args.export(args)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``CKPT``; :func:`load_checkpoint` reads it."""
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help="a student file, states-*.ckpt, or a run's folder (its newest checkpoint)",
    )


def check_exists(checkpoint: Path) -> None:
    """Raise CheckpointError if there is no such file or folder, before torch is imported."""
    if not checkpoint.exists():
        raise CheckpointError(f"cannot read the student checkpoint {checkpoint}: no such file")


def add_heads(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the option ``--heads keep|drop``."""
    parser.add_argument(
        "--heads", choices=("keep", "drop"), default="keep", help=f"{help_text} (default: keep)"
    )


def check_output(path: Path, force: bool) -> None:
    """Raise CheckpointError if a file exists and may not be replaced."""
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists; add --force to write over it")


def load_checkpoint(checkpoint: Path) -> tuple[Path, LoadedStudent]:
    """Load a student file or a checkpoint; of a run's folder, the newest checkpoint.

    Returns:
        The path of the file, and its contents.

    Raises:
        CheckpointError: no such file, no checkpoint in the folder, or the file has no student.
    """
    from ...files.run_checkpoints import newest_checkpoint
    from ...student_file import load_student

    path = newest_checkpoint(checkpoint) if checkpoint.is_dir() else checkpoint
    if path is None:
        raise CheckpointError(f"no checkpoints (states-*.ckpt) in {checkpoint}")
    return path, load_student(path)
