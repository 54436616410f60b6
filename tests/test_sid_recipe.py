"""SID: the layout, the check of the real corpus, the cache that is not read, and a run."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3prl
import soundfile

from s3prl_ekd.compat import voxceleb1_cache
from s3prl_ekd.errors import SetupError

from .conftest import command
from .preparing import accuracy, fails, prepare

SPLITS = ("train", "train", "dev", "test")
HEADER = "path\tspeaker\tsplit\n"


def make_manifest(folder: Path, speakers=("ann b", "bob", "cy"), first=200) -> Path:
    """Four utterances a speaker, a hum of the speaker's own pitch; FLAC and WAV by turns."""
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(first), [HEADER]
    for i, speaker in enumerate(speakers):
        for j, split in enumerate(SPLITS):
            time = np.arange(8000 + 700 * j + 100 * i) / 16000
            sound = 0.2 * np.sin(2 * np.pi * (first + 400 * i) * time)
            name = f"{speaker[0]}/{j}.{('flac', 'wav')[j % 2]}"
            (folder / name).parent.mkdir(exist_ok=True)
            soundfile.write(folder / name, sound + 0.01 * rng.standard_normal(len(time)), 16000)
            lines.append(f"{name}\t{speaker}\t{split}\n")
    (folder / "sid.tsv").write_text("".join(lines))
    return folder / "sid.tsv"


@pytest.fixture
def manifest(tmp_path):
    return make_manifest(tmp_path / "corpus")


@pytest.fixture
def dataset(monkeypatch):
    """s3prl's data set of SID, imported as the launcher has it imported."""
    for name in [name for name in sys.modules if name.startswith("s3prl.downstream.voxceleb1")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    voxceleb1_cache.bypass_cache()
    from s3prl.downstream.voxceleb1.dataset import SpeakerClassifiDataset

    return SpeakerClassifiDataset


# --- prepare sid


@pytest.mark.parametrize("options", [(), ("--copy",)])
def test_s3prl_reads_the_layout(manifest, tmp_path, dataset, capsys, options):
    out = tmp_path / "out"
    assert prepare("sid", manifest, "-o", out, *options) == 0
    assert "3 speakers: chance is 33.3 %" in capsys.readouterr().out
    rows = (out / "prepared.tsv").read_text().splitlines()[1:]
    source = {row.split("\t")[0]: row.split("\t") for row in rows}
    ids = [line.split("\t")[:3] for line in (out / "speakers.tsv").read_text().splitlines()[1:]]
    assert ids == [["id10001", "0", "ann b"], ["id10002", "1", "bob"], ["id10003", "2", "cy"]]
    for split, count in (("train", 6), ("dev", 3), ("test", 3)):
        found = dataset(split, out / "audio", out / "split.txt")
        assert len(found) == count
        for index in range(count):
            wave, label, name = found[index]
            path = "/".join(Path(found.dataset[index]).parts[-3:])
            _, original, speaker, in_split, samples = source[path]
            sound, _ = soundfile.read(manifest.parent / original, dtype="float32")
            assert np.array_equal(wave, sound) and len(wave) == int(samples)
            assert (speaker, in_split) == (ids[label][2], split)
            assert name == path.removesuffix(".wav").replace("/", "-")
    with open(out / "audio/all/wav/id10001/train/00001.wav", "rb") as file:
        assert file.read(4) == (b"RIFF" if options else b"fLaC")
    assert (out / "audio/all/wav/id10001/train/00001.wav").is_symlink() is not bool(options)


def test_only_the_middle_of_dev_and_test(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("sid", manifest, "-o", out, "--test-seconds", "0.55") == 0
    assert "6 files written as WAV" in capsys.readouterr().out
    rows = [line.split("\t") for line in (out / "prepared.tsv").read_text().splitlines()[1:]]
    assert {row[3] for row in rows if int(row[4]) > 8800} == {"train"}  # 0.55 s at 16 kHz
    for name, original, _, split, samples in rows:
        path = out / "audio/all/wav" / name
        sound, _ = soundfile.read(path, dtype="int16")
        whole, _ = soundfile.read(manifest.parent / original, dtype="int16")
        assert len(sound) == int(samples) and path.is_symlink() == (split == "train")
        if split != "train" and len(whole) > 8800:
            begin = (len(whole) - 8800) // 2
            assert np.array_equal(sound, whole[begin : begin + 8800])
        else:
            assert np.array_equal(sound, whole)
    for wrong in ("0.01", "0", "nan", "inf", "1e308"):
        message = fails(capsys, "sid", manifest, "-o", tmp_path / "no", "--test-seconds", wrong)
        assert "0.1 s or more is needed" in message


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("speaker", "talker", "line 1 lacks the column speaker"),
        ("\tbob\tdev", "\t\tdev", "line 8 has no speaker"),
        ("\tbob\tdev", "\tdan\tdev", "the speaker dan in dev and not in train"),
        ("\tdev", "\ttest", "has no dev utterances; SID needs train, dev, test"),
        ("b/0.flac", "b/9.flac", "line 6: "),
        ("\tdev", "\tvalid", "has the split 'valid'"),
    ],
)
def test_manifests_that_are_refused(manifest, tmp_path, capsys, old, new, message):
    manifest.write_text(manifest.read_text().replace(old, new))
    assert message in fails(capsys, "sid", manifest, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_speaker_is_refused(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "corpus", speakers=["ann"])
    assert "1 speaker(s)" in fails(capsys, "sid", manifest, "-o", tmp_path / "out")


# --- prepare voxceleb1


@pytest.fixture
def voxceleb(tmp_path):
    """Folder and split file of a corpus as VoxCeleb1 is unpacked: speaker 3 is in test/."""
    lines = []
    for speaker in range(1, 4):
        part = "test" if speaker == 3 else "dev"
        for digit in (1, 2, 3):
            path = f"id{10000 + speaker}/x-{digit}_y/0000{digit}.wav"
            file = tmp_path / "VoxCeleb1" / part / "wav" / path
            file.parent.mkdir(parents=True)
            soundfile.write(file, np.full(1600 + digit, 0.1), 16000)
            lines.append(f"{digit} {path}\n")
    split = tmp_path / "iden_split.txt"
    split.write_text("".join(lines))
    return tmp_path / "VoxCeleb1", split


def test_the_real_corpus_is_linked(voxceleb, tmp_path, dataset, capsys):
    root, split = voxceleb
    out = tmp_path / "data" / "voxceleb1"
    assert prepare("voxceleb1", root, split, "-o", out) == 0
    assert "3 speakers" in capsys.readouterr().out
    assert (out / "split.txt").read_text() == split.read_text()
    found = dataset("test", out / "audio", out / "split.txt")
    assert found.label == [0, 1, 2] and len(found[2][0]) == 1603
    assert "--replace" in fails(capsys, "voxceleb1", root, split, "-o", out)
    assert prepare("voxceleb1", root, split, "-o", out, "--replace") == 0


def test_what_is_missing_is_named(voxceleb, tmp_path, capsys):
    root, split = voxceleb
    out = tmp_path / "out"
    (root / "dev/wav/id10001/x-1_y/00001.wav").unlink()
    shutil.rmtree(root / "test/wav/id10003")
    error = fails(capsys, "voxceleb1", root, split, "-o", out)
    assert "lacks 4 of the 9 files" in error and "id10001/x-1_y/00001.wav, id10003/x-1_y" in error
    listed = (tmp_path / "out-missing.txt").read_text().splitlines()
    assert len(listed) == 4 and not out.exists()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("2 id10001", "4 id10001", "line 2 has the split '4'; known: 1 (train), 2 (dev)"),
        ("2 id10001", "2 id20001", "line 2 has the speaker id20001; s3prl's classes are id10001"),
        ("2 id10001/", "2 ", "line 2 is not of the form"),
        ("2 id10001/x-2_y/00002", "1 id10001/x-1_y/00001", "line 2 repeats"),
        ("1 id10002", "2 id10002", "id10002 in dev and not in train"),
    ],
)
def test_split_files_that_are_refused(voxceleb, tmp_path, capsys, old, new, message):
    root, split = voxceleb
    split.write_text(split.read_text().replace(old, new))
    assert message in fails(capsys, "voxceleb1", root, split, "-o", tmp_path / "out")


def test_wrong_folders_are_explained(voxceleb, tmp_path, capsys):
    root, split = voxceleb
    out = ("-o", tmp_path / "out")
    assert f"the folder above, {root}" in fails(capsys, "voxceleb1", root / "dev", split, *out)
    assert "speakers directly" in fails(capsys, "voxceleb1", root / "dev/wav", split, *out)
    assert "no dev/wav" in fails(capsys, "voxceleb1", tmp_path, split, *out)
    assert "not a folder" in fails(capsys, "voxceleb1", tmp_path / "no", split, *out)
    assert "does not exist" in fails(capsys, "voxceleb1", root, tmp_path / "no", *out)


# --- the cache


def test_two_data_sets_in_one_process(tmp_path, dataset):
    folder = Path(sys.modules[dataset.__module__].__file__).parent
    before = sorted(folder.rglob(".cache/*"))
    for name, first in (("one", 200), ("two", 300)):
        prepare(
            "sid", make_manifest(tmp_path / name / "in", first=first), "-o", tmp_path / name / "out"
        )
        for _ in range(2):
            found = dataset(
                "train", tmp_path / name / "out/audio", tmp_path / name / "out/split.txt"
            )
            assert all(path.startswith(str(tmp_path / name)) for path in found.dataset)
    assert sorted(folder.rglob(".cache/*")) == before


def test_librosa_is_not_needed(dataset, monkeypatch):
    module = sys.modules[dataset.__module__]
    monkeypatch.setitem(sys.modules, "librosa", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="librosa"):
        module.find_files(".")  # the real one, asked for by name


def test_an_s3prl_without_that_path_is_refused(monkeypatch):
    module = type(sys)(voxceleb1_cache.DATASET)
    monkeypatch.setitem(sys.modules, voxceleb1_cache.DATASET, module)
    with pytest.raises(SetupError, match="CACHE_PATH"):
        voxceleb1_cache.bypass_cache()


# --- runs


class Payload:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_runs_over_two_corpora_beside_a_foreign_cache(tmp_path):
    """Train on one corpus and on another, then evaluate the first by -e alone."""
    site = tmp_path / "site"
    shutil.copytree(Path(s3prl.__file__).parent, site / "s3prl")  # whose folder may be spoilt
    cache = site / "s3prl/downstream/voxceleb1/.cache"
    cache.mkdir()
    trap = tmp_path / "the_pickle_was_read"
    for split in ("train", "dev", "test"):
        (cache / f"{split}.pkl").write_bytes(pickle.dumps(Payload(trap)))
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    env = {"PYTHONPATH": str(site)}
    words = [sys.executable, "-c", "import s3prl; print(s3prl.__file__)"]
    used = subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True)
    assert used.stdout.startswith(str(site))  # else nothing is tried here

    work = tmp_path / "work"
    command("init", work, cwd=tmp_path)
    steps = "config.runner.total_steps=40,,config.runner.eval_step=20,,config.runner.save_step=20"
    steps += ",,config.runner.log_step=20,,config.downstream_expert.datarc.train_batch_size=6"
    steps += ",,config.optimizer.lr=0.02,,config.scheduler.num_warmup_steps=1"
    for name, speakers in (("one", ("ann", "bob", "cy")), ("two", ("dan", "eve"))):
        corpus = make_manifest(tmp_path / name, speakers)
        command("prepare", "sid", corpus, "-o", f"data/{name}", cwd=work)
        where = f",,config.downstream_expert.datarc.file_path='data/{name}/audio'"
        where += f",,config.downstream_expert.datarc.meta_data='data/{name}/split.txt'"
        words = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "voxceleb1", "-n", name]
        words += ["-c", "downstream/voxceleb1/tiny.yaml", "--device", "cpu", "-o", steps + where]
        done = command("run_downstream.py", *words, cwd=work, **env)
        folder = work / "result/downstream" / name
        assert len((folder / "dev_truth.txt").read_text().splitlines()) == len(speakers)
        printed = re.findall(r"dev acc: (\S+)", done.stdout)
        assert float(printed[-1]) == pytest.approx(accuracy(folder, "dev"), abs=1e-6)
        assert float(printed[-1]) == 1.0  # three hums; a list of other files would not give that

    best = "result/downstream/one/dev-best.ckpt"
    words = ["-m", "evaluate", "-t", "test", "-e", best, "--device", "cpu"]
    done = command("run_downstream.py", *words, cwd=work, **env)
    (printed,) = re.findall(r"test acc: (\S+)", done.stdout)
    folder = work / "result/downstream/one"
    assert float(printed) == pytest.approx(accuracy(folder, "test"), abs=1e-6)
    assert len((folder / "test_truth.txt").read_text().splitlines()) == 3

    assert not trap.exists()
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
