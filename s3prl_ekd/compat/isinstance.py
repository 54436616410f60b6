"""Python's ``isinstance`` is put back after s3prl's downstream script has replaced it."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def isinstance_kept() -> Iterator[None]:
    """What s3prl 0.4.18's ``hack_isinstance`` does ends with the block.

    The script wraps ``isinstance`` once a call, in Python and for the whole process, since DDP
    would rebuild the records, a defaultdict. In a process that runs several, each makes all that
    follows slower: ten times after some dozens.
    """
    before = builtins.isinstance
    try:
        yield
    finally:
        builtins.isinstance = before
