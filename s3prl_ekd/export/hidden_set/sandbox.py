"""Run a package in a separate process with a time limit, and run the checks on its outputs."""

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
from . import runtime_checks as checks
from .messages import BadMessage, receive, send, text
from .outcome import RUNTIME_CHECKS, CheckFailed, CheckOutcome, CheckSkipped, CheckWarning
from .runtime_checks import TASKS, Package, PackageError
from .static_checks import read_checks

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[3]  # the folder that contains s3prl_ekd
# leave_network() must run before torch starts threads. With -c, sys.argv contains no file name.
_PROGRAM = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from s3prl_ekd.export.hidden_set.isolation import leave_network
offline = leave_network()
from s3prl_ekd.export.hidden_set.child import main
del sys.path[0]
main(offline)
"""
TIME_LIMIT = 600.0  # seconds for all checks together
START_TIMEOUT = 300.0  # seconds until the process is ready; it imports torch
# Set to an empty folder and to a closed port, so that programs find no cached downloads and no
# network.
_HOMES = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP")
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
# Environment variables that Python, torch and a GPU need.
_PASSED_VARIABLES = {
    *("PATH", "LANG", "LANGUAGE", "TZ", "SYSTEMROOT", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
    *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "KMP_DUPLICATE_LIB_OK"),
}
CHECKS: dict[str, Callable[[Package], str]] = {
    "weights": checks.check_weights,
    "import": checks.check_import,
    "build": checks.check_build,
    "keywords": checks.check_keywords,
    "forward": checks.check_forward,
    "lists": checks.check_lists,
    "rates": checks.check_rates,
    "frames": checks.check_frames,
    "values": checks.check_values,
    "device": checks.check_output_device,
    "gpu": checks.check_gpu,
    "inputs": checks.check_inputs,
    "repeat": checks.check_repeat,
    "modes": checks.check_modes,
    "order": checks.check_order,
    "batching": checks.check_batching,
    "0.05 s": checks.check_short,
    "1 s": checks.check_middle,
    "35 s": checks.check_long,
    "network": checks.check_network,
    "parameters": checks.check_parameters,
    "macs": checks.check_macs,
}


def validate(
    folder: Path,
    lengths: Mapping[str, Sequence[int]],
    limit: float = TIME_LIMIT,
    show: Callable[[CheckOutcome], object] = lambda outcome: None,
    names: Sequence[str] = tuple(RUNTIME_CHECKS),
) -> tuple[list[CheckOutcome], dict[str, Any] | None]:
    """Check a package.

    Args:
        folder: folder of the package; its ``expert.py`` runs in a separate process.
        lengths: lengths (samples) of the utterances for counting MACs, by bucket.
        limit: seconds for all checks that run the package.
        show: called with each outcome as soon as it is known.
        names: the checks of :data:`.outcome.RUNTIME_CHECKS` to run.

    Returns:
        All outcomes, and the cost as in :func:`...superb.cost.measure_cost`, or None.

    Raises:
        SetupError: no such folder.
        CheckpointError: the installed torch cannot load ``model.pt`` safely.
    """
    folder = _checked_folder(folder)
    outcomes: list[CheckOutcome] = []
    cost = None

    def add(outcome: CheckOutcome) -> None:
        outcomes.append(outcome)
        show(outcome)

    for outcome in read_checks(folder):
        add(outcome)
    if outcomes[0].status == "fail":
        for name in names:
            add(CheckOutcome(name, "skip", "the package is incomplete: see files"))
        return outcomes, None
    for result in run_checks(folder, lengths, limit, names):
        if isinstance(result, CheckOutcome):
            add(result)
        else:
            cost = result
    return outcomes, cost


def package_cost(folder: Path, lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Measure the cost of a package as in :func:`...superb.cost.measure_cost`.

    Raises:
        SetupError: no package in ``folder``, or it does not run.
    """
    folder = _checked_folder(folder)
    for name in ("expert.py", "model.pt"):
        if not (folder / name).is_file():
            raise SetupError(f"{folder} is not a hidden-set package: it has no {name}")
    names = ("weights", "import", "build", "forward", "parameters")
    for result in run_checks(folder, lengths, TIME_LIMIT, names):
        if isinstance(result, CheckOutcome) and result.status in ("fail", "skip"):
            raise SetupError(f"{folder}: {result.name}: {result.reason}")
        if not isinstance(result, CheckOutcome):
            cost = result
    return cost


def run_checks(
    folder: Path, lengths: Mapping[str, Sequence[int]], limit: float, names: Sequence[str]
) -> Iterator[CheckOutcome | dict[str, Any]]:
    """Run the checks ``names``; yield each outcome, then the cost if it was measured."""
    failed_in = ""
    with _package_process(folder) as child:
        package = Package(folder, lengths, child.request)
        for name in names:
            if failed_in:
                yield CheckOutcome(
                    name, "skip", f"not run, because the process failed: see {failed_in}"
                )
                continue
            try:
                if not child.ready:
                    setup = {"folder": str(folder), "lengths": lengths, "tasks": TASKS}
                    package.offline = child.begin(setup, limit)
                outcome = _outcome(name, package)
            except (BadMessage, _ProcessEnded) as error:
                failed_in, outcome = name, CheckOutcome(name, "fail", str(error))
            yield outcome
        if package.cost is not None:
            yield package.cost


def _outcome(name: str, package: Package) -> CheckOutcome:
    """Run one check."""
    try:
        return CheckOutcome(name, "pass", CHECKS[name](package))
    except (CheckFailed, PackageError) as error:
        return CheckOutcome(name, "fail", str(error))
    except CheckWarning as error:
        return CheckOutcome(name, "warn", str(error))
    except CheckSkipped as error:
        return CheckOutcome(name, "skip", str(error))
    except (BadMessage, _ProcessEnded):
        raise
    except Exception as error:  # outputs that the check did not expect
        return CheckOutcome(name, "fail", f"{type(error).__name__}: {text(str(error))}")


class _ProcessEnded(Exception):
    """The package's process ended or timed out; the message is the reason."""


class _PackageProcess:
    """The package's process: takes requests on standard input, replies on standard output.

    A thread sends and receives, because reading from and writing to the process may block.
    """

    def __init__(self, process: subprocess.Popen[bytes]):
        assert process.stdin and process.stdout and process.stderr  # all three are pipes
        self.process = process
        self.input, self.output, self.errors = process.stdin, process.stdout, process.stderr
        self.ready = False
        self.deadline = time.monotonic() + START_TIMEOUT
        self.timeout_message = f"torch was not imported within {START_TIMEOUT:g} s"
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self.replies: queue.SimpleQueue = queue.SimpleQueue()
        self.stderr_tail = b""
        threading.Thread(target=self._exchange, daemon=True).start()
        self.stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self.stderr_reader.start()

    def begin(self, setup: Mapping[str, Any], limit: float) -> bool:
        """Send the setup, wait until the process is ready, and start the time limit.

        Args:
            setup: folder, lengths and tasks.
            limit: seconds for all following requests together.

        Returns:
            Whether the process has no network.
        """
        facts, _ = self.request(setup)
        self.ready = True
        self.deadline = time.monotonic() + limit
        self.timeout_message = f"timeout: the checks took longer than {limit:g} s"
        return facts.get("offline") is True

    def request(
        self, request: Mapping[str, Any], tensors: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Send a request and return the reply, ``(facts, tensors)``.

        Raises:
            _ProcessEnded: the process has ended or timed out.
            BadMessage: the request or the reply is too large, or the reply is malformed.
        """
        self.requests.put((request, tensors))
        give_up_at = None
        while True:
            try:
                reply = self.replies.get(timeout=0.1)
                break
            except queue.Empty:
                pass
            if time.monotonic() > self.deadline:
                raise _ProcessEnded(self.timeout_message)
            if self.process.poll() is not None:  # a descendant may keep the pipe open
                give_up_at = give_up_at or time.monotonic() + 2
                if time.monotonic() > give_up_at:
                    raise _ProcessEnded(self._end_reason())
        if isinstance(reply, BadMessage):
            raise reply
        if reply is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            raise _ProcessEnded(self._end_reason())
        return reply

    def _exchange(self) -> None:
        """Send queued requests and queue the replies; None means that the process has ended."""
        with contextlib.suppress(OSError), self.input, self.output:
            for facts, tensors in iter(self.requests.get, None):
                try:
                    send(self.input, facts, tensors)
                    self.replies.put(receive(self.output))
                except BadMessage as error:
                    self.replies.put(error)
                except (OSError, EOFError):
                    self.replies.put(None)
                    return

    def _read_stderr(self) -> None:
        """Read all of stderr, so that the pipe never fills; keep the last 4096 bytes."""
        with contextlib.suppress(OSError), self.errors:
            while block := os.read(self.errors.fileno(), 1 << 16):
                self.stderr_tail = (self.stderr_tail + block)[-4096:]

    def _end_reason(self) -> str:
        """Why the process gives no reply: its exit code and last line on stderr."""
        code = self.process.poll()
        if code is None:
            return "the process has closed its pipes"
        self.stderr_reader.join(1)
        lines = self.stderr_tail.decode(errors="replace").strip().splitlines()
        last_line = text(lines[-1]) if lines else "no output"
        return f"the process ended ({_exit_text(code)}): {last_line}"


@contextlib.contextmanager
def _package_process(folder: Path) -> Iterator[_PackageProcess]:
    """Start the process with an empty home folder; on exit, kill it and its descendants."""
    with (
        tempfile.TemporaryDirectory(prefix="s3prl_ekd_", ignore_cleanup_errors=True) as home,
        descendants.adopt_orphans(),
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
        child = _PackageProcess(process)
        try:
            yield child
        finally:
            child.requests.put(None)
            alive = descendants.kill_tree(process, started)
            if alive:
                logger.warning("%s started processes that could not be killed: %s", folder, alive)


def _environment(home: str) -> dict[str, str]:
    """Environment of the process: an allowlist of this process's variables, without tokens."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_VARIABLES or name.startswith("LC_") or name.endswith("_NUM_THREADS")
    }
    environment.update(dict.fromkeys(_HOMES, home))
    environment.update(dict.fromkeys(_PROXIES, "http://127.0.0.1:9"))
    environment.update(no_proxy="", NO_PROXY="", PYTHONDONTWRITEBYTECODE="1", PIP_NO_INDEX="1")
    return environment


def _exit_text(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _checked_folder(folder: Path) -> Path:
    """The resolved path of an existing package folder.

    Raises:
        SetupError: no such folder.
        CheckpointError: the installed torch cannot load ``model.pt`` safely.
    """
    if not folder.is_dir():
        raise SetupError(f"{folder} is not a folder; name that of a package (expert.py, model.pt)")
    if (folder / "model.pt").is_file():  # here, because the process cannot import it
        scan_for_old_torch(folder / "model.pt")
    return folder.resolve()
