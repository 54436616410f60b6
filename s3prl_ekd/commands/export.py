"""Write a trained student as a file that stands alone.

The file holds plain tensors and plain settings and loads with `weights_only=True`; it is what
`run_downstream.py -u ekd_student -k FILE` reads, as it reads a run's own checkpoints.

example:
  s3prl-ekd export student result/pretrain/my_student/states-10000.ckpt -o student.pt
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def configure(parser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    student = kinds.add_parser("student", help="a student file for -u ekd_student")
    student.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="states-*.ckpt, or a run's folder"
    )
    student.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    student.add_argument(
        "--heads",
        choices=("keep", "drop"),
        default="keep",
        help="the prediction heads: keep them for -s hidden_states_and_heads (default: keep)",
    )
    student.add_argument("--force", action="store_true", help="write over an existing FILE")


def main(args) -> int:
    from ..checkpoints import newest
    from ..export.student_file import load_student, write_student

    path = args.checkpoint
    if path.is_dir():
        path = newest(path)
        if path is None:
            raise CheckpointError(f"there are no checkpoints (states-*.ckpt) in {args.checkpoint}")
    if args.output.exists() and not args.force:
        raise CheckpointError(f"{args.output} exists; add --force to write over it")
    loaded = load_student(path)
    keep = args.heads == "keep" and loaded.heads is not None
    write_student(loaded, args.output, keep_heads=keep)
    count = sum(p.numel() for p in loaded.student.parameters())
    if keep:
        count += sum(p.numel() for p in loaded.heads.parameters())
    print(f"{path} (step {loaded.about.get('step')}) -> {args.output}")
    print(f"{count:,} parameters, heads {'kept' if keep else 'dropped'}")
    print(f"next: run_downstream.py -m train -u ekd_student -k {args.output} -d asr -n my_asr")
    return 0
