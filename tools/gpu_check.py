"""Check this package on a GPU: tests, step rates, precision and torchrun, in nine minutes.

Writes gpu_check.json and gpu_check.md, again after each part: environment; step rates with three
Base teachers of random weights against s3prl's distiller, in all precisions, compiled, cached and
with a frozen extractor; the tests marked `cuda`; 300 steps of the tiny experiment in bfloat16
against float32; a run under torchrun; step rates with tiny models. A part that fails or takes too
long does not stop the others. Needs no network: WHEELS is a folder of wheels for all packages that
this Python lacks, s3prl among them; the checkout itself is installed with them, in a temporary
environment. `--device cpu --toy` runs everything at toy size.

example:
  python tools/gpu_check.py -o report
  python tools/gpu_check.py -o report --wheels WHEELS --minutes 9
  python tools/gpu_check.py -o report --device cpu --toy
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # the package may not be installed

from gpu_parts.report import markdown  # noqa: E402

from s3prl_ekd.errors import SetupError  # noqa: E402
from s3prl_ekd.files.atomic import write_text  # noqa: E402
from s3prl_ekd.system.terminal import prepare_streams, show_errors  # noqa: E402

# In their order; seconds at most.
LIMITS = {
    "environment": 60, "base": 270, "tests": 150, "training": 90, "torchrun": 75, "tiny": 120,
}  # fmt: skip
LEAST = 15  # seconds that a part needs to start
GRACE = 5  # seconds between SIGTERM and SIGKILL
NAME = "gpu_check"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if all parts passed, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder of the report")
    add("--wheels", type=Path, metavar="FOLDER", help="folder of wheels to install first")
    add("--minutes", type=float, default=9, help="time for everything (default: 9)")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--toy", action="store_true", help="toy sizes, to try the check itself")
    add("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="run these parts only")
    args = parser.parse_args(argv)
    prepare_streams()
    with show_errors():
        return check(args)


def check(args: argparse.Namespace) -> int:
    """Run the parts; see :func:`main`.

    Raises:
        SetupError: an option is invalid, or the wheels cannot be installed.
    """
    begin = time.monotonic()
    output = args.output / f"{NAME}.json"
    if output.exists():
        raise SetupError(f"{output} exists already; name another folder with -o")
    if args.device == "cpu" and not args.toy:
        raise SetupError("--device cpu takes hours at full size; add --toy")
    args.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"toy": args.toy, "device": args.device, "parts": {}}
    with tempfile.TemporaryDirectory(prefix=NAME) as temporary:
        folder = Path(temporary)
        python, project = Path(sys.executable), REPO
        if args.wheels is not None:
            python, project = install(args.wheels, folder)
        for name, limit in LIMITS.items():
            left = 60 * args.minutes - (time.monotonic() - begin) - GRACE
            if name not in args.only:
                continue
            environment = result["parts"].get("environment", {"status": "passed"})
            if left < LEAST or environment["status"] != "passed":
                why = "skipped: no time left" if left < LEAST else "skipped"
                part = {"status": why, "seconds": 0.0, "result": {}}
            else:
                print(f"{name} ...", flush=True)
                command = [str(python), "-m", "tools.gpu_parts", name, str(folder / f"{name}.json")]
                command += [args.device, *["toy"] * args.toy]
                part = run_part(command, folder / name, min(limit, left), project)
            print(f"{name}: {part['status']}", flush=True)
            result["parts"][name] = part
            result["seconds"] = time.monotonic() - begin
            write_text(output, json.dumps(result, indent=1) + "\n")
            write_text(output.with_suffix(".md"), markdown(result))
    print(f"wrote {output} and {output.with_suffix('.md')}")
    return int(any(part["status"] != "passed" for part in result["parts"].values()))


def run_part(command: Sequence[str], folder: Path, limit: float, project: Path) -> dict[str, Any]:
    """Run a part in a process group of its own, for at most ``limit`` seconds.

    Returns:
        ``status`` (passed, failed or out of time), ``seconds``, ``result`` (what the part has
        saved) and, unless it passed, ``error``: the end of its output.
    """
    folder.mkdir()
    begin, log = time.monotonic(), folder / "log.txt"
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(project)}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=project, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    part: dict[str, Any] = {"status": "passed" if code == 0 else "failed"}
    if code is None:
        part["status"] = f"out of time ({limit:.0f} s)"
    if code != 0:
        part["error"] = log.read_text(errors="replace").strip()[-2000:]
    result = Path(f"{folder}.json")
    part["result"] = json.loads(result.read_text()) if result.exists() else {}
    part["seconds"] = time.monotonic() - begin
    return part


def stop(process: subprocess.Popen) -> None:
    """End a process and its group: SIGTERM, so that torchrun ends its workers, then SIGKILL."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def install(wheels: Path, folder: Path) -> tuple[Path, Path]:
    """Install the wheels and a copy of this checkout in a new environment, without a network.

    Returns:
        Its Python, and the copy.

    Raises:
        SetupError: there are no wheels, or pip failed.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SetupError(f"--wheels {wheels}: no *.whl there; fill it with pip download or wheel")
    project, environment = folder / "project", folder / "venv"
    hidden = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "result")
    shutil.copytree(REPO, project, ignore=hidden)
    venv.create(environment, system_site_packages=True, symlinks=True)
    python = environment / "bin" / "python"
    # If this Python is a virtual environment's own, that one's packages, too; pip among them.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (environment / "lib" / version / "site-packages" / "parent.pth").write_text(paths + "\n")
    pip = [str(python), "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    for argv in (
        ["--find-links", str(wheels), *files],
        ["--no-build-isolation", "-e", str(project)],
    ):
        done = subprocess.run([*pip, *argv], capture_output=True, text=True)
        if done.returncode:
            raise SetupError(f"pip cannot install the wheels: {done.stderr.strip()[-500:]}")
    return python, project


if __name__ == "__main__":
    sys.exit(main())
