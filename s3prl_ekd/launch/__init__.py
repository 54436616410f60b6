"""The commands ``run_pretrain.py`` and ``run_downstream.py``: s3prl's own scripts, unmodified.

Each parses and checks what the user typed, applies :mod:`..compat`, registers ``ekd_student``, and
calls the script's ``main()`` within guards. A script in the working folder (an s3prl checkout) wins
over the installed one. Scripts are imported and called rather than run as ``__main__``, so that
worker processes started by spawning can import what they need.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ..request import DOWNSTREAM_HELP, INIT_HINT, R
from ..system import torchrun
from ..system.terminal import errors_shown, log_to_stderr, prepare_streams, quiet_s3prl


def run_pretrain() -> int:
    """Entry point of the command ``run_pretrain.py``."""
    from ..pretrain import run

    return _launch("run_pretrain", run.prepare, run.run)


def run_downstream() -> int:
    """Entry point of the command ``run_downstream.py``."""
    from ..downstream import run

    return _launch("run_downstream", run.prepare, run.run, DOWNSTREAM_HELP)


SCRIPTS = {"run_pretrain.py": run_pretrain, "run_downstream.py": run_downstream}


def _launch(
    name: str,
    prepare: Callable[[Sequence[str]], R],
    run: Callable[[ModuleType, R], None],
    help_text: str = "",
) -> int:
    prepare_streams()
    log_to_stderr(logging.WARNING if torchrun.rank() else logging.INFO)  # one of several speaks
    quiet_s3prl()
    argv = sys.argv[1:]
    hint = "" if "evaluate" in argv else "; add -a (and leave -e out) to go on"
    with errors_shown(f"stopped by Ctrl-C{hint}", broken_pipe=1, files_are_typed=False):
        if "-h" in argv or "--help" in argv:
            with _somewhere_set_up():
                script = import_script(name)
                sys.argv = [f"{name}.py", "-h"]
                print(help_text, end="")
                script.main()
        else:
            request = prepare(argv)
            run(import_script(name), request)
    return 0


def import_script(script: str) -> ModuleType:
    """s3prl's module of that name, from the checkout we stand in or from the installed package."""
    from .. import compat, registration

    compat.apply()
    here = Path.cwd()
    if (here / f"{script}.py").is_file() and (here / "hub.py").is_file():
        sys.path.insert(0, str(here))  # what `python run_pretrain.py` would do
        registration.register()
        return importlib.import_module(script)
    if script == "run_pretrain":
        registration.open_pretrain(here)  # without s3prl.hub, which takes seconds to import
    else:
        registration.register()
    return importlib.import_module(f"s3prl.{script}")


@contextlib.contextmanager
def _somewhere_set_up() -> Iterator[None]:
    """A folder where ``-h`` works: s3prl lists ``pretrain/`` while it builds its parser."""
    if Path("pretrain/ekd").is_dir():
        yield
        return
    from ..workspace import write_workspace

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_workspace(Path(folder))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            print(f"\nekd is not set up in this folder yet; {INIT_HINT}")
