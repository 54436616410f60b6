"""Tables, audio and batches: what is read, what is refused, what is left out and said."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.data import audio as audio_module
from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.data.batches import DistillationDataset, train_loader
from s3prl_ekd.data.sampling import bucket, within
from s3prl_ekd.data.tables import Utterance, read_table, read_tables
from s3prl_ekd.errors import DataError

from .conftest import data_settings, make_sound


def loader(corpus, batch_size=5, seed=0, shuffle=True, **changes):
    data = data_settings(corpus / "audio", batch_size, corpus / "tables", **changes)
    return train_loader(data, ["train"], min_samples=400, seed=seed, shuffle=shuffle)


def test_every_utterance_comes_once_an_epoch(corpus):
    batches = list(loader(corpus))
    assert sorted(len(batch.names) for batch in batches) == [2, 5, 5]
    assert sorted(name for batch in batches for name in batch.names) == sorted(
        f"u{i}.flac" for i in range(12)
    )


def test_a_batch_holds_the_files_samples(corpus):
    for batch in loader(corpus):
        for wave, length, name in zip(batch.waves, batch.lengths, batch.names, strict=True):
            samples, _ = soundfile.read(corpus / "audio" / name, dtype="float32")
            assert length == len(samples)
            assert np.array_equal(wave[:length].numpy(), samples)
            assert wave[length:].abs().sum() == 0


def test_batches_are_s3prls_buckets(corpus):
    """Against s3prl's WaveDataset over the same table, whose leftover of one it drops."""
    import sys

    from s3prl.pretrain.bucket_dataset import WaveDataset

    assert "pandas" in sys.modules
    theirs = WaveDataset({"sequence_length": 8000}, 5, str(corpus / "tables"), ["train"], 0)
    ours = bucket(read_tables(corpus / "tables", ["train"]), 5)
    assert [[row.path for row in batch] for batch in ours] == theirs.X


def test_a_leftover_of_one_is_kept():
    rows = [Utterance(f"u{i}", 1000) for i in range(7)]
    assert [len(batch) for batch in bucket(rows, 3)] == [3, 3, 1]


def names(passes):
    return [[batch.names for batch in each] for each in passes]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_of_seed_and_epoch_alone(corpus, workers):
    first = loader(corpus, batch_size=2, seed=3)
    passes = [list(first) for _ in range(3)]
    torch.manual_seed(8)  # what else is drawn, and by how many, plays no part
    second = loader(corpus, batch_size=2, seed=3, num_workers=workers, sequence_length=4000)
    before = torch.get_rng_state()
    assert names([list(second) for _ in range(3)]) == names(passes)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(each) for each in names(passes)}) == 3
    assert names([list(loader(corpus, batch_size=2, seed=4))]) != names(passes[:1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_can_be_entered_in_the_middle(corpus, workers, monkeypatch):
    whole = loader(corpus, batch_size=2, sequence_length=4000)
    passes = [list(whole) for _ in range(3)]
    read = []
    again = loader(corpus, batch_size=2, sequence_length=4000, num_workers=workers)
    again.sampler.epoch, again.sampler.position = 1, 4
    if not workers:
        get = type(again.dataset).__getitem__
        monkeypatch.setattr(
            type(again.dataset), "__getitem__", lambda self, at: read.append(at) or get(self, at)
        )
    for expected in (passes[1][4:], passes[2]):
        found = list(again)
        assert names([found]) == names([expected])
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one.waves, two.waves)
    if not workers:  # nothing is decoded to be thrown away
        assert len(read) == 2 + 6 and [epoch for epoch, _ in read] == [1] * 2 + [2] * 6
    again.sampler.epoch, again.sampler.position = 0, 6  # at the end of a pass
    assert list(again) == []


def test_without_shuffling_all_passes_are_the_same(corpus):
    fixed = loader(corpus, shuffle=False, sequence_length=4000)
    one, two = list(fixed), list(fixed)
    assert [batch.names[0] for batch in one] == ["u11.flac", "u6.flac", "u1.flac"]
    assert all(torch.equal(a.waves, b.waves) for a, b in zip(one, two, strict=True))


def test_excerpts_are_inside_and_random(corpus):
    rows = read_tables(corpus / "tables", ["train"])
    data = DistillationDataset(
        data_settings(corpus / "audio", 1, sequence_length=4000), rows, min_samples=400
    )
    whole, _ = soundfile.read(corpus / "audio" / rows[0].path, dtype="float32")
    starts = set()
    for epoch in range(8):
        (wave,) = data[(epoch, 0)].waves
        assert torch.equal(data[(epoch, 0)].waves[0], wave)  # of seed, epoch and utterance alone
        assert len(wave) == 4000
        matches = np.flatnonzero(whole == wave[0].item())
        start = next(i for i in matches if np.array_equal(whole[i : i + 4000], wave.numpy()))
        starts.add(int(start))
    assert len(starts) > 4


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, [500, 1000, 2000]), (1000, [500]), (-1000, [2000])]
)
def test_max_timestep_is_s3prls(limit, kept):
    rows = [Utterance(str(n), n) for n in (500, 1000, 2000)]
    assert [row.length for row in within(rows, limit, 400)] == kept


def test_too_short_utterances_are_counted(caplog):
    rows = [Utterance(str(n), n) for n in (100, 399, 400)]
    with caplog.at_level(logging.WARNING):
        assert [row.length for row in within(rows, 0, 400)] == [400]
    assert "left out 2 utterances below 400 samples" in caplog.text
    with pytest.raises(DataError, match="no utterance is left"):
        within(rows, 50, 400)


H = "file_path,length\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1, has no column file_path"),
        ("path,length\na.flac,5\n", "line 1, has no column file_path"),
        ("file_path,label\na.flac,5\n", "line 1, has no column length"),
        ("a.flac,5\nb.flac,6\n", "line 1, has no column file_path"),
        ("length,file_path,length\n5,a.flac,5\n", "line 1, has more than one column length"),
        (H, "has no rows"),
        (H + "a.flac,5\nb.flac,\n", "line 3: 'b.flac' with length '' is not a path with a posi"),
        (H + "a.flac,-5\n", "line 2: 'a.flac' with length '-5' is not a path with a positive"),
        (H + "a.flac,0\n", "line 2: 'a.flac' with length '0' has no samples; mend"),
        (H + "a.flac,5.5\n", "line 2: 'a.flac' with length '5.5' is not"),
        (H + "a.flac,nan\n", "line 2: 'a.flac' with length 'nan' is not"),
        (H + "a.flac,-inf\n", "line 2: 'a.flac' with length '-inf' is not"),
        (H + "a.flac,1e999\n", "line 2: 'a.flac' with length '1e999' is not"),
        (H + "a.flac,many\n", "line 2: 'a.flac' with length 'many' is not"),
        (H + "a.flac,1382400001\n", "line 2: 'a.flac' with length '1382400001' would be longer"),
        (H + "a.flac,1e300\n", "line 2: 'a.flac' with length '1e300' would be longer than a day"),
        (H + ",5\n", "line 2: '' with length '5' is not a path"),
        (H + "a.flac\n", "line 2, has 1 cells; the first line names 2"),
        (H + "a.flac,5\nb.flac,5,6\n", "line 3, has 3 cells; the first line names 2"),
        (H + "a, b.flac,5\n", "line 2, has 3 cells"),
        (H + "a.flac,5\n\n./a.flac,6\n", "line 4: './a.flac' comes twice, first in line 2"),
        (H + "a/b.flac,5\nc.flac,5\na//b.flac,5\n", "line 4: 'a//b.flac' comes twice, first in"),
        (H + "/etc/passwd,5\n", "line 2: the path '/etc/passwd' is absolute; it must be relative"),
        (H + "../a.flac,5\n", "line 2: the path '../a.flac' leads upwards (..); it must stay"),
        (H + "a/../../b.flac,5\n", "line 2: the path 'a/../../b.flac' leads upwards"),
        (H + 'a.flac,5\n"b\nb.flac",5\nc.flac,x\n', "line 5: 'c.flac' with length 'x'"),
        (H + 'a.flac,5\n"b.flac,5\nc.flac,5\n', "line 4: unexpected end of data"),
        (H + f"{'a' * 200_000},5\n", "line 2: field larger than field limit"),
        (H.encode() + b"a.flac,5\n\xff.flac,5\n", "is not CSV text: line 3 is not UTF-8; make"),
        (H.encode("utf-16"), "is not CSV text: line 1 is not UTF-8"),
        (H + "a\0.flac,5\n", "line 2: "),
        (b"\0" * 500, "line 1"),
        (b"\x1f\x8b\x08" + bytes(range(256)), "is not UTF-8"),
    ],
)
def test_a_bad_table(tmp_path, text, said):
    path = tmp_path / "train.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError) as caught:
        read_table(path)
    error = str(caught.value)
    assert said in error and str(path) in error and "\n" not in error and len(error) < 800


def test_an_utterance_in_two_tables(tmp_path):
    (tmp_path / "a.csv").write_text(H + "x.flac,5\ny.flac,6\n")
    (tmp_path / "b.csv").write_text(H + "z.flac,5\n./y.flac,6\n")
    assert [row.path for row in read_tables(tmp_path, ["a"])] == ["y.flac", "x.flac"]
    with pytest.raises(DataError) as caught:
        read_tables(tmp_path, ["a", "b"])
    one, two = f"{tmp_path / 'b.csv'}, line 3: './y.flac'", f"{tmp_path / 'a.csv'}, line 3;"
    assert one in str(caught.value) and two in str(caught.value)
    with pytest.raises(DataError, match="comes twice"):
        read_tables(tmp_path, ["a", "a"])


def test_a_table_out_of_a_spreadsheet(tmp_path):
    """A byte order mark, carriage returns, empty lines, an empty cell for a label."""
    text = 'file_path,length,label\r\na.flac,5,\r\n\r\n"b ""c"".flac",6,\r\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert read_table(tmp_path / "t.csv") == [Utterance("a.flac", 5), Utterance('b "c".flac', 6)]


def test_a_table_as_s3prl_writes_it(tmp_path):
    (tmp_path / "t.csv").write_text(',file_path,length,label\n0,"a, b.flac",16000.0,\n')
    assert read_table(tmp_path / "t.csv") == [Utterance("a, b.flac", 16000)]


def test_a_missing_table_and_root(corpus, tmp_path):
    with pytest.raises(DataError, match="s3prl-ekd lengths AUDIO_FOLDER -o TABLE_FOLDER"):
        read_tables(tmp_path, ["train"])
    with pytest.raises(DataError, match="libri_root"):
        train_loader(
            data_settings(tmp_path / "none", 1, corpus / "tables"), ["train"], min_samples=400
        )


def test_stereo_is_averaged_and_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_warned", set())
    sound = make_sound(0.2, channels=2)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, sound, 16000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        wave = read_audio(tmp_path / "a.wav")
        read_audio(tmp_path / "b.wav")
    assert np.allclose(wave.numpy(), (sound[:, 0] + sound[:, 1]) / 2, atol=1e-6)
    assert caplog.text.count("has 2 channels: averaged") == 1


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_another_rate_is_resampled(tmp_path, rate, caplog, monkeypatch):
    """A 440 Hz tone keeps its pitch: the strongest frequency is found by a Fourier transform."""
    monkeypatch.setattr(audio_module, "_warned", set())
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.wav", tone, rate, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        wave = read_audio(tmp_path / "a.wav")
    assert abs(len(wave) - 16000) <= 1
    spectrum = np.abs(np.fft.rfft(wave.numpy()[:16000]))
    assert spectrum.argmax() == 440
    assert f"has {rate} Hz: resampled to 16000 Hz" in caplog.text


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
    for name, said in [
        ("missing.flac", "there is no such file"),
        ("empty.flac", "it is empty"),
        ("text.flac", "text.flac: "),
        ("none.wav", "holds no samples"),
    ]:
        with pytest.raises(DataError, match=said) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_comes_back_as_a_sentence(tmp_path, workers):
    (tmp_path / "audio").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("file_path,length\nnone.flac,16000\n")
    (batch,) = loader(tmp_path, num_workers=workers)
    assert "none.flac: there is no such file" in batch.problem and batch.names == ["none.flac"]
