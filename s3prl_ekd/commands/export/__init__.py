"""Export a trained student to another format.

example:
  s3prl-ekd export student result/pretrain/my_student/states-10000.ckpt -o student.safetensors
  s3prl-ekd export superb student.safetensors -o my_package
  s3prl-ekd export superb --help
"""

from __future__ import annotations

import argparse
import importlib

# KIND -> its line in `export --help`. Each module KIND.py has a docstring, `configure(parser)` and
# `main(args)`, like a command; it imports torch inside `main`, so that `--help` is fast.
KINDS = {
    "student": "a student file for -u ekd_student",
    "superb": "a package for SUPERB's hidden set: a folder that needs only torch",
    "hf": "a folder for transformers: AutoModel.from_pretrained(FOLDER)",
    "onnx": "an ONNX file with dynamic batch and time",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each of :data:`KINDS`."""
    subparsers = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, line in KINDS.items():
        module = importlib.import_module(f"{__package__}.{name}")
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(subparser)
        subparser.set_defaults(export=module.main)


def main(args: argparse.Namespace) -> int:
    """Run the export of the given KIND; return its exit code."""
    return args.export(args)
