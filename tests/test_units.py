"""Units: labels equal scikit-learn's, files round-trip, errors name what is wrong."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from s3prl_ekd import cli
from s3prl_ekd.errors import CheckpointError, DataError
from s3prl_ekd.essence.units import Units, collect_frames, fit_units, load_units, save_units
from s3prl_ekd.files.weights_digest import weights_digest
from s3prl_ekd.teachers import load_upstream

from .conftest import write_configs


def blobs(count=600, seed=0):
    """Frames in three distant clusters, ``[frame, 2]``."""
    torch.manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    return centres[torch.arange(count) % 3] + 0.1 * torch.randn(count, 2)


def test_labels_are_the_nearest_centroids():
    units = Units(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]]), "t", 1)
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [2.1, 0.0]]])
    assert units.label(hidden).tolist() == [[0, 1], [2, 1]]
    assert units.label(hidden[0, 0]).item() == 0
    assert units.state_dict() == {}


def test_labels_equal_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    frames = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    kmeans = cluster.MiniBatchKMeans(12, random_state=0, n_init=1).fit(frames.numpy())
    units = Units(torch.from_numpy(kmeans.cluster_centers_), "t", 1)
    labels = units.label(frames.view(4, 500, 16))
    assert labels.flatten().tolist() == kmeans.predict(frames.numpy()).tolist()
    distances = torch.cdist(frames.double(), units.centroids.double())
    assert labels.flatten().equal(distances.argmin(-1))


def test_the_fit_finds_the_clusters_and_is_reproducible():
    pytest.importorskip("sklearn")
    frames = blobs()
    units = fit_units(frames, 3, seed=0, teacher="t", layer=2)
    labels = units.label(frames)
    for i in range(3):
        assert len(labels[i::3].unique()) == 1
    assert len(labels.unique()) == 3
    assert units.inertia == pytest.approx(2 * 0.1**2, rel=0.1) and units.frames == 600
    again = fit_units(frames, 3, seed=0, teacher="t", layer=2)
    assert units.centroids.equal(again.centroids)


def test_too_few_frames():
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match=r"\b2\b.*\b3\b"):
        fit_units(torch.zeros(2, 4), 3, seed=0, teacher="t", layer=2)
    with pytest.raises(DataError):
        collect_frames([])
    with pytest.raises(DataError, match="finite"):
        collect_frames([torch.full((1, 2, 3), torch.nan)])


def test_a_frame_with_a_huge_value_is_skipped(caplog):
    states = torch.ones(1, 9, 3)
    states[0, 4] = 1e20
    assert torch.equal(collect_frames([states, torch.ones(1, 2, 3)]), torch.ones(10, 3))
    assert re.search(r"\b1 of 11\b", caplog.text)


def test_save_and_load(tmp_path):
    units = Units(torch.randn(5, 4), "hubert", 3, "hubert_base", 0.1234567, 99, 7, "0a")
    save_units(units, tmp_path / "new" / "u.safetensors")
    loaded = load_units(tmp_path / "new" / "u.safetensors")
    assert loaded.centroids.equal(units.centroids)
    for name in (
        "teacher",
        "layer",
        "model",
        "inertia",
        "frames",
        "seed",
        "weights",
        "clusters",
        "width",
    ):
        assert getattr(loaded, name) == getattr(units, name), name
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["u.safetensors"]


def test_invalid_files(tmp_path):
    path = tmp_path / "u.safetensors"
    with pytest.raises(CheckpointError, match="s3prl-ekd fit-units"):
        load_units(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match=r"u\.safetensors"):
        load_units(path)
    save_file({"centroids": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"u\.safetensors.*fit-units"):
        load_units(path)
    units = Units(torch.zeros(2, 2), "t", 1)
    save_units(units, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"centroids": torch.zeros(3, 2)}, path, metadata)
    with pytest.raises(CheckpointError, match="metadata"):
        load_units(path)
    save_file({"centroids": torch.zeros(2, 2)}, path, metadata | {"layer": "x"})
    with pytest.raises(CheckpointError, match="'x'"):
        load_units(path)


def test_frames_of_a_different_width():
    with pytest.raises(CheckpointError, match=r"\b2\b.*\b3\b"):
        Units(torch.zeros(4, 2), "t", 1).label(torch.zeros(1, 5, 3))


# The command


@pytest.fixture
def config(tmp_path, teachers, corpus):
    write_configs(tmp_path, teachers, corpus)
    return tmp_path / "model.yaml"


def units_command(config, data, *options):
    base = [
        "fit-units",
        config,
        "--teacher",
        "robust",
        "--layer",
        2,
        "--clusters",
        5,
        "--data",
        data,
    ]
    return cli.main([str(argument) for argument in (*base, *options)])


def test_the_command(config, teachers, corpus, tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "u.safetensors"
    table = corpus / "tables" / "train.csv"
    options = ("--utterances", 4, "--seed", 3, "--device", "cpu")
    assert units_command(config, table, "--audio-root", corpus / "audio", *options, "-o", path) == 0
    assert re.search(r"\b5\b.*robust.*\b2\b.*u\.safetensors", capsys.readouterr().out)
    units = load_units(path)
    assert (units.teacher, units.layer, units.width, units.seed) == ("robust", 2, 48, 3)
    assert units.model == str(teachers["robust"])
    wave = torch.randn(8000)
    hidden = load_upstream(units.model, "test").eval()([wave])["hidden_states"][2]
    assert units.label(hidden).shape == hidden.shape[:2]
    assert units.weights == weights_digest(load_upstream(units.model, "test"))
    # the folder of the table's audio: units of the same shape
    path = tmp_path / "v.safetensors"
    units_command(config, corpus / "audio", *options, "-o", path)
    assert load_units(path).centroids.shape == units.centroids.shape


@pytest.mark.parametrize(
    "options, variable",
    [
        (("--layer", 9), r"--layer\b.*\b4\b.*robust.*\b9\b"),
        (("--teacher", "unknown"), r"--teacher unknown\b.*robust"),
        (("--clusters", 1), r"--clusters\b.*\b2\b.*\b1\b"),
        (("--clusters", 99999), r"\b99999\b"),
        (("--data", "none.csv"), r"none\.csv"),
        (("--device", "nonsense"), "--device nonsense"),
    ],
)
def test_wrong_options(config, corpus, tmp_path, capsys, options, variable):
    pytest.importorskip("sklearn")
    with pytest.raises(SystemExit) as stop:
        units_command(config, corpus / "audio", "--utterances", 1, "-o", tmp_path / "u", *options)
    assert stop.value.code == 2
    assert re.search(variable, capsys.readouterr().err)


def test_a_table_needs_an_audio_root(config, corpus, tmp_path, capsys):
    pytest.importorskip("sklearn")
    with pytest.raises(SystemExit):
        units_command(config, corpus / "tables" / "train.csv", "-o", tmp_path / "u")
    assert "--audio-root" in capsys.readouterr().err


def test_an_audio_root_beside_a_folder_is_an_error(config, corpus, tmp_path, capsys):
    pytest.importorskip("sklearn")
    folder = corpus / "audio"
    with pytest.raises(SystemExit):
        units_command(config, folder, "--audio-root", folder, "-o", tmp_path / "u")
    assert "--audio-root" in capsys.readouterr().err


def test_without_scikit_learn(config, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(SystemExit):
        units_command(config, corpus / "audio", "-o", tmp_path / "u")
    assert "pip install scikit-learn" in capsys.readouterr().err
