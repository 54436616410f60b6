"""Names of splits are checked before s3prl evaluates them as code."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest
import torch
import yaml

from s3prl_ekd.compat.no_eval import check_splits
from s3prl_ekd.downstream.run import prepare
from s3prl_ekd.errors import ConfigError, EkdError

from .conftest import recipe

DANGER = "train_dataloader() or self.run() or self.get_train"
RECIPES = {
    "asr": ("asr/tiny.yaml", "asr/config.yaml"),
    "ctc": ("ctc/tiny.yaml", "ctc/libriphone.yaml", "ctc/snips.yaml"),
    "voxceleb1": ("voxceleb1/tiny.yaml", "voxceleb1/config.yaml"),
    "emotion": ("emotion/tiny.yaml", "emotion/config.yaml"),
}
LIBRISPEECH = ("train", "dev-clean", "dev-other", "test-clean", "test-other")


def test_s3prl_evaluates_the_name_of_a_split():
    """In its ER expert; SID's has the same line."""
    from s3prl.downstream.emotion.expert import DownstreamExpert

    calls = []

    class Expert:
        get_dataloader = DownstreamExpert.get_dataloader

        def get_train_dataloader(self):
            return None

        def run(self):
            calls.append(True)

    Expert().get_dataloader(DANGER)
    assert calls


@pytest.mark.parametrize("task", RECIPES)
def test_the_recipes_have_the_splits_they_name(task):
    for path in RECIPES[task]:
        config = recipe(path)
        check_splits(task, config, path)
        names = ("train", "dev", "test")
        if task == "asr":
            names = [name for name in LIBRISPEECH if name in config["downstream_expert"]["datarc"]]
        for name in names:
            check_splits(task, config, path, name)
        with pytest.raises(ConfigError) as raised:
            check_splits(task, config, path, "nonsplit")
        parts = set(re.findall(r"[\w-]+", str(raised.value)))
        assert {"-t", "nonsplit", *names} <= parts and not parts & set(LIBRISPEECH) - set(names)


@pytest.mark.parametrize("task", [*RECIPES, "others"])
@pytest.mark.parametrize("bad", [DANGER, ["dev"], {"dev": 1}, None, 3, "", "-x", "a b"])
def test_invalid_names_are_rejected(task, bad):
    config = recipe(RECIPES.get(task, ["asr/tiny.yaml"])[0])
    check_splits(task, config, "x.yaml")
    for key, value in (("train_dataloader", bad), ("eval_dataloaders", ["dev", bad])):
        changed = {**config, "runner": {**config["runner"], key: value}}
        changed["runner"].setdefault("eval_dataloaders", ["dev"])
        if task == "asr" and key == "eval_dataloaders":
            value[0] = "dev-clean"
        with pytest.raises(ConfigError, match=rf"x\.yaml.*runner\.{key}"):
            check_splits(task, changed, "x.yaml")


@pytest.mark.parametrize("task", ["voxceleb1", "emotion"])
def test_a_downstream_run_checks_before_it_starts(task, tmp_path, monkeypatch):
    config = recipe(RECIPES[task][0])
    config["runner"]["eval_dataloaders"] = [DANGER]
    (tmp_path / "evil.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    argv = ["-m", "train", "-u", "fbank", "-d", task, "-n", "x", "-c", "evil.yaml"]
    with pytest.raises(EkdError, match=r"evil\.yaml.*runner\.eval_dataloaders"):
        prepare(argv)
    assert not (tmp_path / "result").exists()
    override = f"config.runner.train_dataloader='{DANGER}'"
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(recipe(RECIPES[task][0])))
    with pytest.raises(EkdError, match=r"runner\.train_dataloader"):
        prepare([*argv[:-1], "good.yaml", "-o", override])


def test_a_resumed_run_checks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Namespace(expdir="x", downstream="emotion", upstream="fbank", upstream_ckpt=None)
    config = recipe("emotion/tiny.yaml")
    tables = tmp_path / "data/er/meta_data/Session1"
    for folder in (tmp_path / "data/er/audio", tables):
        folder.mkdir(parents=True)
    (tmp_path / "data/er/audio/a.wav").touch()
    for name in ("train", "test"):
        text = '{"labels": {"sad": 0}, "meta_data": [{"path": "a.wav", "label": "sad"}]}'
        (tables / f"{name}_meta_data.json").write_text(text)
    states = {"Args": args, "Config": config, "Step": 1, "Downstream": {}, "Optimizer": {}}
    torch.save(states, "good.ckpt")
    config["runner"]["train_dataloader"] = DANGER
    torch.save(states, "evil.ckpt")
    assert prepare(["-m", "train", "-e", "good.ckpt"])
    with pytest.raises(EkdError, match=r"evil\.ckpt.*runner\.train_dataloader"):
        prepare(["-m", "train", "-e", "evil.ckpt"])
    for split in ("dev", "nonsplit"):  # only -t is checked, not the splits of training
        argv = ["-m", "evaluate", "-t", split, "-e", "evil.ckpt"]
        if split == "dev":
            assert prepare(argv)
        else:
            with pytest.raises(EkdError, match=r"-t\b.*nonsplit"):
                prepare(argv)


def test_an_invalid_task_name():
    check_splits(["asr"], recipe("asr/tiny.yaml"), "x.ckpt")
    with pytest.raises(ConfigError, match=re.escape(DANGER)):
        check_splits(["asr"], recipe("asr/tiny.yaml"), "x.ckpt", DANGER)
