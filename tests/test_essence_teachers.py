"""Ensemble and loss of Essence KD, on models with given posteriors, without a run."""

from argparse import Namespace

import pytest
import torch

from s3prl_ekd.errors import TeacherError
from s3prl_ekd.essence.asr import (
    AsrEnsemble,
    AsrTeacher,
    EssenceSettings,
    MultitaskLoss,
    common_frames,
)
from s3prl_ekd.essence.selection import PosteriorSelection


class Fake(torch.nn.Module):
    """An ASR model with given posteriors; a frame is 320 samples."""

    def __init__(self, posteriors, symbols="ab", extra=0):
        super().__init__()
        self.posteriors, self.extra = torch.tensor(posteriors), extra
        self.dictionary = Namespace(symbols=list(symbols))
        self.projector = torch.nn.Identity()
        self.model = self.logits

    def logits(self, features, lengths):
        shape = (*features.shape[:2], len(self.posteriors))
        return self.posteriors.log().expand(shape), lengths

    def forward(self, waves, hidden=None):
        return [wave.new_zeros(len(wave) // 320 + self.extra, 1) for wave in waves]


def fake(*args, name="fake", **kwargs):
    expert = Fake(*args, **kwargs)
    return AsrTeacher(Fake([1.0]), expert, expert, name)


def test_the_ensemble_is_the_mean_of_posteriors():
    ensemble = AsrEnsemble([fake([0.5, 0.5]), fake([0.9, 0.1], extra=1)])
    posteriors, lengths = ensemble([torch.zeros(3200), torch.zeros(1600)])
    assert lengths.tolist() == [10, 5] and posteriors.shape == (2, 10, 2)
    torch.testing.assert_close(posteriors, torch.tensor([0.7, 0.3]).expand(2, 10, 2))
    ensemble.train()
    assert not any(module.training for teacher in ensemble for module in teacher.modules())


def test_invalid_ensembles():
    with pytest.raises(TeacherError, match=r"\btwo\b.*\bone\b.*dict_path"):
        AsrEnsemble([fake([0.5, 0.5], name="one"), fake([0.5, 0.5], "ac", name="two")])
    ensemble = AsrEnsemble([fake([1.0], "a", name="one"), fake([1.0], "a", extra=2, name="two")])
    with pytest.raises(TeacherError, match="one: 10, two: 12"):
        ensemble([torch.zeros(3200)])


def test_common_frames_are_the_smaller_counts():
    counts = [("a", torch.tensor([5, 7])), ("a", torch.tensor([6, 6], dtype=torch.int32))]
    assert common_frames(counts).tolist() == [5, 6]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="alpha"):
        EssenceSettings(("a",), alpha=float("nan"))


def student_loss(selection, logits, lengths, *teachers):
    """``MultitaskLoss.soft_loss`` for two utterances of 10 and 5 frames."""
    student = Namespace(dictionary=Namespace(symbols=list("ab")), log_records=None)
    runner = Namespace(downstream=Namespace(model=student))
    settings = EssenceSettings(("x",), selection, alpha=1.0)
    loss = MultitaskLoss(runner, AsrEnsemble(teachers), settings, "train")
    return loss.soft_loss([torch.zeros(3200), torch.zeros(1600)], logits, lengths)


def test_the_soft_loss_covers_the_common_frames():
    logits = torch.zeros(2, 11, 2)
    logits[:, :, 0] = 1.0
    logits[0, 10] = logits[1, 5:] = 1e4  # frames that the teachers don't have
    lengths = torch.tensor([11, 5], dtype=torch.int32)
    loss, scalars = student_loss(PosteriorSelection(), logits, lengths, fake([0.75, 0.25]))
    log_probs = torch.tensor([1.0, 0.0]).log_softmax(-1)
    assert loss.item() == pytest.approx(-(0.75 * log_probs[0] + 0.25 * log_probs[1]).item())
    assert scalars["classes_kept"] == 2 and scalars["mass_kept"] == pytest.approx(1.0)
    loss, scalars = student_loss(PosteriorSelection(top_k=1), logits, lengths, fake([0.75, 0.25]))
    assert loss.item() == pytest.approx(-log_probs[0].item())
    assert scalars["classes_kept"] == 1 and scalars["mass_kept"] == pytest.approx(0.75)
    loss, scalars = student_loss(
        PosteriorSelection(confidence=0.8), logits, lengths, fake([0.75, 0.25])
    )
    assert loss.item() == 0 and scalars["frames_kept"] == 0


def test_a_student_with_a_different_frame_rate():
    logits, lengths = torch.zeros(2, 20, 2), torch.tensor([20, 10])
    with pytest.raises(TeacherError, match="teachers: 10, student: 20"):
        student_loss(PosteriorSelection(), logits, lengths, fake([0.75, 0.25]))
