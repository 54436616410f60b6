"""A student that is a copy of a teacher gives the hidden states of s3prl's own model."""

import json

import pytest
import torch
from torch.nn.functional import layer_norm

from s3prl_ekd.distill.pruning.copy import copy_teacher
from s3prl_ekd.distill.student_settings import CopySettings, PruningSettings
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble
from s3prl_ekd.errors import ConfigError, TeacherError
from s3prl_ekd.teachers import load_upstream
from s3prl_ekd.teachers.load import copied_student
from s3prl_ekd.teachers.random_weights import _build_model, hubert_checkpoint

from .conftest import SIZES
from .test_fast_teachers import KINDS, checkpoint
from .test_teacher_sources import HF_SIZE
from .test_teacher_sources import LARGE as HF_LARGE

COPY = CopySettings("copy", "t")


def copied(upstream, pruning=None):
    ensemble = TeacherEnsemble({"t": Teacher(upstream, (0,), "t")})
    return copied_student(ensemble, COPY, pruning).eval()


def assert_states_equal(student, upstream, wave, atol):
    """On a batch of one waveform and its reverse: without padding, which s3prl counts otherwise."""
    batch = [wave, wave.flip(0)]
    with torch.no_grad():
        output = student(torch.stack(batch), torch.tensor([len(wave)] * 2))
        expected = upstream(batch)["hidden_states"]
    for state, reference in zip(output.hidden_states, expected, strict=True):
        scale = max(1, reference.abs().max().item())
        torch.testing.assert_close(state, reference, rtol=0, atol=atol * scale)
    assert torch.equal(output.last, output.hidden_states[-1])
    assert output.mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_equals_s3prls_expert(kind, waves, tmp_path):
    torch.save(checkpoint(kind, KINDS[kind]), tmp_path / f"{kind}.pt")
    upstream = load_upstream(str(tmp_path / f"{kind}.pt"), "here").eval()
    student = copied(upstream)
    for wave in (waves[1], waves[2], 0.5 + 20 * waves[2]):
        assert_states_equal(student, upstream, wave, 2e-6)


@pytest.mark.parametrize(("family", "changes"), [("Hubert", {}), ("WavLM", HF_LARGE)])
def test_a_copy_equals_a_hugging_face_model(family, changes, waves, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    network = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**{**HF_SIZE, **changes})
    ).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    network.save_pretrained(tmp_path)
    settings = {"do_normalize": bool(changes), "sampling_rate": 16000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    student = copied(load_upstream(str(tmp_path), "here"))
    wave = waves[1]
    with torch.no_grad():
        prepared = layer_norm(wave, wave.shape) if changes else wave
        expected = network(prepared[None], output_hidden_states=True)
        output = student(wave[None], torch.tensor([len(wave)]))
    pairs = zip(output.hidden_states[:-1], expected.hidden_states[:-1], strict=True)
    for state, reference in [*pairs, (output.last, expected.last_hidden_state)]:
        torch.testing.assert_close(state, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last_conv", ["hard", "soft"])
def test_open_gates_change_nothing(last_conv, waves, tmp_path):
    torch.save(checkpoint("wavlm", {}), tmp_path / "wavlm.pt")
    upstream = load_upstream(str(tmp_path / "wavlm.pt"), "here").eval()
    units = ("conv", "heads", "ffn", "attention", "feed_forward")
    student = copied(upstream, PruningSettings(units, last_conv))
    for _, _, gate in student.backbone.gates():
        gate.log_alpha.data.fill_(100.0)
    assert_states_equal(student, upstream, waves[0], 1e-5)
    for _, _, gate in student.backbone.gates():
        gate.log_alpha.data.fill_(0.0)
    with pytest.raises(AssertionError):
        assert_states_equal(student, upstream, waves[0], 1e-2)


def test_the_copy_does_not_share_the_teachers_weights(tmp_path):
    torch.save(checkpoint("hubert", {}), tmp_path / "hubert.pt")
    upstream = load_upstream(str(tmp_path / "hubert.pt"), "here")
    student = copied(upstream)
    own = {weight.data_ptr() for weight in student.parameters()}
    assert not own & {weight.data_ptr() for weight in upstream.parameters()}
    assert all(weight.requires_grad for weight in student.parameters())


def test_settings_of_the_copy():
    copy = CopySettings("copy", "t", dropout=0.2, feature_grad_mult=0.5)
    model = load_model(hubert_checkpoint(**SIZES))
    settings = copy_teacher(model, True, copy, None).settings
    assert settings.encoder_embed_dim == 48
    assert settings.conv_layers == ((32, 10, 5), *[(32, 3, 2)] * 4, *[(32, 2, 2)] * 2)
    assert settings.heads == ((0, 1, 2, 3),) * 4
    assert settings.ffn_dims == (64,) * 4
    assert (settings.conv_pos, settings.conv_pos_groups) == (16, 4)
    assert (settings.dropout, settings.feature_grad_mult) == (0.2, 0.5)
    assert settings.normalize_waveforms
    assert settings.gates is None


def load_model(state):
    model = _build_model(state)
    model.load_state_dict(state["model_weight"])
    return model


@pytest.mark.parametrize("conv", ["[(16,10,5)] + [(16,3,2)] * 4", "[(16,10,4)] + [(16,3,2)] * 6"])
def test_other_kernels_and_strides_are_refused(conv):
    model = load_model(hubert_checkpoint(**{**SIZES, "conv_layers": conv}))
    with pytest.raises(TeacherError, match=r"student\.of: t.*\(10, "):
        copy_teacher(model, False, COPY, None)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.Sequential()])
def test_a_model_of_another_layout_is_refused(model):
    with pytest.raises(TeacherError, match="student.of: t"):
        copy_teacher(model, False, COPY, None)


def test_a_teacher_without_a_model_is_refused():
    class Other(torch.nn.Module):
        def forward(self, waves):
            return {"hidden_states": [torch.zeros(len(waves), len(waves[0]) // 320, 4)] * 2}

        def get_downsample_rates(self, key):
            return 320

    with pytest.raises(ConfigError, match="student.of: t"):
        copied(Other())
