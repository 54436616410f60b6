"""The commands ``run_pretrain.py`` and ``run_downstream.py``: s3prl's own scripts, unmodified.

Each applies :mod:`..compat`, registers ``ekd_student``, checks what the user typed, and calls the
script's ``main()``. A script in the working folder (an s3prl checkout) wins over the installed one.
Scripts are imported and called rather than run as ``__main__``, so that worker processes started by
spawning can import what they need.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from ..downstream.script_args import INIT_HINT, options
from ..system import torchrun
from ..system.terminal import log_to_stderr, prepare_streams, quiet_s3prl, run_command

logger = logging.getLogger(__name__)


def run_pretrain() -> int:
    """Entry point of the command ``run_pretrain.py``."""
    from ..pretrain import run as pretrain_run

    return _launch("run_pretrain", pretrain_run.prepare, pretrain_run.main)


def run_downstream() -> int:
    """Entry point of the command ``run_downstream.py``."""
    from ..downstream import run as downstream_run

    return _launch("run_downstream", downstream_run.prepare_downstream, downstream_run.main)


SCRIPTS = {"run_pretrain.py": run_pretrain, "run_downstream.py": run_downstream}


def _launch(
    script: str,
    prepare: Callable[[list[str]], list[str]],
    main: Callable[[ModuleType, list[str]], None],
) -> int:
    prepare_streams()
    level = logging.WARNING if torchrun.rank() else logging.INFO  # one of several processes speaks
    log_to_stderr(level)
    quiet_s3prl()
    hint = "" if "evaluate" in sys.argv else "; add -a (and leave -e out) to go on"
    return run_command(
        functools.partial(_run_script, script, prepare, main),
        f"stopped by Ctrl-C{hint}",
        broken_pipe=1,
        files_are_typed=False,
    )


def _run_script(
    script: str,
    prepare: Callable[[list[str]], list[str]],
    main: Callable[[ModuleType, list[str]], None],
) -> None:
    argv = sys.argv[1:]
    hide_cuda_from_cpu_runs(argv)
    wants_help = "-h" in argv or "--help" in argv
    with contextlib.ExitStack() as stack:
        if wants_help:
            stack.enter_context(_somewhere_set_up())
        else:
            argv = prepare(argv)
        module = import_script(script)
        sys.argv = [f"{script}.py", *argv]
        from ..files.atomic import atomic_saves

        with atomic_saves():
            main(module, argv)


def import_script(script: str) -> ModuleType:
    """s3prl's module of that name, from the checkout we stand in or from the installed package."""
    from .. import compat
    from .. import registration as plugin

    compat.apply()
    here = Path.cwd()
    if (here / f"{script}.py").is_file() and (here / "hub.py").is_file():
        sys.path.insert(0, str(here))  # what `python run_pretrain.py` would do
        plugin.register()
        return importlib.import_module(script)
    if script == "run_pretrain":
        plugin.open_pretrain(here)  # it needs nothing of s3prl.hub, which takes seconds to import
    else:
        plugin.register()
    return importlib.import_module(f"s3prl.{script}")


def hide_cuda_from_cpu_runs(argv: Sequence[str]) -> None:
    """s3prl's downstream Runner calls ``torch.cuda.device("cpu")`` on a machine with CUDA."""
    if options(argv, "", long=("device",)).device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def _somewhere_set_up():
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
