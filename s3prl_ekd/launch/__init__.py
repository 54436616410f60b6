"""The commands ``run_pretrain.py`` and ``run_downstream.py``: they call s3prl's unmodified scripts.

Each command parses and checks its arguments, applies :mod:`..compat`, registers ``ekd_student``,
and calls the ``main()`` of s3prl's script. A script in the working folder (an s3prl checkout) takes
precedence over the installed one. Scripts are imported rather than run as ``__main__``, so that
spawned worker processes can import their classes.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ..compat.source import in_checkout
from ..files import trust
from ..request import DOWNSTREAM_HELP, INIT_HINT, DownstreamRequest, RequestT
from ..system import torchrun
from ..system.s3prl_distribution import announce_s3prl
from ..system.terminal import log_to_stderr, prepare_streams, quiet_s3prl, show_errors


def run_pretrain() -> int:
    """Entry point of the command ``run_pretrain.py``."""
    from ..pretrain import run

    return _launch("run_pretrain", run.prepare, run.run)


def run_downstream() -> int:
    """Entry point of the command ``run_downstream.py``."""
    from ..downstream import run

    return _launch("run_downstream", run.prepare, run.run, DOWNSTREAM_HELP)


def superb_job() -> int:
    """Train and test, in this process, the downstream run that ``superb`` writes to stdin."""
    from ..downstream import run as downstream
    from ..superb.plan import PlannedRun
    from ..superb.run import train_and_test

    def call(request: DownstreamRequest) -> None:
        checked = downstream.prepare(request.command()[1:], by_superb=True)
        downstream.run(import_script("run_downstream"), checked)

    with _messages("stopped by Ctrl-C"):
        trust.read_option(sys.argv)
        train_and_test(PlannedRun.from_json(sys.stdin.buffer.read()), call)
    return 0


SCRIPTS = {
    "run_pretrain.py": run_pretrain,
    "run_downstream.py": run_downstream,
    "superb-job": superb_job,
}


def _launch(
    name: str,
    prepare: Callable[[Sequence[str]], RequestT],
    run: Callable[[ModuleType, RequestT], None],
    help_text: str = "",
) -> int:
    argv = sys.argv[1:]
    with _messages(f"stopped by Ctrl-C{_resume_hint(argv)}"):
        announce_s3prl()
        if "-h" in argv or "--help" in argv:
            with _initialised_folder():
                script = import_script(name)
                sys.argv = [f"{name}.py", "-h"]
                print(help_text, end="")
                script.main()
        else:
            request = prepare(argv)
            run(import_script(name), request)
    return 0


def _resume_hint(argv: Sequence[str]) -> str:
    """How the command resumes after Ctrl-C; empty for an evaluation."""
    values = dict(itertools.pairwise(argv))
    if "evaluate" in (values.get("-m"), values.get("--mode")):
        return ""
    past = values.get("-e") or values.get("--past_exp")
    if past is None:
        return "; add -a to resume"
    folder = past if os.path.isdir(past) else os.path.dirname(past) or "."
    return f"; to resume, give the command with -e {shlex.quote(folder)}"


def _messages(interrupted: str) -> contextlib.AbstractContextManager[None]:
    """Set up logging, and return a context that turns expected errors into messages."""
    prepare_streams()
    log_to_stderr(logging.WARNING if torchrun.rank() else logging.INFO)  # only rank 0 logs progress
    quiet_s3prl()
    return show_errors(interrupted, script=True)


def import_script(script: str) -> ModuleType:
    """Import s3prl's script from the checkout in the working folder, else from the package."""
    from .. import compat, registration

    compat.apply()
    folder = Path.cwd()
    if in_checkout(f"{script}.py"):
        sys.path.insert(0, str(folder))  # as `python run_pretrain.py` does
        registration.register()
        return importlib.import_module(script)
    if script == "run_pretrain":
        registration.expose_pretrain(folder)  # without s3prl.hub, which is not needed
    else:
        registration.register()
    return importlib.import_module(f"s3prl.{script}")


@contextlib.contextmanager
def _initialised_folder() -> Iterator[None]:
    """Work in a temporary folder from ``init`` if the current one has no ``pretrain/ekd``.

    s3prl's parser lists ``pretrain/``, so ``-h`` would fail without it.
    """
    if Path("pretrain/ekd").is_dir():
        yield
        return
    from ..workspace import write_workspace

    previous = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_workspace(Path(folder))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(previous)
            print(f"\nthis folder has no pretrain/ekd yet; {INIT_HINT}")
