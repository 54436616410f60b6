"""Audio files that are no good: what each gives with ``on_bad_audio: error`` and with ``skip``."""

import logging
import os
import shutil
import signal
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torchaudio.functional import resample

from s3prl_ekd.data import audio as audio_module
from s3prl_ekd.data.audio import Recording, read_audio
from s3prl_ekd.data.bad_audio import Bad
from s3prl_ekd.data.batches import DistillationDataset, train_loader
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.sampling import EpochOrder
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.config import build
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain.bad_audio import BadAudioList, as_tensor
from s3prl_ekd.workspace import write_workspace

from .conftest import data_settings, make_sound, write_configs
from .kill_and_resume import outcome, unequal

# Every one is 1 s long by its table; the run takes excerpts of 0.5 s, and each meets what is wrong.
BAD = {
    "missing.flac": "there is no such file",
    "no/folder.flac": "there is no such file",
    "text.flac/below.flac": "there is no such file",
    f"{'n' * 300}.flac": "it cannot be opened (File name too long)",
    "folder.flac": "it is not a file",
    "loop.flac": "it cannot be opened (Too many levels of symbolic links)",
    "empty.flac": "it is empty (0 bytes)",
    "header.wav": "it holds no samples",
    "text.flac": "it is not audio that can be read (Format not recognised)",
    "cut.flac": "it is cut off or damaged: the last of its 16000 samples is not there",
    "cut.wav": "it is cut off: its last 16000 bytes are missing",
    "damaged.flac": "it is cut off or damaged (Error : flac decoder lost sync)",
    "piped.flac": "it does not say how long it is (written to a pipe?); convert it to FLAC again",
    "nan.wav": "it has samples that are NaN or infinite",
    "infinite.wav": "it has samples that are NaN or infinite",
    "silent.flac": "it is digital silence from begin to end",
    "short.wav": "399 samples at 16000 Hz are too few for one frame (400)",
    "rate.wav": "15999 Hz cannot be resampled well to 16000 Hz",
}
OUT_OF_RANGE = {
    "loud.wav": "it has samples of 1e+30, and full scale is 1: scale it to -1 to 1",
    "unscaled.wav": "it has samples of 3.28e+03, and full scale is 1: scale it to -1 to 1",
    "constant.flac": "it has no sound: every sample is 0.25",
    "constant8.flac": "it has no sound: every sample is 0.25",
}
# name -> its samples at 16 kHz
USED = {
    "stereo.wav": 16000,
    "r8000.wav": 16000,
    "r44100.flac": 16000,
    "r48000.opus": 16000,
    "hour.wav": 57_600_000,
    "half.wav": 8000,
    "pause.flac": 16000,
    "frame.wav": 400,
    "hot.wav": 16000,
    "offset.flac": 16000,
}


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """A folder with all of them, and 12 files that are as they should be."""
    root = tmp_path_factory.mktemp("bad") / "audio"
    root.mkdir()
    sound = make_sound(1.0)
    for i in range(12):
        soundfile.write(root / f"u{i}.flac", make_sound(1.0, seed=i + 1), 16000)
    _write_bad(root, sound)
    soundfile.write(root / "stereo.wav", make_sound(1.0, channels=2), 16000)
    soundfile.write(root / "r8000.wav", make_sound(1.0, rate=8000), 8000)
    soundfile.write(root / "r44100.flac", make_sound(1.0, rate=44100), 44100)
    wave = make_sound(1.0, rate=48000)
    soundfile.write(root / "r48000.opus", wave, 48000, format="OGG", subtype="OPUS")
    hour = np.tile((sound * 2**15).astype(np.int16), 60)
    with soundfile.SoundFile(root / "hour.wav", "w", 16000, 1, "PCM_U8") as file:
        for _ in range(60):
            file.write(hour)
    soundfile.write(root / "half.wav", sound[:8000], 16000)
    soundfile.write(root / "pause.flac", np.concatenate([np.zeros(15000), sound[:1000]]), 16000)
    soundfile.write(root / "frame.wav", sound[:400], 16000)
    hot = 4 * sound / abs(sound).max()  # clips in every format but float
    soundfile.write(root / "hot.wav", hot, 16000, subtype="FLOAT")
    soundfile.write(root / "offset.flac", 0.5 + 1e-4 * np.sign(sound), 16000)
    return root


def _write_bad(root, sound):
    (root / "folder.flac").mkdir()
    (root / "loop.flac").symlink_to("loop.flac")
    (root / "empty.flac").write_bytes(b"")
    soundfile.write(root / "header.wav", np.zeros(0, np.float32), 16000)
    (root / "text.flac").write_text("not audio")
    soundfile.write(root / "silent.flac", np.zeros(16000, np.float32), 16000)
    soundfile.write(root / "constant.flac", np.full(16000, 0.25, np.float32), 16000)
    soundfile.write(root / "constant8.flac", np.full(8000, 0.25, np.float32), 8000)
    soundfile.write(root / "loud.wav", np.sign(sound) * 1e30, 16000, subtype="FLOAT")
    soundfile.write(root / "unscaled.wav", np.sign(sound) * 3277, 16000, subtype="FLOAT")
    soundfile.write(root / "short.wav", sound[:399], 16000)
    soundfile.write(root / "rate.wav", sound, 15999)
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        spoiled = sound.copy()
        spoiled[::1000] = value
        soundfile.write(root / f"{name}.wav", spoiled, 16000, subtype="FLOAT")
    soundfile.write(root / "cut.wav", sound, 16000)
    os.truncate(root / "cut.wav", 44 + 16000)
    data = (root / "u0.flac").read_bytes()
    (root / "cut.flac").write_bytes(data[: len(data) * 3 // 10])
    middle = len(data) // 2
    spoiled = bytes(byte ^ 0xFF for byte in data[middle - 500 : middle + 500])
    (root / "damaged.flac").write_bytes(data[: middle - 500] + spoiled + data[middle + 500 :])
    # STREAMINFO: 36 bits of the 8 bytes from 18 on are the number of samples; 0 is "not known".
    (known,) = struct.unpack(">Q", data[18:26])
    assert known & (2**36 - 1) == 16000
    unknown = struct.pack(">Q", known & ~(2**36 - 1))
    (root / "piped.flac").write_bytes(data[:18] + unknown + data[26:])


def dataset_of(root, rows, batch_size, length=8000, skip=True, **options):
    how = "skip" if skip else "error"
    settings = data_settings(root, batch_size, sequence_length=length, on_bad_audio=how)
    return DistillationDataset(settings, rows, 400, **options)


def data(audio, *names, skip=True, **options):
    rows = [Utterance(name, 16000) for name in names]
    return dataset_of(audio, rows, 3, skip=skip, **options)


@pytest.mark.parametrize("name", [*BAD, *OUT_OF_RANGE])
def test_a_bad_file(audio, name):
    sentence = (BAD | OUT_OF_RANGE)[name]
    batch = data(audio, name, "u1.flac", skip=False)[0]
    assert batch.problem.startswith(f"cannot use the audio file {audio / name}: {sentence}; ")
    assert batch.problem.endswith(
        "leave such files out: -o \"config.pretrain_expert.datarc.on_bad_audio='skip'\""
    )
    assert "\n" not in batch.problem and batch.waves.numel() == 0
    batch = data(audio, "u0.flac", name, "u1.flac")[0]
    ((path, _, reason),) = batch.bad
    assert (path, reason) == (name, sentence) and batch.problem == ""
    good = data(audio, "u0.flac", "u1.flac", skip=False)[0]
    assert batch.names == good.names == ["u0.flac", "u1.flac"]
    assert torch.equal(batch.waves, good.waves) and torch.equal(batch.lengths, good.lengths)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(audio, tmp_path):
    shutil.copy(audio / "u0.flac", tmp_path / "a.flac")
    (tmp_path / "a.flac").chmod(0)
    ((_, _, reason),) = data(tmp_path, "a.flac")[0].bad
    assert "Permission denied" in reason or "System error" in reason


def test_nothing_is_left_of_a_batch(audio):
    batch = data(audio, "nan.wav", "text.flac", "missing.flac")[0]
    assert batch.names == [] and batch.problem == "" and len(batch.bad) == 3
    assert len({bad.kind for bad in batch.bad}) == 3


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", USED)
def test_a_file_that_can_be_used(audio, name, skip):
    batch = data(audio, name, skip=skip)[0]
    assert batch.problem == "" and list(batch.bad) == [] and batch.names == [name]
    assert batch.lengths.tolist() == [min(8000, USED[name])]
    with Recording(audio / name) as recording:
        assert recording.samples == USED[name]


@pytest.mark.parametrize("length", [8000, 0])
def test_a_header_that_announces_a_thousand_hours(audio, tmp_path, length):
    flac = (audio / "u0.flac").read_bytes()
    (known,) = struct.unpack(">Q", flac[18:26])
    lies = struct.pack(">Q", known | (2**36 - 1))
    (tmp_path / "lies.flac").write_bytes(flac[:18] + lies + flac[26:])
    rows = [Utterance("lies.flac", 16000)]
    ((_, _, reason),) = dataset_of(tmp_path, rows, 1, length)[0].bad
    assert reason.startswith("it is cut off")


def test_babble_is_of_good_files(audio):
    weights = {"clean": 0, "gaussian": 0}
    chosen = {"setup": "same", "babble": True, "additive_weights": weights}
    settings = build(DistortionSettings, chosen, "distortion")
    good = data(audio, "u0.flac", "u1.flac", "u2.flac", distortion=settings)[0]
    names = ("u0.flac", "text.flac", "nan.wav", "u1.flac", "missing.flac", "u2.flac")
    rows = [Utterance(name, 16000) for name in names]
    dataset = dataset_of(audio, rows, 6, distortion=settings)
    for epoch in range(4):
        batch = dataset[(epoch, 0)]
        assert batch.problem == "" and batch.names == good.names and len(batch.bad) == 3
        assert batch.waves.isfinite().all()
    dataset = dataset_of(audio, rows[3:], 1, skip=False, distortion=settings)
    problems = {dataset[(epoch, 0)].problem for epoch in range(8)}
    assert any("missing.flac: there is no such file" in each for each in problems)


def test_a_silent_excerpt_is_a_pause(audio):
    excerpts = [data(audio, "pause.flac")[(epoch, 0)] for epoch in range(8)]
    assert all(batch.names for batch in excerpts)
    assert any(not batch.waves.any() for batch in excerpts)


@pytest.mark.parametrize("name", ["hour.wav", "r44100.flac", "u0.flac", "r48000.opus"])
def test_no_more_than_the_excerpt_is_decoded(audio, name, monkeypatch):
    read, decoded = soundfile.SoundFile.read, []

    def counted(self, *args, **kwargs):
        decoded.append(len(block := read(self, *args, **kwargs)))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    batch = data(audio, name)[0]
    assert batch.lengths.tolist() == [8000]
    rate = soundfile.info(audio / name).samplerate
    assert 8000 * rate / 16000 <= sum(decoded) <= 8000 * rate / 16000 + 20 * 441


@pytest.mark.parametrize("rate", [16000, 8000, 11025, 44100, 48000, 96000])
@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "opus", "mp3"])
def test_an_excerpt_is_a_part_of_the_whole(tmp_path, form, rate):
    sound = make_sound(3.0, rate=rate, channels=2)
    path = tmp_path / f"a.{form}"
    try:
        if form == "opus":
            soundfile.write(path, sound, rate, format="OGG", subtype="OPUS")
        else:
            soundfile.write(path, sound, rate)
    except soundfile.LibsndfileError:
        pytest.skip(f"no {form} of {rate} Hz")
    whole = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).mean(1)
    if rate != 16000:
        whole = resample(whole, rate, 16000)
    bound = 0 if rate == 16000 and form in ("wav", "flac") else 2e-6
    assert (read_audio(path) - whole).abs().max() <= bound
    for start, count in ((0, 4000), (1, 7), (12345, 9000), (len(whole) - 5000, 5000)):
        with Recording(path) as recording:
            part = recording.read(start, count)
        assert part.shape == (count,)
        assert (part - whole[start : start + count]).abs().max() <= bound


def test_a_long_file_is_decoded_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_module, "_BLOCK", 1000)
    sound = make_sound(1.0, channels=3)
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "a.wav").numpy(), torch.tensor(sound).mean(1))


def test_a_length_other_than_the_tables_is_said_once(audio, caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_warned", set())
    with caplog.at_level(logging.WARNING):
        data(audio, "half.wav", "frame.wav", "u0.flac")[0]
    assert caplog.text.count("its table says 16000: the file's length counts") == 1
    assert "half.wav has 8000 samples at 16000 Hz" in caplog.text


# The run


def write_tables(folder, tables):
    """``{table: [names]}``, in that order: batches are cut from the longest to the shortest."""
    (folder / "tables").mkdir(exist_ok=True)
    for table, names in tables.items():
        rows = [f"{name},{20000 - i}" for i, name in enumerate(names)]
        text = "\n".join(["file_path,length", *rows]) + "\n"
        (folder / "tables" / f"{table}.csv").write_text(text)


GOOD = [*list(USED)[:5], *(f"u{i}.flac" for i in range(7))]  # 4 batches of 3
EMPTY = 2  # the batch of which nothing is left


def mixed():
    """5 batches of 6 in which 3 are good, but for one in which none is."""
    bad, good, rows = [*BAD], [*GOOD], []
    for batch in range(5):
        for i in range(6):
            rows.append((bad if batch == EMPTY or i % 2 else good).pop(0))
    assert not bad and not good
    return rows


@pytest.fixture
def run(audio, tmp_path, teachers, monkeypatch, pretrain):
    """Run in this process, 9 steps, in skip mode; (code, stdout + stderr)."""
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, audio.parent)
    monkeypatch.chdir(tmp_path)

    def run(name, *words, tables=None, runner=None, **changes):
        if tables:
            write_tables(tmp_path, tables)
        config = yaml.safe_load((tmp_path / "runner.yaml").read_text())
        config["runner"].update({"total_steps": 9, "save_step": 4, "log_step": 1, **(runner or {})})
        here = {"file_path": str(tmp_path / "tables"), "on_bad_audio": "skip", **changes}
        config["pretrain_expert"]["datarc"].update(here)
        if "-a" not in words and "-e" not in words:
            (tmp_path / "runner.yaml").write_text(yaml.safe_dump(config))
            words = ("-c", "runner.yaml", "-g", "model.yaml", "-n", name, *words)
        elif "-a" in words:
            words = ("-n", name, *words)
        return pretrain("--device", "cpu", *words)

    return run


def listed(name):
    with open(f"result/pretrain/{name}/bad_audio.tsv") as file:
        first, *lines = file.read().splitlines()
    assert first == "path\treason\ttimes\tfirst epoch"
    return [tuple(line.split("\t")) for line in lines]


def batches_used(seed, steps):
    """``(epoch, index)`` of the batches that a run of so many steps reads, by hand."""
    used, epoch = [], 0
    while steps:
        for index in EpochOrder(5, seed).order(epoch):
            if steps:
                used.append((epoch, index))
                steps -= index != EMPTY
        epoch += 1
    return used


def test_a_run_over_all_of_them_is_one_over_the_good(run, monkeypatch, caplog):
    code, said = run("all", tables={"train": mixed()}, train_batch_size=6)
    assert code == 0, said
    states = read_run(newest("result/pretrain/all"))
    seed = states["Args"].seed
    order = EpochOrder.order

    def without_the_empty(self, epoch):
        whole = order(SimpleNamespace(seed=self.seed, count=5), epoch)
        return [index - (index > EMPTY) for index in whole if index != EMPTY]

    monkeypatch.setattr(EpochOrder, "order", without_the_empty)
    code, said_good = run("good", tables={"train": GOOD}, train_batch_size=3)
    assert code == 0 and not os.path.exists("result/pretrain/good/bad_audio.tsv")
    good = read_run(newest("result/pretrain/good"))
    assert states["Step"] == good["Step"] == 9
    for part in ("student", "heads"):
        assert not unequal(states["EKD"][part], good["EKD"][part])
    monkeypatch.setattr(EpochOrder, "order", order)

    rows = [mixed()[i : i + 6] for i in range(0, 30, 6)]
    read = [(epoch, name) for epoch, index in batches_used(seed, 9) for name in rows[index]]
    expected = []
    for name, reason in sorted(BAD.items()):
        epochs = [epoch for epoch, each in read if each == name]
        expected.append((name, reason, str(len(epochs)), str(epochs[0])))
    assert listed("all") == expected and len(expected) == 18
    assert max(int(row[2]) for row in expected) > 1
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("left out missing.flac" in each for each in warned) <= 1
    kinds = [each for each in warned if each.startswith("left out ")]
    assert len(kinds) == len({kind_of(each) for each in kinds}) == 12
    summary = "18 of 30 utterances were left out, their audio is bad: see result/pretrain/all/bad_a"
    assert any(each.startswith(summary) for each in warned)


def kind_of(warning):
    return warning.split(": ", 1)[1].split(" (said once")[0]


def test_a_resumed_run_is_the_same_and_counts_nothing_twice(run, monkeypatch, tmp_path):
    options = {"train_batch_size": 6}
    assert run("alone", tables={"train": mixed()}, **options)[0] == 0
    options["num_workers"] = 2
    forward, seen = EnsembleDistiller.forward, []

    def signalled(self, *args, step=1, **kwargs):
        seen.append(step)
        if seen == [1, 2, 3] or len(seen) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, step=step, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    assert run("cut", **options)[0] == 143
    at_three = listed("cut")
    assert run("cut", "-a")[0] == 143 and run("cut", "-a")[0] == 0
    assert seen == list(range(1, 10))
    assert listed("cut") == listed("alone") != at_three
    _equal(tmp_path, "alone", "cut")
    # Killed: the list is of step 9 then, the checkpoint of step 4.
    for path in tmp_path.glob("result/pretrain/cut/*.ckpt"):
        if path.name != "states-4.ckpt":
            path.unlink()
    monkeypatch.setattr(EnsembleDistiller, "forward", forward)
    assert run("cut", "-a")[0] == 0
    assert listed("cut") == listed("alone")
    _equal(tmp_path, "alone", "cut")


def _equal(folder, *names):
    outcomes = []
    for name in names:
        shutil.rmtree(folder / "compared", ignore_errors=True)
        copy = folder / "compared/result/pretrain/x"
        shutil.copytree(f"result/pretrain/{name}", copy)
        (copy / "dev-best.ckpt").write_bytes(newest(copy).read_bytes())
        outcomes.append(outcome(folder / "compared"))
    assert len(outcomes[0]) > 100 and not unequal(*outcomes)
    assert isinstance(outcomes[0]["/EKD_Run/bad_audio"], torch.Tensor)  # the list is among them


def test_error_is_the_default_and_says_how_to_go_on(run):
    tables = {"train": [*GOOD[:5], "nan.wav"]}
    code, said = run("x", tables=tables, train_batch_size=6, on_bad_audio="error")
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and "nan.wav: it has samples that are NaN or infinite; mend" in error
    assert "Traceback" not in said and not os.path.exists("result/pretrain/x/bad_audio.tsv")
    config = yaml.safe_load(open("runner.yaml"))
    del config["pretrain_expert"]["datarc"]["on_bad_audio"]
    with open("runner.yaml", "w") as file:
        yaml.safe_dump(config, file)
    words = ("-o", "config.pretrain_expert.datarc.on_bad_audio='skip'")
    argv = ["run_pretrain.py", "-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml", "-n", "y"]
    for more, code in (((), 2), (words, None)):
        sys.argv = [*argv, "--device", "cpu", *more]
        if code:
            with pytest.raises(SystemExit):
                run_pretrain()
        else:
            assert run_pretrain() == 0
    assert [row[0] for row in listed("y")] == ["nan.wav"]


def test_another_word_than_the_two(run):
    code, said = run("x", tables={"train": GOOD}, on_bad_audio="ignore")
    assert code == 2
    assert "datarc.on_bad_audio: 'ignore' is not known; use one of: skip, error" in said


def test_nothing_is_left_of_a_pass(run):
    code, said = run("x", tables={"train": ["missing.flac", "nan.wav", "empty.flac"]})
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in said
    assert "no utterance of a whole pass over the data can be used: the first is " in error
    assert "check libri_root, and see result/pretrain/x/bad_audio.tsv" in error
    assert len(listed("x")) == 3


def test_a_corpus_that_goes_away(run, audio, tmp_path, monkeypatch):
    """The run stops, at the last step that had something to learn from, and goes on from there."""
    shutil.copytree(audio, tmp_path / "copy", symlinks=True)
    options = {"libri_root": str(tmp_path / "copy"), "tables": {"train": GOOD[5:]}}
    forward = EnsembleDistiller.forward

    def removed(self, *args, step=1, **kwargs):
        if step == 3:
            (tmp_path / "copy").rename(tmp_path / "away")
        return forward(self, *args, step=step, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", removed)
    code, said = run("x", **options)
    assert code == 2 and "no utterance of a whole pass" in said
    assert read_run(newest("result/pretrain/x"))["Step"] == 3
    (tmp_path / "away").rename(tmp_path / "copy")
    monkeypatch.setattr(EnsembleDistiller, "forward", forward)
    assert run("x", "-a")[0] == 0 and run("alone", **options)[0] == 0
    one, two = (read_run(newest(f"result/pretrain/{name}")) for name in ("x", "alone"))
    assert not unequal(one["EKD"]["student"], two["EKD"]["student"])
    assert one["EKD_Run"]["bad_audio"] == {}  # the checkpoint of step 3 knew of none


def test_bad_files_among_dev_and_too_short_by_the_table(run, tmp_path):
    tables = {"train": GOOD[5:], "dev": ["u8.flac", "text.flac", "nan.wav", "silent.flac"]}
    write_tables(tmp_path, tables)
    with open("tables/train.csv", "a") as file:
        file.write("tiny.flac,399\n")
    options = {"dev_sets": ["dev"], "train_batch_size": 1, "runner": {"eval_step": 3}}
    code, said = run("x", **options)
    assert code == 0, said
    short = "399 samples at 16000 Hz are too few for one frame (400)"
    assert listed("x") == [
        ("nan.wav", BAD["nan.wav"], "3", "0"),
        ("silent.flac", BAD["silent.flac"], "3", "0"),
        ("text.flac", BAD["text.flac"], "3", "0"),
        ("tiny.flac", short, "1", "0"),
    ]
    write_tables(tmp_path, {"dev": ["text.flac"]})
    code, said = run("y", **options)
    assert code == 2 and "no utterance of a whole pass over dev_sets can be used" in said


def test_s3prls_own_runner_skips_too(run, monkeypatch, caplog):
    monkeypatch.setattr(
        "s3prl_ekd.pretrain.trainer.Trainer",
        lambda args, config, s3prl_runner, overridden: s3prl_runner(args, config),
    )
    code, said = run("x", tables={"train": mixed()}, train_batch_size=6)
    assert code == 0, said
    states = read_run(newest("result/pretrain/x"))
    assert states["Step"] == 9 and "EKD_Run" not in states
    assert all(value.isfinite().all() for value in states["EKD"]["student"].values())
    assert "left out missing.flac: there is no such file" in caplog.text


# The list


def a_list(folder, saved=None):
    rows = [Utterance(f"u{i}", 16000) for i in range(7)]
    return BadAudioList(folder, [dataset_of(".", rows, 3, 0)], saved)


def test_the_list_is_of_the_last_update(tmp_path):
    bad = a_list(tmp_path)
    bad.record([Bad("a\tb\n.flac", "x", "why"), Bad("c", "x", "one")], 0)
    bad.commit()
    bad.record([Bad("c", "y", "two"), Bad("d", "y", "two")], 4)
    assert bad.state() == {"a\tb\n.flac": ["why", 1, 0], "c": ["one", 1, 0]}
    bad.write()
    assert (tmp_path / "bad_audio.tsv").read_text().splitlines() == [
        "path\treason\ttimes\tfirst epoch",
        "a\\tb\\n.flac\twhy\t1\t0",
        "c\tone\t2\t0",
        "d\ttwo\t1\t4",
    ]
    bad.commit()
    again = a_list(tmp_path, bad.state())
    again.record([Bad("d", "y", "three")], 5)
    again.commit()
    assert again.state()["d"] == ["two", 2, 4] and len(again.state()) == 3


def test_a_list_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    bad = a_list(tmp_path)
    bad.write()
    assert not list(tmp_path.iterdir())  # nothing was bad
    bad.record([Bad("a", "x", "why")], 0)
    (tmp_path / "bad_audio.tsv").write_text("old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    bad.write()
    assert "bad_audio.tsv: No space left on device" in caplog.text
    assert (tmp_path / "bad_audio.tsv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("saved", [3, ["a"], {"a": 3}, {"a": ["x", "1", 0]}, {1: ["x", 1, 0]}])
def test_a_damaged_list_in_a_checkpoint(tmp_path, saved):
    with pytest.raises(CheckpointError, match="its list of bad audio"):
        a_list(tmp_path, saved)


def test_workers_hand_their_findings_over(audio, tmp_path):
    write_tables(tmp_path, {"train": mixed()})
    found = {}
    for workers in (0, 2):
        settings = data_settings(
            audio,
            6,
            tmp_path / "tables",
            sequence_length=8000,
            num_workers=workers,
            on_bad_audio="skip",
        )
        loader = train_loader(settings, ["train"], min_samples=400)
        batches = list(loader)
        found[workers] = [(list(batch.bad), batch.names) for batch in batches]
        assert sorted(bad.path for batch in batches for bad in batch.bad) == sorted(BAD)
    assert found[0] == found[2]


def test_a_checkpoint_may_name_a_hundred_thousand_files(tmp_path):
    """As values they would be more than what a checkpoint may have of them."""
    entries = {f"train-other-500/{i}.flac": ["there is no such file", 2, 0] for i in range(100_000)}
    torch.save({"x": as_tensor(entries)}, tmp_path / "x.ckpt")
    saved = safe_load(tmp_path / "x.ckpt")["x"]
    assert BadAudioList(tmp_path, [], saved, "x").state() == entries
    assert as_tensor({}) == {} and BadAudioList(tmp_path, [], {}, "x").state() == {}
    for spoiled in (torch.tensor([1, 2]), torch.tensor([91] * 100_000, dtype=torch.uint8)):
        with pytest.raises(CheckpointError, match="its list of bad audio"):
            BadAudioList(tmp_path, [], spoiled, "x")
