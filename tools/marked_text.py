"""Replace the text between two marks in a file that is written by hand otherwise."""

from __future__ import annotations

from pathlib import Path

from s3prl_ekd.errors import SetupError


def between(text: str, begin: str, end: str, body: str, path: Path) -> str:
    """Return ``text`` with ``body`` between its marks ``begin`` and ``end``.

    Args:
        path: file of the text, for the error message.

    Raises:
        SetupError: the text does not have each mark once, in this order.
    """
    start, stop = text.find(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or start > stop:
        raise SetupError(f"{path} must have the marks {begin} and {end} once each, in this order")
    return f"{text[: start + len(begin)]}\n\n{body.strip()}\n\n{text[stop:]}"
