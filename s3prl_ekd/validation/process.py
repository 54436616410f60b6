"""Start the process in which a package is run, follow it, and end it when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SetupError
from ..safe_load import scan_for_old_torch
from .files import read_checks
from .outcome import RUN, Outcome

ROOT = Path(__file__).parent.parent.parent  # the folder that holds s3prl_ekd
LIMIT = 600.0  # seconds that the checks may take
START = 300.0  # seconds until the first of them, in which torch is imported
# Nothing that was downloaded before is found, and no program that is started gets out.
_HOMES = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "USERPROFILE")
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def validate(
    folder: Path,
    lengths: Mapping[str, Sequence[int]],
    limit: float = LIMIT,
    show: Callable[[Outcome], object] = lambda outcome: None,
    names: Sequence[str] = tuple(RUN),
) -> tuple[list[Outcome], dict[str, Any] | None]:
    """Check a package.

    Args:
        folder: of the package; its ``expert.py`` is run in a process of its own.
        lengths: of the utterances that MACs are counted over, by bucket.
        limit: seconds that the checks in this process may take.
        show: called with each outcome as it comes.
        names: the checks to run there, of :data:`.outcome.RUN`.

    Returns:
        All outcomes, and the cost as :func:`..evaluate.cost.measure_cost` gives it, or None.

    Raises:
        SetupError: there is no such folder.
        CheckpointError: the installed torch cannot load its ``model.pt`` safely.
    """
    folder = _existing(folder)
    outcomes: list[Outcome] = []
    cost = None

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        show(outcome)

    for outcome in read_checks(folder):
        add(outcome)
    if outcomes[0].status == "fail":
        for name in names:
            add(Outcome(name, "skip", "the package is not complete: see files"))
        return outcomes, None
    for found in run_checks(folder, lengths, limit, names):
        if isinstance(found, Outcome):
            add(found)
        else:
            cost = found
    return outcomes, cost


def package_cost(folder: Path, lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The cost of a package, see :func:`..evaluate.cost.measure_cost`.

    Raises:
        SetupError: there is none, or it does not run.
    """
    folder = _existing(folder)
    for name in ("expert.py", "model.pt"):
        if not (folder / name).is_file():
            raise SetupError(f"{folder} is no package: it has no {name}")
    names = ("weights", "import", "build", "forward", "parameters")
    for found in run_checks(folder, lengths, LIMIT, names):
        if isinstance(found, Outcome) and found.status in ("fail", "skip"):
            raise SetupError(f"{folder}: {found.name}: {found.reason}")
        if not isinstance(found, Outcome):
            cost = found
    return cost


def run_checks(
    folder: Path, lengths: Mapping[str, Sequence[int]], limit: float, names: Sequence[str]
) -> Iterator[Outcome | dict[str, Any]]:
    """The outcomes of ``names``, as they come, and at the end the cost if it was measured."""
    with tempfile.TemporaryDirectory(prefix="s3prl_ekd_") as temporary:
        place = Path(temporary)
        plan = {
            "root": str(ROOT),
            "folder": str(folder),
            "names": list(names),
            "lengths": {bucket: list(many) for bucket, many in lengths.items()},
            "report": str(place / "report.jsonl"),
        }
        (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        (place / "report.jsonl").touch()
        (place / "home").mkdir()
        with open(place / "output.txt", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("child.py")), place / "plan.json"],
                cwd=place / "home",
                env=_environment(place / "home"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                yield from _follow(process, place, names, limit)
            finally:
                _end(process)


def _follow(process, place: Path, names: Sequence[str], limit: float):
    running, waiting = "", list(names)
    end, started = "", False
    deadline = time.monotonic() + START
    with open(place / "report.jsonl", encoding="utf-8") as report:
        text = ""
        while True:
            over = process.poll() is not None
            text += report.read()
            *lines, text = text.split("\n")
            for line in map(json.loads, lines):
                if "start" in line:
                    running = line["start"]
                    if not started:  # a slow import of torch is not the package's fault
                        started, deadline = True, time.monotonic() + limit
                elif "name" in line:
                    waiting.remove(line["name"])
                    running = ""
                    yield Outcome(line["name"], line["status"], line["reason"])
                elif "done" in line:
                    if line["cost"]:
                        yield line["cost"]
                    return  # its own end takes a while, and says nothing of the package
            if over:
                end = f"the process ended ({_how(process.returncode)}): {_last(place)}"
                break
            if time.monotonic() > deadline:
                end = (
                    f"it was not done within {limit:g} s and was ended"
                    if started
                    else f"torch was not imported within {START:g} s"
                )
                break
            time.sleep(0.05)
    for name in waiting:  # none, if all went well
        if name == (running or waiting[0]):
            yield Outcome(name, "fail", end)
        else:
            yield Outcome(name, "skip", f"the process did not come to it: see {running or 'above'}")


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if "PYTHONPATH" in os.environ:  # torch may be there
        kept["PYTHONPATH"] = os.environ["PYTHONPATH"]
    kept.update(dict.fromkeys(_HOMES, str(home)))
    kept.update(dict.fromkeys(_PROXIES, "http://127.0.0.1:9"))
    kept.update(no_proxy="", NO_PROXY="", PYTHONDONTWRITEBYTECODE="1", PIP_NO_INDEX="1")
    return kept


def _end(process: subprocess.Popen) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _last(place: Path) -> str:
    """The last line that it wrote, which is most often the reason."""
    text = (place / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
    return text.splitlines()[-1][:300] if text else "it wrote nothing"


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise SetupError(f"{folder} is no folder; give that of a package (expert.py, model.pt)")
    if (folder / "model.pt").is_file():  # the process that loads it has torch alone
        scan_for_old_torch(folder / "model.pt")
    return folder.resolve()
