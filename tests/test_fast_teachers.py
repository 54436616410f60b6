"""Fast teachers give the hidden states of s3prl's own experts, also on padded batches."""

import copy
import logging
import re

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.conv_extractor import ConvExtractor
from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.student_forward import normalise
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble
from s3prl_ekd.errors import TeacherError
from s3prl_ekd.teachers import load_teachers, load_upstream
from s3prl_ekd.teachers.fast.encoder import (
    PRECISIONS,
    family,
    fast_encoders,
    padded_frames,
)
from s3prl_ekd.teachers.fast.layers import FastLayer
from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

from .conftest import SIZES
from .experiments import distiller

LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
KINDS = {
    "hubert": {},
    "hubert_normalised": {"normalize": True},
    "hubert_large": {**LARGE, "normalize": True},
    "hubert_relu": {"activation_fn": "relu"},
    "wav2vec2": {},
    "wav2vec2_large": {**LARGE, "normalize": True},
    "wavlm": {},
    "wavlm_large": {**LARGE, "normalize": True},
    "unispeech_sat": {"relative_position_embedding": False, "gru_rel_pos": False},
}


def add_noise(state):
    """Move every tensor away from its initial zeros and ones, so that each bias and norm counts."""
    generator = torch.Generator().manual_seed(11)
    for weight in state.values():
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return state


def checkpoint(kind, changes):
    """A tiny checkpoint of a kind, in s3prl's format."""
    if kind.startswith(("wavlm", "unispeech")):
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

        state = wavlm_checkpoint(**SIZES)
        cfg = {**state["cfg"], **changes}
        torch.manual_seed(3)
        return {"cfg": cfg, "model": add_noise(WavLM(WavLMConfig(cfg)).state_dict())}
    state = hubert_checkpoint(**SIZES)
    changes = dict(changes)
    state["task_cfg"]["normalize"] = changes.pop("normalize", False)
    state["model_cfg"].update(changes)
    torch.manual_seed(3)
    if kind.startswith("wav2vec2"):
        from s3prl.upstream.wav2vec2.wav2vec2_model import Wav2Vec2Config, Wav2Vec2Model

        for name in ("label_rate", "untie_final_proj"):
            del state["model_cfg"][name]
        del state["dictionaries_symbols"], state["task_cfg"]["label_rate"]
        model = Wav2Vec2Model(Wav2Vec2Config(**state["model_cfg"]))
    else:
        from s3prl.upstream.hubert.hubert_model import (
            HubertConfig,
            HubertModel,
            HubertPretrainingConfig,
        )

        configs = HubertConfig(**state["model_cfg"]), HubertPretrainingConfig(**state["task_cfg"])
        model = HubertModel(*configs, state["dictionaries_symbols"])
    state["model_weight"] = add_noise(model.state_dict())
    return state


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory):
    """s3prl's expert of each of KINDS."""
    folder, upstreams = tmp_path_factory.mktemp("kinds"), {}
    for kind, changes in KINDS.items():
        path = folder / f"{kind}.pt"
        torch.save(checkpoint(kind, changes), path)
        upstreams[kind] = load_upstream(str(path), "here").eval().requires_grad_(False)
    return upstreams


@torch.no_grad()
def expert(upstream, waves):
    return [state.clone() for state in upstream(list(waves))["hidden_states"]]


def assert_close(actual, expected):
    """Equal to 1e-5 of the largest absolute value, or to 1e-5 if that is below 1."""
    assert actual.shape == expected.shape
    atol = 1e-5 * max(1, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def run(encoder, waves, layers, **options):
    lengths = [len(wave) for wave in waves]
    return encoder.hidden_states(
        pad_sequence(list(waves), batch_first=True), lengths, layers, **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_s3prls_expert(upstreams, waves, kind):
    """On padded batches, on one waveform, and on waveforms of equal length."""
    upstream = upstreams[kind]
    assert family(upstream) == kind.split("_")[0].replace("unispeech", "unispeech_sat")
    encoder = fast_encoders({kind: upstream})[kind]
    equal = [waves[0][:9000], waves[1][:9000]]
    short = [waves[0], waves[1][:401]]  # one frame by wav2vec 2.0's count
    loud = [0.5 + 20 * wave for wave in waves]
    for batch in (waves, waves[:1], [waves[0][:15600]], equal, short, loud):
        expected = expert(upstream, batch)
        states = run(encoder, batch, range(5))
        assert sorted(states) == list(range(len(expected)))
        for index, state in states.items():
            assert_close(state, expected[index])
    # The module shares the concatenated weights: its own forward still gives the same.
    for repeated, first in zip(expert(upstream, batch), expected, strict=True):
        torch.testing.assert_close(repeated, first)


def test_normalised_is_torchs_layer_norm_of_each_waveform(waves):
    padded = pad_sequence(waves, batch_first=True)
    rows = normalise(padded, torch.tensor([len(wave) for wave in waves]))
    for row, wave in zip(rows, waves, strict=True):
        expected = torch.nn.functional.layer_norm(wave, wave.shape)
        torch.testing.assert_close(row[: len(wave)], expected, rtol=0, atol=1e-5)
        assert not row[len(wave) :].any()


def test_padded_frames_worked_out():
    conv = [(10, 5), (3, 2)]
    assert padded_frames([100, 100], 100, 9, None) is None
    # 100 samples in 9 frames: blocks of 11 samples; the 34th sample is in the fourth block.
    assert padded_frames([100, 34, 33, 1], 100, 9, None) == [9, 4, 3, 1]
    # 40 samples: 7 frames after the first layer, 3 after the second. 12 samples: 1 frame, then 0;
    # s3prl then marks all frames as valid.
    assert padded_frames([100, 40, 12], 100, 9, conv) == [9, 3, 9]


def test_layers_above_the_highest_target_do_not_run(upstreams, waves, monkeypatch):
    encoder = fast_encoders({"h": upstreams["hubert_large"]})["h"]
    calls = []

    def counting(self, *args):
        calls.append(1)
        return original(self, *args)

    original = FastLayer.__call__
    monkeypatch.setattr(FastLayer, "__call__", counting)
    states = run(encoder, waves, [0, 2])
    assert sorted(states) == [0, 2] and len(calls) == 2
    expected = expert(upstreams["hubert_large"], waves)
    assert_close(states[2], expected[2])  # without the encoder's final norm
    calls.clear()
    assert sorted(run(encoder, waves, [0])) == [0] and not calls


def test_a_hidden_state_is_not_overwritten_by_later_layers(upstreams, waves):
    for kind in ("hubert", "wavlm_large"):
        encoder = fast_encoders({kind: upstreams[kind]})[kind]
        together = run(encoder, waves, range(5))
        for index in range(5):
            torch.testing.assert_close(run(encoder, waves, [index])[index], together[index])


def test_the_position_bias_is_cached_by_number_of_frames(upstreams, waves, monkeypatch):
    encoder = fast_encoders({"w": upstreams["wavlm"]})["w"]
    computed = []
    cls = type(encoder._weights_on(torch.device("cpu")).bias)
    compute = cls._compute
    monkeypatch.setattr(cls, "_compute", lambda self, n: computed.append(n) or compute(self, n))
    for samples in (16000, 9000, 16000, 9000, 8000, 7000, 6000, 16000):
        run(encoder, [waves[0][:samples]], [1])
    assert computed == [49, 27, 24, 21, 18, 49]  # the cache has four entries


def test_teachers_with_equal_conv_extractors_run_it_once(teachers, waves, monkeypatch, tmp_path):
    hubert = load_upstream(str(teachers["hubert"]), "here")
    state = torch.load(teachers["hubert"], weights_only=True)
    for name, weight in state["model_weight"].items():
        if name.startswith("encoder."):
            weight += 0.1
    torch.save(state, tmp_path / "tuned.pt")
    state["task_cfg"]["normalize"] = True
    torch.save(state, tmp_path / "normalised.pt")
    related = {n: load_upstream(str(tmp_path / f"{n}.pt"), "here") for n in ("tuned", "normalised")}
    robust = load_upstream(str(teachers["robust"]), "here")
    models = {"hubert": hubert, **related, "robust": robust}
    encoders = fast_encoders(models)
    assert encoders["hubert"].extractor is encoders["tuned"].extractor
    assert encoders["hubert"].extractor is encoders["normalised"].extractor
    assert encoders["hubert"].extractor is not encoders["robust"].extractor
    calls = []
    original = ConvExtractor.__call__
    monkeypatch.setattr(
        ConvExtractor, "__call__", lambda self, *w: calls.append(self) or original(self, *w)
    )
    shared = {}
    for name, encoder in encoders.items():
        states = run(encoder, waves, [4], shared=shared)
        assert_close(states[4], expert(models[name].eval(), waves)[4])
    assert len(calls) == 3  # without and with normalised waveforms, and that of `robust`


def test_the_ensemble_uses_fast_encoders_and_autograd_accepts_its_output(teachers, waves):
    settings = {
        "hubert": TeacherSettings(str(teachers["hubert"]), (2, 4)),
        "wavlm": TeacherSettings(str(teachers["wavlm"]), groups=((1, 2), (3,))),
    }
    fast = load_teachers(settings, False)
    reference = load_teachers(settings, False, backend="plain")
    assert all(teacher.encoder is not None for teacher in fast.values())
    assert all(teacher.encoder is None for teacher in reference.values())
    states = fast.states(waves, also={"hubert": {1}})
    assert sorted(states["hubert"]) == [1, 2, 4] and sorted(states["wavlm"]) == [1, 2, 3]
    outputs, expected = fast(waves), reference(waves)
    for name in settings:
        output = outputs[name]
        assert_close(output, expected[name])
        weight = torch.ones(output.shape[-1], requires_grad=True)
        torch.cosine_similarity(output * weight, output, dim=-1).sum().backward()
        assert torch.isfinite(weight.grad).all()


def test_fast_teachers_do_not_change_a_training_step(teachers, student_settings, waves):
    """Loss and gradients are equal, with a unit head on a layer that is not a target."""
    from .experiments import batch_of

    class Units:
        teacher, layer, clusters, width = "t1", 1, 3, 48

        def label(self, hidden):
            return (hidden @ torch.linspace(-1, 1, 48)).relu().long().clamp(max=2)

    names = ("hubert", "wavlm")
    loss = {}
    for backend in ("fast", "s3prl"):
        model = distiller(teachers, student_settings, names, units=[Units()])
        if backend == "fast":
            models = {name: teacher.upstream for name, teacher in model.teachers.items()}
            for name, encoder in fast_encoders(models).items():
                model.teachers[name].encoder = encoder
        value, terms = model(batch_of(waves), detail=True)
        value.backward()
        grads = {name: weight.grad for name, weight in model.trainable.named_parameters()}
        loss[backend] = value.detach(), terms, grads
    torch.testing.assert_close(loss["fast"][0], loss["s3prl"][0], rtol=1e-5, atol=1e-5)
    assert loss["fast"][1].keys() == loss["s3prl"][1].keys()
    for name, grad in loss["s3prl"][2].items():
        if grad is not None:
            torch.testing.assert_close(loss["fast"][2][name], grad, rtol=1e-3, atol=1e-5)


def test_teacher_dropout_uses_s3prls_forward(teachers, waves):
    settings = {"hubert": TeacherSettings(str(teachers["hubert"]), (2, 4))}
    loaded = load_teachers(settings, dropout=True).train()
    assert loaded["hubert"].encoder is None
    first, second = loaded(waves)["hubert"], loaded(waves)["hubert"]
    assert not torch.equal(first, second)  # dropout is on
    # An encoder set on a teacher with dropout is not used.
    teacher = Teacher(load_upstream(str(teachers["hubert"]), "here"), (2,), "h")
    teacher.encoder = fast_encoders({"h": teacher.upstream})["h"]
    ensemble = TeacherEnsemble({"h": teacher}, dropout=True).train()
    assert not torch.equal(ensemble(waves)["h"], ensemble(waves)["h"])


def test_unsupported_upstreams_get_no_fast_encoder(upstreams, teachers, waves, monkeypatch):
    class Other(torch.nn.Module):
        pass

    wav2vec2 = copy.copy(upstreams["wav2vec2"])
    wav2vec2.apply_padding_mask = False
    assert family(Other()) is None and family(wav2vec2) is None
    assert fast_encoders({"other": Other()}) == {}

    def family_after(change):
        upstream = load_upstream(str(teachers["wavlm"]), "here")
        change(upstream.model)
        return family(upstream)

    assert family_after(lambda model: None) == "wavlm"
    conv = torch.nn.Conv1d(32, 32, 3, stride=2, padding=1)
    for change in (
        lambda m: m.feature_extractor.conv_layers[1].__setitem__(0, conv),
        lambda m: m.feature_extractor.conv_layers[1].__setitem__(-1, torch.nn.ReLU()),
        lambda m: setattr(m.encoder.layers[1], "fc1", torch.nn.Identity()),
        lambda m: setattr(m.encoder.layers[0].self_attn, "add_zero_attn", True),
        lambda m: m.encoder.pos_conv.append(torch.nn.GELU()),
        lambda m: setattr(m, "crop_seq_to_multiple", 2),
    ):
        assert family_after(change) is None


@pytest.mark.parametrize("kind", ["hubert_large", "wavlm"])
def test_half_precision_returns_float32_and_logs_its_error_once(upstreams, waves, caplog, kind):
    expected = expert(upstreams[kind], waves)
    with caplog.at_level(logging.INFO):
        for precision in ("float16", "bfloat16"):
            encoder = fast_encoders({kind: upstreams[kind]}, precision)[kind]
            states = run(encoder, waves, [1, 4])
            run(encoder, waves, [1, 4])
            for index in (1, 4):
                state, reference = states[index], expected[index]
                assert state.dtype == torch.float32
                error = (state - reference).abs().mean() / reference.abs().mean()
                assert 0 < error < 0.05
            messages = [record.getMessage() for record in caplog.records]
            logged = [text for text in messages if kind in text and f" {precision} " in text]
            assert len(logged) == 1 and re.search(r"\d\.\d{3} %", logged[0])


def test_compiled_layers_are_called_and_a_failure_names_the_setting(upstreams, waves, monkeypatch):
    """With a mock of torch.compile, which takes a minute on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    encoder = fast_encoders({"w": upstreams["wavlm"]}, compiled=True)["w"]
    assert_close(run(encoder, waves, [4])[4], expert(upstreams["wavlm"], waves)[4])

    def fails(*args):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fails)
    encoder = fast_encoders({"w": upstreams["wavlm"]}, compiled=True)["w"]
    with pytest.raises(TeacherError, match=r"teachers\.w\b.*\bno compiler\b.*teacher_compile"):
        run(encoder, waves, [4])


def test_weights_are_converted_again_for_another_device(upstreams, waves):
    encoder = fast_encoders({"h": upstreams["hubert"]})["h"]
    weights = encoder._weights_on(torch.device("cpu"))
    assert encoder._weights_on(torch.device("cpu")) is weights
    assert encoder._weights_on(torch.device("meta")) is not weights


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_backend": "s3prl", "teacher_precision": "bfloat16"},
        {"teacher_dropout": True, "teacher_precision": "float16"},
        {"teacher_backend": "s3prl", "teacher_compile": True},
    ],
)
def test_contradicting_settings_are_rejected(settings):
    with pytest.raises(ValueError) as error:
        DistillSettings({"a": TeacherSettings("x")}, **settings)
    first, second = settings
    assert first in str(error.value) and second in str(error.value)


def test_precisions_are_those_of_the_settings():
    from typing import get_args, get_type_hints

    settings = get_args(get_type_hints(DistillSettings)["teacher_precision"])
    assert {*PRECISIONS, "auto"} == {*settings}
