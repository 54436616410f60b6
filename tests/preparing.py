"""`s3prl-ekd prepare` in this process, its mistakes, and the lists of a classification run."""

from pathlib import Path

import pytest

from s3prl_ekd import cli


def prepare(*words) -> int:
    """The exit code of ``s3prl-ekd prepare WORDS``."""
    return cli.main(["prepare", *map(str, words)])


def fails(capsys, *words) -> str:
    """The one sentence with which ``s3prl-ekd prepare WORDS`` is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prepare(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def accuracy(folder: Path, name: str) -> float:
    """From the two lists of a run, ``NAME_predict.txt`` and ``NAME_truth.txt``, line by line."""
    predicted = (folder / f"{name}_predict.txt").read_text().splitlines()
    truth = (folder / f"{name}_truth.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in predicted] == [line.split(" ")[0] for line in truth]
    return sum(a == b for a, b in zip(predicted, truth, strict=True)) / len(truth)
