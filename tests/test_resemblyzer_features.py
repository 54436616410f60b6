"""tools/resemblyzer_features.py on a wheel with random weights."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from s3prl_ekd.pretrain.target_cache.build import CachedWaves
from s3prl_ekd.teachers.stored import StoredStates
from tools import resemblyzer_features as tool

from .conftest import CreatesFolder, write_configs

pytestmark = pytest.mark.slow


@pytest.fixture
def lstm():
    torch.manual_seed(0)
    return nn.LSTM(40, 256, 3, batch_first=True)  # as in resemblyzer/voice_encoder.py


@pytest.fixture
def wheel(tmp_path, lstm):
    return write_wheel(tmp_path, {f"lstm.{name}": w for name, w in lstm.state_dict().items()})


def write_wheel(folder, weights):
    torch.save({"step": 1, "model_state": weights}, folder / "pretrained.pt")
    with zipfile.ZipFile(folder / "encoder.whl", "w") as archive:
        archive.write(folder / "pretrained.pt", "resemblyzer/pretrained.pt")
    return folder / "encoder.whl"


def wave(samples=16000):
    return 0.01 * torch.randn(samples, generator=torch.Generator().manual_seed(0))


def test_a_tone_is_in_the_mel_channel_of_its_frequency():
    """librosa's mel scale is linear below 1000 Hz, 200/3 Hz a mel, and then logarithmic, 27 mels
    for a factor of 6.4; 40 channels are equally far apart up to 8000 Hz."""
    highest = 15 + 27 * math.log(8) / math.log(6.4)
    time = torch.arange(16000) / 16000
    for hertz, mel in ((500, 7.5), (1000, 15), (6400, 42)):
        power = tool.mel_spectrogram(torch.sin(2 * math.pi * hertz * time))
        assert power.shape == (101, 40)
        channel = mel / highest * 41 - 1  # of 42 edges, channel i is centred at edge i + 1
        assert abs(power[50].argmax() - channel) <= 1


def test_a_power_spectrum_is_that_of_a_loop(lstm):
    samples, window = wave(2000).double().numpy(), np.hanning(401)[:400]
    padded = np.pad(samples, 200)
    frames = [abs(np.fft.rfft(padded[160 * i : 160 * i + 400] * window)) ** 2 for i in range(13)]
    expected = torch.from_numpy(np.stack(frames)).float() @ tool.mel_filters()
    torch.testing.assert_close(tool.mel_spectrogram(wave(2000)), expected, rtol=1e-3, atol=1e-8)


def test_the_last_layer_is_that_of_one_lstm_of_three_layers(wheel, lstm):
    output = tool.load_encoder(wheel)(wave())
    assert output.shape == (3, 49, 256)  # (16000 - 400) // 320 + 1 frames
    with torch.no_grad():
        loud = tool.raise_loudness(wave())
        expected = lstm(tool.mel_spectrogram(loud)[None])[0][0]
    torch.testing.assert_close(output[2], expected[1:98:2], rtol=1e-4, atol=1e-6)


def test_quiet_waveforms_are_raised_to_30_dB_below_full_scale():
    assert tool.raise_loudness(wave()).square().mean().log10() * 10 == pytest.approx(-30, abs=1e-3)
    assert torch.equal(tool.raise_loudness(100 * wave()), 100 * wave())


def test_projected_frames_have_variance_one_on_average_and_one_scale():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 256, 256, generator=generator)
    states = torch.randn(3, 4000, 256, generator=generator) @ mix + 5
    projection = tool.fit_projection(states)
    projected = tool.project(states, projection)
    assert projected.shape == (3, 4000, 192)
    for layer, matrix in zip(projected, projection["matrix"], strict=True):
        covariance = layer.T @ layer / 4000
        assert covariance.diagonal().mean() == pytest.approx(1, abs=1e-3)
        assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-2
        lengths = matrix.norm(dim=0)
        torch.testing.assert_close(lengths, lengths[:1].expand(192), rtol=1e-4, atol=0)


def test_the_command_stores_every_waveform_once(wheel, tmp_path, teachers, corpus, capsys):
    write_configs(tmp_path, teachers, corpus)
    config, out = tmp_path / "runner.yaml", tmp_path / "states"
    argv = [str(wheel), "-c", str(config), "-o", str(out), "--sample", "4"]
    assert tool.main(argv) == 0
    waves = [wave for _, wave in CachedWaves(config)]
    stored = StoredStates(out)
    assert len(waves) > 5 and all(wave in stored for wave in waves)
    projection = (out / "projection.safetensors").read_bytes()
    listed = (out / "stored_states.txt").read_text().split()
    capsys.readouterr()
    (path,) = [out / f"{key[:2]}/{key[2:]}.safetensors" for key in listed[:1]]
    path.unlink()
    assert tool.main(argv) == 0
    assert capsys.readouterr().out.startswith("1 of ") and path.is_file()
    assert (out / "projection.safetensors").read_bytes() == projection
    assert torch.equal(StoredStates(out).digest, stored.digest)  # the same bytes again


def test_another_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.whl").write_bytes(b"no zip")
    assert tool.main([str(tmp_path / "x.whl"), "-c", "x", "-o", "y"]) == 2
    error = capsys.readouterr().err
    assert "x.whl" in error and "pip download" in error and error.count("\n") == 1


def test_code_in_the_wheel_is_not_run(tmp_path, capsys):
    wheel = write_wheel(tmp_path, CreatesFolder(tmp_path / "touched"))
    assert tool.main([str(wheel), "-c", "x", "-o", "y"]) == 2
    assert not (tmp_path / "touched").exists()
