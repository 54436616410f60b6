"""``--trust-checkpoint``: the one way to read a checkpoint that asks for code. Never a default.

For old files of s3prl or of others, whose pickles name classes beside tensors and plain values.
Loading one runs whatever it says. It counts for the one command that it is typed for, and those
that this one starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

OPTION = "--trust-checkpoint"
HELP = f"""\
  {OPTION}    load checkpoints that ask for code (old files of s3prl), and run that code;
                        only for files from somebody whom you would let use your account
"""
# What torch.load does where nobody says weights_only, as in s3prl.
FREE, STRICT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_trusted = False


def take(argv: Sequence[str]) -> list[str]:
    """``argv`` without the option; from now on checkpoints are trusted if it was there.

    s3prl's own ``torch.load`` goes by it too: trusted or not, with any torch.
    """
    global _trusted
    _trusted = OPTION in argv
    os.environ.pop(STRICT if _trusted else FREE, None)
    if _trusted:
        os.environ[FREE] = "1"
    return [word for word in argv if word != OPTION]


def trusted() -> bool:
    """Whether checkpoints that ask for code are loaded."""
    return _trusted


def words() -> list[str]:
    """What a command that starts others hands on to them."""
    return [OPTION] if _trusted else []
