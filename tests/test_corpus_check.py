"""A wrong corpus folder in a recipe is an error before the run starts; it names the right one."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from s3prl_ekd.downstream.requirements import check_recipe
from s3prl_ekd.downstream.run import prepare
from s3prl_ekd.downstream.tasks import DEFAULT_TASKS, TASKS
from s3prl_ekd.downstream.tasks.corpus_check import check_corpus
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.superb.plan import Recipe
from s3prl_ekd.workspace import write_workspace

# For each recipe, the YAML keys of its corpus paths and the paths in the fixture.
KEYS = {
    "voxceleb1": {"datarc.file_path": "vox/x", "datarc.meta_data": "lists/split.txt"},
    "emotion": {"datarc.root": "iemo/x", "datarc.meta_data": "iemo/meta"},
    "asr": {"datarc.libri_root": "libri/x", "datarc.bucket_file": "tables/x"},
    "ctc": {"corpus.path": "libri/x", "corpus.lexicon": "lists/lexicon.txt"},
}
FOLDERS = [
    ("voxceleb1", "datarc.file_path"),
    ("emotion", "datarc.root"),
    ("emotion", "datarc.meta_data"),
    ("asr", "datarc.libri_root"),
    ("asr", "datarc.bucket_file"),
    ("ctc", "corpus.path"),
]
SETS = ("train-clean-100", "dev-clean", "test-clean")


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working folder with a corpus of empty files for each recipe."""
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path)
    lines = []
    for i, part in enumerate(("dev", "dev", "test"), start=1):
        for j in range(7):
            name = f"id1000{j + 1}/v{i}/0000{i}.wav"
            touch(tmp_path / f"vox/x/{part}/wav/{name}")
            lines.append(f"{i} {name}\n")
    touch(tmp_path / "lists/split.txt", "".join(lines))
    touch(tmp_path / "lists/lexicon.txt", "".join(f"{w}\tAH0\n" for w in ("TRAIN", "DEV", "TEST")))
    for session in ("Session1", "Session2"):
        for table in ("train", "test"):
            names = [f"{session}/wav/{table}{i}.wav" for i in range(4)]
            for name in names:
                touch(tmp_path / f"iemo/x/{name}")
            content = {"labels": {}, "meta_data": [{"path": name} for name in names]}
            path = tmp_path / f"iemo/meta/{session}/{table}_meta_data.json"
            touch(path, json.dumps(content))
    for name in SETS:
        rows = ["file_path,length,label"]
        for speaker in ("1", "2"):
            folder = tmp_path / f"libri/x/{name}/{speaker}/7"
            touch(folder / f"{speaker}-7.trans.txt", f"{speaker}-7-0000 {name.split('-')[0]}\n")
            touch(folder / f"{speaker}-7-0000.flac")
            rows.append(f"{name}/{speaker}/7/{speaker}-7-0000.flac,1,x")
        touch(tmp_path / f"tables/x/{name}.csv", "\n".join(rows))
    return tmp_path


BY_DOWNSTREAM = {TASKS[name].downstream: TASKS[name] for name in DEFAULT_TASKS}


def config_of(downstream: str, **changed) -> dict:
    config = yaml.safe_load(Path(BY_DOWNSTREAM[downstream].full).read_text())
    for key, value in {**KEYS[downstream], **changed}.items():
        section, name = key.split(".")
        config["downstream_expert"][section][name] = value
    return config


def error_of(downstream: str, config: dict, **options) -> str:
    with pytest.raises(ConfigError) as raised:
        check_corpus(downstream, config, "recipe.yaml", **options)
    assert str(raised.value).startswith("recipe.yaml") and "\n" not in str(raised.value)
    return str(raised.value)


def none_found(key: str, path: str | Path) -> str:
    """A pattern for an error that names key and path, and says that 0 of the files exist."""
    return rf"{re.escape(key)}\b.*{re.escape(str(path))}\b.*\b0 of\b"


@pytest.mark.parametrize("downstream", KEYS)
def test_a_correct_corpus_folder(workspace, downstream):
    check_corpus(downstream, config_of(downstream), "recipe.yaml")
    for key, value in KEYS[downstream].items():
        absolute = str(workspace / value)
        check_corpus(downstream, config_of(downstream, **{key: absolute}), "recipe.yaml")


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("downstream, key", FOLDERS)
def test_a_level_too_high_or_too_deep(workspace, downstream, key, absolute):
    right = Path(KEYS[downstream][key])
    (right / "inside").mkdir(exist_ok=True)
    for path in (right.parent, right / "inside"):
        path = workspace / path if absolute else path
        suggestion = workspace / right if absolute else right
        error = error_of(downstream, config_of(downstream, **{key: str(path)}))
        assert re.search(none_found(f"downstream_expert.{key}", path), error)
        assert f"{key}='{suggestion}'" in error


def test_two_levels_too_deep(workspace):
    error = error_of("voxceleb1", config_of("voxceleb1", **{"datarc.file_path": "vox/x/dev/wav"}))
    assert re.search(r"\b0 of .*\b21\b.* lists/split\.txt", error)
    assert "datarc.file_path='vox/x'" in error
    assert "vox/x/dev/wav/*/wav/id10001/v1/00001.wav" in error


@pytest.mark.parametrize("downstream, key", FOLDERS)
def test_an_unrelated_folder(workspace, downstream, key):
    """And values that are not folders, do not exist or are not set."""
    (workspace / "other/place/far").mkdir(parents=True)
    error = error_of(downstream, config_of(downstream, **{key: "other/place/far"}))
    assert re.search(none_found(key, "other/place/far"), error)
    assert f"{key}='PATH'" in error  # no suggestion
    for value in ("lists/split.txt", "missing", None, 7, ["a"], "a\0b"):
        assert key in error_of(downstream, config_of(downstream, **{key: value}))


@pytest.mark.parametrize(
    "downstream, key", [("voxceleb1", "datarc.meta_data"), ("ctc", "corpus.lexicon")]
)
def test_a_list_that_is_not_a_file(workspace, downstream, key):
    for value in ("lists", "missing", None, 7):
        assert key in error_of(downstream, config_of(downstream, **{key: value}))


@pytest.mark.parametrize(
    "downstream, key, file",
    [
        ("voxceleb1", "datarc.file_path", "vox/x/test/wav/id10003/v3/00003.wav"),
        ("emotion", "datarc.root", "iemo/x/Session1/wav/test2.wav"),
        ("emotion", "datarc.meta_data", "iemo/meta/Session1/test_meta_data.json"),
        ("asr", "datarc.libri_root", "libri/x/dev-clean/2/7/2-7-0000.flac"),
        ("asr", "datarc.libri_root", "libri/x/dev-clean/2/7/2-7.trans.txt"),
        ("asr", "datarc.bucket_file", "tables/x/dev-clean.csv"),
    ],
)
def test_a_single_missing_file(workspace, downstream, key, file):
    (workspace / file).unlink()
    error = error_of(downstream, config_of(downstream))
    assert key in error and Path(file).name in error
    assert "PATH" not in error  # the folder is right


def test_a_resumed_run_is_checked(workspace):
    """Its corpus may have been moved."""
    args = Namespace(expdir="x", downstream="voxceleb1", upstream="fbank", upstream_ckpt=None)
    states = {"Args": args, "Config": config_of("voxceleb1"), "Step": 1, "Downstream": {}}
    torch.save({**states, "Optimizer": {}}, "run.ckpt")
    for argv in (["-m", "train"], ["-m", "evaluate", "-t", "test"]):
        assert prepare([*argv, "-e", "run.ckpt"])
    (workspace / "vox/x").rename(workspace / "vox/y")
    for argv in (["-m", "train"], ["-m", "evaluate", "-t", "test"]):
        with pytest.raises(ConfigError, match=r"datarc\.file_path\b.*\bvox/x\b"):
            prepare([*argv, "-e", "run.ckpt"])
    for downstream in (["voxceleb1"], None):
        check_corpus(downstream, config_of("voxceleb1"), "recipe.yaml")


def test_only_the_evaluated_split_is_checked(workspace):
    shutil.rmtree(workspace / "libri/x/dev-clean")
    for downstream, split in (("asr", "test-clean"), ("ctc", "test")):
        check_corpus(downstream, config_of(downstream), "recipe.yaml", split)
        assert "dev-clean" in error_of(downstream, config_of(downstream))
    (workspace / "iemo/meta/Session2/train_meta_data.json").unlink()
    check_corpus("emotion", config_of("emotion"), "recipe.yaml")
    config = config_of("emotion", **{"datarc.test_fold": None})
    check_corpus("emotion", config, "recipe.yaml")
    assert "Session2" in error_of("emotion", config, fold="fold2")


@pytest.mark.parametrize(
    "downstream, file, text",
    [
        ("voxceleb1", "lists/split.txt", "1 id10001/v1/00001.wav\n\n2 id10001/v1/00001.wav"),
        ("voxceleb1", "lists/split.txt", "one id10001/v1/00001.wav"),
        ("voxceleb1", "lists/split.txt", ""),
        ("emotion", "iemo/meta/Session1/train_meta_data.json", "{"),
        ("emotion", "iemo/meta/Session1/train_meta_data.json", '{"meta_data": [3]}'),
        ("emotion", "iemo/meta/Session1/train_meta_data.json", '{"meta_data": []}'),
        ("asr", "tables/x/dev-clean.csv", "a,b\n1,2"),
        ("asr", "tables/x/dev-clean.csv", "file_path,length\n"),
    ],
)
def test_invalid_lists(workspace, downstream, file, text):
    (workspace / file).write_text(text)
    assert Path(file).name in error_of(downstream, config_of(downstream))


def test_words_that_the_lexicon_lacks(workspace):
    """Also of the dev set, which s3prl reads at the first evaluation."""
    (workspace / "lists/lexicon.txt").write_text("TRAIN\tAH0\n")
    error = error_of("ctc", config_of("ctc"))
    assert "corpus.lexicon" in error and "DEV" in error and "TEST" not in error
    check_corpus("ctc", config_of("ctc", **{"corpus.skip_unknown_words": True}), "recipe.yaml")
    (workspace / "lists/lexicon.txt").write_text("TRAIN\tAH0\nDEV\tQQ9\n")
    assert "QQ9" in error_of("ctc", config_of("ctc"))


@pytest.mark.parametrize("name", ["pr", "asr"])
def test_superb_checks_the_test_set_before_training(workspace, name):
    task = TASKS[name]
    Path(task.full).write_text(yaml.safe_dump(config_of(task.downstream)))
    Recipe(task, task.full).check(workspace)
    shutil.rmtree(workspace / "libri/x/test-clean")
    with pytest.raises(ConfigError, match="test-clean"):
        Recipe(task, task.full).check(workspace)
    check_corpus(task.downstream, config_of(task.downstream), "recipe.yaml")  # trains without it


@pytest.mark.parametrize("downstream, key", FOLDERS)
def test_every_command_checks_the_corpus(workspace, downstream, key):
    """run_downstream.py before training, superb before planning, and doctor."""
    task = BY_DOWNSTREAM[downstream]
    wrong = str(Path(KEYS[downstream][key]).parent)
    Path(task.full).write_text(yaml.safe_dump(config_of(downstream, **{key: wrong})))
    argv = ["-m", "train", "-u", "fbank", "-d", downstream, "-c", task.full, "-n", "run"]
    error = none_found(key, wrong)
    with pytest.raises(ConfigError, match=error):
        prepare(argv)
    assert not (workspace / "result").exists()
    with pytest.raises(ConfigError, match=error):
        Recipe(task, task.full).check(workspace)
    assert re.search(error, check_recipe(task, workspace).note)
