"""Validate hidden-set packages of full-size two-layer students with random weights.

Three students are exported and validated one after the other: with the separate heads of three
teachers, with the head of an average, and without heads. Each head predicts three layers of width
768, as `aggregation: separate` and `average` do with layers 4, 8 and 12.

example:
  OMP_NUM_THREADS=1 python tools/package_report.py OUT_FOLDER | tee report.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from s3prl_ekd import compat

TEACHERS = ("hubert", "robust_hubert", "wavlm")
STUDENTS = {  # name -> (its heads, value of --heads)
    "separate_kept": (TEACHERS, "keep"),
    "average_kept": (("average",), "keep"),
    "dropped": (("average",), "drop"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", metavar="OUT_FOLDER", type=Path, help="folder for students and packages"
    )
    parser.add_argument("--only", choices=STUDENTS, nargs="+", default=list(STUDENTS))
    args = parser.parse_args()
    compat.apply()

    import torch

    from s3prl_ekd import cli
    from s3prl_ekd.distill.aggregation import TargetSpec
    from s3prl_ekd.distill.heads import PredictionHeads
    from s3prl_ekd.distill.student import Student
    from s3prl_ekd.distill.student_settings import StudentSettings
    from s3prl_ekd.student_file import LoadedStudent, write_student

    failed = 0
    for name in args.only:
        names, heads_option = STUDENTS[name]
        print(f"--- {name}", flush=True)
        torch.manual_seed(1337)
        student = Student(StudentSettings())
        targets = {head: TargetSpec(3, (student.width,)) for head in names}
        heads = PredictionHeads(student.width, targets)
        file, package = args.out / f"{name}.pt", args.out / name
        write_student(LoadedStudent(student, heads, targets, {"step": 0}), file)
        argv = [str(file), "-o", str(package), "--heads", heads_option, "--force"]
        cli.main(["export", "superb", *argv])
        failed += cli.main(["validate", str(package), "--timeout", "1800"])
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
