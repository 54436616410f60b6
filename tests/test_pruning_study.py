"""The parts of tools/pruning_study.py that are computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from study_parts import probes
from study_parts.probes import accuracy, add_noise, middle, phone_frames

from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings
from tools import pruning_study
from tools.pruning_study import two_layer_size

pytestmark = pytest.mark.slow  # of tools/


def test_accuracy_of_separable_and_of_random_classes():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (600,), generator=generator)
    noise = torch.randn(600, 5, generator=generator)
    x = torch.nn.functional.one_hot(y, 3).float() @ torch.randn(3, 5, generator=generator)
    separable = accuracy(x[:400] + 0.01 * noise[:400], y[:400], x[400:], y[400:])
    assert separable == 100
    assert 20 < accuracy(noise[:400], y[:400], noise[400:], y[400:]) < 47


def test_phones_of_frames(monkeypatch):
    """Frame i is centred at 20 i + 12.5 ms; segments are in frames of 10 ms."""
    monkeypatch.setattr(probes, "features", lambda upstream, wave: torch.arange(4.0)[:, None])
    corpus = SimpleNamespace(read=lambda path: torch.zeros(400 + 3 * 320))
    row = {"path": "a.flac", "segments": "SIL:0+2 AH:2+3 B:5+3"}
    names: dict[str, int] = {}
    hidden, labels = phone_frames(corpus, None, row, names)
    assert names == {"AH": 0, "B": 1}
    assert hidden[:, 0].tolist() == [1, 2, 3] and labels.tolist() == [0, 1, 1]


def test_the_noise_has_the_ratio_that_is_asked_for():
    wave, noise = torch.randn(16_000), torch.rand(5_000)
    added = add_noise(wave, noise, 5) - wave
    ratio = 10 * torch.log10(wave.square().mean() / added.square().mean())
    assert ratio.item() == pytest.approx(5, abs=0.1)
    assert torch.equal(middle(torch.arange(40_000)), torch.arange(12_000, 28_000))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_two_layer_students_have_the_size_of_pruned_ones(sparsity):
    wanted = round((1 - sparsity) * pruning_study.COPY)
    settings, same_width = two_layer_size(wanted)
    student = Student(StudentSettings(**settings))
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == pytest.approx(wanted, rel=1e-3) and student.settings.encoder_layers == 2
    assert same_width == (settings["encoder_embed_dim"] == 192)
