"""Facts that a program writes between two marks of a text that people wrote, and nowhere else."""

from __future__ import annotations

from pathlib import Path

from s3prl_ekd.errors import SetupError


def between(text: str, begin: str, end: str, body: str, path: Path) -> str:
    """``text`` with ``body`` between its marks ``begin`` and ``end``.

    Args:
        path: of the text, for the sentence.

    Raises:
        SetupError: the marks are not there once each, in this order.
    """
    first, last = text.find(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or first > last:
        raise SetupError(f"{path} lacks the marks {begin} and {end}, once each and in this order")
    return f"{text[: first + len(begin)]}\n\n{body.strip()}\n\n{text[last:]}"
