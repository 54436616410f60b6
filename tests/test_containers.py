"""Files that are cut off, and headers that are wrong: tables and training decide alike."""

import io
import random
import struct

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd import cli
from s3prl_ekd.analysis.choice import choose_audio
from s3prl_ekd.analysis.sample import read_excerpt
from s3prl_ekd.data import audio as audio_module
from s3prl_ekd.data.audio import Recording, read_audio
from s3prl_ekd.data.audio_files import MAX_SAMPLES, read_header
from s3prl_ekd.data.bad_audio import BadAudio
from s3prl_ekd.data.batches import train_loader
from s3prl_ekd.data.distortion.additive import fit
from s3prl_ekd.data.distortion.sources import AudioPool, is_silent
from s3prl_ekd.data.lengths import write_length_tables
from s3prl_ekd.data.tables import Utterance, read_tables
from s3prl_ekd.distill.settings import StudentSettings
from s3prl_ekd.downstream.noise import mix
from s3prl_ekd.errors import DataError
from s3prl_ekd.pretrain.target_cache.build import cached_rows

from .conftest import data_settings, make_sound

SOUND = make_sound(1.0)
# What libsndfile reads and would take for shorter; the samples' bytes are given.
PLAIN = {
    "WAV PCM_16": 2,
    "WAV PCM_24": 3,
    "WAV FLOAT": 4,
    "WAVEX PCM_16": 2,
    "RF64 PCM_16": 2,
    "W64 PCM_16": 2,
    "AIFF PCM_16": 2,
    "AU PCM_16": 2,
    "CAF PCM_16": 2,
    "NIST PCM_16": 2,
    "NIST ULAW": 1,
}
PACKED = ("FLAC PCM_16", "FLAC PCM_24", "MP3 MPEG_LAYER_III", "OGG VORBIS", "CAF ALAC_16")


def encoded(kind, sound=SOUND, **more):
    form, subtype = kind.split()
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, 16000, format=form, subtype=subtype, **more)
    return buffer.getvalue()


@pytest.fixture
def both(tmp_path):
    """What tables and training make of some bytes called a.wav: (samples, oddity), or why not."""

    def both(data):
        path = tmp_path / "a.wav"
        path.write_bytes(data)
        try:
            with Recording(path) as recording:
                trained = recording.samples
                assert len(recording.read()) == trained
        except BadAudio as error:
            with pytest.raises(BadAudio) as refused:
                read_header(path)
            assert (refused.value.kind, refused.value.reason) == (error.kind, error.reason)
            return error.kind, error.reason
        header = read_header(path)
        assert header.samples == trained
        return trained, header.oddity

    return both


@pytest.mark.parametrize("kind", PLAIN)
def test_a_file_of_plain_samples(both, kind):
    data, size = encoded(kind), PLAIN[kind]
    assert both(data) == (16000, "")
    samples, oddity = both(data[: -300 * size])  # 19 ms
    assert 15690 <= samples <= 15700 and f"{300 * size} bytes" in oddity
    for cut in (1000 * size, len(data) // 2):
        assert both(data[:-cut])[0] in ("cut off", "not audio")
    samples, _ = both(data[:-1])
    assert samples == 15999


def test_big_endian_wav_and_little_endian_au(both):
    for kind, endian in (("WAV PCM_16", "BIG"), ("AU PCM_16", "LITTLE")):
        data = encoded(kind, endian=endian)
        assert both(data) == (16000, "")
        assert both(data[:-2000])[0] == "cut off"


@pytest.mark.parametrize("kind", PACKED)
def test_a_file_of_packed_samples(both, kind):
    data = encoded(kind)
    assert both(data)[1] == ""
    for cut in (3, len(data) // 4, len(data) // 2):
        assert both(data[:-cut])[0] in ("cut off", "not audio", "no samples")


def test_opus(both):
    data = encoded("OGG OPUS", np.tile(SOUND, 5))
    assert both(data) == (80000, "")
    last = data.rindex(b"OggS")
    assert both(data[: last + 20])[0] in ("cut off", "not audio")
    samples, oddity = both(data[:last])  # between two pages, where nothing is missing for certain
    assert 0 < samples < 80000 and "may be cut off" in oddity


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), bytes(5000)])
@pytest.mark.parametrize("kind", ["WAV PCM_16", "FLAC PCM_16", "OGG VORBIS"])
def test_what_follows_a_whole_file_is_no_fault(both, kind, tail):
    assert both(encoded(kind) + tail) == (16000, "")


@pytest.mark.parametrize("kind", ["WAV PCM_16", "FLAC PCM_16"])
def test_a_tag_before_a_file(both, kind):
    tag = b"ID3\x03\0\0\0\0\1\0" + bytes(128)
    data = tag + encoded(kind)
    assert both(data) == (16000, "")
    assert both(data[:-2000])[0] == "cut off"


def with_data_size(size):
    data = encoded("WAV PCM_16")
    return data[:40] + struct.pack("<I", size) + data[44:]


@pytest.mark.parametrize("more", [1, 4, 36, 44, 800])
def test_a_data_chunk_that_claims_a_few_bytes_too_many(both, more):
    samples, oddity = both(with_data_size(32000 + more))
    assert samples == 16000 and f"announces {more} bytes more" in oddity
    assert both(with_data_size(32000 + 900))[0] == "cut off"


@pytest.mark.parametrize("size", [2**32 - 1, 2**32 - 45, 2**31 - 1, 2**31, 0x7FFFF000])
def test_a_size_of_a_pipe(both, size):
    assert both(with_data_size(size)) == (16000, "")


@pytest.mark.parametrize("size", [10**9, 3 * 10**9])
def test_a_large_size_that_is_not_of_a_pipe(both, size):
    assert both(with_data_size(size))[0] == "cut off"


def test_a_header_that_was_never_finished(both):
    kind, reason = both(with_data_size(0))
    assert kind == "no samples" and "32000 bytes follow" in reason
    kind, reason = both(encoded("WAV PCM_16", SOUND[:0]))
    assert kind == "no samples" and "follow" not in reason


def test_an_odd_chunk_before_the_samples(both):
    data = encoded("WAV PCM_16")
    junk = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # a chunk of odd size is padded
    assert both(data[:36] + junk + data[36:]) == (16000, "")
    assert both(data[:36] + junk + data[36:-2000])[0] == "cut off"


def test_mp3_in_a_wav(both):
    payload = encoded("MP3 MPEG_LAYER_III")
    extra = struct.pack("<HIHHH", 1, 2, 144, 1, 1393)
    form = struct.pack("<HHIIHHH", 0x55, 1, 16000, 2000, 1, 0, len(extra)) + extra
    chunks = [(b"fmt ", form), (b"fact", struct.pack("<I", 16000)), (b"data", payload)]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(x)) + x for name, x in chunks)
    kind, reason = both(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert kind == "MP3 in a WAV" and "convert it to FLAC" in reason


def test_mp3_without_an_index(both):
    data = encoded("MP3 MPEG_LAYER_III", np.tile(SOUND, 3))
    samples, oddity = both(data[data.index(data[:2], 40) :])  # the first frame is the index
    assert "estimate" in oddity and 0 < samples


def test_a_container_that_does_not_say(both):
    kind, reason = both(encoded("IRCAM PCM_16"))
    assert kind == "not audio" and "IRCAM" in reason


def test_rates_that_training_refuses_are_in_no_table(both):
    buffer = io.BytesIO()
    soundfile.write(buffer, SOUND, 15999, format="WAV")
    assert both(buffer.getvalue())[0] == "rate"


def lying_flac(samples=2**36 - 1):
    data = encoded("FLAC PCM_16")
    (known,) = struct.unpack(">Q", data[18:26])
    return data[:18] + struct.pack(">Q", known & ~(2**36 - 1) | samples) + data[26:]


@pytest.fixture
def corpus(tmp_path):
    """Three files, one of which has a header that lies, and a table that believes it."""
    root = tmp_path / "audio"
    root.mkdir()
    for name in "ab":
        (root / f"{name}.flac").write_bytes(encoded("FLAC PCM_16"))
    (root / "lies.flac").write_bytes(lying_flac())
    (tmp_path / "tables").mkdir()
    rows = f"lies.flac,{2**36 - 1}\na.flac,16000\nb.flac,16000\nnone.flac,0\n"
    (tmp_path / "tables/train.csv").write_text(f"file_path,length\n{rows}")
    return root


@pytest.mark.parametrize("samples", [2**36 - 1, 16001, MAX_SAMPLES + 1])
def test_a_flac_that_announces_more_than_it_has(both, samples):
    assert both(lying_flac(samples))[0] == "cut off"


def test_lengths_leaves_a_lying_header_out(corpus, tmp_path, capsys):
    assert cli.main(["lengths", str(corpus), "-o", str(tmp_path / "new")]) == 0
    assert "left out: 1 (lies.flac)" in capsys.readouterr().out
    assert {row.path for row in read_tables(tmp_path / "new", ["audio"])} == {"a.flac", "b.flac"}


def test_a_table_with_a_lying_header(corpus, tmp_path):
    data = data_settings(corpus, 2, tmp_path / "tables")
    skipping = data_settings(corpus, 2, tmp_path / "tables", on_bad_audio="skip")
    with pytest.raises(DataError, match=r"train.csv, line 2: 'lies.flac' .*on_bad_audio='skip'"):
        train_loader(data, ["train"], min_samples=400)
    loader = train_loader(skipping, ["train"], min_samples=400)
    assert [batch.names for batch in loader] == [["a.flac", "b.flac"]]
    assert [bad.path for bad in loader.dataset.left_out] == ["lies.flac", "none.flac"]
    assert all("table" in bad.reason for bad in loader.dataset.left_out)


def test_other_commands_with_such_a_table(corpus, tmp_path, caplog):
    paths = choose_audio(tmp_path / "tables/train.csv", corpus, 9)
    assert [path.name for path in paths] == ["a.flac", "b.flac"] and "left out 2" in caplog.text
    data = data_settings(corpus, 2, tmp_path / "tables", on_bad_audio="skip")
    rows = cached_rows(data, StudentSettings())
    assert rows == [Utterance("a.flac", 16000), Utterance("b.flac", 16000)]


def test_a_table_of_nothing_but_lying_headers(tmp_path):
    (tmp_path / "t.csv").write_text("file_path,length\na.flac,0\n")
    with pytest.raises(DataError, match="t.csv has no rows that can be used: 'a.flac': its table"):
        read_tables(tmp_path, ["t"], [])


def test_a_day_is_the_limit(both):
    silence = np.zeros(1, np.float32)
    data = encoded("WAV PCM_16", silence)
    header = struct.pack("<I", 8000) + data[28:]  # of 8 kHz: more than a day is half as many
    assert both(data[:24] + header)[0] == 2
    assert MAX_SAMPLES == 24 * 3600 * 16000


def test_what_is_borne_is_counted_in_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_warned", set())
    (tmp_path / "audio").mkdir()
    for name in "abc":
        (tmp_path / f"audio/{name}.wav").write_bytes(with_data_size(32044 - 44 * (name == "c")))
    write_length_tables(tmp_path / "audio", tmp_path / "out")
    lines = [each for each in caplog.messages if "may lack their end" in each]
    assert len(lines) == 1 and lines[0].startswith("2 of 3 files") and "a.wav" in lines[0]
    caplog.clear()
    for name in "abc":
        read_audio(tmp_path / f"audio/{name}.wav")
    assert len([each for each in caplog.messages if "44 bytes more" in each]) == 1


@pytest.fixture
def strange(tmp_path):
    """A constant, a wave far out of range, and one that is as it should be."""
    soundfile.write(tmp_path / "dc.wav", np.full(16000, -0.5), 16000)
    soundfile.write(tmp_path / "loud.wav", SOUND * 1e30, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "good.wav", SOUND, 16000)
    return tmp_path


def test_a_constant_and_a_loud_file(strange, caplog):
    with pytest.raises(BadAudio) as refused:
        read_audio(strange / "dc.wav", speech=True)
    assert refused.value.kind == "silent" and len(read_audio(strange / "dc.wav")) == 16000
    for speech in (True, False):
        with pytest.raises(BadAudio) as refused:
            read_audio(strange / "loud.wav", speech=speech)
        assert refused.value.kind == "out of range"
    # layers and units
    used = [read_excerpt(strange / f"{name}.wav") for name in ("dc", "loud", "good")]
    assert [wave is None for wave in used] == [True, True, False]
    assert caplog.text.count("left out") == 2 and "dc.wav" in caplog.text


def test_a_constant_is_no_noise(strange, caplog):
    pool = AudioPool("noises", strange, ["dc.wav", "good.wav"])
    draws = [pool.draw(random.Random(seed)) for seed in range(8)]
    assert all(torch.equal(draw, draws[0]) for draw in draws) and "dc.wav" in caplog.text
    noises = [torch.full((9,), 0.3), torch.zeros(9)]
    with pytest.raises(DataError):
        mix(draws[0], noises, snr=5)
    assert not is_silent(torch.ones(1))  # an impulse response of one sample
    crop = fit(torch.cat([torch.full((900,), 0.3), draws[0][:100]]), 100, random.Random(1))
    assert not is_silent(crop)
