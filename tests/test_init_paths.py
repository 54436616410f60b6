"""`init --librispeech DIR ...`: paths put into the recipes once, with the comments left alone."""

import re
from pathlib import Path

import pytest
import yaml

from s3prl_ekd import cli
from s3prl_ekd.downstream.tasks import TASKS, missing_paths
from s3prl_ekd.errors import ConfigError
from s3prl_ekd.pretrain.settings import load_runner_config
from s3prl_ekd.workspace import files, get, put

TEXT = """\
# head
a:
  path: './old'      # ours
  plain: old value   # a comment
  files:
    - 'one'          # first
    - two
    # about what follows
  flow: [x, 'y']
  b: {path: z}
last: 1
"""
NAMES = ("librispeech", "voxceleb1", "iemocap")
CHANGED = {
    "pretrain/ekd/config_runner.yaml",
    "downstream/asr/config.yaml",
    "downstream/ctc/libriphone.yaml",
    "downstream/voxceleb1/config.yaml",
    "downstream/emotion/config.yaml",
}


def test_values_are_replaced_and_nothing_else():
    new = put(TEXT, {"a.path": "/it's #1: here", "a.plain": "x", "a.b.path": "/z"})
    assert new == TEXT.replace("'./old'", "'/it''s #1: here'").replace("old value", "'x'").replace(
        "{path: z}", "{path: '/z'}"
    )
    assert get(new, "a.path") == "/it's #1: here"
    new = put(TEXT, {"a.files": ["/p", "/q", "/r"], "a.flow": ["/s"]})
    assert yaml.safe_load(new)["a"]["files"] == ["/p", "/q", "/r"]
    assert get(new, "a.flow") == ["/s"] and "\n    # about what follows\n" in new
    assert put(TEXT, {"a.files": ["/p"]}).count("\n") == TEXT.count("\n") - 1


@pytest.mark.parametrize(
    "key, value", [("a.none", "x"), ("none.path", "x"), ("a.path.x", "x"), ("a.files", "x")]
)
def test_keys_that_are_not_there(key, value):
    with pytest.raises(ConfigError, match=re.escape(f"the key {key} is not there")):
        put(TEXT, {key: value})
    with pytest.raises(ConfigError, match="is not there"):
        put(TEXT, {"a.path": ["a list"]})
    assert get(TEXT, "a.none") is None and get(TEXT, "a.path.x") is None


@pytest.fixture
def corpora(tmp_path):
    """Folders of the three corpora's shapes, in one with a space and a quote in its name."""
    return make_corpora(tmp_path / "Ann's data")


def make_corpora(data: Path) -> Path:
    for split in ("train-clean-100", "dev-clean", "test-clean"):
        (data / "librispeech" / split).mkdir(parents=True)
    for part, speaker in (("dev", "id10001"), ("test", "id10270")):
        (data / "voxceleb1" / part / "wav" / speaker).mkdir(parents=True)
    for number in range(1, 6):
        for below in ("dialog/EmoEvaluation", "sentences/wav"):
            (data / "iemocap" / f"Session{number}" / below).mkdir(parents=True)
    (data / "lexicon.txt").write_text("A\tAH0\n")
    return data


def options(corpora: Path) -> list[str]:
    words = [word for name in NAMES for word in (f"--{name}", str(corpora / name))]
    return [*words, "--lexicon", str(corpora / "lexicon.txt")]


def init(*words) -> int:
    return cli.main(["init", *map(str, words)])


def fails(capsys, *words) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        init(*words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_every_recipe_finds_its_corpus(corpora, tmp_path, capsys):
    work = tmp_path / "work"
    assert init(work, *options(corpora)) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert f"s3prl-ekd prepare {name} " in printed
    assert "kept" not in printed and "prepare librispeech" in printed
    # What `prepare` writes later; the rest of what the recipes name is there.
    for name in ("voxceleb1/split.txt", "iemocap/meta_data", "librispeech/len_for_bucket"):
        (work / "data" / name).mkdir(parents=True)
    for task in TASKS.values():
        config = yaml.safe_load((work / task.full).read_text())
        assert list(missing_paths(config, task.paths, work)) == []
    config = load_runner_config(work / "pretrain/ekd/config_runner.yaml")
    data = config.pretrain_expert.datarc
    assert Path(data.libri_root) == corpora / "librispeech"
    assert (work / data.file_path).is_dir()

    # Against the files as they are shipped: other values on the lines that hold paths, no more.
    for name, shipped in files():
        ours, theirs = (work / name).read_text().split("\n"), shipped.decode().split("\n")
        assert len(ours) == len(theirs)
        changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        assert bool(changed) == (name in CHANGED), name
        for mine, other in changed:
            assert str(tmp_path).replace("'", "''") in mine or "data/librispeech" in mine
            assert mine.partition("  #")[2] == other.partition("  #")[2]  # the comment


def test_relative_paths_are_those_of_the_folder_one_stands_in(corpora, tmp_path, monkeypatch):
    monkeypatch.chdir(corpora)
    init("../work", "--iemocap", "iemocap")
    config = yaml.safe_load((tmp_path / "work/downstream/emotion/config.yaml").read_text())
    assert config["downstream_expert"]["datarc"]["root"] == str(corpora / "iemocap")
    assert config["downstream_expert"]["datarc"]["meta_data"] == "./data/iemocap/meta_data"


def test_kept_files_stay_and_are_told_of(tmp_path, capsys):
    corpora, work = make_corpora(tmp_path / "my data"), tmp_path / "work"
    init(work)
    mine = work / "downstream/emotion/config.yaml"
    mine.write_text(mine.read_text().replace("./data/iemocap/audio", "/mine"))
    (work / "downstream/asr/config.yaml").unlink()
    (work / "downstream/voxceleb1/config.yaml").write_text("a: [\n")
    before = mine.read_text()
    capsys.readouterr()
    assert init(work, *options(corpora)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"kept     {mine}" in lines and mine.read_text() == before
    (line,) = [line for line in lines if "emotion" in line and "was kept and has" in line]
    assert "datarc.root: /mine; edit it, or add to the command -o " in line
    # and what it says to add is what s3prl's override understands
    key, _, value = line.partition('-o "')[2].rstrip('"').partition("=")
    assert eval(value) == str(corpora / "iemocap") and key.endswith("datarc.root")
    assert not [line for line in lines if "asr/config.yaml was kept" in line]
    assert [line for line in lines if "voxceleb1/config.yaml cannot be read" in line]
    assert len([line for line in lines if "was kept and has" in line]) == 5
    odd = make_corpora(tmp_path / "a=b's")
    init(work, "--iemocap", odd / "iemocap")
    assert f"datarc.root: /mine; it should be {odd / 'iemocap'}\n" in capsys.readouterr().out
    init(work, "--librispeech", corpora / "librispeech")
    assert "asr/config.yaml was kept" not in capsys.readouterr().out  # it has that path already


def test_what_is_missing_is_named_and_nothing_written(corpora, tmp_path, capsys):
    work = tmp_path / "work"
    (corpora / "librispeech/dev-clean").rmdir()
    error = fails(capsys, work, *options(corpora))
    assert error.startswith("error: --librispeech: ") and "lacks dev-clean/; unpack" in error
    error = fails(capsys, work, "--voxceleb1", corpora / "voxceleb1/dev")
    assert "--voxceleb1: " in error and f"the folder above, {corpora / 'voxceleb1'}" in error
    (corpora / "voxceleb1/dev/wav/id10001").rmdir()
    (corpora / "voxceleb1/test/wav/id10270").rmdir()
    error = fails(capsys, work, "--voxceleb1", corpora / "voxceleb1")
    assert "dev/wav has no speakers (id10001, …)" in error
    (corpora / "iemocap/Session4/sentences/wav").rmdir()
    error = fails(capsys, work, "--iemocap", corpora / "iemocap")
    assert "--iemocap: " in error and "it has no Session4/sentences/wav" in error
    error = fails(capsys, work, "--lexicon", corpora / "none.txt")
    assert "--lexicon: cannot read the lexicon" in error
    assert not work.exists()
