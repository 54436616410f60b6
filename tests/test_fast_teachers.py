"""Fast teachers: s3prl's own experts are what they are compared with, on padded batches."""

import copy
import logging

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from s3prl_ekd.distill.settings import DistillSettings, TeacherSettings
from s3prl_ekd.distill.teachers import Teacher, TeacherEnsemble
from s3prl_ekd.errors import TeacherError
from s3prl_ekd.teachers import load_teachers, load_upstream
from s3prl_ekd.teachers.fast import conv as fast_conv
from s3prl_ekd.teachers.fast import encoder as fast
from s3prl_ekd.teachers.fast import encoder as fast_encoder
from s3prl_ekd.teachers.fast.encoder import family, fast_encoders, normalised, padded_frames
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


def shake(state):
    """Every tensor away from its first zeros and ones: a bias or a norm left out is then seen."""
    generator = torch.Generator().manual_seed(11)
    for weight in state.values():
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return state


def checkpoint(kind, more):
    """A tiny checkpoint of a kind, in the format that s3prl loads."""
    if kind.startswith(("wavlm", "unispeech")):
        from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

        state = wavlm_checkpoint(**SIZES)
        cfg = {**state["cfg"], **more}
        torch.manual_seed(3)
        return {"cfg": cfg, "model": shake(WavLM(WavLMConfig(cfg)).state_dict())}
    state = hubert_checkpoint(**SIZES)
    more = dict(more)
    state["task_cfg"]["normalize"] = more.pop("normalize", False)
    state["model_cfg"].update(more)
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

        parts = HubertConfig(**state["model_cfg"]), HubertPretrainingConfig(**state["task_cfg"])
        model = HubertModel(*parts, state["dictionaries_symbols"])
    state["model_weight"] = shake(model.state_dict())
    return state


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory):
    """s3prl's expert of each of KINDS."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}
    for kind, more in KINDS.items():
        torch.save(checkpoint(kind, more), folder / f"{kind}.pt")
        made[kind] = load_upstream(str(folder / f"{kind}.pt"), "here").eval().requires_grad_(False)
    return made


@torch.no_grad()
def expert(upstream, waves):
    return [state.clone() for state in upstream(list(waves))["hidden_states"]]


def close(ours, theirs):
    """To 1e-5 of the largest value, and 1e-5 at least."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1, float(theirs.abs().max())))


def run(encoder, waves, layers, **more):
    lengths = [len(wave) for wave in waves]
    return encoder.hidden_states(
        pad_sequence(list(waves), batch_first=True), lengths, layers, **more
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_s3prls_expert(upstreams, waves, kind):
    """On a padded batch of odd and even frames, on one waveform, and on equal ones."""
    upstream = upstreams[kind]
    assert family(upstream) == kind.split("_")[0].replace("unispeech", "unispeech_sat")
    encoder = fast_encoders({kind: upstream})[kind]
    equal = [waves[0][:9000], waves[1][:9000]]
    short = [waves[0], waves[1][:401]]  # one frame by wav2vec 2.0's count
    loud = [0.5 + 20 * wave for wave in waves]
    for batch in (waves, waves[:1], [waves[0][:15600]], equal, short, loud):
        theirs = expert(upstream, batch)
        ours = run(encoder, batch, range(5))
        assert sorted(ours) == list(range(len(theirs)))
        for number, state in ours.items():
            close(state, theirs[number])
    # The fused weights are the module's own: it still gives what it gave.
    for before, after in zip(theirs, expert(upstream, batch), strict=True):
        torch.testing.assert_close(after, before)


def test_normalised_is_torchs_layer_norm_of_each_waveform(waves):
    padded = pad_sequence(waves, batch_first=True)
    ours = normalised(padded, [len(wave) for wave in waves])
    for row, wave in zip(ours, waves, strict=True):
        theirs = torch.nn.functional.layer_norm(wave, wave.shape)
        torch.testing.assert_close(row[: len(wave)], theirs, rtol=0, atol=1e-5)
        assert not row[len(wave) :].any()


def test_padded_frames_by_hand():
    conv = [(10, 5), (3, 2)]
    assert padded_frames([100, 100], 100, 9, None) is None
    # 100 samples in 9 frames: blocks of 11 samples; the 34th sample lies in the fourth.
    assert padded_frames([100, 34, 33, 1], 100, 9, None) == [9, 4, 3, 1]
    # 40 samples: 7 frames, then 3; 12 samples: 1 frame, then none: s3prl marks all as valid.
    assert padded_frames([100, 40, 12], 100, 9, conv) == [9, 3, 9]


def test_no_layer_above_the_highest_wanted_is_run(upstreams, waves, monkeypatch):
    encoder = fast_encoders({"h": upstreams["hubert_large"]})["h"]
    called = []
    layer = fast_encoder.fast_layers.Layer

    def counting(self, *args):
        called.append(1)
        return original(self, *args)

    original = layer.__call__
    monkeypatch.setattr(layer, "__call__", counting)
    states = run(encoder, waves, [0, 2])
    assert sorted(states) == [0, 2] and len(called) == 2
    theirs = expert(upstreams["hubert_large"], waves)
    close(states[2], theirs[2])  # not behind the encoder's last norm
    called.clear()
    assert sorted(run(encoder, waves, [0])) == [0] and not called


def test_a_kept_state_is_not_overwritten_by_the_layers_behind_it(upstreams, waves):
    for kind in ("hubert", "wavlm_large"):
        encoder = fast_encoders({kind: upstreams[kind]})[kind]
        together = run(encoder, waves, range(5))
        for number in range(5):
            torch.testing.assert_close(run(encoder, waves, [number])[number], together[number])


def test_the_position_bias_is_made_once_for_each_number_of_frames(upstreams, waves, monkeypatch):
    encoder = fast_encoders({"w": upstreams["wavlm"]})["w"]
    asked = []
    bias = type(encoder._on(torch.device("cpu")).bias)
    make = bias._make
    monkeypatch.setattr(bias, "_make", lambda self, n: asked.append(n) or make(self, n))
    for samples in (16000, 9000, 16000, 9000, 8000, 7000, 6000, 16000):
        run(encoder, [waves[0][:samples]], [1])
    assert asked == [49, 27, 24, 21, 18, 49]  # four are kept


def test_teachers_with_one_conv_extractor_run_it_once(teachers, waves, monkeypatch, tmp_path):
    hubert = load_upstream(str(teachers["hubert"]), "here")
    state = torch.load(teachers["hubert"], weights_only=True)
    for name, weight in state["model_weight"].items():
        if name.startswith("encoder."):
            weight += 0.1
    torch.save(state, tmp_path / "tuned.pt")
    state["task_cfg"]["normalize"] = True
    torch.save(state, tmp_path / "normalised.pt")
    others = {n: load_upstream(str(tmp_path / f"{n}.pt"), "here") for n in ("tuned", "normalised")}
    robust = load_upstream(str(teachers["robust"]), "here")
    models = {"hubert": hubert, **others, "robust": robust}
    encoders = fast_encoders(models)
    assert encoders["hubert"].extractor is encoders["tuned"].extractor
    assert encoders["hubert"].extractor is encoders["normalised"].extractor
    assert encoders["hubert"].extractor is not encoders["robust"].extractor
    ran = []
    once = fast_conv.ConvExtractor.__call__
    monkeypatch.setattr(
        fast_conv.ConvExtractor, "__call__", lambda self, w: ran.append(self) or once(self, w)
    )
    shared = {}
    for name, encoder in encoders.items():
        states = run(encoder, waves, [4], shared=shared)
        close(states[4], expert(models[name].eval(), waves)[4])
    assert len(ran) == 3  # as it is, normalised, and robust's own


def test_the_ensemble_takes_the_fast_path_and_autograd_may_use_it(teachers, waves):
    settings = {
        "hubert": TeacherSettings(str(teachers["hubert"]), (2, 4)),
        "wavlm": TeacherSettings(str(teachers["wavlm"]), groups=((1, 2), (3,))),
    }
    quick, plain = load_teachers(settings, False), load_teachers(settings, False, path="plain")
    assert all(teacher.encoder is not None for teacher in quick.values())
    assert all(teacher.encoder is None for teacher in plain.values())
    states = quick.states(waves, also={"hubert": 1})
    assert sorted(states["hubert"]) == [1, 2, 4] and sorted(states["wavlm"]) == [1, 2, 3]
    ours, theirs = quick(waves), plain(waves)
    for name in settings:
        close(ours[name], theirs[name])
        weight = torch.ones(ours[name].shape[-1], requires_grad=True)
        torch.cosine_similarity(ours[name] * weight, ours[name], dim=-1).sum().backward()
        assert torch.isfinite(weight.grad).all()


def test_a_step_with_fast_teachers_is_the_step_with_plain_ones(teachers, student_settings, waves):
    """Loss and gradients, with a unit head on a layer that is no target."""
    from .experiments import batch_of

    class Units:
        teacher, layer, clusters, width = "t1", 1, 3, 48

        def label(self, hidden):
            return (hidden @ torch.linspace(-1, 1, 48)).relu().long().clamp(max=2)

    names = ("hubert", "wavlm")
    loss = {}
    for path in ("fast", "plain"):
        made = distiller(teachers, student_settings, names, units=Units())
        if path == "fast":
            models = {name: teacher.upstream for name, teacher in made.teachers.items()}
            for name, encoder in fast_encoders(models).items():
                made.teachers[name].encoder = encoder
        value, parts = made(batch_of(waves), detail=True)
        value.backward()
        grads = {name: weight.grad for name, weight in made.trainable.named_parameters()}
        loss[path] = value.detach(), parts, grads
    torch.testing.assert_close(loss["fast"][0], loss["plain"][0], rtol=1e-5, atol=1e-5)
    assert loss["fast"][1].keys() == loss["plain"][1].keys()
    for name, grad in loss["plain"][2].items():
        if grad is not None:
            torch.testing.assert_close(loss["fast"][2][name], grad, rtol=1e-3, atol=1e-5)


def test_teacher_dropout_takes_the_plain_path(teachers, waves):
    settings = {"hubert": TeacherSettings(str(teachers["hubert"]), (2, 4))}
    loaded = load_teachers(settings, dropout=True).train()
    assert loaded["hubert"].encoder is None
    one, two = loaded(waves)["hubert"], loaded(waves)["hubert"]
    assert not torch.equal(one, two)  # dropout is heard
    # Nor when somebody hangs an encoder on a teacher with dropout.
    made = Teacher(load_upstream(str(teachers["hubert"]), "here"), (2,), "h")
    made.encoder = fast_encoders({"h": made.upstream})["h"]
    ensemble = TeacherEnsemble({"h": made}, dropout=True).train()
    assert not torch.equal(ensemble(waves)["h"], ensemble(waves)["h"])


def test_other_kinds_stay_on_the_plain_path(upstreams, teachers, waves, monkeypatch):
    class Other(torch.nn.Module):
        pass

    wav2vec2 = copy.copy(upstreams["wav2vec2"])
    wav2vec2.apply_padding_mask = False
    assert family(Other()) is None and family(wav2vec2) is None
    assert fast_encoders({"other": Other()}) == {}

    def broken(change):
        upstream = load_upstream(str(teachers["wavlm"]), "here")
        change(upstream.model)
        return family(upstream)

    assert broken(lambda model: None) == "wavlm"
    conv = torch.nn.Conv1d(32, 32, 3, stride=2, padding=1)
    for change in (
        lambda m: m.feature_extractor.conv_layers[1].__setitem__(0, conv),
        lambda m: m.feature_extractor.conv_layers[1].__setitem__(-1, torch.nn.ReLU()),
        lambda m: setattr(m.encoder.layers[1], "fc1", torch.nn.Identity()),
        lambda m: setattr(m.encoder.layers[0].self_attn, "add_zero_attn", True),
        lambda m: m.encoder.pos_conv.append(torch.nn.GELU()),
        lambda m: setattr(m, "crop_seq_to_multiple", 2),
    ):
        assert broken(change) is None


@pytest.mark.parametrize("kind", ["hubert_large", "wavlm"])
def test_half_precision_gives_float32_and_says_how_far_it_is(upstreams, waves, caplog, kind):
    theirs = expert(upstreams[kind], waves)
    # Some virtual machines announce bfloat16 instructions that they have not; oneDNN would take
    # them, torch's own loops do not.
    with torch.backends.mkldnn.flags(enabled=False), caplog.at_level(logging.INFO):
        for precision in ("float16", "bfloat16"):
            encoder = fast_encoders({kind: upstreams[kind]}, precision)[kind]
            states = run(encoder, waves, [1, 4])
            run(encoder, waves, [1, 4])
            for number in (1, 4):
                assert states[number].dtype == torch.float32
                away = (states[number] - theirs[number]).abs().mean() / theirs[number].abs().mean()
                assert 0 < away < 0.05
            said = f"teacher {kind}: {precision} targets differ from float32 by"
            assert caplog.text.count(said) == 1


def test_compiled_layers_are_called_and_a_failure_is_a_sentence(upstreams, waves, monkeypatch):
    """torch.compile itself takes a minute on a CPU; what stands around it is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    encoder = fast_encoders({"w": upstreams["wavlm"]}, compiled=True)["w"]
    close(run(encoder, waves, [4])[4], expert(upstreams["wavlm"], waves)[4])

    def fails(*args):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fails)
    encoder = fast_encoders({"w": upstreams["wavlm"]}, compiled=True)["w"]
    with pytest.raises(TeacherError, match=r"teachers\.w: .*\(no compiler\); set teacher_compile"):
        run(encoder, waves, [4])


def test_weights_move_with_the_module(upstreams, waves):
    """Another device, here one that computes nothing: what was made for the CPU is not used."""
    encoder = fast_encoders({"h": upstreams["hubert"]})["h"]
    first = encoder._on(torch.device("cpu"))
    assert encoder._on(torch.device("cpu")) is first
    assert encoder._on(torch.device("meta")) is not first


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"teacher_path": "plain", "teacher_precision": "bfloat16"}, "with teacher_path: plain"),
        ({"teacher_dropout": True, "teacher_precision": "float16"}, "with teacher_dropout: true"),
        ({"teacher_path": "plain", "teacher_compile": True}, "teacher_path: plain has no use"),
    ],
)
def test_settings_that_contradict_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        DistillSettings({"a": TeacherSettings("x")}, **more)


def test_precisions_are_those_of_the_settings():
    from typing import get_args, get_type_hints

    assert set(fast.PRECISIONS) == set(
        get_args(get_type_hints(DistillSettings)["teacher_precision"])
    )
