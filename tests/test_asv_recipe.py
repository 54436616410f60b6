"""ASV: the layout against s3prl's reader, trials, the EER, and runs."""

from __future__ import annotations

import csv
import functools
import glob
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from s3prl_ekd import cli, compat
from s3prl_ekd.compat.no_eval import check_splits
from s3prl_ekd.downstream import speaker_verification
from s3prl_ekd.downstream.metrics.eer import EqualErrorRate, read_scored_trials
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.downstream.tasks.corpus_check import check_corpus
from s3prl_ekd.errors import CheckpointError, ConfigError, DataError
from s3prl_ekd.files.run_checkpoints import read_checkpoint
from s3prl_ekd.prepare.asv import MIN_SAMPLES, make_trials
from s3prl_ekd.superb.bootstrap import interval, share_better
from s3prl_ekd.superb.submission import MEMBERS

from .conftest import command, run_downstream_here
from .corpora import tone, write_audio, write_manifest
from .kill_and_resume import flat_values, unequal
from .preparing import check_message, fails, prepare

TASK = TASKS["asv"]
SPEAKERS = {"ann b": "train", "bob": "train", "cy": "train"}
SPEAKERS |= {"dan": "test", "eve": "test", "flo": "test"}
SETTINGS = {"vad_config.min_sec": 6000, "max_timestep": 8000, "train_batch_size": 4}


def voice(rng: np.random.Generator, speaker: int, samples: int) -> np.ndarray:
    """A tone of the speaker's pitch, after 0.2 s of silence and with as much in its middle."""
    wave = tone(rng, 150 + 130 * speaker, samples)
    middle = samples // 2
    gap = np.zeros(3200)
    return np.concatenate([gap, wave[:middle], gap, wave[middle:]])


def write_speakers(folder: Path, seed: int = 0) -> Path:
    """Four recordings of each speaker for training, the last one short, and three for the test."""
    rng, rows = np.random.default_rng(seed), []
    for number, (speaker, split) in enumerate(SPEAKERS.items()):
        for i in range(4 if split == "train" else 3):
            name = f"{speaker[:3].strip()}/{i}.{('flac', 'wav')[i % 2]}"
            samples = 4000 if i == 3 else 9000 + 500 * i + 100 * number
            rows.append((voice(rng, number, samples), (name, speaker, split)))
    rows.append((tone(rng, 99, 9000), ("gus.wav", "gus", "dev")))
    return write_manifest(folder / "asv.tsv", ("speaker", "split"), rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a corpus in data/asv."""
    folder = tmp_path_factory.mktemp("work")
    manifest = write_speakers(folder / "corpus")
    assert cli.main(["init", str(folder / "work")]) == 0
    assert prepare("asv", manifest, "-o", folder / "work/data/asv") == 0
    return folder / "work"


@pytest.fixture
def module(monkeypatch):
    """s3prl's data set and expert of ASV, patched."""
    compat.apply()
    for name in [name for name in sys.modules if name.startswith("s3prl.downstream.sv_voxceleb1")]:
        monkeypatch.delitem(sys.modules, name)
    with speaker_verification.recipe_patched():
        from s3prl.downstream.sv_voxceleb1 import dataset, expert

        yield SimpleNamespace(dataset=dataset, expert=expert)


def unpatched_dataset(folder: Path, monkeypatch) -> ModuleType:
    """s3prl's data set as it is, with its cache in ``folder``."""
    import importlib.util

    compat.apply()
    origin = Path(importlib.util.find_spec("s3prl").origin).parent
    source = origin / "downstream/sv_voxceleb1/dataset.py"
    for name, attribute in (("sox", "Transformer"), ("librosa", "util"), ("librosa.util", "")):
        stand_in = ModuleType(name)
        setattr(stand_in, attribute or "find_files", find_files)
        monkeypatch.setitem(sys.modules, name, stand_in)
    module = ModuleType("unpatched")
    module.__file__ = str(folder / "dataset.py")
    exec(compile(source.read_text(), str(source), "exec"), vars(module))
    return module


def find_files(root: Path) -> list[str]:
    """librosa's, for WAV."""
    return sorted(glob.glob(f"{root}/**/*.wav", recursive=True))


def train_set(dataset, root: Path, **changed):
    settings = {"vad_config": {"min_sec": 6000}, "key_list": ["Voxceleb1"], "n_jobs": 1}
    settings |= {"file_path": [root / "dev/wav"], "meta_data": "", "max_timestep": 8000}
    return dataset.SpeakerVerifi_train(**(settings | changed))


def table(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / "prepared.tsv").open(), delimiter="\t"))


# --- prepare asv


def test_s3prl_reads_the_recordings(work, module, tmp_path, monkeypatch):
    root = work / "data/asv"
    theirs = train_set(unpatched_dataset(tmp_path, monkeypatch), root)
    data = train_set(module.dataset, root)
    assert data.dataset == theirs.dataset and len(data) == 9  # without the short ones
    assert data.all_speakers == theirs.all_speakers == ["id10001", "id10002", "id10003"]
    assert data.speaker_num == theirs.speaker_num == 3
    rows = {row["id"]: row for row in table(root)}
    speakers = {}
    for index in range(len(data)):
        wave, name, label = data[index]
        row = rows[str(Path(data.dataset[index]).relative_to(root))]
        assert len(wave) == 8000 and name == row["id"][len("dev/wav/") : -4].replace("/", "-")
        speakers.setdefault(label, set()).add(row["speaker"])
    assert speakers == {0: {"ann b"}, 1: {"bob"}, 2: {"cy"}}


def test_lengths_without_silence_are_s3prls(work, module):
    root = work / "data/asv"
    data = train_set(module.dataset, root, vad_config={"min_sec": 0}, max_timestep=None)
    rows = table(root)
    lengths = [len(data[index][0]) for index in range(len(data))]
    assert lengths == [int(row["trimmed"]) for row in rows if row["split"] == "train"]
    for row in rows:  # two gaps of 0.2 s, whose last 0.02 s count as loud
        assert int(row["samples"]) - int(row["trimmed"]) == pytest.approx(6400, abs=700)
    test = module.dataset.SpeakerVerifi_test({}, root / "test/wav", root / "trials.txt")
    of_path = {path: len(wave) for wave, path in (test[i] for i in range(len(test)))}
    expected = {str(root / r["id"]): int(r["trimmed"]) for r in rows if r["split"] == "test"}
    assert of_path == expected


def test_the_trials_are_all_pairs_and_as_many_others(work):
    rows = {row["id"].removeprefix("test/wav/"): row for row in table(work / "data/asv")}
    trials = [line.split() for line in (work / "data/asv/trials.txt").read_text().splitlines()]
    same = [(a, b) for label, a, b in trials if label == "1"]
    assert len(same) == len(set(same)) == 3 * 3 and len(trials) == 18
    for label, a, b in trials:
        assert (rows[a]["speaker"] == rows[b]["speaker"]) == (label == "1") and a != b
        assert rows[a]["split"] == rows[b]["split"] == "test"
    for speaker in {name.split("/")[0] for name in rows if rows[name]["split"] == "test"}:
        labels = [label for label, a, _ in trials if a.startswith(speaker)]
        assert labels.count("0") == labels.count("1") == 3


def test_pairs_depend_on_the_seed_alone_and_are_limited():
    recordings = [(f"{speaker}{i}", speaker) for speaker in "abc" for i in range(60)]
    trials = make_trials(recordings, 1)
    assert trials == make_trials(recordings, 1) != make_trials(recordings, 2)
    assert len(trials) == 2 * 3 * 1000 and len(set(trials)) == len(trials)
    assert make_trials([("a0", "a"), ("b0", "b")], 0) == []


def test_trials_of_the_user(tmp_path, capsys):
    manifest = write_speakers(tmp_path / "corpus")
    trials = tmp_path / "pairs.txt"
    trials.write_text("1 dan/0.flac dan/1.wav\n0\tdan/0.flac\teve/2.flac\n")
    out = tmp_path / "out"
    assert prepare("asv", manifest, "--trials", trials, "-o", out) == 0
    names = {row["path"]: row["id"].removeprefix("test/wav/") for row in table(out)}
    expected = [f"1 {names['dan/0.flac']} {names['dan/1.wav']}"]
    expected += [f"0 {names['dan/0.flac']} {names['eve/2.flac']}"]
    assert (out / "trials.txt").read_text().splitlines() == expected
    for text, part in (
        ("1 dan/0.flac\n", 1),
        ("2 dan/0.flac dan/1.wav\n", 1),
        ("1 dan/0.flac dan/1.wav\n0 dan/0.flac ann/0.flac\n", 2),
        ("1 dan/0.flac dan/1.wav\n", "0"),
        ("", "1"),
    ):
        trials.write_text(text)
        options = ("--trials", trials, "-o", tmp_path / "no")
        check_message(fails(capsys, "asv", manifest, *options), "pairs.txt", part)


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("\tdan\ttest", "\tbob\ttest", "bob"),
        ("\tspeaker", "\ttalker", "speaker"),
        ("\tdan\t", "\t\t", 14),
        ("\ttest", "\tdev", "test"),
        ("\tflo\ttest", "\teve\ttest", None),
    ],
)
def test_invalid_manifests(old, new, part, tmp_path, capsys):
    manifest = write_speakers(tmp_path / "corpus")
    manifest.write_text(manifest.read_text().replace(old, new))
    if part is None:  # two speakers are enough
        assert prepare("asv", manifest, "-o", tmp_path / "out") == 0
        return
    check_message(fails(capsys, "asv", manifest, "-o", tmp_path / "out"), part)
    assert not (tmp_path / "out").exists()


def test_a_recording_of_the_test_that_is_nearly_silent(tmp_path, capsys):
    manifest = write_speakers(tmp_path / "corpus")
    wave = voice(np.random.default_rng(0), 3, MIN_SAMPLES - 600)
    write_audio(tmp_path / "corpus/dan/0.flac", wave)
    message = fails(capsys, "asv", manifest, "-o", tmp_path / "out")
    check_message(message, 14, MIN_SAMPLES)


# --- prepare voxceleb1_asv


@pytest.fixture
def voxceleb(work, tmp_path) -> tuple[Path, Path]:
    """A corpus and its trials as they are published."""
    root = tmp_path / "VoxCeleb1"
    for part in ("dev", "test"):
        shutil.copytree(work / "data/asv" / part, root / part)
    trials = tmp_path / "veri_test2.txt"
    shutil.copy(work / "data/asv/trials.txt", trials)
    return root, trials


def test_voxceleb1_is_linked_and_measured(voxceleb, work, tmp_path, module, capsys):
    root, trials = voxceleb
    out = tmp_path / "out"
    assert prepare("voxceleb1_asv", root, trials, "-o", out) == 0
    assert "18 trials, 9 of one speaker" in capsys.readouterr().out
    assert (out / "dev").is_symlink() and (out / "test").is_symlink()
    assert (out / "trials.txt").read_text() == trials.read_text()
    keys = ("id", "samples", "trimmed", "bytes", "split")
    ours, expected = ([[r[k] for k in keys] for r in table(d)] for d in (out, work / "data/asv"))
    assert sorted(ours) == sorted(expected)
    assert len(train_set(module.dataset, out)) == 9


def test_errors_of_voxceleb1(voxceleb, tmp_path, capsys):
    root, trials = voxceleb
    out = ("-o", tmp_path / "out")
    assert str(root / "dev/wav/dev") in fails(
        capsys, "voxceleb1_asv", root / "dev/wav", trials, *out
    )
    text = trials.read_text()
    trials.write_text(text.replace("test/00001.wav", "test/00009.wav", 1))
    assert "00009.wav" in fails(capsys, "voxceleb1_asv", root, trials, *out)
    trials.write_text(text.replace("/test/", "/../", 1))
    check_message(fails(capsys, "voxceleb1_asv", root, trials, *out), "veri_test2.txt", 1)
    trials.write_text(text)
    shutil.copytree(root / "test/wav/id10005", root / "dev/wav/id10005")
    assert "id10005 is in train and test" in fails(capsys, "voxceleb1_asv", root, trials, *out)
    (root / "test").rename(root / "test2")
    assert "test/wav" in fails(capsys, "voxceleb1_asv", root, trials, *out)


# --- the recipe's reader


def test_a_changed_or_missing_recording_is_named(voxceleb, tmp_path, module):
    root, trials = voxceleb
    out = tmp_path / "out"
    assert prepare("voxceleb1_asv", root, trials, "-o", out) == 0
    path = root / "dev/wav/id10001/train/00001.wav"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"id10001/train/00001\.wav has changed"):
        len(train_set(module.dataset, out))
    path.unlink()
    with pytest.raises(DataError, match=r"id10001/train/00001\.wav.*No such file"):
        len(train_set(module.dataset, out))


def test_without_the_table_recordings_are_measured_for_training_only(
    voxceleb, work, module, tmp_path, monkeypatch, caplog
):
    root, _ = voxceleb
    data = train_set(module.dataset, root)
    assert data.speaker_num == 3 and not caplog.records  # all that an evaluation needs
    expected = train_set(module.dataset, work / "data/asv").dataset
    names = [Path(path).parts[-3:] for path in data.dataset]
    assert names == [Path(path).parts[-3:] for path in expected]
    assert "12 recordings" in caplog.text and "voxceleb1_asv" in caplog.text
    cache = Path(module.dataset.__file__).parent / ".wav_lengths"
    assert not cache.exists()


def test_s3prls_classes_are_restored(work):
    compat.apply()
    with speaker_verification.recipe_patched():
        from s3prl.downstream.sv_voxceleb1 import dataset, expert

        patched = dataset.SpeakerVerifi_train.__init__
    classes = (dataset.SpeakerVerifi_train, dataset.SpeakerVerifi_test, expert.DownstreamExpert)
    for cls in classes:
        assert all("s3prl_ekd" not in getattr(v, "__module__", "") for v in vars(cls).values())
    assert not hasattr(dataset.SpeakerVerifi_train, "dataset")
    assert "load_state_dict" not in vars(expert.DownstreamExpert)
    with speaker_verification.recipe_patched():
        with speaker_verification.recipe_patched():
            pass
        assert dataset.SpeakerVerifi_train.__init__ is patched
    assert "s3prl_ekd" not in dataset.SpeakerVerifi_train.__init__.__module__


def make_expert(module, work: Path, root: Path, expdir: Path = Path()):
    config = recipe(work)["downstream_expert"]
    trials = str(work / "data/asv/trials.txt")
    config["datarc"] |= {"file_path": str(root), "test_meta_data": trials, "dev_meta_data": trials}
    return module.expert.DownstreamExpert(12, config, expdir)


def test_a_checkpoint_of_other_speakers_is_refused(voxceleb, work, module):
    root, _ = voxceleb
    states = make_expert(module, work, work / "data/asv").state_dict()
    make_expert(module, work, root).load_state_dict(states)
    shutil.rmtree(root / "dev/wav/id10003")
    with pytest.raises(CheckpointError, match="the 2 in .*/dev/wav.*file_path"):
        make_expert(module, work, root).load_state_dict(states)


def test_a_diverged_training_is_named(work, module, tmp_path):
    expert = make_expert(module, work, work / "data/asv", tmp_path)
    records = {path: torch.ones(4) for path in expert.test_dataset.dataset}
    records[expert.test_dataset.dataset[0]] = torch.full((4,), torch.nan)
    with pytest.raises(DataError, match=r"\.wav is not finite.*learning rate"):
        expert.log_records("test", records, None, 0)


def test_the_expert_needs_no_cuda(work, module):
    cuda = torch.Tensor.cuda
    expert = make_expert(module, work, work / "data/asv")
    features = [torch.randn(frames, 12) for frames in (40, 31)]
    records = {"loss": []}
    loss = expert("train", features, ["a", "b"], [0, 2], records)
    assert torch.isfinite(loss) and loss.requires_grad
    expert("test", features, ["a", "b"], records=records)
    assert torch.linalg.norm(records["a"]) == pytest.approx(1.0) and torch.Tensor.cuda is cuda


# --- checks before a run


def recipe(work: Path, **changed) -> dict:
    config = yaml.safe_load((work / TASK.tiny).read_text())
    data = config["downstream_expert"]["datarc"]
    for key, value in (SETTINGS | changed).items():
        *sections, name = key.split(".")
        section = data[sections[0]] if sections else data
        section[name] = value
    return config


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"file_path": "data"}, r"file_path is data.* -o .*data/asv'"),
        ({"file_path": "data/asv/test"}, "file_path is data/asv/test.*data/asv'"),
        ({"file_path": "data/none"}, "not an existing folder"),
        ({"test_meta_data": "data/none"}, "test_meta_data is .*data/none"),
        ({"dev_meta_data": "data/none"}, "dev_meta_data is .*data/none"),
        ({"test_meta_data": "data/asv/prepared.tsv"}, "line 1: expected '1 "),
        ({"vad_config.min_sec": 20_000}, "min_sec is 20000.*the longest has"),
        ({"vad_config.min_sec": 100}, f"min_sec must be {MIN_SAMPLES - 1}.* -o "),
        ({"max_timestep": "all"}, "max_timestep must be .* 'all'"),
        ({"max_timestep": 3000}, "max_timestep must be .* 3000"),
    ],
)
def test_what_s3prl_cannot_use_is_a_sentence_before_training(work, changed, match):
    check_corpus("sv_voxceleb1", recipe(work), "recipe.yaml", folder=work)
    with pytest.raises(ConfigError, match=match) as raised:
        check_corpus("sv_voxceleb1", recipe(work, **changed), "recipe.yaml", folder=work)
    assert str(raised.value).startswith("recipe.yaml: ") and "\n" not in str(raised.value)


def test_dev_is_no_split(work):
    """s3prl would score the trials of test."""
    check_splits("sv_voxceleb1", recipe(work), "recipe.yaml", "test")
    with pytest.raises(ConfigError, match="'dev'; use train or test"):
        check_splits("sv_voxceleb1", recipe(work), "recipe.yaml", "dev")


def test_a_corpus_without_recordings_for_training(voxceleb, work):
    root, _ = voxceleb
    shutil.rmtree(root / "dev/wav")
    config = recipe(work, file_path=str(root))
    with pytest.raises(ConfigError, match=r"0 folder\(s\) of speakers in dev/wav"):
        check_corpus("sv_voxceleb1", config, "recipe.yaml", folder=work)


# --- the metric


def s3prls_eer(labels: np.ndarray, scores: np.ndarray) -> float:
    compat.apply()
    from s3prl.downstream.sv_voxceleb1.utils import EER

    return 100 * float(EER(labels.astype(int), scores)[0])


def sample_of(rng: np.random.Generator, trials: int, step: float) -> EqualErrorRate:
    """Trials of five speakers; scores are multiples of ``step``, so some are equal."""
    same = rng.random(trials) < 0.4
    same[:2] = True, False
    scores = np.round((same + rng.standard_normal(trials)) / step) * step
    return EqualErrorRate(tuple("abcde"), rng.integers(0, 5, trials), same, scores, b"")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [1e-9, 0.1, 1.0])
def test_the_eer_is_s3prls(step):
    rng = np.random.default_rng(0)
    for trials in (2, 3, 10, 1000, 3000):
        sample = sample_of(rng, trials, step)
        assert sample.value == pytest.approx(s3prls_eer(sample.same, sample.scores), abs=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_a_speaker_drawn_twice_has_its_trials_twice():
    rng = np.random.default_rng(1)
    sample = sample_of(rng, 1200, 0.01)
    weights = rng.integers(0, 4, (20, 5)).astype(float)
    for row, value in zip(weights, sample.values(weights), strict=True):
        drawn = np.repeat(np.arange(1200), row[sample.speakers].astype(int))
        expected = s3prls_eer(sample.same[drawn], sample.scores[drawn])
        assert value == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "labels, scores, eer",
    [
        ("10", (1.0, 0.0), 0.0),
        ("10", (0.0, 1.0), 100.0),
        ("10", (0.5, 0.5), 50.0),
        ("1010", (4, 3, 2, 1), 50.0),
        ("11101000", (8, 7, 6, 5, 4, 3, 2, 1), 25.0),
        # the curve crosses at a third of the way from (0, 0.5) to (0.5, 1), of equal scores
        ("1100", (2, 1, 1, 0), 25.0),
    ],
)
def test_the_eer_by_hand(labels, scores, eer, tmp_path):
    names = [f"id{i % 2}-v-{i}_id9-v-{i}" for i in range(len(labels))]
    predict, truth = tmp_path / "test_predict.txt", tmp_path / "test_truth.txt"
    predict.write_text("".join(f"{n} {s}\n" for n, s in zip(names, scores, strict=True)))
    truth.write_text("".join(f"{n} {s}\n" for n, s in zip(names, labels, strict=True)))
    sample = read_scored_trials(predict, truth)
    assert sample.value == pytest.approx(eer) and sample.names == ("id0", "id1")


def test_a_resample_without_a_kind_of_trials_has_no_eer():
    kinds, scores = np.array([True, False, True]), np.array([3.0, 2.0, 1.0])
    sample = EqualErrorRate(("a", "b"), np.array([0, 0, 1]), kinds, scores, b"")
    values = sample.values(np.array([[0.0, 2.0], [1.0, 1.0]]))
    assert np.isnan(values).tolist() == [True, False]
    assert interval(values) == (values[1], values[1])
    assert share_better(values - 200, higher=False) == 1.0


def test_predictions_that_have_no_eer(tmp_path):
    predict, truth = tmp_path / "test_predict.txt", tmp_path / "test_truth.txt"
    for predicted, labels, part in (
        ("a 1\nb 2\n", "a 1\nb 1\n", "label 0"),
        ("a 1\nb nan\n", "a 1\nb 0\n", "not finite"),
        ("a 1\nb x\n", "a 1\nb 0\n", "'x'"),
        ("a 1\nb 2\nc 3\n", "a 1\nb 0\nc 2\n", "'2'"),
        ("a 1\nb 2\n", "a 1\n", "different"),
    ):
        predict.write_text(predicted)
        truth.write_text(labels)
        with pytest.raises(DataError, match=part):
            read_scored_trials(predict, truth)


def test_a_trial_that_is_listed_twice_counts_twice(tmp_path):
    predict, truth = tmp_path / "test_predict.txt", tmp_path / "test_truth.txt"
    predict.write_text("a 3\nb 2\nb 2\nc 1\n")
    truth.write_text("a 1\nb 0\nb 0\nc 1\n")
    assert len(read_scored_trials(predict, truth).scores) == 4


# --- runs


OVERRIDES = ",,".join(
    f"config.downstream_expert.datarc.{key}={value}" for key, value in SETTINGS.items()
)


def test_superb_tests_each_checkpoint(work, tmp_path):
    noise = tmp_path / "noise"
    write_audio(noise / "0.wav", np.random.default_rng(0).normal(0, 0.1, 20_000))
    argv = ["superb", "fbank_no_cmvn", "--tasks", "asv", "--recipes", "tiny", "-o", "out"]
    argv += ["--steps", "20", "--override", f"asv={OVERRIDES}", "--noise", noise, "--snr", "0"]
    command(*argv, cwd=work)
    command("report", "out", cwd=work)
    rows = list(csv.DictReader((work / "out/report/report.csv").open()))
    (folder,) = (work / "out/fbank_no_cmvn/asv").glob("lr*")
    record = json.loads((folder / "superb.json").read_text())
    printed = [float(v) for v in re.findall(r"test-EER: (\S+)", (folder / "log.txt").read_text())]
    checkpoints = sorted(folder.glob("states-*.ckpt"))
    assert len(printed) == len(checkpoints) + 1 >= 3  # of each, and with noise
    values = {row["condition"]: float(row["value"]) for row in rows if row["task"] == "asv"}
    best = record["dev"]["value"]
    assert best == pytest.approx(100 * min(printed[:-1]), abs=1e-6) and record["finished"]
    assert values["clean"] == pytest.approx(best, abs=1e-3)
    (noisy,) = (value for condition, value in values.items() if condition != "clean")
    assert noisy == pytest.approx(100 * printed[-1], abs=1e-3)

    chosen = folder / record["tested"]["clean"]
    trials = (work / "data/asv/trials.txt").read_text().split("\n")[:-1]
    truth = (chosen / "test_truth.txt").read_text().split("\n")[:-1]
    for trial, line in zip(trials, truth, strict=True):
        label, *names = trial.split()
        first, second = (name[: -len(".wav")].replace("/", "-") for name in names)
        assert line == f"{first}_{second} {label}"

    # killed while it wrote the last test of a checkpoint: that test is repeated, the others are not
    kept = {path.stem: (folder / path.stem / "test_truth.txt").stat() for path in checkpoints}
    damaged = folder / checkpoints[-1].stem / "test_truth.txt"
    damaged.write_text(damaged.read_text()[:40])
    (folder / "superb.json").write_text(json.dumps(record | {"dev": None, "finished": False}))
    command(*argv, cwd=work)
    again = json.loads((folder / "superb.json").read_text())
    assert again["dev"] == record["dev"] and again["finished"]
    assert {n for n in kept if (folder / n / "test_truth.txt").stat().st_mtime_ns
            != kept[n].st_mtime_ns} == {damaged.parent.name}  # fmt: skip

    assert MEMBERS["asv", None] == {"test_predict.txt": "sv_public/predict.txt"}
    command("predict-zip", "out", "-o", "p.zip", "--partial", cwd=work)
    with zipfile.ZipFile(work / "p.zip") as archive:
        (name,) = [name for name in archive.namelist() if "sv_public/predict.txt" in name]
        assert archive.read(name) == (chosen / "test_predict.txt").read_bytes()


@pytest.fixture
def run(work, monkeypatch):
    """Run ``run_downstream.py ARGUMENTS`` in this process, in the working folder."""
    monkeypatch.chdir(work)
    return functools.partial(run_downstream_here, monkeypatch)


def train_argv(name: str, upstream: list[str], *options: str, steps: int) -> list[str]:
    settings = f"{OVERRIDES},,config.runner.save_step=4,,config.runner.log_step=4"
    settings += f",,config.runner.total_steps={steps},,config.runner.max_keep=9"
    argv = ["-m", "train", *upstream, "-d", "sv_voxceleb1", "-c", TASK.tiny, "-p", name]
    return [*argv, *options, "-o", settings]


def test_an_interrupted_run_resumes_exactly(run):
    """In the middle of an epoch of three batches of random crops."""
    run(*train_argv("whole", ["-u", "fbank_no_cmvn"], steps=8))
    Path("part").mkdir()
    shutil.copy("whole/states-4.ckpt", "part")
    run("-m", "train", "-e", "part/states-4.ckpt", "-o", "args.expdir='part'")
    states = [read_checkpoint(Path(name, "states-8.ckpt")) for name in ("whole", "part")]
    for state in states:
        del state["Args"]
    assert not unequal(*(dict(flat_values(state)) for state in states))


def test_cached_features_give_the_same_scores(run, teachers):
    """In training, the crops have one length, so that there is no padding."""
    scores = []
    for name, options in (("plain", ()), ("cached", ("--cache-features", "cache"))):
        upstream = ["-u", "hubert_local", "-k", str(teachers["hubert"])]
        run(*train_argv(name, upstream, *options, steps=4))
        run("-m", "evaluate", "-t", "test", "-e", f"{name}/states-4.ckpt", *options)
        lines = Path(name, "test_predict.txt").read_text().splitlines()
        scores.append([float(line.split()[1]) for line in lines])
    assert len(scores[0]) == 18 and np.allclose(*scores, atol=2e-3)
    assert list(Path("cache").rglob("*")) and len(set(scores[0])) > 9
