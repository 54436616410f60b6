"""``--trust-checkpoint``: load checkpoints whose pickle can run code. Off by default.

For old checkpoints of s3prl or other tools, whose pickles name classes. Loading them can run any
code. The option applies to one command and to the commands that it starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

OPTION = "--trust-checkpoint"
HELP = f"""\
  {OPTION}    load checkpoints whose pickle can run code (old files of s3prl); only for
                        files whose authors you trust with your account
"""
# torch's environment variables for torch.load without weights_only, as s3prl calls it.
FREE, STRICT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_trusted = False


def read_option(argv: Sequence[str]) -> list[str]:
    """Remove the option from ``argv``; trust checkpoints from now on only if it was given.

    Applies to s3prl's own calls of ``torch.load`` too, with any version of torch.
    """
    global _trusted
    _trusted = OPTION in argv
    os.environ.pop(STRICT if _trusted else FREE, None)
    if _trusted:
        os.environ[FREE] = "1"
    return [argument for argument in argv if argument != OPTION]


def trusted() -> bool:
    """Whether checkpoints whose pickle can run code are loaded."""
    return _trusted


def trust_argv() -> list[str]:
    """The option as arguments for a child command; empty if it was not given."""
    return [OPTION] if _trusted else []
