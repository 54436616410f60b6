"""Layer groups: clustering, and the commands `layers` and `teachers`."""

import csv
import math
import re
import sys

import numpy as np
import pytest
import torch
import yaml

from s3prl_ekd import cli
from s3prl_ekd.analysis.choice import choose_audio
from s3prl_ekd.analysis.layer_statistics import layer_statistics
from s3prl_ekd.analysis.layers import (
    LINKAGES,
    best_cut,
    cka_matrix,
    cosine_matrix,
    cut_tree,
    cuts,
    layer_distances,
    layer_tree,
    require_scipy,
    silhouette,
)
from s3prl_ekd.analysis.sample import sample_layers
from s3prl_ekd.errors import ConfigError, DataError, SetupError
from s3prl_ekd.system.figures import require_matplotlib
from s3prl_ekd.system.tables import text_table

from .conftest import write_configs

hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
pytest.importorskip("matplotlib")

# Layers 1 and 2 are similar, 3 and 4 more so, and 5 is similar to 1 and 2.
EXAMPLE = np.array(
    [
        [1.0, 0.8, 0.3, 0.2, 0.7],
        [0.8, 1.0, 0.4, 0.3, 0.6],
        [0.3, 0.4, 1.0, 0.9, 0.1],
        [0.2, 0.3, 0.9, 1.0, 0.2],
        [0.7, 0.6, 0.1, 0.2, 1.0],
    ]
)


def group_layers(similarity, groups, linkage="average", contiguous=False):
    return cut_tree(layer_tree(similarity, linkage, contiguous), groups)


def test_groups_by_hand():
    """3+4 merge at 0.1, 1+2 at 0.2, 5 joins 1+2 at (0.3 + 0.4) / 2."""
    tree = layer_tree(EXAMPLE)
    np.testing.assert_allclose(tree[:3], [[2, 3, 0.1, 2], [0, 1, 0.2, 2], [4, 6, 0.35, 3]])
    assert group_layers(EXAMPLE, 2) == ((1, 2, 5), (3, 4))
    assert group_layers(EXAMPLE, 3) == ((1, 2), (3, 4), (5,))
    assert group_layers(EXAMPLE, 1) == ((1, 2, 3, 4, 5),)
    assert group_layers(EXAMPLE, 5) == ((1,), (2,), (3,), (4,), (5,))


def test_contiguous_groups_by_hand():
    """5 is not a neighbour of 1+2; 1+2 and 3+4 are nearer (0.7) than 3+4 and 5 (0.85)."""
    tree = layer_tree(EXAMPLE, contiguous=True)
    np.testing.assert_allclose(tree[:3], [[2, 3, 0.1, 2], [0, 1, 0.2, 2], [5, 6, 0.7, 4]])
    assert group_layers(EXAMPLE, 2, contiguous=True) == ((1, 2, 3, 4), (5,))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(5))
def test_groups_equal_scipys(linkage, seed):
    similarity = np.random.default_rng(seed).uniform(0, 1, (12, 12))
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1)
    condensed = (1 - similarity)[np.triu_indices(12, 1)]
    expected = hierarchy.linkage(condensed, linkage)
    np.testing.assert_allclose(layer_tree(similarity, linkage), expected)
    for k in range(1, 13):
        numbers = hierarchy.cut_tree(expected, k)[:, 0]
        groups = {tuple(np.flatnonzero(numbers == n) + 1) for n in set(numbers)}
        assert set(group_layers(similarity, k, linkage)) == groups


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(5))
def test_contiguous_groups_are_contiguous(linkage, seed):
    similarity = np.random.default_rng(seed).uniform(0, 1, (12, 12))
    tree = layer_tree(similarity, linkage, contiguous=True)
    assert hierarchy.is_valid_linkage(tree) and hierarchy.is_monotonic(tree)
    for k in range(1, 13):
        groups = cut_tree(tree, k)
        assert len(groups) == k
        assert [layer for group in groups for layer in group] == list(range(1, 13))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_contiguous_clustering_equals_scipys_for_points_on_a_line(linkage):
    """Ordered points on a line merge with neighbours in any case."""
    points = np.array([0.0, 0.02, 0.07, 0.3, 0.33, 0.38, 0.39, 0.8, 0.83])
    similarity = 1 - np.abs(points[:, None] - points[None])
    contiguous = layer_tree(similarity, linkage, contiguous=True)
    np.testing.assert_allclose(contiguous, layer_tree(similarity, linkage), atol=1e-12)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("measure", [cka_matrix, cosine_matrix])
def test_blocks_of_similar_layers_are_found(measure, linkage, contiguous):
    blocks = [(1, 2, 3), (4, 5, 6, 7, 8), (9, 10, 11, 12)]
    generator = torch.Generator().manual_seed(0)
    layers = []
    for block in blocks:
        base = torch.randn(200, 16, generator=generator)
        layers += [base + 0.3 * torch.randn(200, 16, generator=generator) for _ in block]
    assert group_layers(measure(layers).numpy(), 3, linkage, contiguous) == tuple(blocks)


def test_silhouette_by_hand():
    """Layers 1, 2 and 3 alone: 1 has 0.2 to layer 2 and 0.7 to layer 3; 2 has 0.2 and 0.6."""
    distance = layer_distances(EXAMPLE[:3, :3])
    expected = ((0.7 - 0.2) / 0.7 + (0.6 - 0.2) / 0.6 + 0) / 3
    assert silhouette(distance, ((1, 2), (3,))) == pytest.approx(expected)
    assert silhouette(distance, ((1,), (2,), (3,))) == 0
    assert math.isnan(silhouette(distance, ((1, 2, 3),)))
    assert silhouette(np.zeros((3, 3)), ((1, 2), (3,))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_silhouettes_equal_sklearns(seed):
    """Of scattered groups as well, which have negative silhouettes, and with layers alone."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    similarity = rng.uniform(0, 1, (12, 12))
    distance = layer_distances((similarity + similarity.T) / 2)
    negative = 0
    for k in range(2, 12):
        labels = rng.permutation(np.r_[np.arange(k), rng.integers(0, k, 12 - k)])
        groups = tuple(tuple(np.flatnonzero(labels == n) + 1) for n in range(k))
        value = silhouette(distance, groups)
        expected = metrics.silhouette_score(distance, labels, metric="precomputed")
        assert value == pytest.approx(expected, abs=1e-12)
        negative += value < 0
    assert negative


def test_the_best_cut_by_hand():
    """Layers at 0, 1, 10 and 12, of an average-linkage tree with merges at 1, 2 and 10.5."""
    points = np.array([0.0, 1.0, 10.0, 12.0])
    similarity = 1 - np.abs(points[:, None] - points[None])
    options = cuts(layer_tree(similarity), layer_distances(similarity))
    assert [cut.sizes for cut in options] == [(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)]
    np.testing.assert_allclose([cut.gap for cut in options[1:]], [8.5, 1, 1])
    pair = (10 / 11 + 9 / 10) / 2  # layers 1 and 2: (11 - 1) / 11 and (10 - 1) / 10
    other = (7.5 / 9.5 + 9.5 / 11.5) / 2  # layers 3 and 4: (9.5 - 2) / 9.5, (11.5 - 2) / 11.5
    assert options[1].silhouette == pytest.approx((pair + other) / 2)
    assert best_cut(options) is options[1] and options[3].silhouette == 0
    two = cuts(layer_tree(np.eye(2)), layer_distances(np.eye(2)))
    assert best_cut(two).groups == ((1,), (2,))


def test_invalid_clusterings():
    with pytest.raises(ConfigError, match=r"\b5\b.*\b6\b"):
        group_layers(EXAMPLE, 6)
    with pytest.raises(ConfigError, match=r"\b1\b"):
        layer_tree(np.ones((1, 1)))
    with pytest.raises(ConfigError, match="constant"):
        layer_tree(np.full((3, 3), np.nan))


def test_statistics_and_tables():
    norm, mean, deviation = layer_statistics(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert (norm, mean) == (3.0, 2.0)
    assert deviation == pytest.approx(np.std([3, 4, 0, 1]))
    lines = text_table([("a", "bb"), ("long", "1")], rule=True)
    assert lines == ["a     bb", "----  --", "long   1"]


class Ramp(torch.nn.Module):
    """Hidden states with values (frame, layer); one frame every 320 samples."""

    def __init__(self, extra=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.extra = extra

    def forward(self, waves):
        frames = torch.arange(len(waves[0]) // 320 + self.extra).float()
        states = [torch.stack([frames, torch.full_like(frames, n)], -1)[None] for n in range(3)]
        return {"hidden_states": states}


def test_the_same_evenly_spaced_frames_are_sampled_for_all_teachers(corpus):
    paths = choose_audio(corpus / "audio", None, 4)
    assert paths == choose_audio(corpus / "audio", None, 4) and len(set(paths)) == 4
    assert sample_layers({"a": Ramp()}, [*paths, corpus / "gone.flac"])[1] == 4
    sample, _ = sample_layers({"a": Ramp(), "b": Ramp(extra=1)}, paths, max_frames=40)
    assert [tuple(layer.shape) for layer in sample["a"]] == [(40, 2)] * 3
    assert torch.equal(sample["a"][1], sample["b"][1])
    first = sample["a"][2][:10]
    assert first[0, 0] == 0 and (first[1:, 0] > first[:-1, 0]).all() and (first[:, 1] == 2).all()


class BadLayer(Ramp):
    """Layer 1 has ``value`` in frame 3 of each file, or in all frames if it is NaN."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, waves):
        states = super().forward(waves)["hidden_states"]
        states[1][0, 3 if self.value == self.value else slice(None)] = self.value
        return {"hidden_states": states}


def test_frames_with_huge_values_are_skipped_for_all_teachers(corpus, caplog):
    paths = choose_audio(corpus / "audio", None, 4)
    sample, _ = sample_layers({"a": BadLayer(1e20), "b": Ramp()}, paths)
    assert re.search(r"\b4 of\b", caplog.text)
    for layers in sample.values():
        assert all(not (layer[:, 0] == 3).any() and layer.max() < 1000 for layer in layers)
    with pytest.raises(DataError):
        sample_layers({"a": BadLayer(float("nan"))}, paths)


def test_audio_can_be_chosen_from_a_table(corpus, tmp_path):
    table = corpus / "tables" / "train.csv"
    assert len(choose_audio(table, corpus / "audio", 99)) == 12
    with pytest.raises(ConfigError, match="--audio-root"):
        choose_audio(table, None, 3)
    with pytest.raises(ConfigError, match=r"--utterances\b.*\b0\b"):
        choose_audio(table, corpus, 0)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        choose_audio(tmp_path, None, 3)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, teachers, corpus):
    """Run ``s3prl-ekd ARGUMENTS --data AUDIO`` in this process, with three teachers."""
    write_configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        if argv[1:] != ("list",):
            argv = (*argv, "--data", str(corpus / "audio"), "--utterances", "4")
        code = cli.main(argv)
        assert code == 0
        return capsys.readouterr().out

    return run


def test_layers_writes_a_config_with_groups(run, tmp_path):
    output = run(
        "group-layers", "model.yaml", "-o", "new/skill.yaml", "--groups", "2", "--contiguous"
    )
    text = (tmp_path / "new/skill.yaml").read_text()
    assert text.startswith("# model.yaml with groups of layers (SKILL, arXiv 2402.16830)")
    assert "cka, average linkage, contiguous, 4 utterances" in text
    data, original = yaml.safe_load(text), yaml.safe_load((tmp_path / "model.yaml").read_text())
    assert data["aggregation"] == "separate" and data["student"] == original["student"]
    for name, teacher in data["teachers"].items():
        assert "layers" not in teacher and teacher["model"] == original["teachers"][name]["model"]
        assert len(teacher["groups"]) == 2
        assert [layer for group in teacher["groups"] for layer in group] == [1, 2, 3, 4]
        assert f"{name}: {teacher['groups'][0]}" in output
    assert (tmp_path / "new/skill.png").read_bytes().startswith(b"\x89PNG")
    assert "run_pretrain.py -u ekd -g new/skill.yaml" in output


@pytest.mark.parametrize(
    ("options", "variable"),
    [
        (("-o", "model.yaml"), r"model\.yaml.*--force"),
        (("-o", "new.yaml", "--groups", "5"), r"--groups\b.*\b4\b.*hubert.*\b5\b"),
        (("-o", "new.yaml", "--device", "nonsense"), "--device nonsense"),
        (("-o", "new.yaml", "--similarity", "distance"), r"--similarity.*cka"),
        (("-o", "new.yaml", "--linkage", "median"), r"--linkage.*average"),
    ],
)
def test_errors_of_layers(run, capsys, options, variable):
    with pytest.raises(SystemExit) as stop:
        run("group-layers", "model.yaml", *options)
    assert stop.value.code == 2
    assert re.search(variable, capsys.readouterr().err)


def test_groups_without_a_number_have_the_highest_silhouette(run, tmp_path):
    """The printed table of each teacher, against its groups in the config."""
    output = run("group-layers", "model.yaml", "-o", "new.yaml", "--linkage", "complete")
    teachers = yaml.safe_load((tmp_path / "new.yaml").read_text())["teachers"]
    for name, teacher in teachers.items():
        table = output.split(f"{name}: ")[1].split("\n\n")[0].splitlines()
        rows = [re.split(r"  +", line.strip()) for line in table[3:]]
        assert [row[0].removesuffix(" *") for row in rows] == ["1", "2", "3"]
        (chosen,) = [row for row in rows if row[0].endswith("*")]
        assert chosen[1] == " ".join(str(len(group)) for group in teacher["groups"])
        assert float(chosen[2]) == max(float(row[2]) for row in rows[1:])


@pytest.mark.parametrize("number", [1, 4])
def test_the_row_of_the_given_number_is_marked(run, tmp_path, number):
    """Of four layers; the last row is there only if each layer is a group."""
    output = run("group-layers", "model.yaml", "-o", "new.yaml", "--groups", str(number))
    marked = re.findall(r"(?m)^(\d) \*  +(\d(?: \d)*)  ", output)
    assert marked == [(str(number), {1: "4", 4: "1 1 1 1"}[number])] * 3
    assert len(re.findall(r"(?m)^4  ", output)) == 0


def test_layers_overwrites_with_force(run, tmp_path):
    argv = ("group-layers", "model.yaml", "-o", "model.yaml", "--force", "--similarity", "cosine")
    run(*argv, "--linkage", "complete")
    assert yaml.safe_load((tmp_path / "model.yaml").read_text())["aggregation"] == "separate"


def test_teachers_inspect(run, tmp_path):
    output = run("teachers", "inspect", "model.yaml", "-o", "report")
    assert "hubert - robust 2 - 2" in " ".join(output.split()) and re.search(
        r"(?m)^4 \w+, \d+ \w+", output
    )
    rows = list(csv.reader((tmp_path / "report/layers.csv").open()))
    assert rows[0] == ["teacher", "layer", "norm", "mean", "spread"] and len(rows) == 1 + 3 * 5
    matrix = list(csv.reader((tmp_path / "report/cka.csv").open()))
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] and matrix[0][6] == "robust 0"
    values = np.array([row[1:] for row in matrix[1:]], dtype=float)
    np.testing.assert_allclose(values, values.T)
    np.testing.assert_allclose(values.diagonal(), 1, atol=1e-5)
    assert (tmp_path / "report/cka.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["cka.csv", "cka.png", "layers.csv"])
def test_teachers_inspect_replaces_only_its_own_files(run, tmp_path, capsys, name):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / name).write_text(",mine")
    with pytest.raises(SystemExit) as stop:
        run("teachers", "inspect", "model.yaml", "-o", "notes")
    assert stop.value.code == 2 and f"notes/{name}" in capsys.readouterr().err
    assert (tmp_path / "notes" / name).read_text() == ",mine"


def test_teachers_list(run):
    output = run("teachers", "list")
    for name in ("hubert_base_robust_mgr", "wavlm_base_plus", "ekd_student", "data2vec-audio"):
        assert name in output


def test_a_missing_package_gives_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SetupError, match="pip install matplotlib"):
        require_matplotlib()
    monkeypatch.setitem(sys.modules, "scipy.cluster", None)
    with pytest.raises(SetupError, match="pip install scipy"):
        require_scipy()
