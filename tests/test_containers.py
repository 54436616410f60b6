"""Truncated files and wrong headers: length tables and training accept the same files."""

import io
import random
import re
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
from s3prl_ekd.data.distortion.additive import crop_or_loop
from s3prl_ekd.data.distortion.sources import AudioPool, is_silent
from s3prl_ekd.data.lengths import write_length_tables
from s3prl_ekd.data.tables import Utterance, read_tables
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.downstream.noise import mix
from s3prl_ekd.errors import DataError
from s3prl_ekd.pretrain.target_cache.build import cached_rows

from .conftest import data_settings, make_sound

SOUND = make_sound(1.0)
# Format -> bytes of a sample, for formats of which libsndfile accepts truncated files.
UNCOMPRESSED = {
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
COMPRESSED = ("FLAC PCM_16", "FLAC PCM_24", "MP3 MPEG_LAYER_III", "OGG VORBIS", "CAF ALAC_16")


def encoded(encoding, sound=SOUND, **more):
    form, subtype = encoding.split()
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, 16000, format=form, subtype=subtype, **more)
    return buffer.getvalue()


@pytest.fixture
def opened(tmp_path):
    """A function that opens the bytes of a file as training and as length tables do.

    It returns (samples, warning), or (kind, reason) of the error; opened must agree.
    """

    def opened(data):
        path = tmp_path / "a.wav"
        path.write_bytes(data)
        try:
            with Recording(path) as recording:
                samples = recording.samples
                assert len(recording.read()) == samples
        except BadAudio as error:
            with pytest.raises(BadAudio) as header_error:
                read_header(path)
            assert header_error.value.kind == error.kind
            assert header_error.value.reason == error.reason
            return error.kind, error.reason
        header = read_header(path)
        assert header.samples == samples
        return samples, header.warning

    return opened


@pytest.mark.parametrize("encoding", UNCOMPRESSED)
def test_uncompressed_files(opened, encoding):
    data, size = encoded(encoding), UNCOMPRESSED[encoding]
    assert opened(data) == (16000, "")
    samples, warning = opened(data[: -300 * size])  # 19 ms
    assert 15690 <= samples <= 15700 and f"{300 * size} bytes" in warning
    for cut in (1000 * size, len(data) // 2):
        assert opened(data[:-cut])[0] in ("cut off", "not audio")
    samples, _ = opened(data[:-1])
    assert samples == 15999


def test_big_endian_wav_and_little_endian_au(opened):
    for encoding, endian in (("WAV PCM_16", "BIG"), ("AU PCM_16", "LITTLE")):
        data = encoded(encoding, endian=endian)
        assert opened(data) == (16000, "")
        assert opened(data[:-2000])[0] == "cut off"


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_compressed_files(opened, encoding):
    data = encoded(encoding)
    assert opened(data)[1] == ""
    for cut in (3, len(data) // 4, len(data) // 2):
        assert opened(data[:-cut])[0] in ("cut off", "not audio", "no samples")


def test_opus(opened):
    data = encoded("OGG OPUS", np.tile(SOUND, 5))
    assert opened(data) == (80000, "")
    last_page = data.rindex(b"OggS")
    assert opened(data[: last_page + 20])[0] in ("cut off", "not audio")
    samples, warning = opened(data[:last_page])  # truncated between two pages
    assert 0 < samples < 80000 and warning


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), bytes(5000)])
@pytest.mark.parametrize("encoding", ["WAV PCM_16", "FLAC PCM_16", "OGG VORBIS"])
def test_bytes_after_a_complete_file_are_ignored(opened, encoding, tail):
    assert opened(encoded(encoding) + tail) == (16000, "")


@pytest.mark.parametrize("encoding", ["WAV PCM_16", "FLAC PCM_16"])
def test_an_id3_tag_before_a_file(opened, encoding):
    tag = b"ID3\x03\0\0\0\0\1\0" + bytes(128)
    data = tag + encoded(encoding)
    assert opened(data) == (16000, "")
    assert opened(data[:-2000])[0] == "cut off"


def with_data_size(size):
    data = encoded("WAV PCM_16")
    return data[:40] + struct.pack("<I", size) + data[44:]


@pytest.mark.parametrize("more", [1, 4, 36, 44, 800])
def test_a_data_size_that_is_slightly_too_large(opened, more):
    samples, warning = opened(with_data_size(32000 + more))
    assert samples == 16000 and f"{more} bytes" in warning
    assert opened(with_data_size(32000 + 900))[0] == "cut off"


@pytest.mark.parametrize("size", [2**32 - 1, 2**32 - 45, 2**31 - 1, 2**31, 0x7FFFF000])
def test_a_data_size_written_to_a_pipe(opened, size):
    assert opened(with_data_size(size)) == (16000, "")


@pytest.mark.parametrize("size", [10**9, 3 * 10**9])
def test_a_data_size_that_is_much_too_large(opened, size):
    assert opened(with_data_size(size))[0] == "cut off"


def test_a_data_size_of_zero(opened):
    kind, reason = opened(with_data_size(0))
    assert kind == "no samples" and "32000 bytes" in reason
    kind, reason = opened(encoded("WAV PCM_16", SOUND[:0]))
    assert kind == "no samples" and "bytes" not in reason


def test_an_odd_chunk_before_the_samples(opened):
    data = encoded("WAV PCM_16")
    junk = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # chunks of odd size are padded
    assert opened(data[:36] + junk + data[36:]) == (16000, "")
    assert opened(data[:36] + junk + data[36:-2000])[0] == "cut off"


def test_mp3_in_a_wav(opened):
    payload = encoded("MP3 MPEG_LAYER_III")
    extra = struct.pack("<HIHHH", 1, 2, 144, 1, 1393)
    form = struct.pack("<HHIIHHH", 0x55, 1, 16000, 2000, 1, 0, len(extra)) + extra
    chunks = [(b"fmt ", form), (b"fact", struct.pack("<I", 16000)), (b"data", payload)]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(x)) + x for name, x in chunks)
    kind, reason = opened(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert kind == "MP3 in a WAV" and "FLAC" in reason


def test_mp3_without_an_index(opened):
    data = encoded("MP3 MPEG_LAYER_III", np.tile(SOUND, 3))
    samples, warning = opened(data[data.index(data[:2], 40) :])  # the first frame is the index
    assert "index" in warning and 0 < samples


def test_a_container_without_a_data_size(opened):
    kind, reason = opened(encoded("IRCAM PCM_16"))
    assert kind == "not audio" and "IRCAM" in reason


def test_an_unsupported_rate(opened):
    buffer = io.BytesIO()
    soundfile.write(buffer, SOUND, 15999, format="WAV")
    assert opened(buffer.getvalue())[0] == "rate"


def flac_with_length(samples=2**36 - 1):
    """A FLAC file of 1 s with another number of samples in its header."""
    data = encoded("FLAC PCM_16")
    (stream_info,) = struct.unpack(">Q", data[18:26])
    return data[:18] + struct.pack(">Q", stream_info & ~(2**36 - 1) | samples) + data[26:]


@pytest.fixture
def corpus(tmp_path):
    """Three files, one with a wrong length in its header, and a table made from these headers."""
    root = tmp_path / "audio"
    root.mkdir()
    for name in "ab":
        (root / f"{name}.flac").write_bytes(encoded("FLAC PCM_16"))
    (root / "wrong.flac").write_bytes(flac_with_length())
    (tmp_path / "tables").mkdir()
    rows = f"wrong.flac,{2**36 - 1}\na.flac,16000\nb.flac,16000\nnone.flac,0\n"
    (tmp_path / "tables/train.csv").write_text(f"file_path,length\n{rows}")
    return root


@pytest.mark.parametrize("samples", [2**36 - 1, 16001, MAX_SAMPLES + 1])
def test_a_flac_with_too_large_a_length(opened, samples):
    assert opened(flac_with_length(samples))[0] == "cut off"


def test_lengths_leaves_out_a_wrong_header(corpus, tmp_path, capsys):
    assert cli.main(["length-tables", str(corpus), "-o", str(tmp_path / "new")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "wrong.flac" in line]
    assert re.search(r"\b1\b", line) and "skipped.txt" in line
    assert {row.path for row in read_tables(tmp_path / "new", ["audio"])} == {"a.flac", "b.flac"}


def test_a_table_with_impossible_lengths(corpus, tmp_path):
    data = data_settings(corpus, 2, tmp_path / "tables")
    skipping = data_settings(corpus, 2, tmp_path / "tables", on_bad_audio="skip")
    with pytest.raises(DataError, match=r"train.csv: line 2: 'wrong.flac' .*on_bad_audio='skip'"):
        train_loader(data, ["train"], min_samples=400)
    loader = train_loader(skipping, ["train"], min_samples=400)
    assert [batch.names for batch in loader] == [["a.flac", "b.flac"]]
    assert [bad.path for bad in loader.dataset.left_out] == ["wrong.flac", "none.flac"]
    assert all(bad.kind == "length" for bad in loader.dataset.left_out)


def test_other_commands_with_impossible_lengths(corpus, tmp_path, caplog):
    paths = choose_audio(tmp_path / "tables/train.csv", corpus, 9)
    assert [part.path.name for part in paths] == ["a.flac", "b.flac"]
    assert any("wrong.flac" in m and re.search(r"\b2\b", m) for m in caplog.messages)
    data = data_settings(corpus, 2, tmp_path / "tables", on_bad_audio="skip")
    rows = cached_rows(data, StudentSettings().min_samples)
    assert rows == [Utterance("a.flac", 16000), Utterance("b.flac", 16000)]


def test_a_table_with_impossible_lengths_only(tmp_path):
    (tmp_path / "t.csv").write_text("file_path,length\na.flac,0\n")
    with pytest.raises(DataError, match="t.csv.*'a.flac'"):
        read_tables(tmp_path, ["t"], [])


def test_the_longest_file_is_a_day(opened):
    silence = np.zeros(1, np.float32)
    data = encoded("WAV PCM_16", silence)
    header = struct.pack("<I", 8000) + data[28:]  # 8 kHz: one sample is two at 16 kHz
    assert opened(data[:24] + header)[0] == 2
    assert MAX_SAMPLES == 24 * 3600 * 16000


def test_one_warning_for_all_files_that_may_be_truncated(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_warned", set())
    (tmp_path / "audio").mkdir()
    for name in "abc":
        (tmp_path / f"audio/{name}.wav").write_bytes(with_data_size(32044 - 44 * (name == "c")))
    write_length_tables(tmp_path / "audio", tmp_path / "out")
    (warning,) = [message for message in caplog.messages if "a.wav" in message]
    assert re.search(r"\b2\b.*\b3\b", warning) and "44 bytes" in warning
    caplog.clear()
    for name in "abc":
        read_audio(tmp_path / f"audio/{name}.wav")
    assert len([message for message in caplog.messages if "44 bytes" in message]) == 1


@pytest.fixture
def unusual(tmp_path):
    """A constant waveform, one far out of range, and a normal one."""
    soundfile.write(tmp_path / "dc.wav", np.full(16000, -0.5), 16000)
    soundfile.write(tmp_path / "loud.wav", SOUND * 1e30, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "good.wav", SOUND, 16000)
    return tmp_path


def test_a_constant_and_a_loud_file(unusual, caplog):
    with pytest.raises(BadAudio) as error:
        read_audio(unusual / "dc.wav", speech=True)
    assert error.value.kind == "silent" and len(read_audio(unusual / "dc.wav")) == 16000
    for speech in (True, False):
        with pytest.raises(BadAudio) as error:
            read_audio(unusual / "loud.wav", speech=speech)
        assert error.value.kind == "out of range"
    # as the commands that compare layers and crop_or_loop units read it
    excerpts = [read_excerpt(unusual / f"{name}.wav") for name in ("dc", "loud", "good")]
    assert [wave is None for wave in excerpts] == [True, True, False]
    for name in ("dc", "loud", "good"):
        warnings = [message for message in caplog.messages if f"{name}.wav" in message]
        assert len(warnings) == (name != "good")


def test_a_constant_file_is_not_used_as_noise(unusual, caplog):
    pool = AudioPool("noises", unusual, ["dc.wav", "good.wav"])
    draws = [pool.draw(random.Random(seed)) for seed in range(8)]
    assert all(torch.equal(draw, draws[0]) for draw in draws) and "dc.wav" in caplog.text
    noises = [torch.full((9,), 0.3), torch.zeros(9)]
    with pytest.raises(DataError):
        mix(draws[0], noises, snr=5)
    assert not is_silent(torch.ones(1))  # an impulse response of one sample
    crop = crop_or_loop(torch.cat([torch.full((900,), 0.3), draws[0][:100]]), 100, random.Random(1))
    assert not is_silent(crop)
