"""BadUtterance audio files, with ``on_bad_audio: error`` and with ``skip``."""

import logging
import os
import re
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
from s3prl_ekd.data.bad_audio import BadUtterance
from s3prl_ekd.data.batches import DistillationDataset, train_loader
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.sampling import EpochSampler
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.config import from_plain_data
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.launch import run_pretrain
from s3prl_ekd.pretrain.bad_audio import BadAudioList, as_tensor

from .conftest import data_settings, edit_yaml, make_sound, write_configs
from .kill_and_resume import outcome, unequal

# Name -> reason in bad_audio.tsv. All have a length of 1 s in the table; the run takes excerpts of
# 0.5 s, each of which has the fault.
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
    "silent.flac": "it has no sound: every sample is 0",
    "short.wav": "399 samples at 16000 Hz are too few for one frame (400)",
    "rate.wav": "15999 Hz cannot be resampled well to 16000 Hz",
}
OUT_OF_RANGE = {
    "loud.wav": "it has samples of 1e+30, and full scale is 1: scale it to -1 to 1",
    "unscaled.wav": "it has samples of 3.28e+03, and full scale is 1: scale it to -1 to 1",
    "constant.flac": "it has no sound: every sample is 0.25",
    "constant8.flac": "it has no sound: every sample is 0.25",
}
# Name -> length in samples at 16 kHz, of files that are used.
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
    """A folder with all of these files, and 12 normal ones."""
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
    hot = 4 * sound / abs(sound).max()  # clips in all formats except float
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
    # STREAMINFO: the lower 36 bits of bytes 18 to 25 are the number of samples; 0 is "unknown".
    (stream_info,) = struct.unpack(">Q", data[18:26])
    assert stream_info & (2**36 - 1) == 16000
    unknown = struct.pack(">Q", stream_info & ~(2**36 - 1))
    (root / "piped.flac").write_bytes(data[:18] + unknown + data[26:])


def dataset_of(root, rows, batch_size, length=8000, skip=True, **options):
    on_bad_audio = "skip" if skip else "error"
    settings = data_settings(root, batch_size, sequence_length=length, on_bad_audio=on_bad_audio)
    return DistillationDataset(settings, rows, 400, **options)


def data(audio, *names, skip=True, **options):
    rows = [Utterance(name, 16000) for name in names]
    return dataset_of(audio, rows, 3, skip=skip, **options)


@pytest.mark.parametrize("name", [*BAD, *OUT_OF_RANGE])
def test_a_bad_file(audio, name):
    expected = (BAD | OUT_OF_RANGE)[name]
    batch = data(audio, name, "u1.flac", skip=False)[0]
    assert f"{audio / name}: {expected}" in batch.problem
    assert "-o \"config.pretrain_expert.datarc.on_bad_audio='skip'\"" in batch.problem
    assert "\n" not in batch.problem and batch.waves.numel() == 0
    batch = data(audio, "u0.flac", name, "u1.flac")[0]
    ((path, _, reason),) = batch.bad
    assert (path, reason) == (name, expected) and batch.problem == ""
    good = data(audio, "u0.flac", "u1.flac", skip=False)[0]
    assert batch.names == good.names == ["u0.flac", "u1.flac"]
    assert torch.equal(batch.waves, good.waves) and torch.equal(batch.lengths, good.lengths)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(audio, tmp_path):
    shutil.copy(audio / "u0.flac", tmp_path / "a.flac")
    (tmp_path / "a.flac").chmod(0)
    ((_, _, reason),) = data(tmp_path, "a.flac")[0].bad
    assert "Permission denied" in reason or "System error" in reason


def test_a_batch_of_bad_files_only(audio):
    batch = data(audio, "nan.wav", "text.flac", "missing.flac")[0]
    assert batch.names == [] and batch.problem == "" and len(batch.bad) == 3
    assert len({bad.kind for bad in batch.bad}) == 3


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", USED)
def test_a_usable_file(audio, name, skip):
    batch = data(audio, name, skip=skip)[0]
    assert batch.problem == "" and list(batch.bad) == [] and batch.names == [name]
    assert batch.lengths.tolist() == [min(8000, USED[name])]
    with Recording(audio / name) as recording:
        assert recording.samples == USED[name]


@pytest.mark.parametrize("length", [8000, 0])
def test_a_header_with_a_thousand_hours(audio, tmp_path, length):
    flac = (audio / "u0.flac").read_bytes()
    (stream_info,) = struct.unpack(">Q", flac[18:26])
    too_long = struct.pack(">Q", stream_info | (2**36 - 1))
    (tmp_path / "long.flac").write_bytes(flac[:18] + too_long + flac[26:])
    rows = [Utterance("long.flac", 16000)]
    ((_, kind, _),) = dataset_of(tmp_path, rows, 1, length)[0].bad
    assert kind == "cut off"


def test_babble_skips_bad_files(audio):
    weights = {"clean": 0, "gaussian": 0}
    config = {"setup": "same", "babble": True, "additive_weights": weights}
    settings = from_plain_data(DistortionSettings, config, "distortion")
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
    assert any(f"missing.flac: {BAD['missing.flac']}" in problem for problem in problems)


def test_a_silent_excerpt_is_accepted(audio):
    excerpts = [data(audio, "pause.flac")[(epoch, 0)] for epoch in range(8)]
    assert all(batch.names for batch in excerpts)
    assert any(not batch.waves.any() for batch in excerpts)


@pytest.mark.parametrize("name", ["hour.wav", "r44100.flac", "u0.flac", "r48000.opus"])
def test_only_the_excerpt_is_decoded(audio, name, monkeypatch):
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
def test_an_excerpt_equals_that_part_of_the_file(tmp_path, form, rate):
    sound = make_sound(3.0, rate=rate, channels=2)
    path = tmp_path / f"a.{form}"
    try:
        if form == "opus":
            soundfile.write(path, sound, rate, format="OGG", subtype="OPUS")
        else:
            soundfile.write(path, sound, rate)
    except soundfile.LibsndfileError:
        pytest.skip(f"no {form} of {rate} Hz")
    expected = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).mean(1)
    if rate != 16000:
        expected = resample(expected, rate, 16000)
    bound = 0 if rate == 16000 and form in ("wav", "flac") else 2e-6
    assert (read_audio(path) - expected).abs().max() <= bound
    for start, count in ((0, 4000), (1, 7), (12345, 9000), (len(expected) - 5000, 5000)):
        with Recording(path) as recording:
            part = recording.read(start, count)
        assert part.shape == (count,)
        assert (part - expected[start : start + count]).abs().max() <= bound


def test_a_long_file_is_decoded_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_module, "_BLOCK", 1000)
    sound = make_sound(1.0, channels=3)
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "a.wav").numpy(), torch.tensor(sound).mean(1))


def test_one_warning_for_lengths_that_differ_from_the_table(audio, caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_warned", set())
    with caplog.at_level(logging.WARNING):
        data(audio, "half.wav", "frame.wav", "u0.flac")[0]
    (warning,) = caplog.messages
    assert "half.wav" in warning and re.search(r"\b8000\b", warning)


# The run


def write_tables(folder, tables):
    """Write ``{table: [names]}`` with decreasing lengths, so that batches keep the order."""
    (folder / "tables").mkdir(exist_ok=True)
    for table, names in tables.items():
        rows = [f"{name},{20000 - i}" for i, name in enumerate(names)]
        text = "\n".join(["file_path,length", *rows]) + "\n"
        (folder / "tables" / f"{table}.csv").write_text(text)


GOOD = [*list(USED)[:5], *(f"u{i}.flac" for i in range(7))]  # 4 batches of 3
EMPTY = 2  # the batch in which all files are bad


def mixed():
    """5 batches of 6 utterances: 4 batches with 3 good ones, and batch ``EMPTY`` with none."""
    bad, good, rows = [*BAD], [*GOOD], []
    for batch in range(5):
        for i in range(6):
            rows.append((bad if batch == EMPTY or i % 2 else good).pop(0))
    assert not bad and not good
    return rows


@pytest.fixture
def run(audio, tmp_path, teachers, pretrain_folder, pretrain):
    """A function that trains 9 steps in this process, in skip mode: (exit code, output)."""
    write_configs(tmp_path, teachers, audio.parent)

    def run(name, *argv, tables=None, runner=None, **changes):
        if tables:
            write_tables(tmp_path, tables)
        config = yaml.safe_load((tmp_path / "runner.yaml").read_text())
        config["runner"].update({"total_steps": 9, "save_step": 4, "log_step": 1, **(runner or {})})
        datarc = {"file_path": str(tmp_path / "tables"), "on_bad_audio": "skip", **changes}
        config["pretrain_expert"]["datarc"].update(datarc)
        if "-a" not in argv and "-e" not in argv:
            (tmp_path / "runner.yaml").write_text(yaml.safe_dump(config))
            argv = ("-c", "runner.yaml", "-g", "model.yaml", "-n", name, *argv)
        elif "-a" in argv:
            argv = ("-n", name, *argv)
        return pretrain("--device", "cpu", *argv)

    return run


def listed(name):
    with open(f"result/pretrain/{name}/bad_audio.tsv") as file:
        header, *lines = file.read().splitlines()
    assert header == "path\treason\ttimes\tfirst epoch"
    return [tuple(line.split("\t")) for line in lines]


def batches_used(seed, steps):
    """``(epoch, index)`` of the batches that a run of ``steps`` reads, computed independently."""
    used, epoch = [], 0
    while steps:
        for index in EpochSampler(5, seed).order(epoch):
            if steps:
                used.append((epoch, index))
                steps -= index != EMPTY
        epoch += 1
    return used


def test_skipping_bad_files_equals_training_on_the_good_ones(run, monkeypatch, caplog):
    code, output = run("all", tables={"train": mixed()}, train_batch_size=6)
    assert code == 0, output
    states = read_checkpoint(newest_checkpoint("result/pretrain/all"))
    seed = states["Args"].seed
    order = EpochSampler.order

    def order_without_empty(self, epoch):
        indices = order(SimpleNamespace(seed=self.seed, count=5), epoch)
        return [index - (index > EMPTY) for index in indices if index != EMPTY]

    monkeypatch.setattr(EpochSampler, "order", order_without_empty)
    code, _ = run("good", tables={"train": GOOD}, train_batch_size=3)
    assert code == 0 and not os.path.exists("result/pretrain/good/bad_audio.tsv")
    good = read_checkpoint(newest_checkpoint("result/pretrain/good"))
    assert states["Step"] == good["Step"] == 9
    for part in ("student", "heads"):
        assert not unequal(states["EKD"][part], good["EKD"][part])
    monkeypatch.setattr(EpochSampler, "order", order)

    rows = [mixed()[i : i + 6] for i in range(0, 30, 6)]
    uses = [(epoch, name) for epoch, index in batches_used(seed, 9) for name in rows[index]]
    expected = []
    for name, reason in sorted(BAD.items()):
        epochs = [epoch for epoch, used in uses if used == name]
        expected.append((name, reason, str(len(epochs)), str(epochs[0])))
    assert listed("all") == expected and len(expected) == 18
    assert max(int(row[2]) for row in expected) > 1
    # One warning for each kind, which has the name and the reason of the first file.
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    reasons = [reason for message in warnings if (reason := reason_in(message))]
    assert len(reasons) == len(set(reasons)) == 12
    assert any(
        "result/pretrain/all/bad_audio.tsv" in message
        and {"18", "30"} <= set(re.findall(r"\d+", message))
        for message in warnings
    )


def reason_in(message):
    """The reason in a warning about one of the BAD files, else None."""
    matches = (reason for name, reason in BAD.items() if name in message and reason in message)
    return next(matches, None)


def test_a_resumed_run_is_the_same_and_counts_nothing_twice(run, monkeypatch, tmp_path):
    options = {"train_batch_size": 6}
    assert run("alone", tables={"train": mixed()}, **options)[0] == 0
    options["num_workers"] = 2
    forward, steps = EnsembleDistiller.forward, []

    def signalled(self, *args, step=1, **kwargs):
        steps.append(step)
        if steps == [1, 2, 3] or len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, step=step, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    assert run("cut", **options)[0] == 143
    at_three = listed("cut")
    assert run("cut", "-a")[0] == 143 and run("cut", "-a")[0] == 0
    assert steps == list(range(1, 10))
    assert listed("cut") == listed("alone") != at_three
    _equal(tmp_path, "alone", "cut")
    # A killed run: the list in the folder is of step 9, the checkpoint of step 4.
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
        (copy / "dev-best.ckpt").write_bytes(newest_checkpoint(copy).read_bytes())
        outcomes.append(outcome(folder / "compared"))
    assert len(outcomes[0]) > 100 and not unequal(*outcomes)
    assert isinstance(outcomes[0]["/EKD_Run/bad_audio"], torch.Tensor)  # the list is compared, too


def test_error_is_the_default_and_gives_the_option_to_skip(run):
    tables = {"train": [*GOOD[:5], "nan.wav"]}
    code, output = run("x", tables=tables, train_batch_size=6, on_bad_audio="error")
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and f"nan.wav: {BAD['nan.wav']}" in error
    assert "config.pretrain_expert.datarc.on_bad_audio='skip'" in error
    assert "Traceback" not in output and not os.path.exists("result/pretrain/x/bad_audio.tsv")
    with edit_yaml("runner.yaml") as config:
        del config["pretrain_expert"]["datarc"]["on_bad_audio"]
    skip = ("-o", "config.pretrain_expert.datarc.on_bad_audio='skip'")
    argv = ["run_pretrain.py", "-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml", "-n", "y"]
    for more, code in (((), 2), (skip, None)):
        sys.argv = [*argv, "--device", "cpu", *more]
        if code:
            with pytest.raises(SystemExit):
                run_pretrain()
        else:
            assert run_pretrain() == 0
    assert [row[0] for row in listed("y")] == ["nan.wav"]


def test_an_unknown_value_of_on_bad_audio(run):
    code, output = run("x", tables={"train": GOOD}, on_bad_audio="ignore")
    assert code == 2
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "datarc.on_bad_audio" in error and "'ignore'" in error
    assert re.search(r"\bskip\b", error) and "Traceback" not in output


def test_a_pass_of_bad_files_only(run):
    tables = {"train": ["missing.flac", "nan.wav", "empty.flac"]}
    code, output = run("x", tables=tables)
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in output
    assert any(name in error and BAD[name] in error for name in tables["train"])
    assert "libri_root" in error and "result/pretrain/x/bad_audio.tsv" in error
    assert len(listed("x")) == 3


def test_a_corpus_that_disappears(run, audio, tmp_path, monkeypatch):
    """The run saves the last step that had audio and stops; it can be resumed from there."""
    shutil.copytree(audio, tmp_path / "copy", symlinks=True)
    options = {"libri_root": str(tmp_path / "copy"), "tables": {"train": GOOD[5:]}}
    forward = EnsembleDistiller.forward

    def removed(self, *args, step=1, **kwargs):
        if step == 3:
            (tmp_path / "copy").rename(tmp_path / "away")
        return forward(self, *args, step=step, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", removed)
    code, output = run("x", **options)
    assert code == 2 and "result/pretrain/x/bad_audio.tsv" in output
    assert read_checkpoint(newest_checkpoint("result/pretrain/x"))["Step"] == 3
    (tmp_path / "away").rename(tmp_path / "copy")
    monkeypatch.setattr(EnsembleDistiller, "forward", forward)
    assert run("x", "-a")[0] == 0 and run("alone", **options)[0] == 0
    one, two = (
        read_checkpoint(newest_checkpoint(f"result/pretrain/{name}")) for name in ("x", "alone")
    )
    assert not unequal(one["EKD"]["student"], two["EKD"]["student"])
    assert one["EKD_Run"]["bad_audio"] == {}  # as in the checkpoint of step 3


def test_bad_dev_files_and_a_row_that_is_too_short(run, tmp_path):
    tables = {"train": GOOD[5:], "dev": ["u8.flac", "text.flac", "nan.wav", "silent.flac"]}
    write_tables(tmp_path, tables)
    with open("tables/train.csv", "a") as file:
        file.write("tiny.flac,399\n")
    options = {"dev_sets": ["dev"], "train_batch_size": 1, "runner": {"eval_step": 3}}
    code, output = run("x", **options)
    assert code == 0, output
    short = "399 samples at 16000 Hz are too few for one frame (400)"
    assert listed("x") == [
        ("nan.wav", BAD["nan.wav"], "3", "0"),
        ("silent.flac", BAD["silent.flac"], "3", "0"),
        ("text.flac", BAD["text.flac"], "3", "0"),
        ("tiny.flac", short, "1", "0"),
    ]
    write_tables(tmp_path, {"dev": ["text.flac"]})
    code, output = run("y", **options)
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and "dev_sets" in error and "result/pretrain/y/bad_audio.tsv" in error


def test_s3prls_own_runner_skips_too(run, monkeypatch, caplog):
    monkeypatch.setattr(
        "s3prl_ekd.pretrain.trainer.Trainer",
        lambda args, config, s3prl_runner, overridden: s3prl_runner(args, config),
    )
    code, output = run("x", tables={"train": mixed()}, train_batch_size=6)
    assert code == 0, output
    states = read_checkpoint(newest_checkpoint("result/pretrain/x"))
    assert states["Step"] == 9 and "EKD_Run" not in states
    assert all(value.isfinite().all() for value in states["EKD"]["student"].values())
    assert any("missing.flac" in m and BAD["missing.flac"] in m for m in caplog.messages)


# The list


def make_list(folder, saved=None):
    rows = [Utterance(f"u{i}", 16000) for i in range(7)]
    return BadAudioList(folder, [dataset_of(".", rows, 3, 0)], saved)


def test_the_state_is_that_of_the_last_step(tmp_path):
    bad = make_list(tmp_path)
    bad.record([BadUtterance("a\tb\n.flac", "x", "why"), BadUtterance("c", "x", "one")], 0)
    bad.commit()
    bad.record([BadUtterance("c", "y", "two"), BadUtterance("d", "y", "two")], 4)
    assert bad.state() == {"a\tb\n.flac": ["why", 1, 0], "c": ["one", 1, 0]}
    bad.write()
    assert (tmp_path / "bad_audio.tsv").read_text().splitlines() == [
        "path\treason\ttimes\tfirst epoch",
        "a\\tb\\n.flac\twhy\t1\t0",
        "c\tone\t2\t0",
        "d\ttwo\t1\t4",
    ]
    bad.commit()
    resumed = make_list(tmp_path, bad.state())
    resumed.record([BadUtterance("d", "y", "three")], 5)
    resumed.commit()
    assert resumed.state()["d"] == ["two", 2, 4] and len(resumed.state()) == 3


def test_a_list_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    bad = make_list(tmp_path)
    bad.write()
    assert not list(tmp_path.iterdir())  # an empty list is not written
    bad.record([BadUtterance("a", "x", "why")], 0)
    (tmp_path / "bad_audio.tsv").write_text("old")

    def disk_full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    bad.write()
    assert re.search("bad_audio.tsv.*No space left on device", caplog.text)
    assert (tmp_path / "bad_audio.tsv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("saved", [3, ["a"], {"a": 3}, {"a": ["x", "1", 0]}, {1: ["x", 1, 0]}])
def test_a_damaged_list_in_a_checkpoint(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"states-1\.ckpt.*bad_audio"):
        BadAudioList(tmp_path, [], saved, "states-1.ckpt")


def test_workers_report_bad_files(audio, tmp_path):
    write_tables(tmp_path, {"train": mixed()})
    results = {}
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
        results[workers] = [(list(batch.bad), batch.names) for batch in batches]
        assert sorted(bad.path for batch in batches for bad in batch.bad) == sorted(BAD)
    assert results[0] == results[2]


def test_a_list_of_a_hundred_thousand_files(tmp_path):
    """Stored as a list, it would exceed the number of values that a checkpoint may have."""
    entries = {f"train-other-500/{i}.flac": ["there is no such file", 2, 0] for i in range(100_000)}
    torch.save({"x": as_tensor(entries)}, tmp_path / "x.ckpt")
    saved = safe_load(tmp_path / "x.ckpt")["x"]
    assert BadAudioList(tmp_path, [], saved, "x").state() == entries
    assert as_tensor({}) == {} and BadAudioList(tmp_path, [], {}, "x").state() == {}
    for damaged in (torch.tensor([1, 2]), torch.tensor([91] * 100_000, dtype=torch.uint8)):
        with pytest.raises(CheckpointError, match=r"x\.ckpt.*bad_audio"):
            BadAudioList(tmp_path, [], damaged, "x.ckpt")
