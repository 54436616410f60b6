"""Measure how long commands take to print their help, or to report a mistake.

Runs every command in processes of its own, with one thread, in a folder written by `init`. Prints a
Markdown table: CPU seconds (user and system, child processes included) and peak memory of the
largest process (at least that of this tool), medians over turns. With --against, the same command
of another installation follows in each turn; the ratio is the median of the turns' ratios, with its
quartiles.

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
    parser.add_argument(
        "--only", metavar="TEXT", nargs="+", default=[""], help="commands that contain a TEXT"
    )
    args = parser.parse_args(argv)
    with show_errors():
        if args.turns < 1:
            raise SetupError(f"--turns must be 1 or more, got {args.turns}")
        print(table([sys.executable, *filter(None, [args.against])], args.turns, args.only))
    return 0


def table(pythons: Sequence[str], turns: int, only: Sequence[str] = ("",)) -> str:
    """A Markdown table of the commands that contain one of ``only``, with one or two Pythons."""
    header = ["command", "CPU s", "peak MB"]
    if len(pythons) > 1:
        header += ["CPU s before", "peak MB before", "ratio (quartiles)"]
    rows = [header]
    commands = [command for command in HELP + MISTAKES if any(text in command for text in only)]
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(index)) for index in range(len(pythons))]
        for python, folder in zip(pythons, folders, strict=True):
            prepare_folder(python, folder)
        for command in tqdm(commands, unit="command"):
            pairs = list(zip(pythons, folders, strict=True))
            if not has_command(command.split()[0], *pairs[-1]):  # an older version
                pairs = pairs[:1]
            results = [[measure(command, *pair) for pair in pairs] for _ in range(turns)]
            cells = [_typed(command), *_figures(results)]
            rows.append(cells + ["-"] * (len(header) - len(cells)))
    return markdown_table(rows)


def _typed(command: str) -> str:
    return f"`{command}`" if command.startswith("run_") else f"`s3prl-ekd {command}`"


def _figures(results: Sequence[Sequence[tuple[float, float]]]) -> list[str]:
    """The cells of a row; ``results``: [turn][Python] -> (CPU seconds, megabytes)."""
    cells = []
    for turns in zip(*results, strict=True):
        seconds, megabytes = map(statistics.median, zip(*turns, strict=True))
        cells += [f"{seconds:.2f}", f"{megabytes:.0f}"]
    if len(results[0]) > 1:
        ratios = [new / old for (new, _), (old, _) in results]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return cells


def has_command(name: str, python: str, folder: Path) -> bool:
    """Whether an installation has the command ``s3prl-ekd NAME``."""
    if name not in COMMANDS:  # a mistake, or a script of s3prl
        return True
    argv = [python, "-m", "s3prl_ekd", name, "--help"]
    return not subprocess.run(argv, cwd=folder, env=_environment(), capture_output=True).returncode


def measure(command: str, python: str, folder: Path) -> tuple[float, float]:
    """CPU seconds and peak megabytes of a command.

    Raises:
        SetupError: its exit code is not that of its kind: 0 with help, 2 after a mistake.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [python, "-m", "s3prl_ekd", *command.split()],
            cwd=folder,
            env=_environment(),
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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


def prepare_folder(python: str, folder: Path) -> None:
    """Write what ``init`` writes, and YAML files with mistakes."""
    folder.mkdir()
    subprocess.run(
        [python, "-m", "s3prl_ekd", "init", "."],
        cwd=folder,
        env=_environment(),
        check=True,
        capture_output=True,
    )
    (folder / "wrong_key.yaml").write_text("agregation: average\n")
    for kind, model in (("missing", "missing.pt"), ("unknown", "hubrt_base")):
        (folder / f"{kind}_teacher.yaml").write_text(
            f"teachers: {{hubert: {{model: {model}, layers: [4]}}}}\naggregation: average\n"
        )


def _environment() -> dict[str, str]:
    """One thread; each Python imports its own installation."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
