"""Processes of the study's commands: start, poll, and terminate them with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.text import read_json
from s3prl_ekd.system.jobs import child_command, child_environment

from .folder import TimeSpent, write_json

LAUNCH_ARGV = tuple(child_command(()))
CPU_POLL_SECONDS = 3.0  # seconds between two measurements of CPU time
GRACE_SECONDS = 30.0  # seconds between SIGTERM and SIGKILL, to save a checkpoint


class JobProcess:
    """Runs commands one after the other in ``cwd``; their output is appended to ``log``.

    Each command leads its own process group. So only this process passes Ctrl-C on to it, and its
    child processes can be killed with it.
    """

    def __init__(self, commands: Sequence[Sequence[str]], cwd: Path, log: Path):
        self.commands, self.cwd, self.log = list(commands), cwd, log
        self.started = self._last_poll = time.monotonic()
        # CPU seconds: of the commands that have ended; of the running one, as last measured
        self._cpu, self._running_cpu = 0.0, 0.0
        self.process: subprocess.Popen | None = None
        self.log_offset = log.stat().st_size if log.exists() else 0  # where our output starts
        self._next()

    def _next(self) -> None:
        argv = self.commands.pop(0)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*LAUNCH_ARGV, *argv],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **child_environment()},
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit code of the last or the failed command; None while commands run."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self._last_poll > CPU_POLL_SECONDS:
                self._last_poll = time.monotonic()
                self._running_cpu = max(self._running_cpu, _session_cpu(self.process.pid))
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        # usage covers only child processes that were waited for, which a fork server is not
        self._cpu += max(usage.ru_utime + usage.ru_stime, self._running_cpu)
        self._running_cpu = 0.0
        if self.process.returncode == 0 and self.commands:
            self._next()
            return None
        return self.process.returncode

    @property
    def spent(self) -> TimeSpent:
        return TimeSpent(time.monotonic() - self.started, self._cpu)

    @property
    def error_message(self) -> str:
        """The text of the last ``error:`` line of the output, or else its last line."""
        with open(self.log, "rb") as log:
            log.seek(self.log_offset)
            text = log.read().decode("utf-8", "replace").replace("\r", "\n").strip()
        lines = text.splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else lines[-1]

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group, if it still exists."""
        # PermissionError: macOS raises it for a group whose last process is a zombie
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def terminate(children: Sequence[JobProcess]) -> None:
    """Terminate the commands: SIGTERM, then SIGKILL after :data:`GRACE_SECONDS`.

    Once a command has ended, what remains of its process group is killed. Runs of ``superb`` that
    are killed this way resume from their last checkpoint.
    """
    for child in children:
        child.commands.clear()
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    waiting = list(children)
    while waiting and time.monotonic() < deadline:
        waiting = [child for child in waiting if child.poll() is None]
        time.sleep(0.05)
    for child in children:
        child.send_signal(signal.SIGKILL)


def write_running(children: Sequence[JobProcess], path: Path) -> None:
    """Record the running process groups in ``path``, for :func:`check_no_leftovers`."""
    write_json(path, {"groups": {str(c.process.pid): _start_time(c.process.pid) for c in children}})


def check_no_leftovers(path: Path) -> None:
    """Check that no command of a killed study is still running.

    Raises:
        SetupError: some are; the message has the command that ends them.
    """
    if not path.exists():
        return
    groups = read_json(path, "record", SetupError).get("groups", {})
    leftovers = [pid for pid, began in groups.items() if began and _start_time(int(pid)) == began]
    if leftovers:
        raise SetupError(
            "commands of an earlier start that was killed are still running; wait for them, or "
            f"type: kill -- {' '.join(f'-{pid}' for pid in leftovers)}"
        )


def _start_time(pid: int | str) -> str:
    """Start time of a process, from /proc; "" if it has ended or there is no /proc."""
    fields = _stat(pid)
    return fields[_START] if fields and fields[0] != "Z" else ""


def _session_cpu(session: int) -> float:
    """CPU seconds of the processes of a session and of the child processes they have waited for; 0
    if there is no /proc."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(path.name)
        if fields and fields[_SESSION] == str(session):
            ticks += sum(map(int, fields[_TIMES]))
    return ticks / os.sysconf("SC_CLK_TCK")


# Indices into the fields of /proc/PID/stat after the command's name. proc_pid_stat(5) counts fields
# from 1 and has two fields more in front.
_SESSION, _TIMES, _START = 6 - 3, slice(14 - 3, 18 - 3), 22 - 3


def _stat(pid: int | str) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
