"""The replacement for torchaudio.sox_effects."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_ekd.compat import SHIMS, sox
from s3prl_ekd.compat.sox_silence import sounding
from s3prl_ekd.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
SHIM = {shim.name: shim for shim in SHIMS}


def effects(wav, *chain, rate=16000):
    return sox.apply_effects_tensor(torch.tensor(wav), rate, [list(e) for e in chain])


def test_channels_mix_down_and_repeat():
    stereo = [[0.2, 0.4], [0.6, -0.4]]
    assert torch.allclose(effects(stereo, ("channels", "1"))[0], torch.tensor([[0.4, 0.0]]))
    four = effects(stereo, ("channels", "4"))[0]
    assert torch.equal(four, torch.tensor([stereo[0], stereo[1], stereo[0], stereo[1]]))


def test_norm_scales_all_channels_by_their_peak():
    wav, _ = effects([[0.1, -0.25], [0.05, 0.0]], ("norm",))
    assert torch.allclose(wav, torch.tensor([[0.4, -1.0], [0.2, 0.0]]))
    wav, _ = effects([[0.1, -0.25]], ("norm", "-20"))  # a tenth
    assert torch.allclose(wav, torch.tensor([[0.04, -0.1]]))
    assert torch.equal(effects([[0.0, 0.0]], ("norm",))[0], torch.zeros(1, 2))


def test_gain_in_decibel_clips_at_full_scale():
    wav, _ = effects([[0.02, -0.5]], ("gain", "20"))
    assert torch.allclose(wav, torch.tensor([[0.2, -1.0]]))


def test_trim_in_seconds_and_samples():
    wav = torch.arange(10.0).unsqueeze(0)
    for chain in (("trim", "0.2", "0.3"), ("trim", "2s", "3s")):
        assert effects(wav.tolist(), chain, rate=10)[0].tolist() == [[2, 3, 4]]
    assert effects(wav.tolist(), ("trim", "0.8"), rate=10)[0].tolist() == [[8, 9]]
    assert effects(wav.tolist(), ("trim", "5"), rate=10)[0].shape == (1, 0)


TRIM_SILENCE = ("silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%")
# seed -> samples, and the sum of their magnitudes, that SoX 14.4.2 wrote with 32 bits for
# `gain -3.0 silence 1 0.1 0.1% -1 0.1 0.1%`
BY_SOX = {
    0: (27837, 3677967544185),
    1: (42457, 7240180942354),
    2: (33619, 5747782250712),
    3: (15172, 1794989453143),
    4: (37906, 5568400765959),
    5: (12903, 1797831204208),
}


def loud_and_quiet(seed: int) -> np.ndarray:
    """Noise of 16 bits with changing loudness, also below the threshold of silence."""
    rng = np.random.default_rng(seed)
    levels, lengths = rng.choice([0, 13, 40, 700, 9000], 14), rng.integers(300, 9000, 14)
    noise = [rng.integers(-level, level + 1, n) for level, n in zip(levels, lengths, strict=True)]
    return np.concatenate(noise)


@pytest.mark.parametrize("seed", BY_SOX)
def test_silence_is_removed_as_by_sox(seed):
    wave = torch.from_numpy(loud_and_quiet(seed) / 32768).float()[None]
    wave, rate = sox.apply_effects_tensor(wave, 16000, [["gain", "-3.0"], TRIM_SILENCE])
    total = wave.double().mul(2**31).round().long().abs().sum().item()
    length, expected = BY_SOX[seed]
    assert (rate, wave.shape) == (16000, (1, length))
    assert total == pytest.approx(expected, abs=length * 2**6)  # float32 has 24 of 32 bits


def kept_one_by_one(wave: np.ndarray, window: int, above: int, below: int) -> list[int]:
    """The samples that `silence` keeps, decided one by one."""
    kept: list[int] = []
    held: list[int] = []
    restart, copying = 0, False
    for i in range(len(wave)):
        recent = wave[max(restart, i - window + 1) : i + 1].astype(np.float64)
        loud = math.sqrt((recent**2).sum() / window) > 0.001
        if copying and loud:
            kept += [*held, i]
            held = []
        elif copying:
            held.append(i)
            if len(held) == below:
                copying, held, restart = False, [], i + 1
        elif loud:
            held.append(i)
            if len(held) == above:
                kept, copying, held = kept + held, True, []
        else:
            held = []
    return kept + (held if copying else [])


@pytest.mark.parametrize("above, below", [(60, 45), (1, 1), (10, 200)])
def test_silence_agrees_with_a_loop_over_samples(above, below):
    for seed in range(8):
        wave = (loud_and_quiet(seed)[::37] / 32768).astype(np.float32)
        parts = sounding(wave, 1000, (above, 0.001), (below, 0.001))
        kept = [i for start, end in parts for i in range(start, end)]
        assert kept == kept_one_by_one(wave, 20, above, below)


def test_silence_of_nothing_and_of_silence_is_empty():
    for samples in (0, 1, 50_000):
        assert effects([[0.0] * samples], TRIM_SILENCE)[0].shape == (1, 0)


def sine(hertz: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    time = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * time).float().unsqueeze(0)


@pytest.mark.parametrize("source, target", [(8000, 16000), (44100, 16000), (16000, 16000)])
def test_rate_resamples_a_tone(source, target):
    import torchaudio

    tone = sine(440, source)
    wav, rate = sox.apply_effects_tensor(tone, source, [["rate", str(target)]])
    assert rate == target and wav.shape == (1, target // 2)
    middle = slice(target // 8, -target // 8)  # without the filter's edges
    assert torch.allclose(wav[:, middle], sine(440, target)[:, middle], atol=2e-3)
    assert torch.equal(wav, torchaudio.functional.resample(tone, source, target))


def test_speed_changes_the_rate_and_then_the_pitch():
    tone = sine(400, 16000)
    wav, rate = sox.apply_effects_tensor(tone, 16000, [["speed", "1.1"]])
    assert rate == 17600 and torch.equal(wav, tone)
    wav, rate = sox.apply_effects_tensor(tone, 16000, [["speed", "1.25"], ["rate", "16000"]])
    assert rate == 16000 and wav.shape == (1, 6400)
    assert torch.allclose(wav[:, 800:-800], sine(500, 16000, 0.4)[:, 800:-800], atol=2e-3)


def test_effects_on_a_file_channels_first_and_last(tmp_path):
    # [time, channel], 16-bit integers
    noise = np.random.default_rng(0).integers(-20000, 20000, (4000, 2)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", noise, 8000)
    chain = [["channels", "1"], ["trim", "0", "0.1"]]
    mono = noise[:800].mean(axis=1) / 32768
    wav, rate = sox.apply_effects_file(str(tmp_path / "a.wav"), chain)
    assert rate == 8000 and np.allclose(wav.numpy(), mono[None], atol=1e-6)
    wav, _ = sox.apply_effects_file(str(tmp_path / "a.wav"), chain, channels_first=False)
    assert np.allclose(wav.numpy(), mono[:, None], atol=1e-6)


def test_unknown_effect_is_named_in_the_error():
    with pytest.raises(SetupError, match="'vad'.*channels, gain, norm, rate, silence, speed, trim"):
        effects([[0.0]], ("rate", "16000"), ("vad", "-T", "0.25"))


@pytest.mark.parametrize(
    "effect",
    [("rate",), ("rate", "fast"), ("trim", "-1"), ("trim", "0", "=5"), ("norm", "1", "2")]
    + [("silence", "1", "0.1", "0.1%"), ("silence", "1", "0.1", "-60d", "-1", "0.1", "0.1%")]
    + [("silence", "2", "0.1", "0.1%", "-1", "0.1", "0.1%")],
)
def test_invalid_arguments(effect):
    with pytest.raises(SetupError, match=f"'{' '.join(effect)}'"):
        effects([[0.0, 0.0]], effect)


def test_s3prl_finds_the_effects():
    import torchaudio
    from torchaudio.sox_effects import apply_effects_file, apply_effects_tensor

    assert torchaudio.sox_effects.apply_effects_tensor is apply_effects_tensor
    assert callable(apply_effects_file)
