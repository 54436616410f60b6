"""ER: folds from a manifest, folds of IEMOCAP, and a run over them."""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from s3prl_ekd.prepare.er import natural

from .conftest import command
from .preparing import accuracy, fails, prepare

HEADER = "path\tspeaker\temotion\tgroup\tsplit\n"
PITCH = {"low": 200, "mid": 700, "high": 1500}


def make_manifest(folder: Path, speakers=("s1", "s2", "s10")) -> Path:
    """Three utterances of each label and speaker, hums of the label's pitch; one has no label."""
    rng, lines = np.random.default_rng(0), [HEADER]
    folder.mkdir(parents=True)
    for speaker in speakers:
        for label in (*PITCH, ""):
            for number in range(3 if label else 1):
                time = np.arange(8000 + 500 * number) / 16000
                sound = 0.2 * np.sin(2 * np.pi * PITCH.get(label, 50) * time)
                name = f"{speaker}-{label}-{number}.flac"
                soundfile.write(folder / name, sound + 0.01 * rng.standard_normal(len(time)), 16000)
                split = ("train", "dev", "test")[number]
                lines.append(f"{name}\t{speaker}\t{label}\tg-{speaker}\t{split}\n")
    (folder / "er.tsv").write_text("".join(lines))
    return folder / "er.tsv"


@pytest.fixture
def manifest(tmp_path):
    return make_manifest(tmp_path / "corpus")


def read(out: Path, session: int, part: str) -> dict:
    return json.loads((out / f"meta_data/Session{session}/{part}_meta_data.json").read_text())


# --- prepare er


def test_a_fold_for_each_value(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--labels", "mid", "low", "high", "--fold-column", "group")
    assert prepare("er", manifest, "-o", out, *words) == 0
    printed = capsys.readouterr().out
    assert "3 lines with another label or none left out" in printed
    assert "fold3: 18 utterances to train and 9 to test (g-s10)" in printed  # after s2
    assert "3 classes: mid 9, low 9, high 9; always guessing one: 33.3 %" in printed
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
    words = ("--label-column", "mood", "--labels", "low", "high")
    assert prepare("er", manifest, "-o", out, *words) == 0
    train, test = (read(out, 1, part)["meta_data"] for part in ("train", "test"))
    assert len(train) == 12 and {item["path"][-6] for item in train} == {"0", "1"}
    assert len(test) == 6 and {item["path"][-6] for item in test} == {"2"}
    assert read(out, 1, "test")["labels"] == {"low": 0, "high": 1}
    assert not (out / "meta_data/Session2").exists()


def test_natural_order():
    names = ["Session10", "Session9", "b", "2", "10", "a1b"]
    assert sorted(names, key=natural) == ["2", "10", "Session9", "Session10", "a1b", "b"]


@pytest.mark.parametrize(
    "old, new, words, message",
    [
        ("emotion", "mood", (), "line 1 lacks the column emotion"),
        ("", "", ("--fold-column", "part"), "line 1 lacks the column part"),
        ("", "", ("--labels", "low", "sad"), "no line with the label 'sad'; it has: high, low"),
        ("", "", ("--labels", "low"), "gives 1 class(es) (low)"),
        ("", "", ("--labels", "low", "low"), "names low twice"),
        ("\tlow\t", "\tvery low\t", (), "the label 'very low'; a label is a word"),
        ("\tg-s2\t", "\t\t", ("--fold-column", "group"), "has no group"),
        ("\tg-s2\t", "\tg-s1\t", ("--fold-column", "split"), ""),
        ("\ttest", "\ttrain", (), "no labelled line in the split test"),
        ("low\tg-s1", "mid\tg-s1", ("--fold-column", "emotion"), "no training utterance of high"),
        ("s1-low-0", "s1-low-9", (), "line 2: "),
    ],
)
def test_manifests_that_are_refused(manifest, tmp_path, capsys, old, new, words, message):
    manifest.write_text(manifest.read_text().replace(old, new))
    if message:
        assert message in fails(capsys, "er", manifest, "-o", tmp_path / "out", *words)
        assert not (tmp_path / "out").exists()
    else:  # any column may be the fold's
        assert prepare("er", manifest, "-o", tmp_path / "out", *words) == 0


def test_no_labels_and_one_fold_value(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "corpus", speakers=["s1"])
    words = ("-o", tmp_path / "out", "--fold-column", "group")
    assert "has one value only" in fails(capsys, "er", manifest, *words)
    for label in PITCH:
        manifest.write_text(manifest.read_text().replace(f"\t{label}\t", "\t\t"))
    assert "0 class(es) (no label)" in fails(capsys, "er", manifest, "-o", tmp_path / "out")


# --- prepare iemocap


@pytest.fixture
def iemocap(tmp_path):
    """Folders and label files of IEMOCAP's shape, with seven utterances a dialog."""
    root = tmp_path / "IEMOCAP_full_release"
    for session in range(1, 6):
        for dialog in (f"Ses0{session}F_impro01", f"Ses0{session}M_script02_1"):
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
            for number, label in enumerate(("neu", "hap", "ang", "sad", "exc", "xxx", "fru")):
                name = f"{dialog}_F{number:03d}"
                wav = root / f"Session{session}/sentences/wav/{dialog}/{name}.wav"
                wav.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(wav, np.full(400, 0.1), 16000)
                lines.append(f"[{number}.2901 - 9.2357]\t{name}\t{label}\t[2.5, 2.5000, 2.5000]\n")
                lines.append("C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n")
            labels = root / f"Session{session}/dialog/EmoEvaluation/{dialog}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("".join(lines))
        (labels.parent / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    return root


def test_folds_are_those_of_s3prls_script(iemocap, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert prepare("iemocap", iemocap, "-o", out) == 0
    printed = capsys.readouterr().out
    assert "fold5: 40 utterances to train and 10 to test (Session5)" in printed
    assert "note: 50 utterances; the whole IEMOCAP gives 5531" in printed

    librosa = ModuleType("librosa.util")
    librosa.find_files = lambda folder: sorted(map(str, Path(folder).rglob("*.wav")))
    monkeypatch.setitem(sys.modules, "librosa", ModuleType("librosa"))
    monkeypatch.setitem(sys.modules, "librosa.util", librosa)
    for junk in iemocap.rglob("._*"):
        junk.unlink()  # their script stops at it
    importlib.import_module("s3prl.downstream.emotion.IEMOCAP_preprocess").main(str(iemocap))

    def key(item):
        return item["path"]

    for session in range(1, 6):
        for part in ("train", "test"):
            theirs = iemocap / f"meta_data/Session{session}/{part}_meta_data.json"
            theirs = json.loads(theirs.read_text())
            ours = read(out, session, part)
            assert ours["labels"] == theirs["labels"]
            assert sorted(ours["meta_data"], key=key) == sorted(theirs["meta_data"], key=key)
            assert (out / "audio" / ours["meta_data"][0]["path"]).is_file()


def test_wrong_iemocap_is_explained(iemocap, tmp_path, capsys):
    out = ("-o", tmp_path / "out")
    assert "not a folder" in fails(capsys, "iemocap", tmp_path / "no", *out)
    error = fails(capsys, "iemocap", iemocap.parent, *out)
    assert "no Session1/dialog/EmoEvaluation; is it" in error and str(iemocap) in error
    wav = "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F002.wav"
    (iemocap / wav).rename(tmp_path / "aside.wav")
    error = fails(capsys, "iemocap", iemocap, *out)
    assert "lacks the audio of 1 of 50 labelled utterances" in error and wav in error
    (tmp_path / "aside.wav").rename(iemocap / wav)
    labels = iemocap / "Session3/dialog/EmoEvaluation/Ses03F_impro01.txt"
    labels.write_text("[0.1 - 0.2] Ses03F_impro01_F000 neu\n")
    assert "Ses03F_impro01.txt: line 1 is not time" in fails(capsys, "iemocap", iemocap, *out)
    for file in labels.parent.glob("S*.txt"):
        file.write_text("nothing\n")
    assert "has no line with a label of neu" in fails(capsys, "iemocap", iemocap, *out)


# --- a run


def test_train_and_evaluate_a_fold(tmp_path):
    manifest = make_manifest(tmp_path / "corpus")
    work = tmp_path / "work"
    command("init", work, cwd=tmp_path)
    command("prepare", "er", manifest, "-o", "data/er", "--fold-column", "group", cwd=work)
    steps = "config.runner.total_steps=30,,config.runner.eval_step=15,,config.runner.save_step=15"
    steps += ",,config.runner.log_step=15,,config.downstream_expert.datarc.test_fold='fold3'"
    steps += ",,config.optimizer.lr=0.01"
    words = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "emotion", "-n", "x", "-o", steps]
    words += ["-c", "downstream/emotion/tiny.yaml", "--device", "cpu"]
    done = command("run_downstream.py", *words, cwd=work)
    folder = work / "result/downstream/x"
    printed = re.findall(r"dev acc: (\S+)", done.stdout)
    assert float(printed[-1]) == pytest.approx(accuracy(folder, "dev_fold3"), abs=1e-6)
    assert len((folder / "dev_fold3_truth.txt").read_text().splitlines()) == 4  # 0.2 of 18

    words = ["-m", "evaluate", "-t", "test", "-e", "result/downstream/x/dev-best.ckpt"]
    done = command("run_downstream.py", *words, "--device", "cpu", cwd=work)
    (printed,) = re.findall(r"test acc: (\S+)", done.stdout)
    assert float(printed) == pytest.approx(accuracy(folder, "test_fold3"), abs=1e-6)
    assert float(printed) == 1.0  # three hums, easily told apart
    lines = (folder / "test_fold3_truth.txt").read_text().splitlines()
    assert len(lines) == 9 and all(line.startswith("s10-") for line in lines)
