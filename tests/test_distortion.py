"""Each kind of distortion, compared with an independent computation."""

import dataclasses
import math
import random

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.compat.torchaudio_functional import functional
from s3prl_ekd.data.distortion import convolutive
from s3prl_ekd.data.distortion.additive import babble, crop_or_loop, gaussian, mix_at_snr
from s3prl_ekd.data.distortion.pipeline import Distorter
from s3prl_ekd.data.distortion.settings import DistortionSettings
from s3prl_ekd.data.distortion.sources import AudioPool

from .conftest import make_sound
from .distortions import RATE, only


def power(samples) -> float:
    return float(np.mean(np.asarray(samples, np.float64) ** 2))


def snr_of(clean, noisy) -> float:
    clean, noisy = np.asarray(clean, np.float64), np.asarray(noisy, np.float64)
    return 10 * math.log10(power(clean) / power(noisy - clean))


def tone(hertz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


@pytest.mark.parametrize("snr", [-5.0, 0.0, 10.0, 19.0])
@pytest.mark.parametrize("level", [1.0, 1e-4])
def test_the_snr_is_exact(snr, level):
    wave = level * torch.from_numpy(make_sound(1.0, seed=1))
    noise = torch.from_numpy(make_sound(1.0, seed=2))
    # float32 rounding of the sum is also noise, at about -140 dB relative to the wave.
    assert snr_of(wave, mix_at_snr(wave, noise, snr)) == pytest.approx(snr, abs=1e-4)


def test_a_silent_waveform_stays_silent():
    assert mix_at_snr(torch.zeros(500), torch.ones(500), 10.0).abs().max() == 0


def test_a_long_noise_is_cropped_and_a_short_one_looped():
    noise = torch.arange(1.0, 11.0)
    starts = set()
    for seed in range(40):
        crop = crop_or_loop(noise, 4, random.Random(seed)).tolist()
        assert crop == list(range(int(crop[0]), int(crop[0]) + 4))
        starts.add(crop[0])
        loop = crop_or_loop(noise, 25, random.Random(seed)).tolist()
        assert loop == [(int(loop[0]) - 1 + i) % 10 + 1 for i in range(25)]
    assert starts == set(range(1, 8))  # every start of 4 samples in 10
    silent_start = torch.cat([torch.zeros(1000), torch.ones(3)])
    assert all(crop_or_loop(silent_start, 5, random.Random(seed)).sum() > 0 for seed in range(20))


def test_gaussian_noise_is_white_and_normal():
    noise = gaussian(200_000, random.Random(1)).double().numpy()
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1  # the fourth moment of a normal variable
    bands = (np.abs(np.fft.rfft(noise)) ** 2)[1:100_001].reshape(10, -1).mean(1)
    assert bands.max() / bands.min() < 1.06
    assert np.array_equal(noise, gaussian(200_000, random.Random(1)).double().numpy())


def test_babble_excludes_the_utterance_itself(tmp_path):
    """With one other utterance, babble of two voices is twice that one, scaled to power 1."""
    for i, name in enumerate("ab"):
        soundfile.write(tmp_path / f"{name}.wav", make_sound(0.1, seed=i), RATE, subtype="FLOAT")
    pool = AudioPool("babble", tmp_path, ["a.wav", "b.wav"])
    other, _ = soundfile.read(tmp_path / "b.wav", dtype="float32")
    for seed in range(6):
        sound = babble(pool, 2, 1600, random.Random(seed), exclude="a.wav")
        assert np.allclose(sound, 2 * other / math.sqrt(power(other)), atol=1e-5)


def test_reverberation_equals_a_convolution_by_numpy():
    wave = torch.from_numpy(make_sound(0.5, seed=3))
    impulse = 0.05 * torch.from_numpy(make_sound(0.2, seed=4))
    impulse[40] = 1.0
    wet = convolutive.reverberate(wave, impulse).numpy()
    expected = np.convolve(wave.double(), impulse[40:].double())[: len(wave)]
    expected *= math.sqrt(power(wave) / power(expected))
    assert wet.shape == wave.shape and np.allclose(wet, expected, atol=1e-5)
    assert power(wet) == pytest.approx(power(wave), rel=1e-4)


def test_a_late_direct_path_causes_no_delay():
    wave = torch.from_numpy(make_sound(0.3, seed=5))
    late = torch.zeros(900)
    late[700] = -0.5
    assert torch.allclose(convolutive.reverberate(wave, late), -wave, atol=1e-6)


@pytest.mark.parametrize("rt60", [0.2, 0.8])
def test_a_simulated_room_has_the_given_rt60_and_drr(rt60):
    """Schroeder's backward integral falls by 60 dB in rt60; the slope of its first half is used."""
    room = convolutive.simulate_impulse(rt60, drr=6.0, seed=7).double().numpy()
    assert len(room) == round(rt60 * RATE) and room[0] == 1
    assert 10 * math.log10(1 / (room[1:] ** 2).sum()) == pytest.approx(6.0, abs=1e-3)
    decay = 10 * np.log10(np.cumsum(room[:0:-1] ** 2)[::-1])
    half = len(decay) // 2
    slope = (decay[half] - decay[0]) / (half / RATE)
    assert slope * rt60 == pytest.approx(-60, abs=3)


@pytest.mark.parametrize("cents", [-500, -213, -20, 0, 40, 300, 500])
def test_a_tone_is_shifted_by_the_given_cents(cents):
    shifted = convolutive.shift_pitch(tone(440, 2.0), cents).numpy()
    assert shifted.shape == (32000,)
    middle = shifted[4000:28000] * np.hanning(24000)
    hertz = np.abs(np.fft.rfft(middle, 2**20)).argmax() * RATE / 2**20
    before, after = convolutive.vocoder_lengths(cents)
    assert abs(1200 * math.log2(hertz / 440 * after / before)) < 2  # error of the phase vocoder
    assert abs(1200 * math.log2(hertz / 440) - cents) < 9 + 2
    assert 0.9 < power(middle) / power(tone(440, 2.0)[4000:28000] * np.hanning(24000)) < 1.1


@pytest.mark.parametrize("cents", [-2400, -700, -90, 60, 480, 2400])
def test_the_phase_vocoder_equals_loops_over_windows_and_bins(cents):
    """In double precision; the phase of each bin is followed by its own frequency."""
    wave = gaussian(1500, random.Random(4)).double().numpy()
    before, after = convolutive.vocoder_lengths(cents)
    hop = max(hop for hop in (16, 32, 64, 128) if 2.5 * hop <= after)
    padded = np.concatenate([np.zeros(before // 2), wave, np.zeros(before + hop)])
    total, weight = np.zeros(len(wave) + 3 * after), np.zeros(len(wave) + 3 * after)
    windows = [np.sin(np.pi * np.arange(n) / n) ** 2 for n in (before, after)]
    phase, old = None, None
    for start in range(0, len(wave) + hop, hop):
        spectrum = np.fft.rfft(padded[start : start + before] * windows[0])
        new = np.zeros(after // 2 + 1, complex)
        angles = np.angle(spectrum)
        phase = angles.copy() if phase is None else phase
        for k in range(min(len(new), len(spectrum))):
            if old is not None:
                cycles = k * hop / before  # of the bin's centre
                turns = (angles[k] - old[k]) / (2 * np.pi)
                turns += round(cycles - turns)  # the whole turns that bring it closest
                phase[k] += 2 * np.pi * turns * before / after
            new[k] = abs(spectrum[k]) * np.exp(1j * phase[k]) * after / before
        old = angles
        total[start : start + after] += np.fft.irfft(new, after) * windows[1]
        weight[start : start + after] += windows[1] ** 2
    expected = (total / np.maximum(weight, 1e-6))[after // 2 :][: len(wave)]
    shifted = convolutive.shift_pitch(torch.from_numpy(wave).float(), cents)
    assert np.abs(shifted.numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_every_pitch_shift_is_fast_and_close():
    """FFTs of lengths with large prime factors take several times as long."""
    for cents in range(-500, 501):
        lengths = convolutive.vocoder_lengths(cents)
        assert abs(1200 * math.log2(lengths[0] / lengths[1]) - cents) <= 9
        for length in lengths:
            for prime in (2, 3, 5, 7, 11):
                while length % prime == 0:
                    length //= prime
            assert length == 1


@pytest.mark.parametrize("length", [1, 399, 5000])
@pytest.mark.parametrize("ringing", [1, 2, 700, 4096, 5000])
def test_convolution_in_blocks_equals_numpy(length, ringing):
    wave, impulse = (gaussian(n, random.Random(n)) for n in (length, ringing))
    expected = np.convolve(wave.double(), impulse.double())[:length]
    result = convolutive.convolve(wave, impulse).numpy()
    assert result.shape == (length,) and np.abs(result - expected).max() < 1e-4


@pytest.mark.parametrize(("centre", "width"), [(250, 100), (1000, 500), (3000, 1000), (6000, 100)])
def test_the_band_is_rejected(centre, width):
    noise = gaussian(4 * RATE, random.Random(2))
    out = convolutive.reject_band(noise, centre, width).numpy()
    power_in, power_out = (np.abs(np.fft.rfft(x)) ** 2 for x in (noise.numpy(), out))
    hertz = np.fft.rfftfreq(4 * RATE, 1 / RATE)

    def decibels(low, high):
        inside = (hertz >= low) & (hertz < high)
        return 10 * math.log10(power_out[inside].sum() / power_in[inside].sum())

    assert decibels(centre - width / 20, centre + width / 20) < -15
    assert decibels(centre - width / 3, centre + width / 3) < -6
    for hertz_outside in (centre / 4, centre + 3 * width):
        if hertz_outside + 50 < 8000:
            assert -1.5 < decibels(hertz_outside - 50, hertz_outside + 50) < 0.2


@pytest.mark.parametrize(("centre", "width"), [(300, 100), (1500, 1000), (6000, 400)])
def test_the_band_has_the_given_width(centre, width):
    impulse = torch.zeros(RATE)
    impulse[0] = 1
    gain = np.abs(np.fft.rfft(convolutive.reject_band(impulse, centre, width).numpy()))
    assert gain[centre] < 1e-3  # a bin is 1 Hz
    assert (gain < math.sqrt(0.5)).sum() == pytest.approx(width, abs=2)


@pytest.mark.parametrize(("centre", "width"), [(200, 100), (200, 1000), (2500, 300), (6000, 100)])
def test_the_band_filter_equals_that_of_torchaudio(centre, width):
    """Convolution with the impulse response, compared with the filter run on the waveform."""
    wave = gaussian(2500, random.Random(3)) * 0.1
    # its Q is that of the analogue filter; the bilinear transform narrows the band
    angle, half = 2 * math.pi * centre / RATE, math.pi * width / RATE
    quality = math.sin(angle) / (2 * math.tan(half))
    slow = functional.bandreject_biquad(wave.double(), RATE, centre, quality).float()
    assert torch.allclose(convolutive.reject_band(wave, centre, width), slow, atol=1e-6)


@pytest.mark.parametrize("length", [400, 1601, 24000])
@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("additive", "noise"),
        ("additive", "gaussian"),
        ("additive", "babble"),
        ("convolutive", "reverb"),
        ("convolutive", "pitch"),
        ("convolutive", "band_reject"),
    ],
)
def test_each_kind_keeps_length_dtype_and_range(corpus, distortion_sources, part, kind, length):
    wave = torch.from_numpy(make_sound(1.5, seed=9)[:length].copy())
    wave *= 0.99 / wave.abs().max()  # loud, so that the sums exceed the range
    original = wave.clone()
    files = sorted(path.name for path in (corpus / "audio").iterdir())
    for more in (distortion_sources, {"noise": distortion_sources["noise"]}):
        settings = only(part, kind, babble=True, **more)
        distorter = Distorter(settings, 1, corpus / "audio", files)
        for epoch in range(4):
            out = distorter(wave, "u1.flac", epoch, "student")
            assert out.shape == wave.shape and out.dtype == torch.float32
            assert out.isfinite().all() and out.abs().max() <= 1.000001
            assert not torch.equal(out, wave)
    assert torch.equal(wave, original)
    silent = distorter(torch.zeros(length), "u1.flac", 0, "student")
    assert silent.abs().max() == 0


def test_the_pipeline_mixes_at_the_drawn_snr(distortion_sources):
    wave = 0.1 * torch.from_numpy(make_sound(1.0, seed=10))
    for settings in (only("additive", "gaussian"), only("additive", "noise", **distortion_sources)):
        distorter = Distorter(settings, seed=4)
        for epoch in range(6):
            plan = distorter.plan("u", epoch, "student")
            assert 10 <= plan.snr <= 19
            assert snr_of(wave, distorter.render(wave, plan)) == pytest.approx(plan.snr, abs=1e-3)


def test_noise_is_added_after_reverberation():
    wave = 0.1 * torch.from_numpy(make_sound(1.0, seed=11))
    distorter = Distorter(DistortionSettings(setup="setup1"), seed=4)
    plan = dataclasses.replace(
        distorter.plan("u", 0, "student"), additive="gaussian", convolutive="reverb"
    )
    room = distorter.render(wave, dataclasses.replace(plan, additive="clean"))
    assert snr_of(room, distorter.render(wave, plan)) == pytest.approx(plan.snr, abs=1e-3)


def test_a_sum_beyond_full_scale_is_scaled():
    wave = tone(200)
    wave *= 1 / wave.abs().max()
    distorter = Distorter(only("additive", "gaussian"), seed=1)
    plan = distorter.plan("u", 0, "student")
    out = distorter.render(wave, plan)
    assert float(out.abs().max()) == pytest.approx(1.0)
    quiet = distorter.render(wave / 10, plan)  # the same noise, far from the limit
    assert np.allclose(out / out.abs().max(), quiet / quiet.abs().max(), atol=1e-5)
