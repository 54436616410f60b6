"""Export a trained student to a single file of tensors and settings, without training state.

`run_downstream.py -u ekd_student -k FILE` loads it. FILE.safetensors is written in safetensors
format: loading it runs no code, with any version of torch. Any other name, such as FILE.pt, is
written by torch.save and loads with `weights_only=True`.

CKPT may also be a Hugging Face folder with a student's architecture (from `export hf`, or
DistilHuBERT).

example:
  s3prl-ekd export student result/pretrain/my_student/states-10000.ckpt -o student.safetensors
  s3prl-ekd export student my_student_hf -o student.safetensors
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError

if TYPE_CHECKING:
    from ...student_file import LoadedStudent


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export student``."""
    add_checkpoint(parser)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    add_heads(parser, "the prediction heads; -s hidden_states_and_heads needs them")
    parser.add_argument("--force", action="store_true", help="overwrite an existing FILE")


def main(args: argparse.Namespace) -> int:
    """Write the file; return exit code 0."""
    from ...student_file import write_student

    if args.output.exists() and not args.force:
        raise CheckpointError(f"{args.output} exists; add --force to write over it")
    if (args.checkpoint / "config.json").is_file():  # a run's folder has no such file
        from ...export.huggingface import load_hf_student

        path, loaded = args.checkpoint, load_hf_student(args.checkpoint)
    else:
        path, loaded = load_checkpoint(args.checkpoint)
    heads = loaded.heads if args.heads == "keep" else None
    write_student(loaded, args.output, keep_heads=heads is not None)
    count = sum(p.numel() for p in loaded.student.parameters())
    if heads is not None:
        count += sum(p.numel() for p in heads.parameters())
    step = loaded.about.get("step")
    print(f"{path}{f' (step {step})' if step is not None else ''} -> {args.output}")
    print(f"{count:,} parameters, heads {'kept' if heads else 'dropped'}")
    path = shlex.quote(str(args.output))
    print(f"next: run_downstream.py -m train -u ekd_student -k {path} -d asr -n my_asr")
    return 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``CKPT``; :func:`load_checkpoint` reads it."""
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help="a student file, states-*.ckpt, or a run's folder (its newest checkpoint)",
    )


def add_heads(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the option ``--heads keep|drop``."""
    parser.add_argument(
        "--heads", choices=("keep", "drop"), default="keep", help=f"{help_text} (default: keep)"
    )


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
