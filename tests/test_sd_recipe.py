"""SD: mixtures and Kaldi folders against s3prl's reader, the DER against dscore and twins, runs."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import re
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch
import yaml

from s3prl_ekd import compat
from s3prl_ekd.data.rttm import read_rttm
from s3prl_ekd.downstream.metrics import diarization
from s3prl_ekd.downstream.metrics.diarization import MEDIANS, THRESHOLDS
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.downstream.tasks.corpus_check import check_corpus
from s3prl_ekd.errors import ConfigError, DataError, SetupError
from s3prl_ekd.files.run_checkpoints import read_checkpoint

from .conftest import command, run_downstream_here
from .corpora import PITCH, tone, write_libri2mix, write_manifest, write_noise
from .kill_and_resume import flat_values, unequal
from .preparing import check_message, fails, prepare

SD = TASKS["sd"]
COUNTS = {"train": 4, "dev": 2, "test": 2}
# Seconds of silence, speech, silence, speech, silence
PARTS = (0.2, 0.5, 0.4, 0.6, 0.1)


def write_speakers(folder: Path) -> Path:
    """Utterances of three speakers with a pitch each, in two parts."""
    rng, rows = np.random.default_rng(0), []
    for split, count in COUNTS.items():
        for speaker, hertz in PITCH.items():
            for number in range(count):
                longer = (0, 0, 0.1 * number, 0, 0)
                sizes = [round(16000 * sum(s)) for s in zip(PARTS, longer, strict=True)]
                wave = np.concatenate([tone(rng, hertz, size, noise=3e-4) for size in sizes])
                silent = np.repeat(np.arange(5) % 2 == 0, sizes)
                wave[silent] = rng.normal(0, 3e-4, silent.sum())
                rows.append((wave, (f"{split}-{speaker}-{number}.flac", split, speaker)))
    return write_manifest(folder / "sd.tsv", ("split", "speaker"), rows)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_speakers(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    """A working folder with mixtures in data/sd."""
    folder = tmp_path_factory.mktemp("work")
    command("init", folder / "work", cwd=folder)
    assert prepare("sd", corpus, "-o", folder / "work/data/sd") == 0
    return folder / "work"


def prepared(folder: Path) -> list[dict[str, str]]:
    with (folder / "prepared.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def dataset(folder: Path, mode: str, frame_shift: int = 160):
    compat.apply()
    from s3prl.downstream.diarization.dataset import DiarizationDataset

    options = {"chunk_size": 2000, "frame_shift": frame_shift, "num_speakers": 2}
    return DiarizationDataset(mode, str(folder), **options)


# --- folders


def test_mixtures_are_pairs_of_different_speakers(work, corpus):
    rows = prepared(work / "data/sd")
    assert {split: sum(r["split"] == split for r in rows) for split in COUNTS} == {
        "train": 6,
        "dev": 3,
        "test": 3,
    }
    used = [path for row in rows for path in row["paths"].split()]
    assert len(set(used)) == len(used) == sum(COUNTS.values()) * 3
    for row in rows:
        mixture, rate = soundfile.read(work / f"data/sd/wav/{row['id']}.flac")
        first, second = row["speakers"].split()
        assert first != second and rate == 16000
        waves = [soundfile.read(corpus.parent / path)[0] for path in row["paths"].split()]
        assert len(mixture) == int(row["samples"]) == max(map(len, waves))
        padded = np.stack([np.pad(w, (0, len(mixture) - len(w))) for w in waves], axis=1)
        gains, *_ = np.linalg.lstsq(padded, mixture, rcond=None)
        np.testing.assert_allclose(padded @ gains, mixture, atol=1e-4)
        for gain, wave in zip(gains, waves, strict=True):
            spoken = wave[round(0.25 * 16000) : round(0.65 * 16000)]
            level = 20 * np.log10(gain * np.sqrt(np.mean(spoken**2)))
            assert -33.5 < level < -24.5


def test_s3prl_labels_the_speech_of_each_speaker(work):
    for split in COUNTS:
        folder = work / f"data/sd/{split}"
        data = dataset(folder, split)
        rows = {row["id"]: row for row in prepared(work / "data/sd") if row["split"] == split}
        assert len(data) == len(rows)
        for i in range(len(data)):
            item = data[i]
            if split == "test":
                waves, labels, name = item[0], item[1], item[2]
                (wave,), (label,) = waves, labels
            else:
                (wave, label), name = item, data.chunk_indices[i][0]
            row = rows[name]
            assert len(wave) // 160 == len(label) == int(row["samples"]) // 160
            speakers = sorted(row["speakers"].split())
            for column, speaker in zip(label.T, speakers, strict=True):
                (path,) = (p for p in row["paths"].split() if f"-{speaker}-" in p)
                longer = 10 * int(path[-6])  # frames
                frames = np.flatnonzero(np.diff(column, prepend=0, append=0))
                truth = np.array([20, 70, 110 + longer, 170 + longer])
                assert len(frames) == 4 and np.abs(frames - truth).max() <= 2


def test_the_rttm_has_the_segments(work):
    turns = read_rttm(work / "data/sd/test/rttm")
    lines = (work / "data/sd/test/segments").read_text().splitlines()
    expected = {
        (r, float(b), round(float(e) - float(b), 3)) for _, r, b, e in map(str.split, lines)
    }
    assert expected == {(r, *t) for r, own in turns.items() for ts in own.values() for t in ts}
    assert all(len(own) == 2 for own in turns.values())


def test_another_seed_gives_other_pairs(corpus, work, tmp_path):
    assert prepare("sd", corpus, "-o", tmp_path / "same") == 0
    assert prepare("sd", corpus, "-o", tmp_path / "other", "--seed", "1") == 0
    first, same, other = (
        prepared(p) for p in (work / "data/sd", tmp_path / "same", tmp_path / "other")
    )
    assert first == same != other
    for row in first:
        files = (p / f"wav/{row['id']}.flac" for p in (work / "data/sd", tmp_path / "same"))
        assert len({path.read_bytes() for path in files}) == 1


def test_phones_tell_the_speech(corpus, tmp_path):
    """Pauses of 0.3 s or less are closed; the rest of the recording is no speech."""
    lines = corpus.read_text().splitlines()
    cells = "SIL:0+20 AA:20+10 SIL:30+20 B:50+20 SIL:70+40 AA:110+30"
    lines = [lines[0] + "\tsegments", *(f"{line}\t{cells}" for line in lines[1:])]
    manifest = tmp_path / "sd.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    options = ("--audio-root", corpus.parent, "-o", tmp_path / "out")
    assert prepare("sd", manifest, *options) == 0
    for speakers in read_rttm(tmp_path / "out/dev/rttm").values():
        assert list(speakers.values()) == 2 * [[(0.2, 0.5), (1.1, 0.3)]]


def test_long_utterances_are_cut_and_few_speakers_named(corpus, tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for split in COUNTS:
        for speaker, hertz in (("a", 200), ("b", 900)):
            wave = tone(rng, hertz, 21 * 16000)
            rows.append((wave, (f"{split}-{speaker}.flac", split, speaker)))
    long = write_manifest(tmp_path / "long/sd.tsv", ("split", "speaker"), rows)
    assert prepare("sd", long, "-o", tmp_path / "out") == 0
    assert {row["samples"] for row in prepared(tmp_path / "out")} == {str(20 * 16000)}
    text = corpus.read_text()
    one = corpus.with_name("one.tsv")
    one.write_text(re.sub(r"\tdev\t\w+", "\tdev\tx", text))
    assert "dev" in fails(capsys, "sd", one, "-o", tmp_path / "x")
    one.write_text(text.replace("\tdev\tlow", "\tdev\ttwo words"))
    check_message(fails(capsys, "sd", one, "-o", tmp_path / "x"), 14, "two words")
    assert not (tmp_path / "x").exists()


def test_libri2mix(tmp_path, capsys):
    write_libri2mix(tmp_path / "Libri2Mix", tmp_path / "rttm")
    argv = ("libri2mix", tmp_path / "Libri2Mix", tmp_path / "rttm", "-o", tmp_path / "out")
    assert prepare(*argv) == 0
    assert re.search(r"train: 4 .*dev: 2 .*test: 2 ", capsys.readouterr().out, re.DOTALL)
    name = "7-70-0001_8-80-0001"
    lines = (tmp_path / "out/train/segments").read_text().splitlines()
    times = ("7_000 NAME 0.1 0.5", "8_001 NAME 0.2 0.4", "8_002 NAME 0.5 0.75")
    assert lines[:3] == [f"{name}_{text.replace('NAME', name)}" for text in times]
    data = dataset(tmp_path / "out/train", "train")
    wave, labels = data[0]
    assert len(data) == 4 and len(wave) == 14400 and labels.shape == (90, 2)
    first, second = (set(np.flatnonzero(column)) for column in labels.T)
    assert first == set(range(10, 50)) and second == {*range(20, 40), *range(50, 75)}


MIXTURES = "Libri2Mix/wav16k/max/metadata/mixture_dev_mix_both.csv"


@pytest.mark.parametrize(
    "file, old, new, part",
    [
        (MIXTURES, "7-70-0001_", "7-71-0001_", "71-0001"),
        (MIXTURES, ",14400", ",16800", "1.050"),
        (MIXTURES, "length", "frames", "length"),
        ("rttm/test_clean.rttm", "0.400", "-0.4", "test_clean.rttm"),
    ],
)  # fmt: skip
def test_a_libri2mix_that_does_not_fit(file, old, new, part, tmp_path, capsys):
    write_libri2mix(tmp_path / "Libri2Mix", tmp_path / "rttm")
    path = tmp_path / file
    path.write_text(path.read_text().replace(old, new, 1))
    argv = ("libri2mix", tmp_path / "Libri2Mix", tmp_path / "rttm", "-o", tmp_path / "out")
    assert part in fails(capsys, *argv) and not (tmp_path / "out").exists()
    check_message(fails(capsys, "libri2mix", tmp_path, *argv[2:]), "wav16k/max")


# --- checks before a run


def recipe(work: Path, **changes) -> dict:
    config = yaml.safe_load((work / SD.tiny).read_text())
    for section in ("datarc", "loaderrc"):
        own = config["downstream_expert"][section]
        own.update({key: value for key, value in changes.items() if key in own})
    return config


def check(work: Path, split: str | None = None, **changes) -> None:
    check_corpus("diarization", recipe(work, **changes), "recipe.yaml", split, folder=work)


def problem(work: Path, split: str | None = None, **changes) -> str:
    with pytest.raises(ConfigError) as raised:
        check(work, split, **changes)
    message = str(raised.value)
    assert message.startswith("recipe.yaml: ") and "\n" not in message
    return message


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text, count=1))


@pytest.mark.parametrize(
    "file, old, new, part",
    [
        ("wav.scp", r"mix(\d+) (.*)", r"mix\1 touch hacked; cat \2 |", "commands are not executed"),
        ("wav.scp", r" .*/mix(\d+)", r" /nowhere/mix\1", "does not exist"),
        ("wav.scp", r" .*flac", " -", "wav.scp: line 1"),
        ("wav.scp", r"^mix(\d+) ", r"../mix\1 ", "../mix"),
        ("wav.scp", r"\n", "\n\n", "wav.scp: line 2"),
        ("wav.scp", r"(?s).*", "", "wav.scp is empty"),
        ("reco2dur", r"mix\d+ .*\n", "", "not in reco2dur"),
        ("reco2dur", r" .*", " 0.01", "0.01"),
        ("reco2dur", r" .*", " 9.0", "9.000"),
        ("reco2dur", r" .*", " nan", "nan"),
        ("segments", r" mix\d+ ", " other ", "other"),
        ("segments", r" [\d.]+ [\d.]+\n", " 2.0 1.0\n", "2.0 to 1.0"),
        ("segments", r" [\d.]+\n", "\n", "segments: line 1"),
        ("utt2spk", r".*\n", "", "not in utt2spk"),
        ("utt2spk", r" \w+\n", " third\n", "3 speakers"),
        ("rttm", r"SPEAKER mix\d+ ", "SPEAKER other ", "rttm"),
        ("rttm", r" [\d.]+ <NA>", " 0 <NA>", "rttm: line 1"),
    ],
)  # fmt: skip
def test_a_folder_that_s3prl_would_fail_on_is_a_sentence(file, old, new, part, work, tmp_path):
    folder = tmp_path / "test"
    shutil.copytree(work / "data/sd/test", folder)
    check(work, test_dir=str(folder))
    replace_in(folder / file, old, new)
    for split in (None, "test"):  # before a training, too
        message = problem(work, split, test_dir=str(folder))
        assert part in message and "test_dir" in message
    check(work, "dev", test_dir=str(folder))
    assert not (work / "hacked").exists() and not Path("hacked").exists()


@pytest.mark.parametrize("file", ["wav.scp", "segments", "utt2spk", "reco2dur", "rttm"])
def test_a_missing_file_is_named(file, work, tmp_path):
    shutil.copytree(work / "data/sd/test", tmp_path / "test")
    (tmp_path / "test" / file).unlink()
    assert f"test/{file}" in problem(work, test_dir=str(tmp_path / "test"))


def test_settings_that_do_not_fit(work, tmp_path):
    assert "num_speakers" in problem(work, num_speakers="two")
    assert "1 to 1" in problem(work, num_speakers=1)
    assert "rate" in problem(work, rate=8000)
    assert "dev_dir" in problem(work, dev_dir="data/none")
    shutil.copytree(work / "data/sd/test", tmp_path / "test")
    first = (tmp_path / "test/wav.scp").read_text().split()[1]
    write_noise(tmp_path / "8k.wav", 15000, rate=8000)
    replace_in(tmp_path / "test/wav.scp", re.escape(first), str(tmp_path / "8k.wav"))
    check_message(problem(work, test_dir=str(tmp_path / "test")), 16000, 8000)


def test_chunks_that_s3prl_cannot_use(work):
    """A last chunk below the upstreams' window, and a segment that spans a chunk."""
    check(work, chunk_size=180, frame_shift=160)
    assert "last chunk" in problem(work, chunk_size=178, frame_shift=160)
    message = problem(work, chunk_size=10, frame_shift=160)
    assert "leaves out" in message and "chunk_size" in message
    name = (work / "data/sd/train/wav.scp").read_text().split()[0]
    assert name in message


def test_relative_paths_start_at_the_working_folder(work, tmp_path):
    shutil.copytree(work / "data/sd/test", tmp_path / "test")
    scp = tmp_path / "test/wav.scp"
    scp.write_text(scp.read_text().replace(f"{work.resolve()}/", ""))
    assert " data/sd/wav/" in scp.read_text()
    check(work, "test", test_dir=str(tmp_path / "test"))


# --- the metric


def random_test(seed: int, frame_shift: int) -> tuple[dict, dict]:
    """Turns of seven recordings in seconds, with overlaps, and probabilities with noise."""
    rng = np.random.default_rng(seed)
    turns, probabilities = {}, {}
    for number in range(7):
        frames = int(rng.integers(200, 600))
        truth, own = np.zeros((frames, 2)), {}
        for speaker in range(2):
            time, end = float(rng.uniform(0, 1)), frames * frame_shift / 16000
            own[f"s{speaker}"] = []
            while time < end - 0.3:
                length = float(rng.uniform(0.1, end - time))
                own[f"s{speaker}"].append((round(time, 3), round(length, 3)))
                begin, stop = (int(t * 16000 / frame_shift) for t in (time, time + length))
                truth[begin:stop, speaker] = 1
                time += length + float(rng.uniform(-0.05, 1))
        noisy = 3 * truth - 1.5 + rng.normal(0, 0.8, truth.shape)
        if number == 3:
            noisy[:] = -9  # nobody speaks
        values = (1 / (1 + np.exp(-noisy))).astype(np.float32)
        turns[f"r{number}"] = {name: ts for name, ts in own.items() if ts}
        probabilities[f"r{number}"] = values[:, :: -1 if number % 2 else 1]
    return turns, probabilities


def write_test(folder: Path, turns: dict, probabilities: dict, frame_shift: int) -> None:
    """The files of a test, as s3prl and `superb` leave them."""
    (folder / "scoring/predictions").mkdir(parents=True)
    for name, values in probabilities.items():
        with h5py.File(folder / f"scoring/predictions/{name}.h5", "w") as file:
            file.create_dataset("T_hat", data=values)
    (folder / "frame_shift").write_text(f"{frame_shift}\n")
    lines = [
        f"SPEAKER {name} 1 {begin} {length} <NA> <NA> {speaker} <NA>\n"
        for name, own in turns.items()
        for speaker, those in own.items()
        for begin, length in those
    ]
    (folder / "reference.rttm").write_text("".join(lines))


def rate_at(turns, probabilities, frame_shift, threshold, median) -> float:
    times = diarization.frame_times(max(map(len, probabilities.values())), frame_shift)
    counts = [
        diarization.count_errors(
            diarization.reference_turns(own),
            diarization.speaker_turns(probabilities[name], times, threshold, median),
        )
        for name, own in turns.items()
    ]
    errors, lengths = map(sum, zip(*counts, strict=True))
    return 100 * errors / lengths


def slow_rate(turns, probabilities, frame_shift, threshold, median) -> float:
    """The DER from scratch: 1 ms at a time, both mappings of two speakers."""
    from scipy.signal import medfilt

    total = missed = 0
    for name, own in turns.items():
        active = np.where(probabilities[name] > threshold, 1, 0)
        active = medfilt(active, (median, 1)) if median > 1 else active
        size = 1000 * 60
        ref, sys = np.zeros((2, size), bool), np.zeros((2, size), bool)
        for row, those in zip(ref, own.values(), strict=False):
            for begin, length in those:
                start = round(1000 * begin)
                row[start : start + round(1000 * length)] = True
        for row, frames in zip(sys, active.T, strict=True):
            start = None
            for i, value in enumerate([*frames, 0]):
                if value and start is None:
                    start = i
                elif not value and start is not None:
                    begin, length = (round(x * frame_shift / 16000, 2) for x in (start, i - start))
                    row[round(1000 * begin) : round(1000 * begin) + round(1000 * length)] = True
                    start = None
        errors = [
            np.sum(np.maximum(ref.sum(0), sys.sum(0)) - (ref & sys[list(order)]).sum(0))
            for order in ((0, 1), (1, 0))
        ]
        missed, total = missed + min(errors), total + ref.sum()
    return 100 * missed / total


# What dscore printed for random_test(0, 320) and random_test(1, 256): thresholds in columns
DSCORE = {
    (0, 320): [
        [18.7142, 17.3986, 18.1233, 21.6821, 32.3443],
        [16.7147, 15.8023, 15.5082, 15.7264, 17.5248],
    ],
    (1, 256): [
        [26.6213, 23.5873, 23.2960, 27.1922, 36.5725],
        [21.5611, 20.3879, 20.1911, 20.4037, 22.1700],
    ],
}


@pytest.mark.parametrize("seed, shift", DSCORE)
def test_the_rate_is_that_of_dscore(seed, shift):
    turns, probabilities = random_test(seed, shift)
    rates = [
        [rate_at(turns, probabilities, shift, t, median) for t in THRESHOLDS] for median in MEDIANS
    ]
    np.testing.assert_allclose(rates, DSCORE[seed, shift], atol=6e-5)
    best = diarization.diarisation_errors(turns, probabilities, shift)
    assert best.value == np.min(rates) and best.names == tuple(sorted(turns))
    moved = {name: {s: [(b + 0.5, n) for b, n in own] for s, own in speakers.items()}
             for name, speakers in turns.items()}  # fmt: skip
    other = diarization.diarisation_errors(moved, probabilities, shift)
    assert (other.lengths == best.lengths).all() and other.reference != best.reference


@pytest.mark.parametrize("seed, shift", [(2, 160), (3, 320), (4, 320)])
def test_the_rate_is_that_of_a_slow_twin(seed, shift):
    turns, probabilities = random_test(seed, shift)
    for median, threshold in itertools.product(MEDIANS, THRESHOLDS):
        expected = slow_rate(turns, probabilities, shift, threshold, median)
        assert rate_at(turns, probabilities, shift, threshold, median) == pytest.approx(expected)


@pytest.mark.parametrize("median", MEDIANS)
def test_turns_are_those_of_make_rttm(median, tmp_path, monkeypatch):
    """s3prl's own script; with 256 samples a frame its rounding to 10 ms matters."""
    import s3prl.downstream.diarization

    turns, probabilities = random_test(5, 256)
    write_test(tmp_path, turns, probabilities, 256)
    paths = sorted((tmp_path / "scoring/predictions").iterdir())
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in paths))
    options = ["--threshold=0.4", f"--median={median}", "--frame_shift=256"]
    argv = ["make_rttm.py", *options, str(tmp_path / "list"), str(tmp_path / "system.rttm")]
    monkeypatch.setattr(sys, "argv", argv)
    script = Path(s3prl.downstream.diarization.__file__).with_name("make_rttm.py")
    runpy.run_path(str(script), run_name="__main__")
    written = read_rttm(tmp_path / "system.rttm")
    assert len(written) == 6  # nobody speaks in the seventh
    times = diarization.frame_times(600, 256)
    for name, own in written.items():
        ours = diarization.speaker_turns(probabilities[name], times, 0.4, median)
        for speaker, expected in zip(
            sorted(own), diarization.reference_turns(dict(sorted(own.items()))), strict=True
        ):
            np.testing.assert_array_equal(ours[int(speaker[-1])], expected)


def test_the_rate_of_frames_is_that_of_s3prl():
    """s3prl's own count in frames, where turns begin and end with frames."""
    compat.apply()
    from s3prl.downstream.diarization.utils import calc_diarization_error

    rng = np.random.default_rng(6)
    label = rng.random((20, 2)).repeat(10, 0) > 0.5
    predicted = (rng.random((20, 2)).repeat(10, 0) > 0.5) ^ (rng.random((200, 2)) > 0.9)
    turns = diarization.speaker_turns(label.astype(float), diarization.frame_times(200, 160), 0.5)
    seconds = {
        str(i): [(b / 1000, (e - b) / 1000) for b, e in own.tolist()] for i, own in enumerate(turns)
    }
    rates = []
    for order in ([0, 1], [1, 0]):
        tensors = (torch.tensor(x[None]).float() for x in (2 * predicted - 1.0, label[:, order]))
        counts = calc_diarization_error(*tensors, torch.tensor([200]))
        rates.append(100 * sum(counts[-3:]) / counts[-4])
    ours = rate_at({"r": seconds}, {"r": predicted.astype(float)}, 160, 0.5, 1)
    assert ours == pytest.approx(min(rates))


def test_by_hand():
    """One of 4 s for 3 s, with 1 s of overlap missed and the speakers swapped."""
    reference = [np.array([[0, 2000]]), np.array([[1000, 3000]])]
    system = [np.array([[2000, 4000]]), np.array([[0, 2000]])]
    # missed 1 s of the second speaker, a false alarm of 1 s after the end
    assert diarization.count_errors(reference, system) == (2000, 4000)
    nothing = [np.empty((0, 2), np.int64)] * 2
    assert diarization.count_errors(reference, nothing) == (4000, 4000)
    assert diarization.count_errors(reference, reference[::-1]) == (0, 4000)


@pytest.mark.parametrize(
    "break_it, part",
    [
        (lambda d: (d / "frame_shift").write_text("x"), "frame_shift"),
        (lambda d: (d / "frame_shift").unlink(), "frame_shift"),
        (lambda d: (d / "scoring/predictions/r1.h5").unlink(), "r1"),
        (lambda d: (d / "scoring/predictions/old.h5").write_text("x"), "old"),
        (lambda d: (d / "scoring/predictions/r1.h5").write_text("x"), "r1.h5"),
        (lambda d: h5py.File(d / "scoring/predictions/r1.h5", "w").close(), "r1.h5"),
        (lambda d: (d / "reference.rttm").write_text("SPEAKER r0 1 x 2\n"), "line 1"),
        (lambda d: (d / "reference.rttm").write_text("\n"), "no speaker turns"),
    ],
)
def test_predictions_that_cannot_be_used(break_it, part, tmp_path):
    turns, probabilities = random_test(0, 320)
    write_test(tmp_path, turns, probabilities, 320)
    (sample,) = SD.measure(tmp_path, None)
    assert sample.value == diarization.diarisation_errors(turns, probabilities, 320).value
    break_it(tmp_path)
    with pytest.raises(DataError, match=re.escape(part)):
        SD.measure(tmp_path, None)


def test_without_h5py_the_command_is_named(work, tmp_path, monkeypatch):
    turns, probabilities = random_test(0, 320)
    write_test(tmp_path, turns, probabilities, 320)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SetupError, match="pip install h5py"):
        SD.measure(tmp_path, None)


# --- runs


@pytest.fixture
def downstream(work, monkeypatch, capfd):
    """Run ``run_downstream.py ARGUMENTS`` in this process; return its output."""
    monkeypatch.chdir(work)

    def run(*argv: str) -> str:
        capfd.readouterr()
        run_downstream_here(monkeypatch, *argv)
        output = capfd.readouterr()
        return output.out + output.err

    return run


def train(name: str, *options: str, **changes: object) -> tuple[str, ...]:
    keys = {f"runner.{k}_step": 2 for k in ("log", "eval", "save")}
    keys |= {"runner.total_steps": 6, "runner.max_keep": 9, "runner.gradient_accumulate_steps": 2}
    keys |= {f"downstream_expert.loaderrc.{k}": v for k, v in changes.items()}
    override = ",,".join(f"config.{key}={value}" for key, value in keys.items())
    argv = ("-m", "train", "-u", "fbank_no_cmvn", "-d", "diarization", "-c", SD.tiny, "-p", name)
    return (*argv, "-o", override, *options)


def predictions(folder: Path) -> dict[str, np.ndarray]:
    paths = (folder / "scoring/predictions").glob("*.h5")
    return {path.stem: diarization.read_probabilities(path) for path in paths}


def test_an_interrupted_run_resumes_exactly(downstream, work, caplog):
    """After four batches, in the second epoch of three; an update has two batches."""
    downstream(*train("full", train_batchsize=2))
    (work / "resumed").mkdir()
    shutil.copy(work / "full/states-2.ckpt", work / "resumed")
    caplog.set_level(logging.INFO)
    downstream("-m", "train", "-e", "resumed/states-2.ckpt", "-o", "args.expdir='resumed'")
    assert "resuming after batch 1 of the epoch" in caplog.text
    for name in ("states-6.ckpt", "best-states-dev.ckpt"):
        full, resumed = (read_checkpoint(work / run / name) for run in ("full", "resumed"))
        for part in ("Featurizer", "Downstream"):
            for key, value in full[part].items():
                assert torch.equal(resumed[part][key], value), (name, key)
        states = (dict(flat_values(run["Optimizer"]["state"])) for run in (full, resumed))
        assert not unequal(*states)


def test_cached_noisy_and_plain_predictions(downstream, work):
    """Utterance by utterance, cached features give s3prl's own predictions; noise changes them."""
    cached = ("--cache-features", "features")
    downstream(*train("plain", train_batchsize=1))
    downstream(*train("cached", *cached, train_batchsize=1))
    one, two = (read_checkpoint(work / n / "states-6.ckpt") for n in ("plain", "cached"))
    for key, value in one["Downstream"].items():
        torch.testing.assert_close(two["Downstream"][key], value, rtol=0.02, atol=0.02)
    test = ("-m", "evaluate", "-t", "test", "-e")
    output = downstream(*test, "plain/best-states-dev.ckpt")
    expected = predictions(work / "plain")
    assert len(expected) == 3 and (work / "plain/frame_shift").read_text() == "160\n"
    # s3prl prints the mean over recordings of the DER of frames
    (printed,) = re.findall(r"mode test acc \S+ der (\S+)", output)
    SD.write_reference(recipe(work), "test", work / "plain")
    turns = read_rttm(work / "plain/reference.rttm")
    rates = [rate_at({n: turns[n]}, {n: expected[n]}, 160, 0.5, 1) for n in expected]
    assert np.mean(rates) == pytest.approx(100 * float(printed), abs=0.5)
    shutil.copytree(work / "plain", work / "again")
    shutil.rmtree(work / "again/scoring")
    move = ("-o", "args.expdir='again'")
    downstream(*test, "plain/best-states-dev.ckpt", *cached, *move)
    for name, values in predictions(work / "again").items():
        np.testing.assert_allclose(values, expected[name], atol=0.01)
    for number in range(2):
        write_noise(work / f"noise/{number}.wav", 20000 + number)
    downstream(*test, "plain/best-states-dev.ckpt", "--noise", "noise", "--snr", "0")
    noisy = predictions(work / "plain/noisy/noise_snr0")
    assert noisy.keys() == expected.keys()
    assert all(np.abs(noisy[name] - expected[name]).max() > 1e-3 for name in noisy)
    assert all(np.array_equal(expected[n], v) for n, v in predictions(work / "plain").items())


def test_a_split_that_is_not_there(work, monkeypatch):
    with pytest.raises(ConfigError, match="train or dev or test"):
        from s3prl_ekd.compat.no_eval import check_splits

        check_splits("diarization", recipe(work), "recipe.yaml", "other")


def test_superb_trains_tests_reports_and_packs(work):
    argv = ["superb", "fbank_no_cmvn", "--tasks", "sd", "--recipes", "tiny", "-o", "out"]
    command(*argv, "--steps", "30", "--lr", "0.02", cwd=work)
    command("report", "out", cwd=work)
    (row,) = csv.DictReader((work / "out/report/report.csv").open())
    (folder,) = (work / "out/fbank_no_cmvn/sd").iterdir()
    record = json.loads((folder / "superb.json").read_text())
    best = read_checkpoint(folder / "best-states-dev.ckpt")["Downstream"]["best_score"]
    assert record["dev"]["value"] == pytest.approx(100 * float(best)) and record["finished"]
    turns = read_rttm(work / "data/sd/test/rttm")
    rates = [
        slow_rate(turns, predictions(folder), 160, threshold, median)
        for median, threshold in itertools.product(MEDIANS, THRESHOLDS)
    ]
    assert row["metric"] == "der" and float(row["value"]) == pytest.approx(min(rates), abs=1e-3)
    assert float(row["value"]) < 60
    shutil.rmtree(folder / "scoring/predictions")  # tested again
    (folder / "scoring/predictions").mkdir()
    command(*argv, "--steps", "30", "--lr", "0.02", cwd=work)
    assert len(predictions(folder)) == 3
    shutil.rmtree(folder / "scoring/predictions")
    command(*argv, "--steps", "30", "--lr", "0.02", cwd=work)
    command("predict-zip", "out", "-o", "p.zip", "--partial", cwd=work)
    with zipfile.ZipFile(work / "p.zip") as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        top = "predict/sd_public"
        assert names == {f"{top}/frame_shift"} | {
            f"{top}/scoring/predictions/{name}.h5" for name in turns
        }
        assert archive.read(f"{top}/frame_shift") == b"160\n"
