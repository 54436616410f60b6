"""The tiny teachers of the package: found by name wherever a teacher or an upstream is named."""

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
from s3prl_ekd.teachers.random_weights import random_twin

# conv, projection, positional conv, 6 layers; HuBERT's head goes with it: 192 for each unit
WAVLM, HUBERT_BODY = 3_257_352, 3_290_752


def parameters(name: str) -> int:
    if family(name) == "wavlm":
        return WAVLM
    return HUBERT_BODY + 192 * len(safe_load(zoo.weights(name))["dictionaries_symbols"][0])


def family(name: str) -> str:
    return "wavlm" if "wavlm" in name else "hubert"


def states_of(waves, upstream):
    with torch.no_grad():
        return upstream.eval()(waves)["hidden_states"]


@pytest.mark.parametrize("name", zoo.TEACHERS)
def test_a_file_is_in_s3prls_format_small_and_finite(name, waves):
    path = zoo.weights(name)
    assert path.stat().st_size < 7_000_000
    states = safe_load(path)
    weights = states["model" if family(name) == "wavlm" else "model_weight"]
    assert all(weight.dtype == torch.float16 for weight in weights.values())
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    theirs = (wavlm_local if family(name) == "wavlm" else hubert_local)(str(path))
    for ours in (load_upstream(name, "here"), build_upstream(name, None)):
        assert sum(p.numel() for p in ours.parameters()) == parameters(name)
        hidden = states_of(waves, ours)
        assert len(hidden) == 7 and hidden[0].shape == (3, 49, 192)
        for one, other in zip(hidden, states_of(waves, theirs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", zoo.TWINS)
def test_a_twin_is_another_model_of_the_same_shape(name, waves):
    twin = build_upstream(name, None)
    learned = build_upstream(zoo.TWINS[name], None)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in learned.state_dict().items()
    }
    hidden = states_of(waves, twin)
    assert not torch.allclose(hidden[-1], states_of(waves, learned)[-1], atol=0.1)
    again = states_of(waves, load_upstream(name, "here"))
    assert torch.equal(hidden[-1], again[-1])


@pytest.mark.parametrize("name", zoo.TEACHERS)
def test_a_twin_is_what_the_training_begins_with(name):
    from teacher_zoo.models import MaskedPredictor
    from teacher_zoo.recipe import Recipe

    states = safe_load(zoo.weights(name))
    classes = len(states["dictionaries_symbols"][0]) if family(name) == "hubert" else 200
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MaskedPredictor(family(name), Recipe(), classes)
    wanted = model.backbone.state_dict()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    twin = random_twin(name, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.keys() == states.keys()
    weights = twin["model" if family(name) == "wavlm" else "model_weight"]
    assert weights.keys() == wanted.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, wanted[key].half()), key
    other = random_twin(name, seed=12)["model" if family(name) == "wavlm" else "model_weight"]
    assert not torch.equal(other["post_extract_proj.weight"], weights["post_extract_proj.weight"])


def test_they_are_teachers_on_the_fast_path(waves):
    settings = {name: TeacherSettings(name, (2, 6)) for name in (*zoo.TEACHERS, *zoo.TWINS)}
    quick = load_teachers(settings, False)
    plain = load_teachers(settings, False, path="plain")
    for name in settings:
        assert quick[name].encoder is not None and plain[name].encoder is None
    with torch.no_grad():
        fast, slow = quick(waves[:1]), plain(waves[:1])
    for name in settings:
        torch.testing.assert_close(fast[name], slow[name], atol=1e-4, rtol=1e-4)


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch, teachers):
    monkeypatch.chdir(tmp_path)
    Path("tiny_hubert").write_bytes(teachers["hubert"].read_bytes())
    hidden = states_of([torch.zeros(4000)], load_upstream("tiny_hubert", "here"))
    assert hidden[0].shape[-1] == 48


def test_mistakes(monkeypatch, tmp_path):
    with pytest.raises(TeacherError, match=r"did you mean tiny_robust_hubert\?"):
        check_source("tiny_robust_huber", "here")
    with pytest.raises(SetupError, match="no tiny teacher 'tiny_bert'; known: tiny_hubert, "):
        zoo.weights("tiny_bert")
    with pytest.raises(CheckpointError, match="tiny_wavlm has weights of its own; leave -k out"):
        build_upstream("tiny_wavlm", "x.pt")
    monkeypatch.setattr(zoo, "_HERE", tmp_path)
    with pytest.raises(SetupError, match="missing from this installation"):
        load_upstream("tiny_wavlm", "here")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tiny_wavlm.pt").write_bytes(b"no torch file")
    for name in ("tiny_wavlm", "tiny_wavlm_random"):
        with pytest.raises(CheckpointError, match="damaged or no torch file"):
            load_upstream(name, "here")


def test_the_hub_has_them_and_another_plugins_entry_is_refused(monkeypatch):
    s3prl_ekd.register()
    from s3prl import hub

    assert all(callable(getattr(hub, name)) for name in zoo.NAMES)
    monkeypatch.setattr(hub, "tiny_wavlm", print)
    with pytest.raises(SetupError, match="s3prl.hub has another tiny_wavlm already"):
        s3prl_ekd.register()


def test_their_cost():
    """Parameters as SUPERB counts them: all, also HuBERT's head, which no hidden state needs."""
    short = {"short": (16_000,)}
    for name in ("tiny_hubert", "tiny_wavlm"):
        cost = measure_cost(build_upstream(name, None), short)
        assert cost["parameters"] == parameters(name)
        # conv: 128 x (10 x 3199 + 128 x 3 x (1599 + 799 + 399 + 199) + 128 x 2 x (99 + 49))
        assert cost["macs_products"] > 128 * (31_990 + 384 * 2_996 + 256 * 148)
        assert 0 < cost["unused"] < 100_000


def test_they_are_listed(capsys):
    assert teachers_command.main(Namespace(action="list")) == 0
    said = capsys.readouterr().out
    for name in zoo.NAMES:
        assert f"    {name}" in said
