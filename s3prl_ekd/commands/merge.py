"""Average students that were distilled from different teachers (arXiv 2505.13270).

Each CKPT is a student file, a checkpoint or a run's folder. The students have one size, and their
trainings began with the same weights; otherwise their hidden units are unrelated, and the command
refuses. Training settings, such as dropout, may differ; the first student's are kept. Runs begin
with the same weights if

* every run has the same `init.teacher`. It is one of the run's teachers; a teacher of `weight: 0`
  teaches nothing, but may give the first weights:
    teachers: {hubert: {model: hubert_base, weight: 0}, wavlm: {model: wavlm_base_plus}}
    init: {teacher: hubert}
* or every run begins with one student file:
    student: {kind: file, file: START.pt, keep_heads: false}
* or every run has `init: {teacher: null}`, one `student` and one --seed.

FILE is a student file without prediction heads, since each student's heads predict its own
teachers.

Paper: interpolation of students with equal first weights. Ours: more than two students, and equal
weights unless --weights gives others.

example:
  s3prl-ekd merge result/pretrain/of_hubert result/pretrain/of_wavlm -o merged.pt
  s3prl-ekd merge a.pt b.pt -o merged.pt --weights 0.7 0.3
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..teachers.student_source import check_student
from .export import check_output, load_checkpoint


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.usage = (
        "%(prog)s CKPT CKPT [CKPT ...] -o FILE [--weights W W ...] [--assume-same-start] [--force]"
    )
    add = parser.add_argument
    add(
        "checkpoints", metavar="CKPT", type=Path, nargs="+",
        help="two or more student files, states-*.ckpt, or runs' folders (their newest checkpoint)",
    )  # fmt: skip
    add(
        "-o", "--output", metavar="FILE", type=Path, required=True,
        help="the student file to write, .pt or .safetensors",
    )  # fmt: skip
    add(
        "--weights", metavar="W", type=float, nargs="+", action="extend",
        help="a weight for each CKPT, after the CKPTs; divided by their sum (default: equal)",
    )  # fmt: skip
    add(
        "--assume-same-start", action="store_true",
        help="accept files without a record of their initial weights (of older versions)",
    )  # fmt: skip
    add("--force", action="store_true", help="replace an existing FILE")


def main(args: argparse.Namespace) -> int:
    """Write the student file; return exit code 0."""
    for checkpoint in args.checkpoints:
        check_student(checkpoint)

    from ..export.merge import Member, merge, normalised
    from ..student_file import write_student

    if not args.output.name or args.output.is_dir():
        raise ConfigError(f"-o {args.output}: expected a file name, such as merged.pt")
    if len(args.checkpoints) < 2:
        raise ConfigError("expected at least two students to merge, got 1")
    normalised(args.weights, len(args.checkpoints))  # before files are read
    check_output(args.output, args.force)
    found = [load_checkpoint(checkpoint) for checkpoint in args.checkpoints]
    members = [Member(source.path, loaded) for source, loaded in found]
    if args.output.resolve() in [member.path.resolve() for member in members]:
        raise CheckpointError(
            f"-o {args.output} is one of the students to merge; write the merged one to another "
            "file"
        )
    merged = merge(members, args.weights, args.assume_same_start)
    write_student(merged, args.output)
    for member, part in zip(members, merged.about["merged"], strict=True):
        print(f"{part['weight']:.3f}  {member.path}")
    count = sum(parameter.numel() for parameter in merged.student.parameters())
    print(f"-> {args.output}: {count:,} parameters, no prediction heads")
    if "assumed_same_start" in merged.about:
        print("initial weights: assumed to be the same (--assume-same-start)")
    path = shlex.quote(str(args.output))
    print(f"next: run_downstream.py -m train -u ekd_student -k {path} -d asr -n my_asr")
    return 0
