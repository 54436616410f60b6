"""ER: folds of a manifest, folds of IEMOCAP, and a run."""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from s3prl_ekd.prepare.er import natural_sort_key

from .conftest import command
from .corpora import PITCH, write_er_manifest, write_iemocap
from .preparing import accuracy, check_message, fails, numbers, prepare


@pytest.fixture
def manifest(tmp_path):
    return write_er_manifest(tmp_path / "corpus")


def read(out: Path, session: int, part: str) -> dict:
    return json.loads((out / f"meta_data/Session{session}/{part}_meta_data.json").read_text())


# --- prepare er


def test_a_fold_for_each_value(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--labels", "mid", "low", "high", "--fold-column", "group")
    assert prepare("er", manifest, "-o", out, *options) == 0
    printed = capsys.readouterr().out
    assert re.search("^3 lines", printed, re.MULTILINE)
    (fold3,) = re.findall("^fold3: .*", printed, re.MULTILINE)
    assert numbers(fold3) == [18, 9] and "g-s10" in fold3  # after s2
    assert re.search("^3 classes: mid 9, low 9, high 9.* 33.3 %", printed, re.MULTILINE)
    for session, speaker in ((1, "s1"), (2, "s2"), (3, "s10")):
        train, test = read(out, session, "train"), read(out, session, "test")
        assert train["labels"] == test["labels"] == {"mid": 0, "low": 1, "high": 2}
        assert {item["speaker"] for item in test["meta_data"]} == {speaker}
        assert {item["speaker"] for item in train["meta_data"]} == {"s1", "s2", "s10"} - {speaker}
        assert Counter(item["label"] for item in test["meta_data"]) == dict.fromkeys(PITCH, 3)
        for item in test["meta_data"]:
            assert item["label"] == item["path"].split("-")[1]
            assert (out / "audio" / item["path"]).is_file()
    assert not (out / "meta_data/Session4").exists()
    prepared = (out / "prepared.tsv").read_text().splitlines()
    assert prepared[1].split("\t") == ["s1-low-0.flac", "low", "s1", "g-s1", "fold1"]
    assert len(prepared) == 28


def test_one_fold_by_split(manifest, tmp_path, capsys):
    text = manifest.read_text().replace("emotion", "mood")
    manifest.write_text(text)
    out = tmp_path / "out"
    options = ("--label-column", "mood", "--labels", "low", "high")
    assert prepare("er", manifest, "-o", out, *options) == 0
    train, test = (read(out, 1, part)["meta_data"] for part in ("train", "test"))
    assert len(train) == 12 and {item["path"][-6] for item in train} == {"0", "1"}
    assert len(test) == 6 and {item["path"][-6] for item in test} == {"2"}
    assert read(out, 1, "test")["labels"] == {"low": 0, "high": 1}
    assert not (out / "meta_data/Session2").exists()


def test_natural_order():
    names = ["Session10", "Session9", "b", "2", "10", "a1b"]
    assert sorted(names, key=natural_sort_key) == ["2", "10", "Session9", "Session10", "a1b", "b"]


@pytest.mark.parametrize(
    "old, new, options, parts",
    [
        ("emotion", "mood", (), [1, "emotion"]),
        ("", "", ("--fold-column", "part"), [1, "part"]),
        ("", "", ("--labels", "low", "sad"), ["sad", "high, low"]),
        ("", "", ("--labels", "low"), [1, "low"]),
        ("", "", ("--labels", "low", "low"), ["--labels", "low"]),
        ("\tlow\t", "\tvery low\t", (), ["very low"]),
        ("\tg-s2\t", "\t\t", ("--fold-column", "group"), [12, "group"]),
        ("\ttest", "\ttrain", (), ["test", "--fold-column"]),
        ("low\tg-s1", "mid\tg-s1", ("--fold-column", "emotion"), ["high", "--labels"]),
        ("s1-low-0", "s1-low-9", (), [2]),
    ],
)
def test_invalid_manifests(manifest, tmp_path, capsys, old, new, options, parts):
    manifest.write_text(manifest.read_text().replace(old, new))
    check_message(fails(capsys, "er", manifest, "-o", tmp_path / "out", *options), *parts)
    assert not (tmp_path / "out").exists()


def test_any_column_may_give_the_folds(manifest, tmp_path):
    manifest.write_text(manifest.read_text().replace("\tg-s2\t", "\tg-s1\t"))
    assert prepare("er", manifest, "-o", tmp_path / "out", "--fold-column", "split") == 0


def test_no_labels_and_one_fold_value(tmp_path, capsys):
    manifest = write_er_manifest(tmp_path / "corpus", speakers=["s1"])
    options = ("-o", tmp_path / "out", "--fold-column", "group")
    check_message(fails(capsys, "er", manifest, *options), "group")
    for label in PITCH:
        manifest.write_text(manifest.read_text().replace(f"\t{label}\t", "\t\t"))
    check_message(fails(capsys, "er", manifest, "-o", tmp_path / "out"), 0)


# --- prepare iemocap


@pytest.fixture
def iemocap(tmp_path):
    """IEMOCAP's layout with seven utterances in each dialog."""
    labels = ("neu", "hap", "ang", "sad", "exc", "xxx", "fru")
    dialogs = ("F_impro01", "M_script02_1")
    root = write_iemocap(tmp_path / "IEMOCAP_full_release", dialogs, labels, 400)
    for file in list(root.rglob("*_script02_1.txt")):
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07\xff")
    return root


def test_folds_equal_those_of_s3prls_script(iemocap, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert prepare("iemocap", iemocap, "-o", out) == 0
    printed = capsys.readouterr().out
    (fold5,) = re.findall("^fold5: .*", printed, re.MULTILINE)
    assert numbers(fold5) == [40, 10] and "Session5" in fold5
    (note,) = re.findall(".*5531.*", printed)
    assert numbers(note) == [50, 5531]

    librosa = ModuleType("librosa.util")
    librosa.find_files = lambda folder: sorted(map(str, Path(folder).rglob("*.wav")))
    monkeypatch.setitem(sys.modules, "librosa", ModuleType("librosa"))
    monkeypatch.setitem(sys.modules, "librosa.util", librosa)
    for junk in iemocap.rglob("._*"):
        junk.unlink()  # s3prl's script fails at it
    importlib.import_module("s3prl.downstream.emotion.IEMOCAP_preprocess").main(str(iemocap))

    def key(item):
        return item["path"]

    for session in range(1, 6):
        for part in ("train", "test"):
            expected = iemocap / f"meta_data/Session{session}/{part}_meta_data.json"
            expected = json.loads(expected.read_text())
            result = read(out, session, part)
            assert result["labels"] == expected["labels"]
            assert sorted(result["meta_data"], key=key) == sorted(expected["meta_data"], key=key)
            assert (out / "audio" / result["meta_data"][0]["path"]).is_file()


def test_invalid_iemocap_folders(iemocap, tmp_path, capsys):
    out = ("-o", tmp_path / "out")
    assert str(tmp_path / "no") in fails(capsys, "iemocap", tmp_path / "no", *out)
    error = fails(capsys, "iemocap", iemocap.parent, *out)
    assert "Session1/dialog/EmoEvaluation" in error and str(iemocap) in error
    wav = "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F002.wav"
    (iemocap / wav).rename(tmp_path / "aside.wav")
    error = fails(capsys, "iemocap", iemocap, *out)
    check_message(error, 1, 50, wav)
    (tmp_path / "aside.wav").rename(iemocap / wav)
    labels = iemocap / "Session3/dialog/EmoEvaluation/Ses03F_impro01.txt"
    labels.write_text("[0.1 - 0.2] Ses03F_impro01_F000 neu\n")
    check_message(fails(capsys, "iemocap", iemocap, *out), "Ses03F_impro01.txt", 1)
    for file in labels.parent.glob("S*.txt"):
        file.write_text("nothing\n")
    check_message(fails(capsys, "iemocap", iemocap, *out), str(labels.parent), "neu")


# --- a run


def test_train_and_evaluate_a_fold(tmp_path):
    manifest = write_er_manifest(tmp_path / "corpus")
    work = tmp_path / "work"
    command("init", work, cwd=tmp_path)
    command("prepare", "er", manifest, "-o", "data/er", "--fold-column", "group", cwd=work)
    steps = "config.runner.total_steps=30,,config.runner.eval_step=15,,config.runner.save_step=15"
    steps += ",,config.runner.log_step=15,,config.downstream_expert.datarc.test_fold='fold3'"
    steps += ",,config.optimizer.lr=0.01"
    argv = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "emotion", "-n", "x", "-o", steps]
    argv += ["-c", "downstream/emotion/tiny.yaml", "--device", "cpu"]
    process = command("run_downstream.py", *argv, cwd=work)
    folder = work / "result/downstream/x"
    printed = re.findall(r"dev acc: (\S+)", process.stdout)
    assert float(printed[-1]) == pytest.approx(accuracy(folder, "dev_fold3"), abs=1e-6)
    assert len((folder / "dev_fold3_truth.txt").read_text().splitlines()) == 4  # 0.2 of 18

    argv = ["-m", "evaluate", "-t", "test", "-e", "result/downstream/x/dev-best.ckpt"]
    process = command("run_downstream.py", *argv, "--device", "cpu", cwd=work)
    (printed,) = re.findall(r"test acc: (\S+)", process.stdout)
    assert float(printed) == pytest.approx(accuracy(folder, "test_fold3"), abs=1e-6)
    assert float(printed) == 1.0  # three pitches, easy to classify
    lines = (folder / "test_fold3_truth.txt").read_text().splitlines()
    assert len(lines) == 9 and all(line.startswith("s10-") for line in lines)
