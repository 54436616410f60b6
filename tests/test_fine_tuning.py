"""Fine-tuning a student trains the same parameters by every route, with the same gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import s3prl_ekd
from s3prl_ekd.distill.student import Student
from s3prl_ekd.export.huggingface import save_hf_model, to_hf_model
from s3prl_ekd.student_file import LoadedStudent, write_student
from s3prl_ekd.teachers.hf_names import fairseq_name

LENGTHS = (16_000, 9_000)
FRAMES = (49, 27)  # of conv layers with kernel and stride 10, 5; 3, 2 (four times); 2, 2 (twice)


@pytest.fixture
def exported(student_settings, tmp_path):
    """Write a student as a file and as a Hugging Face folder; returns both paths."""

    def exported(scale: float):
        torch.manual_seed(0)
        student = Student(dataclasses.replace(student_settings, feature_grad_mult=scale))
        write_student(LoadedStudent(student, None, {}, {}), tmp_path / "student.safetensors")
        save_hf_model(to_hf_model(student), tmp_path / "student_hf")
        return tmp_path / "student.safetensors", tmp_path / "student_hf"

    return exported


def gradients(states: torch.Tensor, model: nn.Module, hugging_face: bool = False) -> dict:
    """Gradients, by s3prl's names, of a sum over the valid frames of ``states [2, frame, dim]``."""
    weights = torch.randn(2, FRAMES[0], states.shape[2], generator=torch.Generator().manual_seed(1))
    for row, frames in enumerate(FRAMES):
        weights[row, frames:] = 0
    (states[:, : FRAMES[0]] * weights).sum().backward()
    return {
        fairseq_name(name, False) if hugging_face else name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture
def padded() -> tuple[torch.Tensor, torch.Tensor]:
    waves = 0.1 * torch.randn(2, LENGTHS[0], generator=torch.Generator().manual_seed(0))
    waves[1, LENGTHS[1] :] = 0
    return waves, torch.tensor(LENGTHS)


def of_s3prl(name: str, path, padded, as_espnet=False) -> dict:
    """By s3prl's newer API, which ESPnet's frontend uses. It changes one attribute before."""
    from s3prl.nn import S3PRLUpstream

    s3prl_ekd.register()
    upstream = S3PRLUpstream(name, path_or_url=str(path))
    if as_espnet and getattr(upstream.upstream.model, "feature_grad_mult", None) is not None:
        upstream.upstream.model.feature_grad_mult = 1.0
    states, _ = upstream(*padded)
    return gradients(states[-1], upstream.upstream.model, name == "hf_hubert_custom")


def of_transformers(folder, padded) -> dict:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).train()
    waves, lengths = padded
    mask = (torch.arange(waves.shape[1])[None] < lengths[:, None]).long()
    return gradients(model(waves, attention_mask=mask).last_hidden_state, model, True)


def of_the_runner(path, padded) -> dict:
    """By the upstream itself, as ``run_downstream.py -f`` calls it."""
    from s3prl import hub

    s3prl_ekd.register()
    upstream = hub.ekd_student(ckpt=str(path)).train()
    waves = [wave[:length] for wave, length in zip(*padded, strict=True)]
    return gradients(upstream(waves)["hidden_states"][-1], upstream.student.backbone)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_all_parameters_learn_with_the_same_gradients(exported, padded, scale):
    """A scale of 0 freezes the conv extractor in the distillation."""
    file, folder = exported(scale)
    expected = of_transformers(folder, padded)
    student = s3prl_ekd.load_student(file).student
    assert expected.keys() == {name for name, _ in student.backbone.named_parameters()}
    for routed in (
        of_the_runner(file, padded),
        of_s3prl("ekd_student", file, padded),
        of_s3prl("ekd_student", file, padded, as_espnet=True),
        of_s3prl("hf_hubert_custom", folder, padded),
    ):
        assert routed.keys() == expected.keys()
        for name, gradient in routed.items():
            # that of a key's bias is 0, except for rounding
            limit = 1e-4 * expected[name].abs().max() + 1e-6
            assert (gradient - expected[name]).abs().max() < limit, name


def test_the_network_is_in_the_state_dict_once(exported):
    from s3prl import hub

    s3prl_ekd.register()
    file, _ = exported(0.1)
    upstream = hub.ekd_student(ckpt=str(file))
    names = s3prl_ekd.load_student(file).student.state_dict().keys()
    assert upstream.state_dict().keys() == {f"student.{name}" for name in names}
