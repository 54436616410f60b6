"""Measure the evaluation of a tiny student on a synthetic corpus: CPU seconds of whole commands.

- s3prl: a training of PR by s3prl's own script, whose import includes transformers;
- cold, warm: the same by `run_downstream.py --cache-features`, with an empty and a full cache;
- superb: `s3prl-ekd superb --recipes tiny` over four tasks; uncached: with `--no-cache-features`.

All run once in each turn, one after another, with one thread. CPU seconds are user and system time
of the command and all its child processes. Ratios are medians over turns, with quartiles. With
--against, `superb` of another installation runs in each turn too. Prints a Markdown table. Linux
only.

example:
  python -m tools.bench.evaluation --turns 3
  python -m tools.bench.evaluation --steps 100 --against /data/before/.venv/bin/python
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from s3prl_ekd.demo.corpus import make_corpus
from s3prl_ekd.demo.labels import make_labels
from s3prl_ekd.distill.aggregation import AGGREGATIONS, TeacherShape
from s3prl_ekd.distill.heads import PredictionHeads
from s3prl_ekd.distill.student import Student
from s3prl_ekd.errors import SetupError
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.superb.plan import steps_overrides
from s3prl_ekd.system.terminal import prepare_streams, show_errors

from .report import markdown, quartiles

# s3prl's script with this package's shims, without which it does not run, and its upstreams. The
# two experts import transformers, as in an unmodified s3prl.
S3PRL = """
from s3prl_ekd import compat
compat.apply()
import s3prl.upstream.hf_hubert.expert, s3prl.upstream.hf_wav2vec2.expert
from s3prl_ekd.registration import register
register()
from s3prl.run_downstream import main
main()
"""
STUDENT, TASKS = "student.pt", ("pr", "sid", "er", "asr")
PR = (
    "config.downstream_expert.corpus.path='data/corpus'",
    "config.downstream_expert.corpus.lexicon=['data/labels/lexicon.txt']",
)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--against", metavar="PYTHON", help="the Python of another installation to compare with")
    add("--turns", type=int, default=3, metavar="N", help="default: 3")
    add("--steps", type=int, metavar="N", help="of each training (default: the recipes')")
    add("--utterances", type=int, default=400, metavar="N", help="for training (default: 400)")
    add("--only", nargs="+", metavar="NAME", help="rows of the table to measure")
    args = parser.parse_args(argv)
    prepare_streams()
    with show_errors(), tempfile.TemporaryDirectory(prefix="s3prl_ekd_bench_") as name:
        if args.turns < 1 or args.utterances < 40:
            raise SetupError(
                f"--turns {args.turns} --utterances {args.utterances}: --turns must be 1 or more, "
                "--utterances 40 or more"
            )
        folder = Path(name)
        prepare(folder, args.utterances)
        seconds: list[dict[str, float]] = []
        for turn in tqdm(range(args.turns), unit="turn"):
            runs = commands(turn, args.steps, args.against)
            unknown = set(args.only or ()) - runs.keys()
            if unknown:
                raise SetupError(f"--only {' '.join(unknown)}: expected some of {', '.join(runs)}")
            runs = {name: run for name, run in runs.items() if name in (args.only or runs)}
            seconds.append({name: cpu_seconds(run, folder) for name, run in runs.items()})
        print(table(seconds))
    return 0


def prepare(folder: Path, utterances: int) -> None:
    """Write the corpus, what ``init`` writes, and a student with random weights and heads."""
    corpus, labels = folder / "data/corpus", folder / "data/labels"
    splits = {"train-clean": utterances, "dev-clean": 40, "test-clean": 40}
    make_corpus(corpus, utterances=splits)
    make_labels(corpus, labels, moods=max(4, utterances // 10))
    for argv in (
        ["init", "."],
        ["prepare", "sid", "data/labels/sid.tsv", "--audio-root", "data/corpus", "-o", "data/sid"],
        ["prepare", "er", "data/labels/er.tsv", "--audio-root", "data/labels", "-o", "data/er"],
    ):
        cpu_seconds([sys.executable, "-m", "s3prl_ekd", *argv], folder)
    model = load_model_config(folder / "pretrain/ekd/tiny_model.yaml")
    torch.manual_seed(0)
    student = Student(model.student)
    shape = TeacherShape(((2,), (4,), (6,)), student.width)
    targets = AGGREGATIONS[model.aggregation](dict.fromkeys(model.teachers, shape)).specs
    heads = PredictionHeads(student.width, targets)
    write_student(LoadedStudent(student, heads, targets, {}), folder / STUDENT)


def commands(turn: int, steps: int | None, against: str | None) -> dict[str, list[str]]:
    """The commands of a turn, in order: row of the table -> argv."""
    override = ",,".join([*PR, steps_overrides(steps)] if steps else PR)
    pr = ["-m", "train", "-u", "ekd_student", "-k", STUDENT, "-d", "ctc", "--device", "cpu"]
    pr += ["-c", "downstream/ctc/tiny.yaml", "-o", override]
    superb = ["superb", STUDENT, "--recipes", "tiny", "--override", "pr=" + ",,".join(PR)]
    for task in TASKS if steps else ():
        superb += ["--steps", f"{task}={steps}"]
    cached = ["run_downstream.py", *pr, "--cache-features", f"features{turn}"]
    package = [sys.executable, "-m", "s3prl_ekd"]
    runs = {
        "s3prl": [sys.executable, "-c", S3PRL, *pr, "-p", f"s3prl{turn}"],
        "cold": [*package, *cached, "-p", f"cold{turn}"],
        "warm": [*package, *cached, "-p", f"warm{turn}"],
        "superb": [*package, *superb, "-o", f"superb{turn}"],
        "superb, uncached": [*package, *superb, "--no-cache-features", "-o", f"uncached{turn}"],
    }
    if against:
        other = [against, "-m", "s3prl_ekd", *superb]
        runs["superb, other"] = [*other, "-o", f"other{turn}"]
        runs["superb, other, cached"] = [*other, "--cache-features", "-o", f"other_cached{turn}"]
    return runs


def cpu_seconds(argv: Sequence[str], folder: Path) -> float:
    """CPU seconds of a command and all of its child processes.

    Raises:
        SetupError: it failed.
    """
    ctypes.CDLL(None).prctl(
        SUBREAPER, 1, 0, 0, 0
    )  # processes that outlive their parent become ours
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        argv,
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while True:
            os.wait()
    except ChildProcessError:  # all have ended
        pass
    if process.returncode:
        raise SetupError(
            f"{' '.join(argv)}: exit code {process.returncode}: {process.stdout[-600:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(seconds: Sequence[dict[str, float]]) -> str:
    """A Markdown table: median CPU seconds of each row, and its ratio to the rows compared with.

    Args:
        seconds: of each turn, row -> CPU seconds.
    """
    lines = [["", "CPU s", "compared with", "ratio (quartiles)"], ["---", "---:", "---", "---:"]]
    for name in seconds[0]:
        reference = "superb, other" if name.startswith("superb") else "s3prl"
        ratio = ["", ""]
        if reference in seconds[0] and reference != name:
            low, median, high = quartiles([turn[name] / turn[reference] for turn in seconds])
            ratio = [reference, f"{median:.2f} ({low:.2f} to {high:.2f})"]
        lines.append([name, f"{quartiles([turn[name] for turn in seconds]).median:.1f}", *ratio])
    return markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
