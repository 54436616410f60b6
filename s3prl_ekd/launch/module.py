"""Run a module of another program, with this package's upstreams in ``s3prl.hub``."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence

from ..errors import SetupError
from ..system.terminal import prepare_streams, show_errors


def run_module(name: str, argv: Sequence[str]) -> int:
    """Run ``python -m NAME ARGV...`` in this process, after ``s3prl_ekd.register()``.

    An error of this package, such as a missing student file, becomes one line. Other exceptions
    keep their traceback. Logging and warnings are left to the program.
    """
    from ..registration import register
    from ..system import s3prl_distribution

    prepare_streams()
    with show_errors(script=True):
        if name.endswith(".py"):
            raise SetupError(
                f"{name[:100]} is a file; give a module, as after python -m: {name[:-3][:100]}"
            )
        _check(name.partition(".")[0], name)  # before anything is imported
        register()
        print(f"ekd_student added to {s3prl_distribution.installation()}", file=sys.stderr)
        _check(name, name)  # imports the packages around it
        sys.argv = [name, *argv]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def _check(module: str, name: str) -> None:
    """Raise SetupError if there is no such module; ``name`` is what was typed."""
    try:
        spec = importlib.util.find_spec(module)
        found = spec is not None
        if spec is not None and module == name and spec.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__") is not None  # of a package
    except (ModuleNotFoundError, ValueError) as error:
        missing = getattr(error, "name", None) or module
        if missing != module and not module.startswith(f"{missing}."):
            raise  # a package around it needs something that is not installed
        found = False
    if not found:
        raise SetupError(
            f"{name[:100]} is neither a command of s3prl-ekd nor a module of {sys.executable}; "
            "check its spelling, or install its package in this Python"
        )
