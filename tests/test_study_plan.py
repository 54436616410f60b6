"""The study's command: what it plans, and what it says to mistakes."""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import study as tool
import torch
import yaml
from s3prl.optimizers import get_optimizer
from study_parts.design import StudyRow, model_config, runner_config, students
from study_parts.folder import StudyFolder, input_digests
from study_parts.parts import plan

from s3prl_ekd.commands import superb
from s3prl_ekd.distill.losses import LossWeights, distillation_loss
from s3prl_ekd.errors import ConfigError, SetupError
from s3prl_ekd.files.config import apply_overrides
from s3prl_ekd.pretrain.settings import load_model_config, load_runner_config
from s3prl_ekd.superb.plan import noise_digest
from s3prl_ekd.teachers import zoo

from .conftest import REPO
from .study_cases import SINGLE, typed


def test_42_students_that_differ_in_nothing_but_what_is_compared():
    setting = typed()
    found = students(setting)
    assert len(found) == len({s.name for s in found}) == 42
    sources = ["none", *SINGLE, "average", "concat", "separate"]
    expected = set(itertools.product(["small", "large"], sources, [1, 2, 3]))
    assert {(s.row.size, s.row.learned_from, s.seed) for s in found} == expected
    configs = {s.row: model_config(setting, s.row) for s in found}
    assert len(configs) == 14
    for row, config in configs.items():
        assert config["init"] == {"teacher": "tiny_hubert"}
        teachers = config.pop("teachers")
        wanted = SINGLE if row.learned_from in sources[4:] else [row.learned_from]
        if row.learned_from == "none":  # of the control, too, it gives the first weights
            wanted = ["tiny_hubert"]
        if "tiny_hubert" not in wanted:  # its weights are the first ones, its layers no target
            assert teachers.pop("tiny_hubert")["weight"] == 0
        assert teachers == {name: {"model": name, "layers": [2, 4, 6]} for name in wanted}
        assert config.pop("aggregation") == (
            row.learned_from if row.learned_from in sources[4:] else "separate"
        )
    for size in ("small", "large"):  # what is left is the same for all of a size
        left = [json.dumps(c, sort_keys=True) for row, c in configs.items() if row.size == size]
        assert len(set(left)) == 1


def test_random_first_weights_if_asked_for():
    setting = typed("--init", "none", "--size", "small=48,96,2")
    for row in {s.row for s in students(setting)}:
        config = model_config(setting, row)
        assert config["init"] == {"teacher": None}
        assert all("weight" not in teacher for teacher in config["teachers"].values())
        assert "feature_grad_mult" not in config["student"]


@pytest.mark.parametrize("learned_from", SINGLE)
def test_first_weights_of_one_teacher_and_a_loss_of_another(learned_from):
    """The loss of a row over one teacher is that of a run that knows no other one."""
    torch.manual_seed(0)
    shape, losses = (2, 3, 5, 192), []  # [batch, layer, frame, width]
    targets = {name: torch.randn(shape) for name in SINGLE}
    for each in (typed(), typed("--init", "none")):
        teachers = load_model_config(model_config(each, StudyRow("small", learned_from))).teachers
        weights = {name: teacher.weight for name, teacher in teachers.items()}
        wanted = {name: targets[name] for name in teachers}
        made = {name: torch.zeros_like(value) for name, value in wanted.items()}
        masks = dict.fromkeys(wanted, torch.ones(2, 5, dtype=torch.bool))
        losses.append(distillation_loss(made, wanted, LossWeights(masks, weights))[0])
    assert losses[0] == losses[1] > 0


def test_the_configs_are_what_the_product_takes(tmp_path):
    setting = typed()
    folder = StudyFolder(tmp_path)
    folder.start(setting, Path("/speech"), {})
    for row in {s.row for s in students(setting)}:
        loaded = load_model_config(tmp_path / f"configs/{row.name}.yaml")
        assert all(t.layers == (2, 4, 6) for t in loaded.teachers.values())
    loaded = load_runner_config(tmp_path / "configs/runner.yaml")
    assert loaded.runner.total_steps == 200
    assert load_runner_config(tmp_path / "configs/start.yaml").runner.total_steps < 10
    assert loaded.pretrain_expert.datarc.sequence_length == 32_000


@pytest.mark.parametrize("steps", [4, 5, 7, 30, 2000])
def test_any_number_of_steps_makes_a_runner_config(tmp_path, steps):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(runner_config(typed("--steps", str(steps)), tmp_path)))
    assert load_runner_config(path).runner.total_steps == steps


def test_the_plan_computes_targets_once_and_evaluates_seed_after_seed():
    jobs = plan(typed(), Path("/s"), Path("/s/esc10"), 2)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    kinds = [job.kind for job in jobs if job.kind != "prepare"]
    assert kinds == ["cache"] + (["start", *["distil"] * 6] * 2 + ["evaluate"]) * 3
    cache = next(job for job in jobs if job.kind == "cache")
    assert model_config(typed(), StudyRow("large", "separate"))["teachers"].keys() == set(SINGLE)
    assert "configs/large-separate.yaml" in cache.commands[0]
    for job in jobs:
        assert set(job.needs) <= set(names[: names.index(job.name)])
    for job in jobs:
        if job.kind in ("start", "distil"):
            train = job.commands[0]
            runner = "runner" if job.kind == "distil" else "start"
            assert train[train.index("-c") + 1] == f"configs/{runner}.yaml"
            seed = job.name[-1]
            assert train[train.index("--seed") + 1] == seed
            assert train[-1].endswith("target_cache='cache'")
    words = jobs[-1].commands[0]
    assert words[words.index("--seeds") + 1] == "3"
    assert sum(word.endswith("-seed3.pt") for word in words) == 14
    assert words[-1] == "--cache-features"


def test_the_control_keeps_its_first_weights():
    """Bit by bit, after as many steps of s3prl's optimizer as its runner config has."""
    torch.manual_seed(0)
    config = runner_config(typed(), Path("/speech"), trained=False)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    before = copy.deepcopy(model.state_dict())
    optimizer = get_optimizer([model], config["runner"]["total_steps"], config["optimizer"])
    for _ in range(config["runner"]["total_steps"]):
        model(torch.randn(3, 7)).exp().sum().backward()
        assert model[0].weight.grad.abs().sum() > 0
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_evaluation_is_what_superb_takes():
    """PR: a linear probe; its learning rate and steps, and ASR's, are the study's own."""
    words = plan(typed(), Path("/s"), Path("/s/esc10"), 2)[-1].commands[0]
    parser = argparse.ArgumentParser()
    superb.configure(parser)
    args = parser.parse_args(words[1:])
    assert sorted(args.lr) == ["asr=3e-3", "pr=1e-2"]
    assert sorted(args.steps) == ["asr=400", "er=160", "pr=1000", "sid=240"]
    changes = dict(text.split("=", 1) for text in args.override)
    assert changes.keys() == {"pr", "sid"}
    recipe = yaml.safe_load((REPO / "downstream_recipes/ctc/tiny.yaml").read_text())
    assert recipe["downstream_expert"]["model"]["select"] == "RNNs"
    changed = apply_overrides(recipe, changes["pr"])
    assert changed["downstream_expert"]["model"].pop("select") == "FrameLevel"
    del recipe["downstream_expert"]["model"]["select"]
    assert changed == recipe
    only = plan(typed("--tasks", "er"), Path("/s"), Path("/s/esc10"), 2)[-1].commands[0]
    assert "--lr" not in only and "--override" not in only


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--teacher", "a"], "two teachers"),
        (["--teacher", "a", "--teacher", "b=nowhere/b.pt"], "nowhere/b.pt"),
        (["--teacher", "a", "--teacher", "a=b"], "twice"),
        (["--teacher", "average", "--teacher", "b"], "'average'"),
        (["--size", "small=48,96"], "CHANNELS,WIDTH,LAYERS"),
        (["--size", "small=48,97,2", "--init", "none"], "multiple of 4"),
        (["--size", "small=48,100,2"], "multiple of 16"),
        (["--init", "wavlm"], "none is allowed, or one of: tiny_hubert"),
        (["--teacher", "none", "--teacher", "b"], "'none'"),
        (["--size", "a/b=48,96,2"], "'a/b'"),
        (["--seeds", "1", "1"], "twice"),
        (["--steps", "3"], "4 or more"),
        (["--lr", "nan"], "--lr"),
        (["--seconds", "-1"], "--seconds"),
        (["--task-steps", "pr=0"], "4 or more"),
        (["--task-steps", "xx=8"], "pr, asr, sid, er"),
        (["--jobs", "0"], "--jobs"),
        ([], "unlabeled.tsv"),
        (["--report-only"], "holds no study"),
        (["--report-only", "--reference", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert tool.main([str(tmp_path), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error
    assert not (tmp_path / "study_run").exists()


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    StudyFolder(tmp_path).start(typed(), tmp_path, {})
    StudyFolder(tmp_path).start(typed(), tmp_path, {})
    with pytest.raises(ConfigError, match=r"steps \(200, now 10\)"):
        StudyFolder(tmp_path).start(typed("--steps", "10"), tmp_path, {})


def test_inputs_change_with_what_is_in_them_and_not_with_where_they_are(tmp_path):
    def made(name: str) -> tuple[Path, Path]:
        root = tmp_path / name
        (root / "esc10" / "rain").mkdir(parents=True)
        for file in ("unlabeled.tsv", "pr.tsv", "sid.tsv", "lexicon.txt", "esc10/rain/1.wav"):
            (root / file).write_text(file)
        return root, root / "esc10"

    setting = typed("--tasks", "pr", "sid")
    before = input_digests(setting, *made("a"))
    assert before.keys() == {"unlabeled.tsv", "pr.tsv", "sid.tsv", "lexicon.txt", "noise"}
    assert before["pr.tsv"] == hashlib.sha256(b"pr.tsv").hexdigest()[:16]
    where = made("b")
    assert input_digests(setting, *where) == before
    for file, key in (("pr.tsv", "pr.tsv"), ("lexicon.txt", "lexicon.txt"),
                      ("esc10/rain/1.wav", "noise"), ("esc10/2.wav", "noise")):  # fmt: skip
        last = input_digests(setting, *where)
        (where[0] / file).write_text("another length")
        noise_digest.cache_clear()  # a process looks once
        now = input_digests(setting, *where)
        assert {k for k in now if now[k] != last[k]} == {key}
    assert "lexicon.txt" not in input_digests(typed("--tasks", "sid"), *where)
    (where[0] / "pr.tsv").unlink()
    with pytest.raises(SetupError, match=r"pr\.tsv cannot be read"):
        input_digests(setting, *where)


def test_a_tiny_teacher_counts_by_its_file_and_its_name(tmp_path, monkeypatch):
    found = typed("--teacher", "a=tiny_hubert", "--teacher", "b=tiny_hubert_random").as_json()
    digest = hashlib.sha256(zoo.weights("tiny_hubert").read_bytes()).hexdigest()[:16]
    wanted = {"a": f"tiny_hubert {digest}", "b": f"tiny_hubert_random {digest}"}
    assert found["teachers"] == wanted
    other = tmp_path / "other.pt"
    other.write_bytes(b"another version")
    monkeypatch.setattr(zoo, "weights", lambda name: other)
    assert typed().as_json()["teachers"] != {name: f"{name} {digest}" for name in SINGLE}
    digest = hashlib.sha256(b"another version").hexdigest()[:16]
    assert typed().as_json()["teachers"] == {name: f"{name} {digest}" for name in SINGLE}


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert tool.main([str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    said = f"error: the study needs {name}; type: pip install 's3prl_ekd[analysis]'\n"
    assert capsys.readouterr().err == said


def test_noises_are_named(tmp_path, capsys):
    """The corpus's own would be those that tiny_robust_hubert heard in training."""
    for name in ("unlabeled.tsv", "sid.tsv"):
        (tmp_path / name).touch()
    words = [str(tmp_path), "-o", str(tmp_path / "out"), "--tasks", "sid"]
    for more, said in (
        ([], "--noise: name a folder"),
        (["--noise", "no"], "no such folder of noises"),
    ):
        assert tool.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_an_os_error_names_its_file(monkeypatch, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/students/x.pt")

    monkeypatch.setattr(tool, "run", full)
    assert tool.main(["x"]) == 2
    assert capsys.readouterr().err == "error: /disk/students/x.pt: No space left on device\n"


def test_a_teachers_file_counts_by_what_is_in_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").write_text("weights")
    words = ["--teacher", f"x={tmp_path}/a.pt", "--teacher", "y"]
    moved = ["--teacher", f"x={tmp_path}/b.pt", "--teacher", "y"]
    assert typed(*words).as_json() == typed(*moved).as_json()
    before = typed(*words).as_json()
    (tmp_path / "a.pt").write_text("others")
    assert typed(*words).as_json() != before
