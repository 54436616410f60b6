"""``--trust-checkpoint`` applies to one command and to the commands that it starts."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd import cli
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.files import trust
from s3prl_ekd.pretrain.sweep import SweepRun
from s3prl_ekd.student_file import contents

from .conftest import STUDENT, command


@pytest.fixture(autouse=True)
def untrusted_afterwards():
    yield
    trust.read_option([])


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A workspace with SID data of two speakers, and a student file that contains code."""
    rng, lines = np.random.default_rng(1), ["path\tspeaker\tsplit\n"]
    for speaker in ("ann", "bob"):
        for i, split in enumerate(("train",) * 4 + ("dev", "test")):
            sound = 0.1 * rng.standard_normal(7000 + 400 * i)
            soundfile.write(tmp_path / f"{speaker}{i}.wav", sound, 16000)
            lines.append(f"{speaker}{i}.wav\t{speaker}\t{split}\n")
    (tmp_path / "all.tsv").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "."]) == 0
    assert cli.main(["prepare", "sid", "all.tsv", "-o", "data/sid"]) == 0
    student = Student(StudentSettings(**STUDENT))
    file = contents(student, None, {}, {"step": 1}) | {"old": Touch(tmp_path / "code has run")}
    torch.save(file, tmp_path / "old.pt")
    return tmp_path


@pytest.mark.slow
def test_superb_passes_it_to_its_runs(here):
    """The probe, the training and the tests read the file; the last two are child processes."""
    argv = ["superb", "mine=old.pt", "--tasks", "sid", "--recipes", "tiny", "--steps", "sid=4"]
    result = command(*argv, cwd=here, check=False)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1
    assert "old.pt" in result.stderr and trust.OPTION in result.stderr
    assert not (here / "code has run").exists()
    command(*argv, trust.OPTION, cwd=here)
    assert (here / "code has run").exists()
    assert list(here.glob("result/superb/mine/sid/*/test_predict.txt"))


@pytest.mark.parametrize("options", [[], [trust.OPTION]])
def test_dry_run_prints_it(here, capsys, options):
    capsys.readouterr()
    cli.main(["superb", "fbank", "--tasks", "sid", "--recipes", "tiny", "--dry-run", *options])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert (trust.OPTION in shlex.split(line)) == bool(options)


def test_sweep_passes_it_to_its_runs(tmp_path):
    run = SweepRun(tmp_path / "model.yaml", tmp_path / "runner.yaml", 1, "")
    argv = run.argv
    trust.read_option([trust.OPTION])
    assert run.argv == [*argv, trust.OPTION]
