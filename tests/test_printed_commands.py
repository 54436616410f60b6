"""The next command that is printed can be typed, for any path."""

import shlex

import pytest

from s3prl_ekd import cli
from s3prl_ekd.commands.init import _next_steps
from s3prl_ekd.downstream.requirements import init_command
from s3prl_ekd.workspace import CorpusPaths

AWKWARD = "it's lr=1e-4; $HOME"


def next_argv(capsys) -> list[str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    (line,) = lines
    return shlex.split(line.removeprefix("next: "))


@pytest.mark.parametrize("kind", ["student", "superb"])
def test_after_an_export(student_file, tmp_path, capsys, kind):
    out = tmp_path / AWKWARD
    assert cli.main(["export", kind, str(student_file), "-o", str(out)]) == 0
    assert str(out) in next_argv(capsys)


def test_after_init(tmp_path):
    folder = tmp_path / AWKWARD
    cd = _next_steps(folder, CorpusPaths(None, None, None, [])).partition(", then")[0]
    assert shlex.split(cd.removeprefix("next: ")) == ["cd", str(folder)]
    assert shlex.split(init_command(folder))[-1] == str(folder)
