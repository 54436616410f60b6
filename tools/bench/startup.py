"""Measure how long commands take to print their help, or to report a mistake.

Runs every command in processes of its own, with one thread, in a folder written by `init`. Prints a
Markdown table: CPU seconds (user and system, child processes included) and peak memory of the
largest process, medians over turns. With --against the commands of another installation take turns
with those of this one; the ratio is the median of the turns' ratios, with its quartiles.

example:
  python -m tools.bench.startup
  python -m tools.bench.startup --against /data/before/.venv/bin/python --turns 7 --only run_
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from s3prl_ekd.cli import COMMANDS
from s3prl_ekd.errors import SetupError
from s3prl_ekd.system.tables import markdown_table
from s3prl_ekd.system.terminal import prepare_streams, show_errors

HELP = [
    "--help",
    *(f"{command} --help" for command in COMMANDS),
    "run_pretrain.py -h",
    "run_downstream.py -h",
]
# The files they name are written by `prepare_folder`, or do not exist.
MISTAKES = [
    "demmo",
    "doctor --jason",
    "cost -u hubrt_base",
    "export student missing.pt -o student.pt",
    "features missing.pt . -o features.safetensors",
    "prune missing.ckpt -o pruned.pt",
    "superb missing.pt --recipes tiny -o superb",
    "cache -g wrong_key.yaml -o cache",
    "group-layers wrong_key.yaml --data . -o groups.yaml",
    "sweep wrong_key.yaml",
    "run_pretrain.py -u ekd -n x --sed 1",
    "run_pretrain.py -u ekd -n x --seed one",
    "run_pretrain.py -u ekd",
    "run_pretrain.py -u ekdd -n x",
    "run_pretrain.py -u ekd -n x -g wrong_key.yaml",
    "run_pretrain.py -u ekd -n x -c missing.yaml",
    "run_pretrain.py -u ekd -n x -o config.runner.totl_steps=9",
    "run_pretrain.py -u ekd -n x -g missing_teacher.yaml",
    "run_pretrain.py -u ekd -n x -g unknown_teacher.yaml",
    "run_pretrain.py -u ekd -n x",  # the config has no corpus yet
    "run_pretrain.py -e missing.ckpt",
    "run_downstream.py -m train -u ekd_student -d ctc -n x --sed 1",
    "run_downstream.py -m trian -u ekd_student -d ctc -n x",
    "run_downstream.py -m train -u ekd_student -n x",
    "run_downstream.py -m train -u tiny_hubert -d ctcc -n x",
    "run_downstream.py -m train -u ekd_student -k missing.pt -d ctc -n x",
    "run_downstream.py -m train -u ekd_studnet -d emotion -c recipe.yaml -n x",
    "run_downstream.py -m train -u tiny_hubert -d ctc -c missing.yaml -n x",
    "run_downstream.py -m train -u tiny_hubert -d emotion -n x",  # no corpus yet
    "run_downstream.py -m evaluate -e missing.ckpt",
]


def main(argv: Sequence[str] | None = None) -> int:
    prepare_streams()
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--against", metavar="PYTHON", help="the Python of another installation to compare with"
    )
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--only", metavar="TEXT", default="", help="commands that contain TEXT")
    args = parser.parse_args(argv)
    with show_errors():
        if args.turns < 1:
            raise SetupError(f"--turns must be 1 or more, got {args.turns}")
        print(table([sys.executable, *filter(None, [args.against])], args.turns, args.only))
    return 0


def table(pythons: Sequence[str], turns: int, only: str = "") -> str:
    """Measure the commands that contain ``only`` with one or two Pythons; a Markdown table."""
    header = ["command", "CPU s", "peak MB"]
    if len(pythons) > 1:
        header += ["CPU s before", "peak MB before", "ratio (quartiles)"]
    rows = [header]
    commands = [command for command in HELP + MISTAKES if only in command]
    for command in tqdm(commands, unit="command"):
        results: dict[str, list[tuple[float, float]]] = {python: [] for python in pythons}
        for turn in range(turns):
            for python in pythons[:: 1 if turn % 2 == 0 else -1]:
                results[python].append(measure(python, command))
        row = [f"`{command if command.startswith('run_') else 's3prl-ekd ' + command}`"]
        for python in pythons:
            seconds, megabytes = map(statistics.median, zip(*results[python], strict=True))
            row += [f"{seconds:.2f}", f"{megabytes:.0f}"]
        if len(pythons) > 1:
            pairs = zip(*results.values(), strict=True)
            ratios = [new / old for (new, _), (old, _) in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4) if turns > 1 else ratios * 3
            row.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    return markdown_table(rows)


def measure(python: str, command: str) -> tuple[float, float]:
    """CPU seconds and peak megabytes of a command in a new folder.

    Raises:
        SetupError: its exit code is not that of its kind: 0 with help, 2 after a mistake.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        prepare_folder(Path(name))
        with open(Path(name) / "output.txt", "w+") as output:
            process = subprocess.Popen(
                [python, "-m", "s3prl_ekd", *command.split()],
                cwd=name,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != (0 if command in HELP else 2):
                output.seek(0)
                raise SetupError(
                    f"{python} -m s3prl_ekd {command}: exit code {process.returncode}: "
                    f"{output.read()[-600:]}"
                )
    kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss in bytes
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * kilobyte / 1e6


def prepare_folder(folder: Path) -> None:
    """Write what ``init`` writes, and YAML files with mistakes."""
    from s3prl_ekd.workspace import write_workspace

    write_workspace(folder)
    (folder / "wrong_key.yaml").write_text("agregation: average\n")
    for kind, model in (("missing", "missing.pt"), ("unknown", "hubrt_base")):
        (folder / f"{kind}_teacher.yaml").write_text(
            f"teachers: {{hubert: {{model: {model}, layers: [4]}}}}\naggregation: average\n"
        )


if __name__ == "__main__":
    sys.exit(main())
