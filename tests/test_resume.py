"""What a resumed run takes from where: weights from the checkpoint, the rest as typed."""

import os
import shutil
import sys

import pytest
import torch
import yaml

from s3prl_ekd.checkpoints import newest, read_run
from s3prl_ekd.config import load_model_config
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.evaluate.scalars import read_scalars
from s3prl_ekd.evaluated import check_names
from s3prl_ekd.launch import run_pretrain

from .conftest import command, write_configs

RUN = ("run_pretrain.py", "-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teachers, corpus):
    """A run of 6 steps, started with -o."""
    folder = tmp_path_factory.mktemp("finished")
    command("init", ".", cwd=folder)
    write_configs(folder, teachers, corpus)
    command(*RUN, "-o", "config.runner.log_step=1", cwd=folder)
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch, capfd):
    """Type something in a copy of that folder, in this process; returns (code, stdout + stderr)."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["run_pretrain.py", "--device", "cpu", *words])
        try:
            code = run_pretrain()
        except SystemExit as left:
            code = left.code
        out = capfd.readouterr()
        return code, out.out + out.err

    return run


def latest():
    return read_run(newest("result/pretrain/x"))


def test_a_longer_run_has_the_learning_rate_of_its_length(run):
    more = "config.runner.total_steps=12,,config.optimizer.lr=5.e-3"
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", more)
    assert code == 0 and latest()["Step"] == 12
    rates = read_scalars("result/pretrain/x")["ekd/train-lr"]
    # s3prl's schedule by hand: linear from lr at 10 % of the steps to 0 at the end
    for step in (8, 10):
        assert rates[step] == pytest.approx(5e-3 * (1 - step / 12) / 0.9, rel=1e-4)
    # and what was typed once does not come back, nor is it lost
    code, said = run("-u", "ekd", "-n", "x", "-a")
    assert code == 0 and "Training for 12 steps" in said


def test_a_folder_in_use_is_not_written_into(run):
    before = {path.name for path in newest("result/pretrain/x").parent.iterdir()}
    code, said = run("-u", "ekd", "-n", "x", "-c", "runner.yaml", "-g", "model.yaml")
    assert code == 2 and "holds a run already: add -a to go on with it" in said
    assert {path.name for path in newest("result/pretrain/x").parent.iterdir()} == before


def test_the_config_of_a_resumed_run_is_checked(run):
    code, said = run("-u", "ekd", "-n", "x", "-a", "-o", "config.runner.save_step=0")
    assert code == 2 and "save_step is 0; 1 or more is allowed" in said


@pytest.mark.parametrize("where", ["override", "optimizer", "scheduler"])
def test_a_checkpoint_of_plain_data_runs_no_code(run, tmp_path, where):
    """s3prl would evaluate each of these texts."""
    evil = "__import__('os').mkdir('hacked')"
    path = newest("result/pretrain/x")
    states = read_run(path)
    if where == "override":
        states["Args"].override = f"config.runner.fp16={evil}"
    else:
        states["Config"][where] = {"name": f"{evil} or Adam", "lr": 0.1}
    torch.save(states, "new.ckpt")  # not in place: the tensors are still in the file
    os.replace("new.ckpt", path)
    code, said = run("-u", "ekd", "-n", "x", "-a")
    assert not (tmp_path / "hacked").exists()
    assert code == (0 if where == "override" else 2)
    if where != "override":
        assert f"{where}.name is" in said and "would run as code" in said


def test_the_run_keeps_its_whole_config(run, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "small.yaml").write_text("extends: ../model.yaml\naggregation: average\n")
    words = ("-u", "ekd", "-n", "y", "-c", "runner.yaml", "-g", "sub/small.yaml")
    code, said = run(*words)
    assert code == 0
    kept = load_model_config("result/pretrain/y/config_model.yaml")
    assert kept == load_model_config("sub/small.yaml") and kept.aggregation == "average"


def test_a_device_that_is_not_there(run):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    code, said = run("-u", "ekd", "-n", "x", "-a", "--device", "cuda:9")
    assert code == 2 and "--device cuda:9 cannot be used here" in said


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": {"name": "Adam(print(1))"}},
        {"scheduler": {"name": "x()"}},
        {"downstream_expert": {"modelrc": {"select": "RNNs if 1 else 2"}}},
        {"downstream_expert": {"corpus": {"metric": ["per", "__import__('os')"]}}},
        {"downstream_expert": {"datarc": {"decoder_args": {"unk_weight": "exit()"}}}},
        {"downstream_expert": {"modelrc": {"a": [{"pooling": "a.b"}]}}},
    ],
)
def test_what_s3prl_evaluates_must_be_a_name(config):
    with pytest.raises(ConfigError, match="must be a plain name"):
        check_names(config, "x.yaml")


def test_names_and_other_texts_pass():
    from .conftest import REPO

    for path in (REPO / "downstream_recipes").rglob("*.yaml"):
        check_names(yaml.safe_load(path.read_text()), path.name)
    check_names({"corpus": {"name": "a b"}, "x": {"unk_weight": "-math.inf"}}, "x.yaml")
