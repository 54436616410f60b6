"""Length tables, audio and batches: reading, checks and warnings."""

import logging
import re

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.data import audio as audio_module
from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.bad_audio import BadAudio
from s3prl_ekd.data.batches import DistillationDataset, train_loader
from s3prl_ekd.data.sampling import bucket, filter_by_length
from s3prl_ekd.data.tables import Utterance, read_table, read_tables
from s3prl_ekd.errors import DataError

from .conftest import data_settings, make_sound


def make_loader(corpus, batch_size=5, seed=0, shuffle=True, **changes):
    data = data_settings(corpus / "audio", batch_size, corpus / "tables", **changes)
    return train_loader(data, ["train"], min_samples=400, seed=seed, shuffle=shuffle)


def test_an_epoch_has_every_utterance_once(corpus):
    batches = list(make_loader(corpus))
    assert sorted(len(batch.names) for batch in batches) == [2, 5, 5]
    assert sorted(name for batch in batches for name in batch.names) == sorted(
        f"u{i}.flac" for i in range(12)
    )


def test_a_batch_has_the_samples_of_its_files(corpus):
    for batch in make_loader(corpus):
        for wave, length, name in zip(batch.waves, batch.lengths, batch.names, strict=True):
            samples, _ = soundfile.read(corpus / "audio" / name, dtype="float32")
            assert length == len(samples)
            assert np.array_equal(wave[:length].numpy(), samples)
            assert wave[length:].abs().sum() == 0


def test_batches_equal_those_of_s3prl(corpus):
    """Compared with s3prl's WaveDataset, which drops a last batch of one utterance."""
    import sys

    from s3prl.pretrain.bucket_dataset import WaveDataset

    assert "pandas" in sys.modules
    expected = WaveDataset({"sequence_length": 8000}, 5, str(corpus / "tables"), ["train"], 0)
    batches = bucket(read_tables(corpus / "tables", ["train"]), 5)
    assert [[row.path for row in batch] for batch in batches] == expected.X


def test_a_last_batch_of_one_utterance_is_kept():
    rows = [Utterance(f"u{i}", 1000) for i in range(7)]
    assert [len(batch) for batch in bucket(rows, 3)] == [3, 3, 1]


def names(passes):
    return [[batch.names for batch in batches] for batches in passes]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_depends_on_seed_and_epoch_only(corpus, workers):
    loader = make_loader(corpus, batch_size=2, seed=3)
    passes = [list(loader) for _ in range(3)]
    torch.manual_seed(8)  # the global random state and the number of workers must not matter
    loader = make_loader(corpus, batch_size=2, seed=3, num_workers=workers, sequence_length=4000)
    state = torch.get_rng_state()
    assert names([list(loader) for _ in range(3)]) == names(passes)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({str(order) for order in names(passes)}) == 3
    assert names([list(make_loader(corpus, batch_size=2, seed=4))]) != names(passes[:1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_can_start_in_the_middle(corpus, workers, monkeypatch):
    loader = make_loader(corpus, batch_size=2, sequence_length=4000)
    passes = [list(loader) for _ in range(3)]
    indices = []
    resumed = make_loader(corpus, batch_size=2, sequence_length=4000, num_workers=workers)
    resumed.sampler.epoch, resumed.sampler.position = 1, 4
    if not workers:
        getitem = type(resumed.dataset).__getitem__

        def recorded(self, index):
            indices.append(index)
            return getitem(self, index)

        monkeypatch.setattr(type(resumed.dataset), "__getitem__", recorded)
    for expected in (passes[1][4:], passes[2]):
        batches = list(resumed)
        assert names([batches]) == names([expected])
        for batch, expected_batch in zip(batches, expected, strict=True):
            assert torch.equal(batch.waves, expected_batch.waves)
    if not workers:  # the skipped batches are not read
        assert len(indices) == 2 + 6 and [epoch for epoch, _ in indices] == [1] * 2 + [2] * 6
    resumed.sampler.epoch, resumed.sampler.position = 0, 6  # at the end of a pass
    assert list(resumed) == []


def test_without_shuffling_all_passes_are_the_same(corpus):
    fixed = make_loader(corpus, shuffle=False, sequence_length=4000)
    one, two = list(fixed), list(fixed)
    assert [batch.names[0] for batch in one] == ["u11.flac", "u6.flac", "u1.flac"]
    assert all(torch.equal(a.waves, b.waves) for a, b in zip(one, two, strict=True))


def test_excerpts_are_random_parts_of_the_file(corpus):
    rows = read_tables(corpus / "tables", ["train"])
    data = DistillationDataset(
        data_settings(corpus / "audio", 1, sequence_length=4000), rows, min_samples=400
    )
    samples, _ = soundfile.read(corpus / "audio" / rows[0].path, dtype="float32")
    starts = set()
    for epoch in range(8):
        (wave,) = data[(epoch, 0)].waves
        assert torch.equal(data[(epoch, 0)].waves[0], wave)  # the same for the same epoch
        assert len(wave) == 4000
        matches = np.flatnonzero(samples == wave[0].item())
        start = next(i for i in matches if np.array_equal(samples[i : i + 4000], wave.numpy()))
        starts.add(int(start))
    assert len(starts) > 4


def test_an_excerpt_without_a_frame_of_the_student_is_an_error(corpus):
    rows = read_tables(corpus / "tables", ["train"])
    data = data_settings(corpus / "audio", 1, sequence_length=800)
    with pytest.raises(DataError, match=r"sequence_length\b.*\b800\b.*\b801\b"):
        DistillationDataset(data, rows, min_samples=801)
    assert DistillationDataset(data, rows, min_samples=800)[0].lengths.tolist() == [800]


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, [500, 1000, 2000]), (1000, [500]), (-1000, [2000])]
)
def test_max_timestep_is_that_of_s3prl(limit, expected):
    rows = [Utterance(str(n), n) for n in (500, 1000, 2000)]
    assert [row.length for row in filter_by_length(rows, limit, 400)] == expected


def test_too_short_utterances_are_counted(caplog):
    rows = [Utterance(str(n), n) for n in (100, 399, 400)]
    with caplog.at_level(logging.WARNING):
        assert [row.length for row in filter_by_length(rows, 0, 400)] == [400]
    assert re.search(r"\b2\b.*\b400\b", caplog.text)
    with pytest.raises(DataError, match="max_timestep"):
        filter_by_length(rows, 50, 400)


H = "file_path,length\n"
MAKE_TABLES = "s3prl-ekd length-tables"  # the command to type
SKIP_BAD = "on_bad_audio='skip'"  # the option that skips impossible lengths


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["line 1", "0", "file_path", MAKE_TABLES]),
        ("path,length\na.flac,5\n", ["line 1", "0", "file_path", MAKE_TABLES]),
        ("file_path,label\na.flac,5\n", ["line 1", "0", "length", MAKE_TABLES]),
        ("a.flac,5\nb.flac,6\n", ["line 1", "0", "file_path", MAKE_TABLES]),
        ("length,file_path,length\n5,a.flac,5\n", ["line 1", "2", "length"]),
        (H, ["rows", MAKE_TABLES]),
        (H + "a.flac,5\nb.flac,\n", ["line 3", "'b.flac'", "''"]),
        (H + "a.flac,-5\n", ["line 2", "'a.flac'", "'-5'"]),
        (H + "a.flac,0\n", ["line 2", "'a.flac'", "'0'", SKIP_BAD]),
        (H + "a.flac,5.5\n", ["line 2", "'a.flac'", "'5.5'"]),
        (H + "a.flac,nan\n", ["line 2", "'a.flac'", "'nan'"]),
        (H + "a.flac,-inf\n", ["line 2", "'a.flac'", "'-inf'"]),
        (H + "a.flac,1e999\n", ["line 2", "'a.flac'", "'1e999'"]),
        (H + "a.flac,many\n", ["line 2", "'a.flac'", "'many'"]),
        (H + "a.flac,1382400001\n", ["line 2", "'a.flac'", "'1382400001'", SKIP_BAD]),
        (H + "a.flac,1e300\n", ["line 2", "'a.flac'", "'1e300'", SKIP_BAD]),
        (H + ",5\n", ["line 2", "''", "'5'"]),
        (H + "a.flac\n", ["line 2", "1", "2", "cells"]),
        (H + "a.flac,5\nb.flac,5,6\n", ["line 3", "3", "2", "cells"]),
        (H + "a, b.flac,5\n", ["line 2", "3", "cells"]),
        (H + "a.flac,5\n\n./a.flac,6\n", ["line 4", "'./a.flac'", "line 2"]),
        (H + "a/b.flac,5\nc.flac,5\na//b.flac,5\n", ["line 4", "'a//b.flac'", "line 2"]),
        (H + "/etc/passwd,5\n", ["line 2", "'/etc/passwd'", "libri_root"]),
        (H + "../a.flac,5\n", ["line 2", "'../a.flac'", "libri_root"]),
        (H + "a/../../b.flac,5\n", ["line 2", "'a/../../b.flac'", "libri_root"]),
        (H + 'a.flac,5\n"b\nb.flac",5\nc.flac,x\n', ["line 5", "'c.flac'", "'x'"]),
        (H + 'a.flac,5\n"b.flac,5\nc.flac,5\n', ["line 4", "CSV", MAKE_TABLES]),
        (H + f"{'a' * 200_000},5\n", ["line 2", "CSV", MAKE_TABLES]),
        (H.encode() + b"a.flac,5\n\xff.flac,5\n", ["line 3", "UTF-8", MAKE_TABLES]),
        (H.encode("utf-16"), ["line 1", "UTF-8", MAKE_TABLES]),
        (H + "a\0.flac,5\n", ["line 2"]),
        (b"\0" * 500, ["line 1"]),
        (b"\x1f\x8b\x08" + bytes(range(256)), ["UTF-8", MAKE_TABLES]),
    ],
)
def test_a_bad_table(tmp_path, text, parts):
    path = tmp_path / "train.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError) as error:
        read_table(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 800
    message = message.replace(str(path), "")
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message), part


def test_an_utterance_in_two_tables(tmp_path):
    (tmp_path / "a.csv").write_text(H + "x.flac,5\ny.flac,6\n")
    (tmp_path / "b.csv").write_text(H + "z.flac,5\n./y.flac,6\n")
    assert [row.path for row in read_tables(tmp_path, ["a"])] == ["y.flac", "x.flac"]
    with pytest.raises(DataError) as error:
        read_tables(tmp_path, ["a", "b"])
    for part in (f"{tmp_path / 'b.csv'}: line 3", "'./y.flac'", f"{tmp_path / 'a.csv'}: line 3"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="'x.flac'"):
        read_tables(tmp_path, ["a", "a"])


def test_a_table_from_a_spreadsheet_program(tmp_path):
    """A byte order mark, carriage returns, empty lines, an empty label."""
    text = 'file_path,length,label\r\na.flac,5,\r\n\r\n"b ""c"".flac",6,\r\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert read_table(tmp_path / "t.csv") == [Utterance("a.flac", 5), Utterance('b "c".flac', 6)]


def test_a_table_as_s3prl_writes_it(tmp_path):
    (tmp_path / "t.csv").write_text(',file_path,length,label\n0,"a, b.flac",16000.0,\n')
    assert read_table(tmp_path / "t.csv") == [Utterance("a, b.flac", 16000)]


def test_a_missing_table_and_root(corpus, tmp_path):
    with pytest.raises(DataError, match="s3prl-ekd length-tables AUDIO_FOLDER -o TABLE_FOLDER"):
        read_tables(tmp_path, ["train"])
    with pytest.raises(DataError, match="libri_root"):
        train_loader(
            data_settings(tmp_path / "none", 1, corpus / "tables"), ["train"], min_samples=400
        )


def test_stereo_is_averaged_with_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_warned", set())
    sound = make_sound(0.2, channels=2)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, sound, 16000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        wave = read_audio(tmp_path / "a.wav")
        read_audio(tmp_path / "b.wav")
    assert np.allclose(wave.numpy(), (sound[:, 0] + sound[:, 1]) / 2, atol=1e-6)
    (warning,) = caplog.messages
    assert "a.wav" in warning and re.search(r"\b2\b", warning)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate, caplog, monkeypatch):
    """A 440 Hz tone keeps its frequency."""
    monkeypatch.setattr(audio_module, "_warned", set())
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.wav", tone, rate, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        wave = read_audio(tmp_path / "a.wav")
    assert abs(len(wave) - 16000) <= 1
    spectrum = np.abs(np.fft.rfft(wave.numpy()[:16000]))
    assert spectrum.argmax() == 440
    (warning,) = caplog.messages
    assert "a.wav" in warning and f"{rate} Hz" in warning


@pytest.mark.parametrize("ending", ["flac", "wav", "opus"])
def test_formats(tmp_path, ending):
    sound = make_sound(1.0)
    path = tmp_path / f"a.{ending}"
    if ending == "opus":
        soundfile.write(path, sound, 16000, format="OGG", subtype="OPUS")
    else:
        soundfile.write(path, sound, 16000)
    assert len(read_audio(path)) == 16000


def test_unusable_audio(tmp_path):
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "text.flac").write_text("not audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    for name, kind in [
        ("missing.flac", "missing"),
        ("empty.flac", "empty"),
        ("text.flac", "not audio"),
        ("none.wav", "no samples"),
    ]:
        with pytest.raises(BadAudio, match=re.escape(name)) as error:
            read_audio(tmp_path / name)
        assert error.value.kind == kind


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_gives_a_batch_with_an_error_message(tmp_path, workers):
    (tmp_path / "audio").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("file_path,length\nnone.flac,16000\n")
    (batch,) = make_loader(tmp_path, num_workers=workers)
    assert str(tmp_path / "audio/none.flac") in batch.problem and "\n" not in batch.problem
    assert batch.names == ["none.flac"] and batch.waves.numel() == 0
