"""The tiny teachers of the package, as teachers and as upstreams."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from s3prl.upstream.hubert.hubconf import hubert_local
from s3prl.upstream.wavlm.hubconf import wavlm_local

import s3prl_ekd
from s3prl_ekd.commands import teachers as teachers_command
from s3prl_ekd.distill.settings import TeacherSettings
from s3prl_ekd.errors import CheckpointError, SetupError, TeacherError
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.superb.cost import build_upstream, measure_cost
from s3prl_ekd.teachers import check_source, load_teachers, load_upstream, zoo
from s3prl_ekd.teachers.random_weights import random_init

# parameters: conv, projection, positional conv, 6 layers; for HuBERT plus a head, 192 for each unit
WAVLM, HUBERT_BODY = 3_257_352, 3_290_752


def parameters(name: str) -> int:
    if family(name) == "wavlm":
        return WAVLM
    return HUBERT_BODY + 192 * len(safe_load(zoo.checkpoint_path(name))["dictionaries_symbols"][0])


def family(name: str) -> str:
    return "wavlm" if "wavlm" in name else "hubert"


def states_of(waves, upstream):
    with torch.no_grad():
        return upstream.eval()(waves)["hidden_states"]


@pytest.mark.parametrize("name", zoo.TEACHERS)
def test_a_file_is_in_s3prls_format_small_and_finite(name, waves):
    path = zoo.checkpoint_path(name)
    assert path.stat().st_size < 7_000_000
    states = safe_load(path)
    weights = states["model" if family(name) == "wavlm" else "model_weight"]
    assert all(weight.dtype == torch.float16 for weight in weights.values())
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    reference = (wavlm_local if family(name) == "wavlm" else hubert_local)(str(path))
    for upstream in (load_upstream(name, "here"), build_upstream(name, None)):
        assert sum(p.numel() for p in upstream.parameters()) == parameters(name)
        hidden = states_of(waves, upstream)
        assert len(hidden) == 7 and hidden[0].shape == (3, 49, 192)
        for state, expected in zip(hidden, states_of(waves, reference), strict=True):
            assert torch.equal(state, expected)


@pytest.mark.parametrize("name", zoo.RANDOM_INIT)
def test_random_weights_have_the_trained_teachers_shapes_and_do_not_change(name, waves):
    upstream = build_upstream(name, None)
    trained = build_upstream(zoo.RANDOM_INIT[name], None)
    assert {k: v.shape for k, v in upstream.state_dict().items()} == {
        k: v.shape for k, v in trained.state_dict().items()
    }
    hidden = states_of(waves, upstream)
    assert not torch.allclose(hidden[-1], states_of(waves, trained)[-1], atol=0.1)
    repeated = states_of(waves, load_upstream(name, "here"))
    assert torch.equal(hidden[-1], repeated[-1])


@pytest.mark.parametrize("name", zoo.TEACHERS)
def test_random_init_gives_the_initial_weights_of_training(name):
    from teacher_zoo.models import MaskedPredictor
    from teacher_zoo.recipe import TeacherRecipe

    states = safe_load(zoo.checkpoint_path(name))
    classes = len(states["dictionaries_symbols"][0]) if family(name) == "hubert" else 200
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MaskedPredictor(family(name), TeacherRecipe(), classes)
    expected = model.backbone.state_dict()
    torch.manual_seed(0)
    rng_state = torch.get_rng_state()
    initial = random_init(name, seed=11)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert initial.keys() == states.keys()
    weights_key = "model" if family(name) == "wavlm" else "model_weight"
    weights = initial[weights_key]
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, expected[key].half()), key
    other = random_init(name, seed=12)[weights_key]
    assert not torch.equal(other["post_extract_proj.weight"], weights["post_extract_proj.weight"])


def test_tiny_teachers_have_fast_encoders(waves):
    settings = {name: TeacherSettings(name, (2, 6)) for name in zoo.NAMES}
    fast = load_teachers(settings, False)
    reference = load_teachers(settings, False, backend="plain")
    for name in settings:
        assert fast[name].encoder is not None and reference[name].encoder is None
    with torch.no_grad():
        outputs, expected = fast(waves[:1]), reference(waves[:1])
    for name in settings:
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4)


def test_a_file_of_the_same_name_takes_precedence(tmp_path, monkeypatch, teachers):
    monkeypatch.chdir(tmp_path)
    Path("tiny_hubert").write_bytes(teachers["hubert"].read_bytes())
    hidden = states_of([torch.zeros(4000)], load_upstream("tiny_hubert", "here"))
    assert hidden[0].shape[-1] == 48


def test_errors(monkeypatch, tmp_path):
    with pytest.raises(TeacherError, match=r"\(did you mean tiny_robust_hubert\?\)"):
        check_source("tiny_robust_huber", "here")
    with pytest.raises(SetupError, match="'tiny_bert'.*tiny_hubert, "):
        zoo.checkpoint_path("tiny_bert")
    with pytest.raises(CheckpointError, match=r"-k x\.pt.*tiny_wavlm"):
        build_upstream("tiny_wavlm", "x.pt")
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    with pytest.raises(SetupError, match=r"files/tiny_wavlm\.pt"):
        load_upstream("tiny_wavlm", "here")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tiny_wavlm.pt").write_bytes(b"no torch file")
    for name in ("tiny_wavlm", "tiny_wavlm_random"):
        with pytest.raises(CheckpointError, match=r"files/tiny_wavlm\.pt"):
            load_upstream(name, "here")


def test_the_hub_has_them_and_another_plugins_entry_is_rejected(monkeypatch):
    s3prl_ekd.register()
    from s3prl import hub

    assert all(callable(getattr(hub, name)) for name in zoo.NAMES)
    monkeypatch.setattr(hub, "tiny_wavlm", print)
    with pytest.raises(SetupError, match=r"s3prl\.hub.*tiny_wavlm"):
        s3prl_ekd.register()


def test_cost_of_the_tiny_teachers():
    """SUPERB counts all parameters, also HuBERT's head, which the hidden states don't need."""
    lengths = {"short": (16_000,)}
    for name in ("tiny_hubert", "tiny_wavlm"):
        cost = measure_cost(build_upstream(name, None), lengths)
        assert cost["parameters"] == parameters(name)
        # conv: 128 x (10 x 3199 + 128 x 3 x (1599 + 799 + 399 + 199) + 128 x 2 x (99 + 49))
        assert cost["macs_products"] > 128 * (31_990 + 384 * 2_996 + 256 * 148)
        assert 0 < cost["unused"] < 100_000


def test_the_tiny_teachers_are_listed(capsys):
    assert teachers_command.main(Namespace(action="list")) == 0
    output = capsys.readouterr().out
    for name in zoo.NAMES:
        assert f"    {name}" in output
