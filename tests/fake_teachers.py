"""Teachers of a few lines with a set receptive field, and experiments with them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.batch import DistillBatch
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings, UnitLossSettings
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import MaskSettings, StudentSettings
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble
from s3prl_ekd.essence.units import Units

from .conftest import NO_DROPOUT

STRIDE, WIDTH, LAYERS = 320, 48, (2, 4)
MASK = MaskSettings(length=5, share=0.5)
STUDENT = StudentSettings(**NO_DROPOUT, masked_norm=True)


class FakeUpstream(nn.Module):
    """Hidden states 0 to 4: random projections of windows of ``field`` samples, every 320.

    A frame depends on its window only. ``ceil``: one frame for each started block of 320 samples.
    ``change``: if set, it maps each hidden state to the one that is returned.
    """

    def __init__(self, field=400, ceil=False, seed=0):
        super().__init__()
        self.field, self.ceil, self.change = field, ceil, None
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(5, field, WIDTH, generator=generator) / field**0.5

    def frames(self, samples):
        return -(-samples // STRIDE) if self.ceil else (samples - self.field) // STRIDE + 1

    def forward(self, waves):
        count = self.frames(max(map(len, waves)))
        padded = F.pad(pad_sequence(waves, batch_first=True), (0, self.field))
        windows = 10 * padded.unfold(1, self.field, STRIDE)[:, :count]
        states = [torch.tanh(windows @ weight) for weight in self.weights]
        return {"hidden_states": [self.change(s) if self.change else s for s in states]}

    def get_downsample_rates(self, key):
        return STRIDE


def fake_distiller(upstreams, units=(), weights=(), mask=None, student=STUDENT, **more):
    """A distiller of teachers ``{name: FakeUpstream}``; ``weights``: of each unit loss, and of its
    unmasked frames."""
    torch.manual_seed(0)
    teachers = {name: Teacher(upstream, LAYERS, name) for name, upstream in upstreams.items()}
    unit_loss = tuple(UnitLossSettings("x", *pair) for pair in weights or [(1.0,)] * len(units))
    settings = DistillSettings(
        {name: TeacherSettings("x", LAYERS) for name in teachers},
        student=dataclasses.replace(student, mask=mask),
        unit_loss=unit_loss,
        **more,
    )
    student = Student(dataclasses.replace(student, mask=None))
    distiller = EnsembleDistiller(TeacherEnsemble(teachers), student, settings, units)
    return distiller.train()


def random_units(teacher, layer, clusters=5, seed=1, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return Units(torch.randn(clusters, width, generator=generator), teacher, layer)


def noise(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def student_frames(samples):
    return (samples - 400) // STRIDE + 1


def spans_of(lengths, seed=0):
    """Masked frames for each utterance: bool ``[frame]``; about half of them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(student_frames(n), generator=generator) < 0.5 for n in lengths]


def batch_of(waves, spans=None):
    lengths = torch.tensor([len(wave) for wave in waves])
    spans = None if spans is None else pad_sequence(spans, batch_first=True)
    return DistillBatch(pad_sequence(waves, batch_first=True), lengths, spans=spans)
