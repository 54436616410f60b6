"""Helpers: run `s3prl-ekd prepare` in this process, check its messages, compute accuracies."""

import re
from pathlib import Path

from s3prl_ekd import cli

from .conftest import error_of


def prepare(*argv) -> int:
    """Run ``s3prl-ekd prepare ARGV``; return its exit code."""
    return cli.main(["prepare", *map(str, argv)])


def fails(capsys, *argv) -> str:
    """Run ``s3prl-ekd prepare ARGV``, which must fail with exit code 2; return the error line."""
    return error_of(capsys, "prepare", *argv)


def without_folders(text: str) -> str:
    """Replace absolute paths by ``/NAME``: the names of temporary folders have words and digits."""
    return re.sub(r"/\S*/", "/", text)


def numbers(text: str) -> list[int]:
    """Return the integers in a message, in order; paths and names with digits do not count."""
    return [int(n) for n in re.findall(r"(?<![\w.-])\d+(?!\.?\w)", without_folders(text))]


def check_message(message: str, *parts: str | int) -> None:
    """Assert that a message has all parts: integers, paths (with a /) and other strings."""
    for part in parts:
        if isinstance(part, int):
            assert part in numbers(message), (part, message)
        else:
            text = message if "/" in part else without_folders(message)
            assert re.search(rf"(?<![\w-]){re.escape(part.strip())}(?!\w)", text), (part, message)


def accuracy(folder: Path, name: str) -> float:
    """Compute the accuracy from a run's ``NAME_predict.txt`` and ``NAME_truth.txt``."""
    predicted = (folder / f"{name}_predict.txt").read_text().splitlines()
    truth = (folder / f"{name}_truth.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in predicted] == [line.split(" ")[0] for line in truth]
    return sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(truth)
