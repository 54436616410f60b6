"""Run a package in a separate process with a time limit, and run the checks on its outputs."""

from __future__ import annotations

import contextlib
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
from typing import IO, Any

from torch import Tensor

from ...errors import SetupError
from ...files.torch_load import scan_for_old_torch
from .descendants import killed_on_exit
from .messages import BadMessage, Message, receive, send, text
from .outcome import CheckOutcome, run_check
from .runtime_checks import CHECKS, NEEDS, TASKS, Package
from .static_checks import REQUIRED_FILES, read_checks

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


def validate(
    folder: Path,
    lengths: Mapping[str, Sequence[int]],
    limit: float = TIME_LIMIT,
    show: Callable[[CheckOutcome], object] = lambda outcome: None,
    names: Sequence[str] = tuple(CHECKS),
) -> tuple[list[CheckOutcome], dict[str, Any] | None]:
    """Check a package.

    Args:
        folder: folder of the package; its ``expert.py`` runs in a separate process.
        lengths: lengths (samples) of the utterances for counting MACs, by bucket.
        limit: seconds for all checks that run the package.
        show: called with each outcome as soon as it is known.
        names: the checks that run the package.

    Returns:
        All outcomes, and the cost as in :func:`...superb.cost.measure_cost`, or None.

    Raises:
        SetupError: no such folder.
        CheckpointError: the installed torch cannot load ``model.pt`` safely.
    """
    folder = _checked_folder(folder)
    outcomes: list[CheckOutcome] = []

    def add(outcome: CheckOutcome) -> None:
        outcomes.append(outcome)
        show(outcome)

    for outcome in read_checks(folder):
        add(outcome)
    if outcomes[0].status == "fail":
        for name in names:
            add(CheckOutcome(name, "skip", "not run: see files"))
        return outcomes, None
    return outcomes, run_checks(folder, lengths, limit, names, add)


def package_cost(folder: Path, lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Measure the cost of a package as in :func:`...superb.cost.measure_cost`.

    Raises:
        SetupError: no package in ``folder``, or it does not run.
    """
    folder = _checked_folder(folder)
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            raise SetupError(f"{folder} is not a hidden-set package: it has no {name}")

    def require(outcome: CheckOutcome) -> None:
        if outcome.status in ("fail", "skip"):
            raise SetupError(f"{folder}: {outcome.name}: {outcome.reason}")

    names = ("weights", "import", "build", "forward", "parameters")
    cost = run_checks(folder, lengths, TIME_LIMIT, names, require)
    assert cost is not None  # the check of the parameters sets it
    return cost


def run_checks(
    folder: Path,
    lengths: Mapping[str, Sequence[int]],
    limit: float,
    names: Sequence[str],
    show: Callable[[CheckOutcome], object],
) -> dict[str, Any] | None:
    """Run the checks ``names`` and ``show`` each outcome; return the cost if it was measured.

    A check is skipped after a check that it needs did not pass, or after the process failed.
    """
    failed_in = ""  # the check in which the process failed
    stopped = set()  # the checks that did not pass
    with _package_process(folder) as child:
        package = Package(folder, lengths, child.request)
        for name in names:
            cause = failed_in or next((need for need in NEEDS[name] if need in stopped), "")
            if cause:
                outcome = CheckOutcome(name, "skip", f"not run: see {cause}")
            else:
                try:
                    if not child.ready:
                        setup = {"folder": str(folder), "lengths": lengths, "tasks": TASKS}
                        package.offline = child.begin(setup, limit)
                    outcome = run_check(name, CHECKS[name], package)
                except BadMessage as error:
                    failed_in, outcome = name, CheckOutcome(name, "fail", str(error))
                except Exception as error:  # outputs that the check did not expect
                    reason = f"{type(error).__name__}: {text(str(error))}"
                    outcome = CheckOutcome(name, "fail", reason)
            if outcome.status in ("fail", "skip"):
                stopped.add(name)
            show(outcome)
    return package.cost


class _PackageProcess:
    """The package's process: takes requests on standard input, replies on standard output.

    Args:
        process: just started, with pipes.
        errors: the file to which it writes standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]):
        self.process, self.errors = process, errors
        self.ready = False
        self.deadline = time.monotonic() + START_TIMEOUT
        self.timeout_message = f"torch was not imported within {START_TIMEOUT:g} s"

    def begin(self, setup: Mapping[str, Any], limit: float) -> bool:
        """Wait until the process is ready; return whether it has no network.

        Args:
            setup: folder, lengths and tasks.
            limit: seconds for all following requests together.
        """
        facts, _ = self.request(setup)
        self.ready = True
        self.deadline = time.monotonic() + limit
        self.timeout_message = f"timeout: the checks took longer than {limit:g} s"
        return facts.get("offline") is True

    def request(self, facts: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> Message:
        """Send a request and return the reply, ``(facts, tensors)``.

        A thread sends and receives, because a descendant of the process may keep the pipes open.

        Raises:
            BadMessage: the process has ended or timed out; the request or the reply is too large,
                or the reply is malformed.
        """
        replies: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._exchange, args=(replies, facts, tensors), daemon=True).start()
        give_up_at = self.deadline
        while True:
            with contextlib.suppress(queue.Empty):
                reply = replies.get(timeout=0.1)
                break
            if time.monotonic() > self.deadline:
                raise BadMessage(self.timeout_message)
            if self.process.poll() is not None:
                give_up_at = min(give_up_at, time.monotonic() + 2)
            if time.monotonic() > give_up_at:
                raise BadMessage(self._end_reason())
        if isinstance(reply, BadMessage):
            raise reply
        if isinstance(reply, Exception):  # mostly OSError or EOFError: the pipes are closed
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            raise BadMessage(self._end_reason())
        return reply

    def _exchange(
        self, replies: queue.SimpleQueue, facts: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> None:
        assert self.process.stdin and self.process.stdout  # both are pipes
        try:
            send(self.process.stdin, facts, tensors)
            replies.put(receive(self.process.stdout))
        except Exception as error:
            with contextlib.suppress(OSError):  # data that could not be sent
                self.process.stdin.close()
            replies.put(error)

    def _end_reason(self) -> str:
        """Why the process gives no reply: its exit code and last line on stderr."""
        code = self.process.poll()
        if code is None:
            return "the process has closed its pipes"
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - 4096))
        lines = self.errors.read(4096).decode(errors="replace").strip().splitlines()
        last_line = text(lines[-1]) if lines else "no output"
        exit_text = signal.strsignal(-code) if code < 0 else f"exit code {code}"
        return f"the process ended ({exit_text}): {last_line}"


@contextlib.contextmanager
def _package_process(folder: Path) -> Iterator[_PackageProcess]:
    """Start the process with an empty home folder; on exit, kill it and its descendants."""
    with (
        tempfile.TemporaryDirectory(prefix="s3prl_ekd_", ignore_cleanup_errors=True) as home,
        tempfile.TemporaryFile() as errors,
        killed_on_exit(
            lambda: subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                cwd=home,
                env=_environment(home),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        ) as process,
    ):
        yield _PackageProcess(process, errors)


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
