"""Teachers with random weights load in s3prl, and their features depend on the waveform."""

import pytest
import torch
from s3prl.upstream.hubert.hubconf import hubert_local
from s3prl.upstream.wavlm.hubconf import wavlm_local

from s3prl_ekd.teachers.random_weights import hubert_checkpoint, wavlm_checkpoint

LOADERS = {"hubert": hubert_local, "wavlm": wavlm_local}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    paths = {name: folder / f"{name}.pt" for name in LOADERS}
    torch.save(hubert_checkpoint(), paths["hubert"])
    torch.save(wavlm_checkpoint(), paths["wavlm"])
    return paths


def hidden_states(name, path, waves):
    """Hidden states, each [batch, frame, feature]."""
    upstream = LOADERS[name](ckpt=str(path)).eval()
    with torch.no_grad():
        return upstream(waves)["hidden_states"]


def speechlike(samples=32_000, seed=0):
    """A noisy tone of varying pitch with the rhythm of syllables: [sample] at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 16_000
    noise = torch.randn(samples, generator=generator)
    carrier = torch.sin(2 * torch.pi * (600 * time + 120 * torch.sin(3 * time)))
    return 0.1 * (carrier + 0.3 * noise) * torch.sin(2 * torch.pi * 2 * time).clamp(min=0)


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    return first == second


@pytest.mark.parametrize("name", LOADERS)
def test_s3prl_loads_them(paths, name):
    torch.load(paths[name], weights_only=True)
    states = hidden_states(name, paths[name], [speechlike(16_000), speechlike(9_000)])
    assert len(states) == 7  # the input of the first of six layers, then their outputs
    # 16 000 samples through kernels and strides 10/5, 4 x 3/2, 2 x 2/2
    assert {tuple(state.shape) for state in states} == {(2, 49, 96)}
    assert all(torch.isfinite(state).all() for state in states)


def test_files_are_small(paths):
    assert all(path.stat().st_size < 3_000_000 for path in paths.values())


@pytest.mark.parametrize("name", LOADERS)
def test_features_vary_over_time_and_between_layers(paths, name):
    states = [state[0] for state in hidden_states(name, paths[name], [speechlike()])]
    for state in (states[0], states[-1]):
        spread = state.std(dim=0).norm() / state.norm(dim=1).mean()
        assert spread > 0.3
    between = torch.cosine_similarity(states[0], states[-1], dim=1).mean()
    assert between < 0.95


def test_wavlm_has_the_gated_relative_bias(paths):
    weights = torch.load(paths["wavlm"], weights_only=True)["model"]
    assert "encoder.layers.0.self_attn.relative_attention_bias.weight" in weights
    assert "encoder.layers.5.self_attn.grep_linear.weight" in weights


@pytest.mark.parametrize("build", [hubert_checkpoint, wavlm_checkpoint])
def test_sizes(build, tmp_path):
    sizes = {"embed_dim": 40, "ffn_dim": 56, "heads": 2, "layers": 3, "conv_pos": 8}
    checkpoint = build(conv_layers="[(24,10,5)] + [(24,3,2)] * 4 + [(24,2,2)] * 2", **sizes)
    torch.save(checkpoint, tmp_path / "teacher.pt")
    name = "hubert" if build is hubert_checkpoint else "wavlm"
    states = hidden_states(name, tmp_path / "teacher.pt", [speechlike(8_000)])
    assert [tuple(state.shape) for state in states] == [(1, 24, 40)] * 4


@pytest.mark.parametrize("build", [hubert_checkpoint, wavlm_checkpoint])
def test_seeds(build):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build(seed=5, layers=2)
    assert torch.equal(torch.rand(4), expected)  # the global random state is unchanged
    assert equal(first, build(seed=5, layers=2))
    assert not equal(first, build(seed=6, layers=2))
