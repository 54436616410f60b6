"""Start the process in which a package is run, follow it, and end it when its time is over."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import SetupError
from ...files.torch_load import scan_for_old_torch
from . import descendants
from . import runtime_checks as behaviour
from . import runtime_checks as official
from . import runtime_checks as size
from .messages import BadMessage, receive, send, text
from .outcome import RUN, Failed, Outcome, Skipped, Warned
from .runtime_checks import TASKS, Package, PackageError
from .static_checks import read_checks

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[3]  # the folder that holds s3prl_ekd
# The network is left before torch starts threads. sys.argv names no file.
_PROGRAM = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from s3prl_ekd.export.hidden_set.isolation import leave_network
offline = leave_network()
from s3prl_ekd.export.hidden_set.child import main
del sys.path[0]
main(offline)
"""
LIMIT = 600.0  # seconds that the checks may take
START = 300.0  # seconds until the first of them, in which torch is imported
# Nothing that was downloaded before is found, and no program that is started gets out.
_HOMES = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP")
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
# What Python, torch and a GPU need of the environment.
_KEPT = {
    *("PATH", "LANG", "LANGUAGE", "TZ", "SYSTEMROOT", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
    *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "KMP_DUPLICATE_LIB_OK"),
}
CHECKS: dict[str, Callable[[Package], str]] = {
    "weights": official.weights,
    "import": official.import_,
    "build": official.build,
    "keywords": official.keywords,
    "forward": official.forward,
    "lists": official.lists,
    "rates": official.rates,
    "frames": official.frames,
    "values": behaviour.values,
    "device": behaviour.device,
    "gpu": behaviour.gpu,
    "inputs": behaviour.inputs,
    "repeat": behaviour.repeat,
    "modes": behaviour.modes,
    "order": behaviour.order,
    "batching": behaviour.batching,
    "0.05 s": behaviour.short,
    "1 s": behaviour.middle,
    "35 s": behaviour.long,
    "network": behaviour.network,
    "parameters": size.parameters,
    "macs": size.macs,
}


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
        All outcomes, and the cost as :func:`...superb.cost.measure_cost` gives it, or None.

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
    """The cost of a package, see :func:`...superb.cost.measure_cost`.

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
    gone = ""
    with _started(folder) as child:
        package = Package(folder, lengths, child.ask)
        for name in names:
            if gone:
                yield Outcome(name, "skip", f"the process did not come to it: see {gone}")
                continue
            try:
                if not child.ready:
                    plan = {"folder": str(folder), "lengths": lengths, "tasks": TASKS}
                    package.offline = child.begin(plan, limit)
                outcome = _outcome(name, package)
            except (BadMessage, _Gone) as error:
                gone, outcome = name, Outcome(name, "fail", str(error))
            yield outcome
        if package.cost is not None:
            yield package.cost


def _outcome(name: str, package: Package) -> Outcome:
    try:
        return Outcome(name, "pass", CHECKS[name](package))
    except (Failed, PackageError) as error:
        return Outcome(name, "fail", str(error))
    except Warned as error:
        return Outcome(name, "warn", str(error))
    except Skipped as error:
        return Outcome(name, "skip", str(error))
    except (BadMessage, _Gone):
        raise
    except Exception as error:  # outputs of shapes that the check does not expect
        return Outcome(name, "fail", f"{type(error).__name__}: {text(str(error))}")


class _Gone(Exception):
    """The package's process gives no answer; the message says why."""


class _Child:
    """The package's process: requests go in on its standard input, answers come on its standard
    output. One thread moves them, because a process may stop to read or to write at any byte."""

    def __init__(self, process: subprocess.Popen[bytes]):
        assert process.stdin and process.stdout and process.stderr  # all three are pipes
        self.process = process
        self.input, self.output, self.errors = process.stdin, process.stdout, process.stderr
        self.ready = False
        self.deadline = time.monotonic() + START
        self.late = f"torch was not imported within {START:g} s"
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.printed = b""
        threading.Thread(target=self._exchange, daemon=True).start()
        self.printing = threading.Thread(target=self._read_printed, daemon=True)
        self.printing.start()

    def begin(self, plan: Mapping[str, Any], limit: float) -> bool:
        """Send the plan; from the first answer on, ``limit`` seconds are left for all others.
        Returns whether the process is without network."""
        facts, _ = self.ask(plan)
        self.ready = True
        self.deadline = time.monotonic() + limit
        self.late = f"it was not done within {limit:g} s and was ended"
        return facts.get("offline") is True

    def ask(
        self, request: Mapping[str, Any], tensors: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The answer to a request, ``(facts, tensors)``.

        Raises:
            _Gone: the process has ended, or the time is over.
            BadMessage: its answer is none.
        """
        self.requests.put((request, tensors))
        ended = None
        while True:
            try:
                answer = self.answers.get(timeout=0.1)
                break
            except queue.Empty:
                pass
            if time.monotonic() > self.deadline:
                raise _Gone(self.late)
            if self.process.poll() is not None:  # one that it has left may hold the pipe open
                ended = ended or time.monotonic() + 2
                if time.monotonic() > ended:
                    raise _Gone(self._end())
        if isinstance(answer, BadMessage):
            raise answer
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            raise _Gone(self._end())
        return answer

    def _exchange(self) -> None:
        with contextlib.suppress(OSError), self.input, self.output:
            for facts, tensors in iter(self.requests.get, None):
                try:
                    send(self.input, facts, tensors)
                    self.answers.put(receive(self.output))
                except BadMessage as error:
                    self.answers.put(error)
                except (OSError, EOFError):
                    self.answers.put(None)
                    return

    def _read_printed(self) -> None:
        """Keep the end of what it prints, so that neither a pipe nor a disk is ever full."""
        with contextlib.suppress(OSError), self.errors:
            while block := os.read(self.errors.fileno(), 1 << 16):
                self.printed = (self.printed + block)[-4096:]

    def _end(self) -> str:
        code = self.process.poll()
        if code is None:
            return "the process has closed its pipes"
        self.printing.join(1)
        lines = self.printed.decode(errors="replace").strip().splitlines()
        last = text(lines[-1]) if lines else "it wrote nothing"
        return f"the process ended ({_how(code)}): {last}"


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[_Child]:
    """The process, with a home of its own; all of it is gone at the end of the block."""
    with (
        tempfile.TemporaryDirectory(prefix="s3prl_ekd_", ignore_cleanup_errors=True) as home,
        descendants.guarded(),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            cwd=home,
            env=_environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started = descendants.start_time(process.pid)
        child = _Child(process)
        try:
            yield child
        finally:
            child.requests.put(None)
            left = descendants.end(process, started)
            if left:
                logger.warning("%s started processes that could not be ended: %s", folder, left)


def _environment(home: str) -> dict[str, str]:
    """What the process may know of this one's environment, by name; no token is among it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith("LC_") or name.endswith("_NUM_THREADS")
    }
    kept.update(dict.fromkeys(_HOMES, home))
    kept.update(dict.fromkeys(_PROXIES, "http://127.0.0.1:9"))
    kept.update(no_proxy="", NO_PROXY="", PYTHONDONTWRITEBYTECODE="1", PIP_NO_INDEX="1")
    return kept


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise SetupError(f"{folder} is no folder; give that of a package (expert.py, model.pt)")
    if (folder / "model.pt").is_file():  # the process that loads it has torch alone
        scan_for_old_torch(folder / "model.pt")
    return folder.resolve()
