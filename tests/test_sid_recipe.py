"""SID: the layout, the check of VoxCeleb1, s3prl's cache that is bypassed, and a run."""

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

from .conftest import CreatesFolder, command
from .corpora import tone, write_manifest, write_voxceleb1
from .preparing import accuracy, check_message, fails, prepare

SPLITS = ("train", "train", "dev", "test")


def make_manifest(folder: Path, speakers=("ann b", "bob", "cy"), first=200) -> Path:
    """Write four utterances per speaker, sines of the speaker's pitch; FLAC and WAV alternate."""
    rng = np.random.default_rng(first)
    rows = []
    for i, speaker in enumerate(speakers):
        for j, split in enumerate(SPLITS):
            name = f"{speaker[0]}/{j}.{('flac', 'wav')[j % 2]}"
            wave = tone(rng, first + 400 * i, 8000 + 700 * j + 100 * i)
            rows.append((wave, (name, speaker, split)))
    return write_manifest(folder / "sid.tsv", ("speaker", "split"), rows)


@pytest.fixture
def manifest(tmp_path):
    return make_manifest(tmp_path / "corpus")


@pytest.fixture
def dataset(monkeypatch):
    """s3prl's data set of SID, imported as by the launcher."""
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
    assert re.search(r"^3 speakers.* 33\.3 %", capsys.readouterr().out, re.MULTILINE)
    rows = (out / "prepared.tsv").read_text().splitlines()[1:]
    source = {row.split("\t")[0]: row.split("\t") for row in rows}
    ids = [line.split("\t")[:3] for line in (out / "speakers.tsv").read_text().splitlines()[1:]]
    assert ids == [["id10001", "0", "ann b"], ["id10002", "1", "bob"], ["id10003", "2", "cy"]]
    for split, count in (("train", 6), ("dev", 3), ("test", 3)):
        data = dataset(split, out / "audio", out / "split.txt")
        assert len(data) == count
        for index in range(count):
            wave, label, name = data[index]
            path = "/".join(Path(data.dataset[index]).parts[-3:])
            _, original, speaker, prepared_split, samples = source[path]
            expected, _ = soundfile.read(manifest.parent / original, dtype="float32")
            assert np.array_equal(wave, expected) and len(wave) == int(samples)
            assert (speaker, prepared_split) == (ids[label][2], split)
            assert name == path.removesuffix(".wav").replace("/", "-")
    with open(out / "audio/all/wav/id10001/train/00001.wav", "rb") as file:
        assert file.read(4) == (b"RIFF" if options else b"fLaC")
    assert (out / "audio/all/wav/id10001/train/00001.wav").is_symlink() is not bool(options)


def test_test_seconds_truncates_dev_and_test(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("sid", manifest, "-o", out, "--test-seconds", "0.55") == 0
    assert re.search(r"^6 files", capsys.readouterr().out, re.MULTILINE)
    rows = [line.split("\t") for line in (out / "prepared.tsv").read_text().splitlines()[1:]]
    assert {row[3] for row in rows if int(row[4]) > 8800} == {"train"}  # 0.55 s at 16 kHz
    for name, original, _, split, samples in rows:
        path = out / "audio/all/wav" / name
        wave, _ = soundfile.read(path, dtype="int16")
        full, _ = soundfile.read(manifest.parent / original, dtype="int16")
        assert len(wave) == int(samples) and path.is_symlink() == (split == "train")
        if split != "train" and len(full) > 8800:
            start = (len(full) - 8800) // 2
            assert np.array_equal(wave, full[start : start + 8800])
        else:
            assert np.array_equal(wave, full)
    for value in ("0.01", "0", "nan", "inf", "1e308"):
        error = fails(capsys, "sid", manifest, "-o", tmp_path / "no", "--test-seconds", value)
        check_message(error, "--test-seconds", " 0.1 ", f"{float(value):g}")


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("speaker", "talker", [1, "speaker"]),
        ("\tbob\tdev", "\t\tdev", [8, "speaker"]),
        ("\tbob\tdev", "\tdan\tdev", ["dan", "dev", "train"]),
        ("\tdev", "\ttest", ["train, dev, test"]),
        ("b/0.flac", "b/9.flac", [6]),
        ("\tdev", "\tvalid", ["valid"]),
    ],
)
def test_invalid_manifests(manifest, tmp_path, capsys, old, new, parts):
    manifest.write_text(manifest.read_text().replace(old, new))
    check_message(fails(capsys, "sid", manifest, "-o", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_one_speaker_is_rejected(tmp_path, capsys):
    manifest = make_manifest(tmp_path / "corpus", speakers=["ann"])
    check_message(fails(capsys, "sid", manifest, "-o", tmp_path / "out"), 1, 2, 1251)


# --- prepare voxceleb1


@pytest.fixture
def voxceleb(tmp_path):
    """Folder and split file of a corpus as VoxCeleb1 is unpacked: speaker 3 is in test/."""
    speakers = {"id10001": "dev", "id10002": "dev", "id10003": "test"}
    write_voxceleb1(tmp_path / "VoxCeleb1", tmp_path / "iden_split.txt", speakers, 1600)
    return tmp_path / "VoxCeleb1", tmp_path / "iden_split.txt"


def test_voxceleb1_is_linked(voxceleb, tmp_path, dataset, capsys):
    root, split = voxceleb
    out = tmp_path / "data" / "voxceleb1"
    assert prepare("voxceleb1", root, split, "-o", out) == 0
    assert re.search("^3 speakers", capsys.readouterr().out, re.MULTILINE)
    assert (out / "split.txt").read_text() == split.read_text()
    data = dataset("test", out / "audio", out / "split.txt")
    assert data.label == [0, 1, 2] and len(data[2][0]) == 1603
    assert "--replace" in fails(capsys, "voxceleb1", root, split, "-o", out)
    assert prepare("voxceleb1", root, split, "-o", out, "--replace") == 0


def test_missing_files_are_listed(voxceleb, tmp_path, capsys):
    root, split = voxceleb
    out = tmp_path / "out"
    (root / "dev/wav/id10001/x-1_y/00001.wav").unlink()
    shutil.rmtree(root / "test/wav/id10003")
    error = fails(capsys, "voxceleb1", root, split, "-o", out)
    check_message(error, 5, 12, "id10001/x-1_y/00001.wav", str(tmp_path / "out-missing.txt"))
    missing = (tmp_path / "out-missing.txt").read_text().splitlines()
    assert len(missing) == 5 and not out.exists()


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("2 id10001", "4 id10001", [3, "4 id10001", "1 (train), 2 (dev) or 3 (test)"]),
        ("2 id10001", "2 id20001", [3, "id20001", "id10001", "id11251"]),
        ("2 id10001/", "2 ", [3, "2 x-2_y/00002.wav"]),
        ("2 id10001/x-2_y/00002", "1 id10001/x-1_y/00001", [3, "id10001/x-1_y/00001.wav", 2]),
        ("1 id10002", "2 id10002", ["id10002", "dev", "train"]),
    ],
)
def test_invalid_split_files(voxceleb, tmp_path, capsys, old, new, parts):
    root, split = voxceleb
    split.write_text(split.read_text().replace(old, new))
    check_message(fails(capsys, "voxceleb1", root, split, "-o", tmp_path / "out"), *parts)


def test_errors_of_wrong_folders(voxceleb, tmp_path, capsys):
    root, split = voxceleb
    out = ("-o", tmp_path / "out")
    error = fails(capsys, "voxceleb1", root / "dev", split, *out)
    assert re.search(rf"{re.escape(str(root))}(?!/)", error)
    error = fails(capsys, "voxceleb1", root / "dev/wav", split, *out)
    assert str(root / "dev/wav/dev/wav") in error
    error = fails(capsys, "voxceleb1", tmp_path, split, *out)
    assert f"{tmp_path} " in error and "dev/wav" in error and "test/wav" in error
    assert str(tmp_path / "no") in fails(capsys, "voxceleb1", tmp_path / "no", split, *out)
    assert str(tmp_path / "no") in fails(capsys, "voxceleb1", root, tmp_path / "no", *out)


# --- the cache


def test_two_data_sets_in_one_process(tmp_path, dataset):
    folder = Path(sys.modules[dataset.__module__].__file__).parent
    before = sorted(folder.rglob(".cache/*"))
    for name, first in (("one", 200), ("two", 300)):
        prepare(
            "sid", make_manifest(tmp_path / name / "in", first=first), "-o", tmp_path / name / "out"
        )
        for _ in range(2):
            data = dataset(
                "train", tmp_path / name / "out/audio", tmp_path / name / "out/split.txt"
            )
            assert all(path.startswith(str(tmp_path / name)) for path in data.dataset)
    assert sorted(folder.rglob(".cache/*")) == before


def test_librosa_is_not_needed(dataset, monkeypatch):
    module = sys.modules[dataset.__module__]
    monkeypatch.setitem(sys.modules, "librosa", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="librosa"):
        module.find_files(".")  # librosa's function


def test_an_s3prl_without_the_cache_path_is_rejected(monkeypatch):
    module = type(sys)(voxceleb1_cache.DATASET)
    monkeypatch.setitem(sys.modules, voxceleb1_cache.DATASET, module)
    with pytest.raises(SetupError, match="CACHE_PATH"):
        voxceleb1_cache.bypass_cache()


# --- runs


@pytest.mark.slow
def test_runs_on_two_corpora_ignore_s3prls_cache(tmp_path):
    """Train on two corpora, then evaluate the first model with -e only."""
    site = tmp_path / "site"
    shutil.copytree(Path(s3prl.__file__).parent, site / "s3prl")  # the test writes into it
    cache = site / "s3prl/downstream/voxceleb1/.cache"
    cache.mkdir()
    trap = tmp_path / "the_pickle_was_loaded"
    for split in ("train", "dev", "test"):
        (cache / f"{split}.pkl").write_bytes(pickle.dumps(CreatesFolder(trap)))
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    env = {"PYTHONPATH": str(site)}
    argv = [sys.executable, "-c", "import s3prl; print(s3prl.__file__)"]
    process = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True)
    assert process.stdout.startswith(str(site))  # the runs import the copy

    work = tmp_path / "work"
    command("init", work, cwd=tmp_path)
    steps = "config.runner.total_steps=40,,config.runner.eval_step=20,,config.runner.save_step=20"
    steps += ",,config.runner.log_step=20,,config.downstream_expert.datarc.train_batch_size=6"
    steps += ",,config.optimizer.lr=0.02,,config.scheduler.num_warmup_steps=1"
    for name, speakers in (("one", ("ann", "bob", "cy")), ("two", ("dan", "eve"))):
        corpus = make_manifest(tmp_path / name, speakers)
        command("prepare", "sid", corpus, "-o", f"data/{name}", cwd=work)
        paths = f",,config.downstream_expert.datarc.file_path='data/{name}/audio'"
        paths += f",,config.downstream_expert.datarc.meta_data='data/{name}/split.txt'"
        argv = ["-m", "train", "-u", "fbank_no_cmvn", "-d", "voxceleb1", "-n", name]
        argv += ["-c", "downstream/voxceleb1/tiny.yaml", "--device", "cpu", "-o", steps + paths]
        process = command("run_downstream.py", *argv, cwd=work, **env)
        folder = work / "result/downstream" / name
        assert len((folder / "dev_truth.txt").read_text().splitlines()) == len(speakers)
        printed = re.findall(r"dev acc: (\S+)", process.stdout)
        assert float(printed[-1]) == pytest.approx(accuracy(folder, "dev"), abs=1e-6)
        assert float(printed[-1]) == 1.0  # easy to classify, unless a file list is wrong

    best = "result/downstream/one/dev-best.ckpt"
    argv = ["-m", "evaluate", "-t", "test", "-e", best, "--device", "cpu"]
    process = command("run_downstream.py", *argv, cwd=work, **env)
    (printed,) = re.findall(r"test acc: (\S+)", process.stdout)
    folder = work / "result/downstream/one"
    assert float(printed) == pytest.approx(accuracy(folder, "test"), abs=1e-6)
    assert len((folder / "test_truth.txt").read_text().splitlines()) == 3

    assert not trap.exists()
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
