"""Small experiments for tests of the method."""

from __future__ import annotations

import torch
from s3prl.upstream.hubert.hubconf import hubert_local
from s3prl.upstream.wavlm.hubconf import wavlm_local
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.batch import DistillBatch
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.settings import (
    DistillSettings,
    LossSettings,
    TeacherSettings,
    UnitLossSettings,
)
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble

LAYERS = (2, 4)


def load(path):
    return (wavlm_local if "wavlm" in path.name else hubert_local)(str(path))


def ensemble(teachers, *names, layers=LAYERS, dropout=False):
    """The named teachers as t0, t1, ...; a name may be repeated."""
    loaded = {f"t{i}": Teacher(load(teachers[n]), layers, n) for i, n in enumerate(names)}
    return TeacherEnsemble(loaded, dropout)


def distiller(teachers, settings, names, aggregation="separate", loss=None, **more):
    torch.manual_seed(0)
    layers = more.pop("layers", LAYERS)
    groups = more.pop("groups", None)
    units = more.pop("units", ())
    more.setdefault("unit_loss", tuple(UnitLossSettings("units") for _ in units))
    loaded = ensemble(teachers, *names, layers=groups or layers)
    teacher_settings = {
        name: TeacherSettings("x", layers, groups, **more.pop(name, {})) for name in loaded
    }
    experiment = DistillSettings(
        teacher_settings, aggregation, student=settings, loss=loss or LossSettings(), **more
    )
    return EnsembleDistiller(loaded, Student(settings), experiment, units)


def batch_of(waves):
    lengths = torch.tensor([len(wave) for wave in waves])
    return DistillBatch(pad_sequence(waves, batch_first=True), lengths)
