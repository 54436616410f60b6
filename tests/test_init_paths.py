"""`init --librispeech DIR ...` inserts paths into the YAML files, and changes nothing else."""

import re
from pathlib import Path

import pytest
import yaml

from s3prl_ekd import cli
from s3prl_ekd.downstream.tasks import DEFAULT_TASKS, TASKS, missing_paths
from s3prl_ekd.pretrain.settings import load_runner_config
from s3prl_ekd.workspace import workspace_files

from .conftest import error_of

NAMES = ("librispeech", "voxceleb1", "iemocap")
CHANGED = {
    "pretrain/ekd/config_runner.yaml",
    "pretrain/ekd/pruning_runner.yaml",
    "pretrain/ekd/s3prl_runner.yaml",
    "downstream/asr/config.yaml",
    "downstream/ctc/libriphone.yaml",
    "downstream/voxceleb1/config.yaml",
    "downstream/emotion/config.yaml",
}


def test_several_lexicons(corpora, tmp_path):
    (corpora / "a # b").write_text("A\tAH0\n")
    files = [str(corpora / "lexicon.txt"), str(corpora / "a # b")]
    init(tmp_path, "--lexicon", *files)
    config = yaml.safe_load((tmp_path / "downstream/ctc/libriphone.yaml").read_text())
    assert config["downstream_expert"]["corpus"]["lexicon"] == files


@pytest.fixture
def corpora(tmp_path):
    """The three corpora, below a folder with a space and a quote in its name."""
    return make_corpora(tmp_path / "Ann's data")


def make_corpora(data: Path) -> Path:
    for split in ("train-clean-100", "dev-clean", "test-clean"):
        (data / "librispeech" / split).mkdir(parents=True)
    for part, speaker in (("dev", "id10001"), ("test", "id10270")):
        (data / "voxceleb1" / part / "wav" / speaker).mkdir(parents=True)
    for number in range(1, 6):
        for name in ("dialog/EmoEvaluation", "sentences/wav"):
            (data / "iemocap" / f"Session{number}" / name).mkdir(parents=True)
    (data / "lexicon.txt").write_text("A\tAH0\n")
    return data


def options(corpora: Path) -> list[str]:
    argv = [word for name in NAMES for word in (f"--{name}", str(corpora / name))]
    return [*argv, "--lexicon", str(corpora / "lexicon.txt")]


def init(*argv) -> int:
    return cli.main(["init", *map(str, argv)])


def test_every_recipe_finds_its_corpus(corpora, tmp_path, capsys):
    work = tmp_path / "work"
    assert init(work, *options(corpora)) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"s3prl-ekd prepare {name} " in printed
    assert "kept" not in printed and "prepare librispeech" in printed
    # Files that `prepare` writes later. All other paths in the recipes exist already.
    for name in ("voxceleb1/split.txt", "iemocap/meta_data", "librispeech/len_for_bucket"):
        (work / "data" / name).mkdir(parents=True)
    for task in map(TASKS.get, DEFAULT_TASKS):
        config = yaml.safe_load((work / task.full).read_text())
        assert list(missing_paths(config, task.paths, work)) == []
    config = load_runner_config(work / "pretrain/ekd/config_runner.yaml")
    data = config.pretrain_expert.datarc
    assert Path(data.libri_root) == corpora / "librispeech"
    assert (work / data.file_path).is_dir()

    # Only lines with paths differ from the packaged files.
    for name, packaged in workspace_files():
        lines, expected = (work / name).read_text().split("\n"), packaged.decode().split("\n")
        assert len(lines) == len(expected)
        changed = [(a, b) for a, b in zip(lines, expected, strict=True) if a != b]
        assert bool(changed) == (name in CHANGED), name
        for line, packaged_line in changed:
            assert str(tmp_path).replace("'", "''") in line or "data/librispeech" in line
            assert line.partition("  #")[2] == packaged_line.partition("  #")[2]  # the comment


def test_paths_are_relative_to_the_current_folder(corpora, tmp_path, monkeypatch):
    monkeypatch.chdir(corpora)
    init("../work", "--iemocap", "iemocap")
    config = yaml.safe_load((tmp_path / "work/downstream/emotion/config.yaml").read_text())
    assert config["downstream_expert"]["datarc"]["root"] == str(corpora / "iemocap")
    assert config["downstream_expert"]["datarc"]["meta_data"] == "./data/iemocap/meta_data"


def test_existing_files_are_kept_and_differences_reported(tmp_path, capsys):
    corpora, work = make_corpora(tmp_path / "my data"), tmp_path / "work"
    init(work)
    edited = work / "downstream/emotion/config.yaml"
    edited.write_text(edited.read_text().replace("./data/iemocap/audio", "/edited"))
    (work / "downstream/asr/config.yaml").unlink()
    (work / "downstream/voxceleb1/config.yaml").write_text("a: [\n")
    before = edited.read_text()
    capsys.readouterr()
    assert init(work, *options(corpora)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"kept     {edited}" in lines and edited.read_text() == before
    differences = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    # two keys of each runner config and of libriphone, one of voxceleb1 and of emotion
    assert len(differences) == 10
    (line,) = [line for line in differences if "emotion" in line]
    assert "datarc.root: /edited" in line
    # s3prl can parse the suggested override
    key, _, value = line.partition('-o "')[2].rstrip('"').partition("=")
    assert eval(value) == str(corpora / "iemocap") and key.endswith("datarc.root")
    assert not [line for line in differences if "asr/config.yaml" in line]
    assert [line for line in differences if "voxceleb1/config.yaml" in line]
    unsafe = make_corpora(tmp_path / "a=b's")
    init(work, "--iemocap", unsafe / "iemocap")
    (line,) = re.findall(".*datarc.root: /edited.*", capsys.readouterr().out)
    assert line.endswith(f" {unsafe / 'iemocap'}") and "-o " not in line
    init(work, "--librispeech", corpora / "librispeech")
    # asr/config.yaml has this path already
    assert capsys.readouterr().out.count("asr/config.yaml") == 1


def test_invalid_corpora_are_rejected_before_writing(corpora, tmp_path, capsys):
    work = tmp_path / "work"
    (corpora / "librispeech/dev-clean").rmdir()
    error = error_of(capsys, "init", work, *options(corpora))
    assert error.startswith("error: --librispeech: ") and "dev-clean.tar.gz" in error
    error = error_of(capsys, "init", work, "--voxceleb1", corpora / "voxceleb1/dev")
    assert "--voxceleb1: " in error
    assert re.search(rf"{re.escape(str(corpora / 'voxceleb1'))}(?!/)", error)
    (corpora / "voxceleb1/dev/wav/id10001").rmdir()
    (corpora / "voxceleb1/test/wav/id10270").rmdir()
    error = error_of(capsys, "init", work, "--voxceleb1", corpora / "voxceleb1")
    assert str(corpora / "voxceleb1/dev/wav") in error and "id10001" in error
    (corpora / "iemocap/Session4/sentences/wav").rmdir()
    error = error_of(capsys, "init", work, "--iemocap", corpora / "iemocap")
    assert "--iemocap: " in error and "Session4/sentences/wav" in error
    error = error_of(capsys, "init", work, "--lexicon", corpora / "none.txt")
    assert "--lexicon: " in error and str(corpora / "none.txt") in error
    assert not work.exists()
