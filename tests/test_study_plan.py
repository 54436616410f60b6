"""tools/study.py: its jobs and configs, and its errors."""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
import itertools
import json
import re
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
from .study_cases import SINGLE, parse

pytestmark = pytest.mark.slow  # of the developers' tools


def test_42_students_differ_only_in_size_source_and_seed():
    setting = parse()
    planned = students(setting)
    assert len(planned) == len({s.name for s in planned}) == 42
    sources = ["none", *SINGLE, "average", "concat", "separate"]
    expected = set(itertools.product(["small", "large"], sources, [1, 2, 3]))
    assert {(s.row.size, s.row.learned_from, s.seed) for s in planned} == expected
    configs = {s.row: model_config(setting, s.row) for s in planned}
    assert len(configs) == 14
    for row, config in configs.items():
        assert config["init"] == {"teacher": "tiny_hubert"}
        teachers = config.pop("teachers")
        targets = SINGLE if row.learned_from in sources[4:] else [row.learned_from]
        if row.learned_from == "none":  # the control is initialised from it, too
            targets = ["tiny_hubert"]
        if "tiny_hubert" not in targets:  # only for the initialisation
            assert teachers.pop("tiny_hubert")["weight"] == 0
        assert teachers == {name: {"model": name, "layers": [2, 4, 6]} for name in targets}
        assert config.pop("aggregation") == (
            row.learned_from if row.learned_from in sources[4:] else "separate"
        )
    for size in ("small", "large"):  # all other keys are the same
        rest = [json.dumps(c, sort_keys=True) for row, c in configs.items() if row.size == size]
        assert len(set(rest)) == 1


def test_init_none_gives_random_weights():
    setting = parse("--init", "none", "--size", "small=48,96,2")
    for row in {s.row for s in students(setting)}:
        config = model_config(setting, row)
        assert config["init"] == {"teacher": None}
        assert all("weight" not in teacher for teacher in config["teachers"].values())
        assert "feature_grad_mult" not in config["student"]


@pytest.mark.parametrize("learned_from", SINGLE)
def test_the_teacher_of_the_initialisation_does_not_change_the_loss(learned_from):
    """A teacher with weight 0 gives the same loss as a config without it."""
    torch.manual_seed(0)
    shape, losses = (2, 3, 5, 192), []  # [batch, layer, frame, width]
    targets = {name: torch.randn(shape) for name in SINGLE}
    for setting in (parse(), parse("--init", "none")):
        config = model_config(setting, StudyRow("small", learned_from))
        teachers = load_model_config(config).teachers
        weights = {name: teacher.weight for name, teacher in teachers.items()}
        used = {name: targets[name] for name in teachers}
        predictions = {name: torch.zeros_like(value) for name, value in used.items()}
        masks = dict.fromkeys(used, torch.ones(2, 5, dtype=torch.bool))
        losses.append(distillation_loss(predictions, used, LossWeights(masks, weights))[0])
    assert losses[0] == losses[1] > 0


def test_the_configs_are_valid(tmp_path):
    setting = parse()
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
def test_any_number_of_steps_gives_a_valid_runner_config(tmp_path, steps):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(runner_config(parse("--steps", str(steps)), tmp_path)))
    assert load_runner_config(path).runner.total_steps == steps


def test_targets_are_computed_once_and_each_seed_is_evaluated():
    jobs = plan(parse(), Path("/s"), Path("/s/esc10"), 2)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    kinds = [job.kind for job in jobs if job.kind != "prepare"]
    assert kinds == ["cache"] + (["start", *["distil"] * 6] * 2 + ["evaluate"]) * 3
    cache = next(job for job in jobs if job.kind == "cache")
    assert model_config(parse(), StudyRow("large", "separate"))["teachers"].keys() == set(SINGLE)
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
    argv = jobs[-1].commands[0]
    assert argv[argv.index("--seeds") + 1] == "3"
    assert sum(word.endswith("-seed3.pt") for word in argv) == 14
    assert argv[-1] == "--cache-features"


def test_the_control_keeps_its_initial_weights():
    """Bit for bit, after the steps of s3prl's optimizer that its runner config has."""
    torch.manual_seed(0)
    config = runner_config(parse(), Path("/speech"), trained=False)
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


def test_the_evaluation_is_a_valid_superb_command():
    """The study changes PR's probe, and learning rate and steps of PR and ASR."""
    argv = plan(parse(), Path("/s"), Path("/s/esc10"), 2)[-1].commands[0]
    parser = argparse.ArgumentParser()
    superb.configure(parser)
    args = parser.parse_args(argv[1:])
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
    er_only = plan(parse("--tasks", "er"), Path("/s"), Path("/s/esc10"), 2)[-1].commands[0]
    assert "--lr" not in er_only and "--override" not in er_only


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--teacher", "a"], r"--teacher: .*\b2\b.*\ba$"),
        (["--teacher", "a", "--teacher", "b=nowhere/b.pt"], "nowhere/b.pt"),
        (["--teacher", "b", "--teacher", "b=c"], r"--teacher b\b"),
        (["--teacher", "average", "--teacher", "b"], "'average'"),
        (["--size", "small=48,96"], "small=48,96"),
        (["--size", "small=48,97,2", "--init", "none"], r"\b4\b.*48,97,2"),
        (["--size", "small=48,100,2"], r"\b16\b.*48,100,2"),
        (["--size", "small=48,96,1", "--size", "small=48,96,1"], r"--size small\b"),
        (["--init", "wavlm"], r"--init .*tiny_hubert, tiny_robust_hubert, tiny_wavlm.* wavlm\b"),
        (["--teacher", "none", "--teacher", "b"], "'none'"),
        (["--size", "a/b=48,96,2"], "'a/b'"),
        (["--seeds", "5", "5"], "5 5"),
        (["--steps", "3"], r"--steps .*\b4\b.*\b3$"),
        (["--lr", "nan"], "--lr"),
        (["--seconds", "-1"], "--seconds"),
        (["--task-steps", "pr=0"], "pr=0"),
        (["--task-steps", "xx=8"], "xx=8"),
        (["--jobs", "0"], "--jobs"),
        ([], "unlabeled.tsv"),
        (["--report-only"], r"study_run.* -o\b"),
        (["--report-only", "--reference", "nowhere"], "nowhere"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, argv, expected):
    monkeypatch.chdir(tmp_path)
    assert tool.main([str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and re.search(expected, error) and "\n" not in error
    assert not (tmp_path / "study_run").exists()


def test_other_settings_in_the_same_folder_are_an_error(tmp_path):
    StudyFolder(tmp_path).start(parse(), tmp_path, {})
    StudyFolder(tmp_path).start(parse(), tmp_path, {})
    with pytest.raises(ConfigError, match=r"\bsteps\b.*200.*10"):
        StudyFolder(tmp_path).start(parse("--steps", "10"), tmp_path, {})


def test_input_digests_depend_on_contents_and_not_on_paths(tmp_path):
    def make_corpus(name: str) -> tuple[Path, Path]:
        root = tmp_path / name
        (root / "esc10" / "rain").mkdir(parents=True)
        for file in ("unlabeled.tsv", "pr.tsv", "sid.tsv", "lexicon.txt", "esc10/rain/1.wav"):
            (root / file).write_text(file)
        return root, root / "esc10"

    setting = parse("--tasks", "pr", "sid")
    before = input_digests(setting, *make_corpus("a"))
    assert before.keys() == {"unlabeled.tsv", "pr.tsv", "sid.tsv", "lexicon.txt", "noise"}
    assert before["pr.tsv"] == hashlib.sha256(b"pr.tsv").hexdigest()[:16]
    corpus, noise = make_corpus("b")
    assert input_digests(setting, corpus, noise) == before
    for file, key in (("pr.tsv", "pr.tsv"), ("lexicon.txt", "lexicon.txt"),
                      ("esc10/rain/1.wav", "noise"), ("esc10/2.wav", "noise")):  # fmt: skip
        old = input_digests(setting, corpus, noise)
        (corpus / file).write_text("another length")
        noise_digest.cache_clear()
        new = input_digests(setting, corpus, noise)
        assert {k for k in new if new[k] != old[k]} == {key}
    assert "lexicon.txt" not in input_digests(parse("--tasks", "sid"), corpus, noise)
    (corpus / "pr.tsv").unlink()
    with pytest.raises(SetupError, match=r"pr\.tsv"):
        input_digests(setting, corpus, noise)


def test_the_digest_of_a_tiny_teacher_has_its_name(tmp_path, monkeypatch):
    record = parse("--teacher", "a=tiny_hubert", "--teacher", "b=tiny_hubert_random").as_json()
    digest = hashlib.sha256(zoo.checkpoint_path("tiny_hubert").read_bytes()).hexdigest()[:16]
    expected = {"a": f"tiny_hubert {digest}", "b": f"tiny_hubert_random {digest}"}
    assert record["teachers"] == expected
    other = tmp_path / "other.pt"
    other.write_bytes(b"another version")
    monkeypatch.setattr(zoo, "checkpoint_path", lambda name: other)
    assert parse().as_json()["teachers"] != {name: f"{name} {digest}" for name in SINGLE}
    digest = hashlib.sha256(b"another version").hexdigest()[:16]
    assert parse().as_json()["teachers"] == {name: f"{name} {digest}" for name in SINGLE}


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert tool.main([str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert name in error and "pip install 's3prl_ekd[analysis]'" in error


def test_noise_is_required(tmp_path, capsys):
    """There is no default: tiny_robust_hubert was trained on noises of the corpus."""
    for name in ("unlabeled.tsv", "sid.tsv"):
        (tmp_path / name).touch()
    argv = [str(tmp_path), "-o", str(tmp_path / "out"), "--tasks", "sid"]
    for more, expected in (([], "--noise"), (["--noise", "no-folder"], r"--noise \S*/no-folder")):
        assert tool.main([*argv, *more]) == 2
        error = capsys.readouterr().err
        assert re.search(expected, error) and error.count("\n") == 1


def test_an_os_error_names_its_file(monkeypatch, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/students/x.pt")

    monkeypatch.setattr(tool, "run", full)
    assert tool.main(["x"]) == 2
    assert capsys.readouterr().err == "error: /disk/students/x.pt: No space left on device\n"


def test_the_digest_of_a_teachers_file_depends_on_its_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").write_text("weights")
    argv = ["--teacher", f"x={tmp_path}/a.pt", "--teacher", "y"]
    moved = ["--teacher", f"x={tmp_path}/b.pt", "--teacher", "y"]
    assert parse(*argv).as_json() == parse(*moved).as_json()
    before = parse(*argv).as_json()
    (tmp_path / "a.pt").write_text("others")
    assert parse(*argv).as_json() != before
