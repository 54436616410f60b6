"""Teachers whose hidden states another program stored in a folder."""

import csv
import json
import os
import shutil

import pytest
import torch

from s3prl_ekd import cli
from s3prl_ekd.analysis.sample import read_excerpt
from s3prl_ekd.distill.teachers import Teacher
from s3prl_ekd.errors import CheckpointError, DataError, EkdError, TeacherError
from s3prl_ekd.essence.units import load_units
from s3prl_ekd.pretrain.target_cache.build import CachedWaves
from s3prl_ekd.teachers import load_upstream
from s3prl_ekd.teachers.stored import StoredStates, write_states
from s3prl_ekd.workspace import write_workspace

from .cache_cases import adapter, cache, configs, files
from .conftest import edit_yaml

EXCERPTS = {"sequence_length": 8000}  # of 16 utterances in the corpus, most are longer


def noise(samples=4000, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def states_of(wave, seed=1):
    """States of two layers of width 3, ``[layer, frame, width]``."""
    return noise(2 * ((len(wave) - 400) // 320 + 1) * 3, seed).view(2, -1, 3)


@pytest.fixture
def folder(tmp_path):
    """A folder with the states of ``noise()`` and ``noise(5000)``."""
    for wave in (noise(), noise(5000)):
        write_states(tmp_path / "states", wave, states_of(wave))
    return tmp_path / "states"


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teachers, corpus):
    """A working folder with the states of tiny_hubert in ``stored``, and a cache of each teacher:
    ``from_model`` and ``from_states``."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        configs(root, teachers, corpus, EXCERPTS, teacher_backend="s3prl", init={"teacher": None})
        for model, name in (("tiny_hubert", "from_model"), ("stored", "from_states")):
            with edit_yaml("model.yaml") as config:
                config["teachers"] = {"tiny": {"model": model, "layers": [2, 4]}}
            if model == "stored":
                store_tiny_hubert()
            assert cache(root, root / name) == 0
    return root


def store_tiny_hubert():
    upstream = load_upstream("tiny_hubert", "here").eval()
    for _, wave in CachedWaves("runner.yaml"):
        with torch.no_grad():
            states = upstream([wave])["hidden_states"]
        write_states("stored", wave, torch.cat(states))


@pytest.fixture
def distilled(caches, monkeypatch):
    monkeypatch.chdir(caches)
    return caches


def test_a_cache_of_stored_states_has_the_bytes_of_a_cache_of_the_model(distilled):
    one, two = files(distilled / "from_model"), files(distilled / "from_states")
    assert one.keys() == two.keys() and len(one["targets.bin"]) > 10_000
    for name in one.keys() - {"index.json"}:  # it has the fingerprint of the teacher
        assert one[name] == two[name], name


def test_a_run_with_the_cache_reads_its_targets(distilled):
    run = adapter(distilled, target_cache=str(distilled / "from_states"))
    batch = next(iter(run.dataloader))
    stored = batch.targets.on("cpu").values["tiny"]  # [batch, layer, frame, width]
    upstream = load_upstream("tiny_hubert", "here").eval()
    with torch.no_grad():
        states = upstream([batch.waves[0, : batch.lengths[0]]])["hidden_states"]
    expected = torch.cat([states[2], states[4]])
    frames = expected.shape[1]
    torch.testing.assert_close(stored[0, :, :frames], expected, rtol=1e-3, atol=1e-3)


def test_a_changed_folder_is_another_teacher(distilled):
    _, wave = next(iter(CachedWaves("runner.yaml")))
    shutil.copytree("stored", "kept")
    write_states("stored", wave, torch.zeros(7, (len(wave) - 400) // 320 + 1, 192))
    try:
        with pytest.raises(DataError, match="teachers.tiny: different weights"):
            adapter(distilled, target_cache=str(distilled / "from_states"))
    finally:
        shutil.rmtree("stored")
        os.rename("kept", "stored")
    adapter(distilled, target_cache=str(distilled / "from_states"))  # another copy is the same


FILES = ("-c", "runner.yaml", "-g", "model.yaml")


def test_a_cache_of_other_excerpts_ends_with_one_sentence(distilled, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["cache", *FILES, "-o", "other", "--seed", "1"])
    check_sentence(stop.value.code, capsys.readouterr().err)


def test_a_run_without_a_cache_ends_with_one_sentence(distilled, pretrain):
    """Its excerpts change with each epoch."""
    write_workspace(distilled)
    check_sentence(*pretrain(*FILES, "-n", "x", "--device", "cpu"))


def check_sentence(code, output):
    assert code == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "teachers.tiny.model: stored" in line and "8000 samples" in line


def test_states_are_read_as_they_were_written(folder):
    waves = [noise(5000), noise()]
    with torch.no_grad():
        output = StoredStates(folder)(waves)["hidden_states"]
    assert [state.shape for state in output] == 2 * [(2, 15, 3)]  # (5000 - 400) // 320 + 1 frames
    for layer in (0, 1):
        for state, wave in zip(output[layer], waves, strict=True):
            expected = states_of(wave)[layer].half().float()
            assert torch.equal(state[: len(expected)], expected)
            assert not state[len(expected) :].any()


def test_depth_width_and_frames_are_known_without_running_it(tmp_path):
    wave = noise(16000)
    write_states(tmp_path, wave, torch.ones(5, 98, 7), stride=160, field=480)
    teacher = Teacher(StoredStates(tmp_path), [0, 4], "x")
    assert (teacher.depth, teacher.width, teacher.stride) == (4, 7, 160)
    assert teacher.frames(16000) == 98 and teacher.frames(480) == 1  # (16000 - 480) / 160 + 1
    with pytest.raises(TeacherError, match="no layer 5"):
        Teacher(StoredStates(tmp_path), [5], "x")


@pytest.fixture
def whole_files(tmp_path, monkeypatch, corpus):
    """Files, a config of tiny_hubert, and one of its stored states of these files."""
    monkeypatch.chdir(tmp_path)
    paths = sorted(corpus.rglob("*.flac"))[:4]
    upstream = load_upstream("tiny_hubert", "here").eval()
    for path in paths:
        shutil.copy(path, tmp_path)
        wave = read_excerpt(path)
        with torch.no_grad():
            write_states("stored", wave, torch.cat(upstream([wave])["hidden_states"]))
    for name in ("tiny_hubert", "stored"):
        text = f"teachers: {{tiny: {{model: {name}, layers: [2]}}}}\ninit: {{teacher: null}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)


@pytest.mark.usefixtures("whole_files")
def test_units_of_stored_states_are_those_of_the_model():
    for name in ("tiny_hubert", "stored"):
        options = ["--teacher", "tiny", "--layer", "2", "--clusters", "3", "--data", "."]
        assert cli.main(["fit-units", f"{name}.yaml", *options, "-o", f"{name}.units"]) == 0
    model, stored = (load_units(f"{name}.units") for name in ("tiny_hubert", "stored"))
    assert model.frames == stored.frames > 100
    assert model.weights and not stored.weights  # files are added to stored states
    torch.testing.assert_close(stored.centroids, model.centroids, rtol=1e-2, atol=1e-2)  # float16


@pytest.mark.usefixtures("whole_files")
def test_teachers_inspect_has_the_layers_of_stored_states():
    for name in ("tiny_hubert", "stored"):
        options = ["--data", ".", "-o", f"{name}.inspected"]
        assert cli.main(["teachers", "inspect", f"{name}.yaml", *options]) == 0
    model, stored = (
        list(csv.DictReader(open(f"{name}.inspected/layers.csv")))
        for name in ("tiny_hubert", "stored")
    )
    assert len(model) == len(stored) == 7
    for row, other in zip(model, stored, strict=True):
        for key in row.keys() - {"teacher", "layer"}:
            assert float(other[key]) == pytest.approx(float(row[key]), rel=1e-3, abs=1e-3), key


def test_a_waveform_is_in_the_folder_if_its_samples_are(folder):
    stored = StoredStates(folder)
    assert noise() in stored and noise(5000) in stored
    assert noise(seed=5) not in stored and noise()[:-1] not in stored
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    assert noise() not in stored


def test_states_written_again_replace_the_old_ones(folder):
    before = StoredStates(folder)
    write_states(folder, noise(), states_of(noise(), seed=2))
    after = StoredStates(folder)
    assert torch.equal(after([noise()])["hidden_states"][0][0], states_of(noise(), 2)[0].half())
    assert not torch.equal(before.digest, after.digest)
    with pytest.raises(CheckpointError):  # read when the folder was still another one
        before([noise()])


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-3] + b"\0\1\2", lambda data: b""]
)
def test_a_damaged_file_is_named(folder, damage):
    stored = StoredStates(folder, "teachers.x.model")
    paths = list(folder.glob("*/*.safetensors"))
    for path in paths:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="teachers.x.model") as error:
        stored([noise()])
    assert any(str(path) in str(error.value) for path in paths) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"format": "x"}, {"version": 99}, {"width": 0}, {"layers": "2"}, {"stride": None}, "["],
)
def test_a_damaged_index_is_one_sentence(folder, change):
    path = folder / "stored_states.json"
    path.write_text(change if change == "[" else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EkdError, match="stored_states.json"):
        load_upstream(str(folder), "here")


@pytest.mark.parametrize("shape", [(2, 13, 3), (12, 3), (2, 12, 0), (3, 12, 3), (2, 12, 4)])
def test_states_of_other_shapes_are_refused(folder, shape):
    """4000 samples have 12 frames; the folder has 2 layers of width 3."""
    with pytest.raises(DataError):
        write_states(folder, noise(), torch.ones(shape))


def test_an_interrupted_line_does_not_hide_others(folder):
    with (folder / "stored_states.txt").open("a") as file:
        file.write("0123456789abcdef")
    assert noise() in StoredStates(folder) and noise(5000) in StoredStates(folder)
    write_states(folder, noise(6000), torch.ones(2, 18, 3))  # after it
    assert noise(6000) in StoredStates(folder)
