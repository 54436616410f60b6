"""Several experiments with several seeds: the runs and their table."""

import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from s3prl_ekd.errors import SetupError
from s3prl_ekd.pretrain import sweep
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.sweep import SweepResult, SweepRun, results_table, run_sweep
from s3prl_ekd.system.jobs import Jobs
from s3prl_ekd.system.tables import markdown_table

from .conftest import command, edit_yaml, write_configs


def test_the_table():
    results = {
        "a": [SweepResult(1.0, {"x": 0.5}, 10.0), SweepResult(2.0, {"x": 0.7}, 20.0)],
        "b": [SweepResult(3.0, {"x": 0.1, "y": 0.2}, 1.4)],
    }
    rows = results_table(results)
    assert rows[0] == ["experiment", "seeds", "loss", "distance to x", "distance to y", "seconds"]
    assert rows[1] == ["a", "2", "1.5000 ± 0.7071", "0.6000 ± 0.1414", "", "15"]
    assert rows[2] == ["b", "1", "3.0000", "0.1000", "0.2000", "1"]
    assert markdown_table(rows).splitlines()[1].startswith("|------------|")


def test_finished_runs_are_kept(pretrain_folder):
    (pretrain_folder / "other.yaml").write_text("extends: model.yaml\naggregation: average\n")
    argv = ("sweep", "model.yaml", "other.yaml", "-c", "runner.yaml", "--seeds", "1", "2")
    first = command(*argv, "--jobs", "2", "--csv", "t.csv", cwd=pretrain_folder)
    rows = list(csv.reader((pretrain_folder / "t.csv").open()))
    assert [row[0] for row in rows] == ["experiment", "model", "other"]
    losses = []
    for seed in (1, 2):
        scalars = read_scalars(pretrain_folder / f"result/sweep/other-seed{seed}")
        losses.append(scalars["ekd/train-loss_mean"][6])
    assert losses[0] != losses[1]
    mean, spread = rows[2][2].split(" ± ")
    assert float(mean) == pytest.approx(statistics.fmean(losses), abs=1e-4)
    assert float(spread) == pytest.approx(statistics.stdev(losses), abs=1e-4)
    log = pretrain_folder / "result/sweep/model-seed1/log.txt"
    size = log.stat().st_size
    second = command(*argv, cwd=pretrain_folder)
    assert second.stdout == first.stdout and log.stat().st_size == size


def test_results_of_version_0_1_are_found(pretrain_folder):
    """Its folder and record had other names; a finished run there is not run again."""
    argv = ("sweep", "model.yaml", "-c", "runner.yaml", "--seeds", "1")
    first = command(*argv, cwd=pretrain_folder)
    folder = pretrain_folder / "result/matrix/model-seed1"
    folder.parent.mkdir()
    (pretrain_folder / "result/sweep/model-seed1").rename(folder)
    (folder / "sweep.json").rename(folder / "matrix.json")
    size = (folder / "log.txt").stat().st_size
    second = command(*argv, cwd=pretrain_folder)
    assert second.stdout == first.stdout and (folder / "log.txt").stat().st_size == size
    assert list((pretrain_folder / "result/sweep").iterdir()) == []


def test_a_folder_with_other_settings(pretrain_folder):
    argv = ("sweep", "model.yaml", "-c", "runner.yaml")
    command(*argv, cwd=pretrain_folder)
    done = command(*argv, "-o", "config.optimizer.lr=0.5", cwd=pretrain_folder, check=False)
    assert done.returncode == 2 and "result/sweep/model-seed1337" in done.stderr


def test_a_folder_with_other_contents_of_the_same_files(tmp_path, teachers, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path, teachers, corpus)
    shutil.copytree(corpus / "tables", "tables")
    shutil.copy(teachers["hubert"], "teacher.pt")
    with edit_yaml("model.yaml") as model:
        model["teachers"]["hubert"]["model"] = "teacher.pt"
    with edit_yaml("runner.yaml") as config:
        config["pretrain_expert"]["datarc"]["file_path"] = "tables"
    run = SweepRun(Path("model.yaml"), Path("runner.yaml"), 1, "")
    monkeypatch.setattr(sweep, "read_result", lambda run: run.name)
    monkeypatch.setattr(Jobs, "run", lambda *_: None)
    assert run_sweep([run]) == ["model-seed1"]
    assert "seconds" in run.record.read_text()
    assert run_sweep([run]) == ["model-seed1"]
    table = Path("tables/train.csv").read_text()
    Path("tables/train.csv").write_text(table.rsplit("\n", 3)[0] + "\n")
    with pytest.raises(SetupError, match=r"result/sweep/model-seed1 .*tables/train"):
        run_sweep([run])
    Path("tables/train.csv").unlink()  # the result can still be read
    assert run_sweep([run]) == ["model-seed1"]
    Path("tables/train.csv").write_text(table)
    shutil.copy(teachers["robust"], "teacher.pt")
    with pytest.raises(SetupError, match=r"result/sweep/model-seed1 .*teachers\.hubert\.model"):
        run_sweep([run])
    record = {**json.loads(run.record.read_text())}
    del record["files"]  # a record of an earlier version
    run.record.write_text(json.dumps(record))
    assert run_sweep([run]) == ["model-seed1"]


def test_errors(tmp_path):
    done = command("sweep", "a.yaml", "-c", "b.yaml", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "s3prl-ekd init ." in done.stderr
    command("init", ".", cwd=tmp_path)
    done = command("sweep", "a.yaml", "-c", "b.yaml", cwd=tmp_path, check=False)
    assert done.returncode == 2 and re.search(r"\bb\.yaml\b.*No such file", done.stderr)
    command("init", ".", "-x", "dp_hubert", "--tiny", cwd=tmp_path)
    with edit_yaml(tmp_path / "pretrain/ekd/tiny_runner.yaml") as config:
        config["optimizer"]["name"] = "AdamW_with_schedule"
    argv = ("pretrain/ekd/tiny/dp_hubert.yaml", "-c", "pretrain/ekd/tiny_runner.yaml")
    done = command("sweep", *argv, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "FusedAdamW" in done.stderr  # before any run
    (tmp_path / "mine.csv").write_text("a,b\n")
    argv = ("pretrain/ekd/tiny_model.yaml", "-c", "pretrain/ekd/tiny_runner.yaml")
    done = command("sweep", *argv, "--csv", "mine.csv", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "mine.csv" in done.stderr
    assert not (tmp_path / "result").exists()
