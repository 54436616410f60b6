"""Commands as processes: begun, looked at, ended with all that they have begun themselves."""

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

from .folder import Spent, write_json

LAUNCH = tuple(child_command(()))
LOOK = 3.0  # seconds between two looks at how busy a command's processes are
GRACE = 30.0  # seconds to save in before a process is killed


class Child:
    """One command after the other in ``cwd``, all that they say in ``log``.

    Each command leads a process group of its own, so that a Ctrl-C reaches it through us alone,
    and what it has begun ends with it.
    """

    def __init__(self, commands: Sequence[Sequence[str]], cwd: Path, log: Path):
        self.commands, self.cwd, self.log = list(commands), cwd, log
        self.began = self._looked = time.monotonic()
        self._cpu, self._seen = 0.0, 0.0  # of commands that ended; of the one that runs
        self.process: subprocess.Popen | None = None
        self.start = log.stat().st_size if log.exists() else 0  # of what this child says
        self._next()

    def _next(self) -> None:
        words = self.commands.pop(0)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*LAUNCH, *words],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **child_environment()},
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code once the last command, or one that failed, has ended; None before."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            if time.monotonic() - self._looked > LOOK:
                self._looked = time.monotonic()
                self._seen = max(self._seen, _session_cpu(self.process.pid))
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        # usage has only the children it has waited for, and a fork server is none of them
        self._cpu += max(usage.ru_utime + usage.ru_stime, self._seen)
        self._seen = 0.0
        if self.process.returncode == 0 and self.commands:
            self._next()
            return None
        return self.process.returncode

    @property
    def spent(self) -> Spent:
        return Spent(time.monotonic() - self.began, self._cpu)

    @property
    def said(self) -> str:
        """The sentence of an error, or the last line."""
        with open(self.log, "rb") as log:
            log.seek(self.start)
            text = log.read().decode("utf-8", "replace").replace("\r", "\n").strip()
        lines = text.splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else lines[-1]

    def signal(self, number: int) -> None:
        """To the command and all that it has begun, as far as they are still there."""
        # PermissionError: macOS says so of a group whose last process has ended unwaited for
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def end(children: Sequence[Child]) -> None:
    """Ask them to save and leave; kill what has not done so after a while.

    A command that has left takes with it what it has begun: runs of ``superb`` that outlive it are
    killed then, saved or not. They go on from their last checkpoint.
    """
    for child in children:
        child.commands.clear()
        child.signal(signal.SIGTERM)
    late = time.monotonic() + GRACE
    waiting = list(children)
    while waiting and time.monotonic() < late:
        waiting = [child for child in waiting if child.poll() is None]
        time.sleep(0.05)
    for child in children:  # the rest of its group
        child.signal(signal.SIGKILL)


def note(children: Sequence[Child], path: Path) -> None:
    """Write down which process groups are running, for whoever comes after a kill."""
    write_json(path, {"groups": {str(c.process.pid): _birth(c.process.pid) for c in children}})


def check_none_left(path: Path) -> None:
    """Refuse to begin where a killed study has left commands that still run.

    Raises:
        SetupError: naming them.
    """
    if not path.exists():
        return
    groups = read_json(path, "record", SetupError).get("groups", {})
    left = [pid for pid, birth in groups.items() if birth and _birth(int(pid)) == birth]
    if left:
        raise SetupError(
            "commands of an earlier start, which was killed, are still running; wait for them, or "
            f"end them: kill -- {' '.join(f'-{pid}' for pid in left)}"
        )


def _birth(pid: int | str) -> str:
    """When a process began, as Linux counts it; "" where it is gone, or where there is no /proc."""
    fields = _stat(pid)
    return fields[_BIRTH] if fields and fields[0] != "Z" else ""


def _session_cpu(session: int) -> float:
    """Processor seconds of the processes of a session, with the ended children they have waited
    for; 0 where there is no /proc."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(path.name)
        if fields and fields[_SESSION] == str(session):
            ticks += sum(map(int, fields[_TIMES]))
    return ticks / os.sysconf("SC_CLK_TCK")


# Of /proc/PID/stat, behind the command's name: see proc_pid_stat(5), whose fields count from 1 and
# of which the first two are left out here.
_SESSION, _TIMES, _BIRTH = 6 - 3, slice(14 - 3, 18 - 3), 22 - 3


def _stat(pid: int | str) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
