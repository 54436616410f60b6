"""Positional convolutions in bfloat16: oneDNN is wrong for narrow groups on CPUs with AMX."""

import pytest
import torch

from s3prl_ekd.distill.student_forward import positions
from s3prl_ekd.distill.student_settings import StudentSettings
from s3prl_ekd.errors import TeacherError
from s3prl_ekd.teachers import load_upstream
from s3prl_ekd.teachers.fast import encoder
from s3prl_ekd.teachers.fast.encoder import fast_encoders

from .students import random_student


def relative(value, exact):
    """Mean error relative to the mean absolute value."""
    return float((value.double() - exact.double()).abs().mean() / exact.double().abs().mean())


def module(channels, groups=16, kernel=128):
    width = channels * groups
    conv = torch.nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
    return torch.nn.Sequential(conv, torch.nn.Identity(), torch.nn.GELU())


@pytest.mark.parametrize("channels", [1, 3, 6, 8, 12, 15, 16, 24, 48])
def test_autocast_is_within_rounding_of_float64(channels):
    torch.manual_seed(0)
    conv, x = module(channels), torch.randn(2, 16 * channels, 100)
    with torch.no_grad():
        exact = conv.double()(x.double())
        conv.float()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = positions(conv, x)
        assert torch.equal(positions(conv, x), conv(x))  # nothing changes without autocast
    assert relative(rounded, exact) < 0.02


def test_only_narrow_groups_are_computed_in_float32():
    for channels, dtype in ((12, torch.float32), (48, torch.bfloat16)):
        x = torch.randn(2, 16 * channels, 10)
        with torch.autocast("cpu", torch.bfloat16):
            assert positions(module(channels, kernel=3), x).dtype == dtype


@pytest.mark.parametrize("width", [96, 192, 256])
def test_a_student_under_autocast_is_close_to_float32(width):
    settings = StudentSettings(
        extractor_conv_feature_layers="[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=2 * width,
        encoder_attention_heads=4,
    )
    student, waves = random_student(settings), 0.1 * torch.randn(2, 16_000)
    lengths = torch.tensor([16_000, 16_000])
    with torch.no_grad():
        exact = student(waves, lengths).last
        with torch.autocast("cpu", torch.bfloat16):
            rounded = student(waves, lengths).last
    assert relative(rounded, exact) < 0.05


def half_precision_states(name, precision):
    upstream = load_upstream(name, "here").eval()
    fast = fast_encoders({"mine": upstream}, precision)["mine"]
    torch.manual_seed(1)
    return fast.hidden_states(0.1 * torch.randn(1, 16_000), [16_000], [2, 6])


@pytest.mark.parametrize("name", ["tiny_hubert", "tiny_wavlm"])
def test_tiny_teachers_in_bfloat16_are_close_to_float32(name):
    rounded, exact = (half_precision_states(name, p) for p in ("bfloat16", "float32"))
    assert all(relative(rounded[n], exact[n]) < 0.05 for n in (2, 6))


def test_targets_that_are_wrong_in_half_precision_are_refused(monkeypatch):
    monkeypatch.setattr(encoder, "LARGEST_ERROR", 1e-6)  # as if rounding were an error
    with pytest.raises(TeacherError, match=r"teachers\.mine.*teacher_precision: float32"):
        half_precision_states("tiny_hubert", "bfloat16")
