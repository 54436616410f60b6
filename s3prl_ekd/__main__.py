"""``python -m s3prl_ekd run_pretrain.py …`` (for torchrun), or any ``s3prl-ekd`` command."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

from .system import torchrun
from .system.jobs import end_with_parent


def main() -> int | None:
    if sys.argv[1:2] == ["torchrun"]:  # as a child: it ends its own processes when it is ended
        from torch.distributed.run import main as torchrun_main

        sys.argv.pop(0)
        torchrun_main()
        return 0
    if sys.argv[1:2] in (["run_pretrain.py"], ["run_downstream.py"]):
        from .launch import SCRIPTS

        return SCRIPTS[sys.argv.pop(1)]()
    from .cli import main as cli_main

    return cli_main()


def process() -> NoReturn:
    """:func:`main` as a whole process, and its end.

    One of several ends before Python takes itself down. The threads of torch.distributed are there
    until then, and one that comes to need Python meanwhile aborts the process ("terminate called
    without an active exception"): rarely, but torchrun calls a run that is finished failed then.
    What waits for the end is called all the same: threads, and whatever was given to atexit.
    """
    end_with_parent()
    if not torchrun.several():
        sys.exit(main())
    code: int | str | None
    try:
        code = main()
    except SystemExit as left:
        code = left.code or 0
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    vars(threading)["_shutdown"]()  # these two are what Python does first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # there is none, or nobody reads it
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    process()
