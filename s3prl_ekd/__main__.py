"""``python -m s3prl_ekd COMMAND ...``: any ``s3prl-ekd`` command, a script of s3prl or torchrun.

``python -m s3prl_ekd MODULE ...`` is ``python -m MODULE ...`` with ``ekd_student`` registered, for
programs that take upstreams from s3prl's hub: ``python -m s3prl_ekd espnet2.bin.asr_train ...``. A
``-m`` before MODULE is ignored, so that ``python -m s3prl_ekd`` can stand for ``python`` in scripts
such as ESPnet's ``asr.sh --python "python3 -m s3prl_ekd"``.
"""

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
    if sys.argv[1:2] == ["torchrun"]:  # in this process: on SIGTERM it ends its workers
        from torch.distributed.run import main as torchrun_main

        sys.argv.pop(0)
        torchrun_main()
        return 0
    if sys.argv[1:2] in (["run_pretrain.py"], ["run_downstream.py"], ["superb-job"]):
        from .launch import SCRIPTS

        return SCRIPTS[sys.argv.pop(1)]()
    if module := _other_module(sys.argv[1:]):
        from .launch.module import run_module

        return run_module(module, sys.argv[3 if sys.argv[1] == "-m" else 2 :])
    from .cli import main as cli_main

    return cli_main()


def _other_module(argv: list[str]) -> str | None:
    """The module to run, which is no command of this package; None if ``argv`` names none."""
    if argv[:1] == ["-m"]:
        return argv[1] if len(argv) > 1 else None
    return argv[0] if argv and "." in argv[0] and not argv[0].startswith("-") else None


def process() -> NoReturn:
    """Run :func:`main` and exit the process.

    Under torchrun the process exits with ``os._exit``, without Python's interpreter shutdown, in
    which a thread of torch.distributed sometimes aborts the process ("terminate called without an
    active exception"): torchrun would report the finished run as failed. Threads are joined and
    atexit functions called first, as in a normal exit.
    """
    end_with_parent()
    if not torchrun.is_distributed():
        sys.exit(main())
    code: int | str | None
    try:
        code = main()
    except SystemExit as system_exit:
        code = system_exit.code or 0
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    vars(threading)["_shutdown"]()  # the first two steps of a normal exit
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # no stream, or a broken pipe
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    process()
