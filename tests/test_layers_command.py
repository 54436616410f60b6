"""Groups of layers: clustering, and the commands `layers` and `teachers`."""

import csv
import sys

import numpy as np
import pytest
import torch
import yaml

from s3prl_ekd import cli
from s3prl_ekd.analysis.choice import choose_audio
from s3prl_ekd.analysis.layer_statistics import aligned, layer_statistics
from s3prl_ekd.analysis.layers import (
    LINKAGES,
    cka_matrix,
    cosine_matrix,
    cut,
    layer_tree,
    require_scipy,
)
from s3prl_ekd.analysis.plots import require_matplotlib
from s3prl_ekd.analysis.sample import sample_layers
from s3prl_ekd.errors import ConfigError, DataError, SetupError

from .conftest import write_configs

hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
pytest.importorskip("matplotlib")

# Layers 1 and 2 are near, 3 and 4 nearer, 5 is like 1 and 2.
WORKED = np.array(
    [
        [1.0, 0.8, 0.3, 0.2, 0.7],
        [0.8, 1.0, 0.4, 0.3, 0.6],
        [0.3, 0.4, 1.0, 0.9, 0.1],
        [0.2, 0.3, 0.9, 1.0, 0.2],
        [0.7, 0.6, 0.1, 0.2, 1.0],
    ]
)


def group_layers(similarity, groups, linkage="average", contiguous=False):
    return cut(layer_tree(similarity, linkage, contiguous), groups)


def test_a_worked_example():
    """3+4 merge at 0.1, 1+2 at 0.2, 5 joins these at (0.3 + 0.4) / 2."""
    tree = layer_tree(WORKED)
    np.testing.assert_allclose(tree[:3], [[2, 3, 0.1, 2], [0, 1, 0.2, 2], [4, 6, 0.35, 3]])
    assert group_layers(WORKED, 2) == ((1, 2, 5), (3, 4))
    assert group_layers(WORKED, 3) == ((1, 2), (3, 4), (5,))
    assert group_layers(WORKED, 1) == ((1, 2, 3, 4, 5),)
    assert group_layers(WORKED, 5) == ((1,), (2,), (3,), (4,), (5,))


def test_the_worked_example_with_neighbours_only():
    """5 may not join 1+2 over 3+4; these two pairs are nearer (0.7) than 3+4 and 5 (0.85)."""
    tree = layer_tree(WORKED, contiguous=True)
    np.testing.assert_allclose(tree[:3], [[2, 3, 0.1, 2], [0, 1, 0.2, 2], [5, 6, 0.7, 4]])
    assert group_layers(WORKED, 2, contiguous=True) == ((1, 2, 3, 4), (5,))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_scipys(linkage, seed):
    similarity = np.random.default_rng(seed).uniform(0, 1, (12, 12))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1)
    condensed = (1 - similarity)[np.triu_indices(12, 1)]
    theirs = hierarchy.linkage(condensed, linkage)
    np.testing.assert_allclose(layer_tree(similarity, linkage), theirs)
    for k in range(1, 13):
        numbers = hierarchy.cut_tree(theirs, k)[:, 0]
        groups = {tuple(np.flatnonzero(numbers == n) + 1) for n in set(numbers)}
        assert set(group_layers(similarity, k, linkage)) == groups


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(5))
def test_contiguous_groups_are_contiguous(linkage, seed):
    similarity = np.random.default_rng(seed).uniform(0, 1, (12, 12))
    tree = layer_tree(similarity, linkage, contiguous=True)
    assert hierarchy.is_valid_linkage(tree) and hierarchy.is_monotonic(tree)
    for k in range(1, 13):
        groups = cut(tree, k)
        assert len(groups) == k
        assert [layer for group in groups for layer in group] == list(range(1, 13))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_neighbour_clustering_equals_scipys_where_layers_lie_on_a_line(linkage):
    """Points in order on a line merge with neighbours anyway."""
    places = np.array([0.0, 0.02, 0.07, 0.3, 0.33, 0.38, 0.39, 0.8, 0.83])
    similarity = 1 - np.abs(places[:, None] - places[None])
    ours, theirs = layer_tree(similarity, linkage, contiguous=True), layer_tree(similarity, linkage)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("measure", [cka_matrix, cosine_matrix])
def test_blocks_of_alike_layers_are_found(measure, linkage, contiguous):
    blocks = [(1, 2, 3), (4, 5, 6, 7, 8), (9, 10, 11, 12)]
    generator = torch.Generator().manual_seed(0)
    layers = []
    for block in blocks:
        base = torch.randn(200, 16, generator=generator)
        layers += [base + 0.3 * torch.randn(200, 16, generator=generator) for _ in block]
    assert group_layers(measure(layers).numpy(), 3, linkage, contiguous) == tuple(blocks)


def test_what_cannot_be_clustered():
    with pytest.raises(ConfigError, match="'median' is not known; use one of: average"):
        layer_tree(WORKED, "median")
    with pytest.raises(ConfigError, match="6 groups of 5 layers"):
        group_layers(WORKED, 6)
    with pytest.raises(ConfigError, match="one layer cannot be grouped"):
        layer_tree(np.ones((1, 1)))
    with pytest.raises(ConfigError, match="do not vary"):
        layer_tree(np.full((3, 3), np.nan))


def test_statistics_and_tables():
    found = layer_statistics(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert (found.norm, found.mean) == (3.0, 2.0)
    assert found.std == pytest.approx(np.std([3, 4, 0, 1]))
    assert aligned([("a", "bb"), ("long", "1")]) == "a     bb\n----  --\nlong   1"


class Ramp(torch.nn.Module):
    """Hidden states that say their frame and layer: one frame every 320 samples."""

    def __init__(self, extra=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.extra = extra

    def forward(self, waves):
        frames = torch.arange(len(waves[0]) // 320 + self.extra).float()
        states = [torch.stack([frames, torch.full_like(frames, n)], -1)[None] for n in range(3)]
        return {"hidden_states": states}


def test_frames_are_sampled_evenly_and_together(corpus):
    paths = choose_audio(corpus / "audio", None, 4)
    assert paths == choose_audio(corpus / "audio", None, 4) and len(set(paths)) == 4
    sample = sample_layers({"a": Ramp(), "b": Ramp(extra=1)}, paths, max_frames=40)
    assert [tuple(layer.shape) for layer in sample["a"]] == [(40, 2)] * 3
    assert torch.equal(sample["a"][1], sample["b"][1])
    first = sample["a"][2][:10]
    assert first[0, 0] == 0 and (first[1:, 0] > first[:-1, 0]).all() and (first[:, 1] == 2).all()


class Spoilt(Ramp):
    """Its layer 1 has a huge value in frame 3 of each file, or NaN throughout."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, waves):
        states = super().forward(waves)["hidden_states"]
        states[1][0, 3 if self.value == self.value else slice(None)] = self.value
        return {"hidden_states": states}


def test_frames_of_huge_values_are_left_out_for_all_teachers(corpus, caplog):
    paths = choose_audio(corpus / "audio", None, 4)
    sample = sample_layers({"a": Spoilt(1e20), "b": Ramp()}, paths)
    assert "left out 4 of" in caplog.text
    for layers in sample.values():
        assert all(not (layer[:, 0] == 3).any() and layer.max() < 1000 for layer in layers)
    with pytest.raises(DataError, match="no frame"):
        sample_layers({"a": Spoilt(float("nan"))}, paths)


def test_audio_is_chosen_from_a_table_too(corpus, tmp_path):
    table = corpus / "tables" / "train.csv"
    assert len(choose_audio(table, corpus / "audio", 99)) == 12
    with pytest.raises(ConfigError, match="--audio-root is needed"):
        choose_audio(table, None, 3)
    with pytest.raises(ConfigError, match="--utterances is 0"):
        choose_audio(table, corpus, 0)
    with pytest.raises(DataError, match="there is no audio below"):
        choose_audio(tmp_path, None, 3)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, teachers, corpus):
    """Run ``s3prl-ekd WORDS --data AUDIO`` in this process over a config of three teachers."""
    write_configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        if words[1:] != ("list",):
            words = (*words, "--data", str(corpus / "audio"), "--utterances", "4")
        code = cli.main(words)
        assert code == 0
        return capsys.readouterr().out

    return run


def test_layers_writes_a_config_with_groups(run, tmp_path):
    said = run("layers", "model.yaml", "-o", "new/skill.yaml", "--groups", "2", "--contiguous")
    text = (tmp_path / "new/skill.yaml").read_text()
    assert text.startswith("# model.yaml with groups of layers (SKILL, arXiv 2402.16830)")
    assert "cka, average linkage, contiguous, 4 utterances" in text
    data, before = yaml.safe_load(text), yaml.safe_load((tmp_path / "model.yaml").read_text())
    assert data["aggregation"] == "groups" and data["student"] == before["student"]
    for name, teacher in data["teachers"].items():
        assert "layers" not in teacher and teacher["model"] == before["teachers"][name]["model"]
        assert len(teacher["groups"]) == 2
        assert [layer for group in teacher["groups"] for layer in group] == [1, 2, 3, 4]
        assert f"{name}: {teacher['groups'][0]}" in said
    assert (tmp_path / "new/skill.png").read_bytes().startswith(b"\x89PNG")
    assert "run_pretrain.py -u ekd -g new/skill.yaml" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "model.yaml"), "model.yaml exists; add --force to write over it"),
        (("-o", "new.yaml", "--groups", "5"), "--groups 5: hubert has 4 transformer layers"),
        (("-o", "new.yaml", "--device", "nonsense"), "--device nonsense cannot be used"),
    ],
)
def test_layers_refuses_in_one_sentence(run, capsys, words, said):
    with pytest.raises(SystemExit) as left:
        run("layers", "model.yaml", *words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_layers_writes_over_with_force(run, tmp_path):
    words = ("layers", "model.yaml", "-o", "model.yaml", "--force", "--similarity", "cosine")
    run(*words, "--linkage", "complete")
    assert yaml.safe_load((tmp_path / "model.yaml").read_text())["aggregation"] == "groups"


def test_teachers_inspect(run, tmp_path):
    said = run("teachers", "inspect", "model.yaml", "-o", "seen")
    assert "hubert - robust 2 - 2" in " ".join(said.split()) and "4 utterances" in said
    rows = list(csv.reader((tmp_path / "seen/layers.csv").open()))
    assert rows[0] == ["teacher", "layer", "norm", "mean", "spread"] and len(rows) == 1 + 3 * 5
    matrix = list(csv.reader((tmp_path / "seen/cka.csv").open()))
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] and matrix[0][6] == "robust 0"
    values = np.array([row[1:] for row in matrix[1:]], dtype=float)
    np.testing.assert_allclose(values, values.T)
    np.testing.assert_allclose(values.diagonal(), 1, atol=1e-5)
    assert (tmp_path / "seen/cka.png").read_bytes().startswith(b"\x89PNG")


def test_teachers_list(run):
    said = run("teachers", "list")
    for name in ("hubert_base_robust_mgr", "wavlm_base_plus", "ekd_student", "data2vec-audio"):
        assert name in said


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SetupError, match=r"pip install 's3prl_ekd\[plots\]'"):
        require_matplotlib()
    monkeypatch.setitem(sys.modules, "scipy.cluster", None)
    with pytest.raises(SetupError, match=r"pip install 's3prl_ekd\[analysis\]'"):
        require_scipy()
