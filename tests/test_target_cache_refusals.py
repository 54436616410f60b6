"""Target caches that do not fit a run, and damaged ones, are rejected."""

import json
import os
import re
import shutil

import pytest
import soundfile
import yaml

from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.hidden_states.store import read_index, write_index
from s3prl_ekd.workspace import write_workspace

from .cache_cases import adapter, cache, configs, make_stored


@pytest.fixture(scope="module")
def stored(tmp_path_factory, teachers, corpus):
    return make_stored(tmp_path_factory.mktemp("stored"), teachers, corpus)


@pytest.fixture
def folder(tmp_path, teachers, corpus, monkeypatch):
    write_workspace(tmp_path)
    configs(tmp_path, teachers, corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Caches that do not fit


def other_weights(folder, teachers):
    return {"teachers": {"hubert": {"model": str(teachers["robust"]), "layers": [2, 4]}}}


MISFITS = {
    "weights": (other_weights, {}, r"teachers.hubert\b"),
    "class": (
        lambda folder, t: {"teachers": {"robust": {"model": str(t["wavlm"]), "layers": [2]}}},
        {},
        r"teachers.robust\b",
    ),
    "layer": (
        lambda folder, t: {"teachers": {"hubert": {"model": str(t["hubert"]), "layers": [2, 3]}}},
        {},
        r"teachers.hubert\b.*\b3\b.*\b2, 4\b",
    ),
    "teacher": (
        lambda folder, t: {"teachers": {"wide": {"model": str(t["wide"]), "layers": [2]}}},
        {},
        r"\bwide\b.*\bhubert, robust, wavlm\b",
    ),
    "precision": (
        lambda folder, t: {"teacher_backend": "fast", "teacher_precision": "float16"},
        {},
        r"teacher_precision\b.*\bfloat16\b.*\bfloat32\b",
    ),
    "crop": (lambda *_: {}, {"sequence_length": 8000}, r"sequence_length\b.*\b8000\b.*\b0\b"),
    "table": (lambda *_: {}, {"sets": ["half"]}, r"\bhalf\b"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_error_names_the_difference(folder, stored, teachers, corpus, name):
    model, data, pattern = MISFITS[name]
    changed = model(folder, teachers)
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["init"] = {}
    (folder / "model.yaml").write_text(yaml.safe_dump(config | changed))
    shutil.copytree(corpus / "tables", folder / "tables")
    lines = (corpus / "tables/train.csv").read_text().splitlines()
    (folder / "tables/half.csv").write_text("\n".join(lines[:7]) + "\n")
    with pytest.raises(DataError) as raised:
        adapter(
            folder, file_path=str(folder / "tables"), target_cache=str(stored / "float16"), **data
        )
    error = str(raised.value)
    assert re.search(pattern, error) and str(stored / "float16") in error
    assert "s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o" in error


def test_the_same_teacher_under_another_path_fits(folder, stored, teachers):
    shutil.copy(teachers["hubert"], folder / "renamed.pt")
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"]["hubert"]["model"] = str(folder / "renamed.pt")
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    adapter(folder, target_cache=str(stored / "float16"))


def test_a_teacher_with_the_same_weights_and_other_outputs(folder, stored):
    shutil.copytree(stored / "float16", "cache")
    index = read_index(folder / "cache")
    index.key["teachers"]["wavlm"]["answer"][1] *= 1.1
    write_index(folder / "cache", index)
    with pytest.raises(DataError, match=r"teachers.wavlm\b"):
        adapter(folder, target_cache="cache")


def test_an_aggregated_cache_fits_no_other_aggregation(folder, stored, teachers, corpus):
    configs(folder, teachers, corpus, aggregation="average")
    assert cache(folder, "cache", "--aggregated") == 0
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"]["hubert"]["weight"] = 2.0
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match=r"\bteachers\.NAME\.weight\b"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus, aggregation="concat")
    with pytest.raises(DataError, match=r"\bconcat\b.*\baverage\b"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus, aggregation="average", target_norm="phi_s")
    with pytest.raises(ConfigError, match="target_norm"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus)
    with pytest.raises(DataError, match=r"\bseparate\b.*\baverage\b"):
        adapter(folder, target_cache="cache")


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        ({"distortion": {"setup": "setup2"}}, r"distortion.setup.*\bsetup2\b"),
        ({"distortion": {"setup": "same"}}, r"distortion.setup.*\bsame\b"),
        ({"teacher_dropout": True}, "teacher_dropout: true"),
        ({"loss": {"mask_padding": False}}, "loss.mask_padding: false"),
    ],
    ids=str,
)
def test_settings_without_fixed_targets(folder, stored, teachers, corpus, model, pattern):
    configs(folder, teachers, corpus, **model)
    with pytest.raises(ConfigError, match=pattern):
        adapter(folder, target_cache=str(stored / "float16"))


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        ({}, "separate"),
        ({"aggregation": "average", "target_norm": "mean_std"}, "target_norm"),
        (
            {"targets": {"drop_teachers": 0.5}, "heads": {"residual": True}},
            "targets.drop_teachers",
        ),
        ({"aggregation": "average", "loss": {"agreement": 0.5}}, "loss.agreement"),
        ({"teacher_dropout": True}, "teacher_dropout: true"),
    ],
    ids=str,
)
def test_settings_that_exclude_aggregated_targets(folder, teachers, corpus, model, pattern, capfd):
    configs(folder, teachers, corpus, **model)
    assert cache(folder, "cache", "--aggregated") == 2
    assert pattern in capfd.readouterr().err and not (folder / "cache").exists()


def test_another_build_in_the_same_folder(folder, stored, capfd):
    shutil.copytree(stored / "float16", "cache")
    assert cache(folder, "cache", "--dtype", "int8") == 2
    error = capfd.readouterr().err
    assert re.search(r"\bdtype\b.*\bint8\b.*\bfloat16\b", error) and "--force" in error
    assert cache(folder, "cache", "--dtype", "int8", "--force") == 0
    assert read_index(folder / "cache").dtype == "int8"
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("notes")
    assert cache(folder, "full", "--force") == 2
    assert "notes.txt" in capfd.readouterr().err


# Damage


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_files(folder, stored):
    def copy():
        shutil.rmtree("cache", ignore_errors=True)
        shutil.copytree(stored / "int8", "cache")
        return folder / "cache"

    os.truncate(copy() / "targets.bin", 1000)
    with pytest.raises(DataError, match=r"targets\.bin.*\b1000\b"):
        adapter(folder, target_cache="cache")
    (copy() / "scales.bin").unlink()
    with pytest.raises(DataError, match=r"scales\.bin.*No such file"):
        adapter(folder, target_cache="cache")
    flip(copy() / "utterances.bin", 8)  # a checksum
    with pytest.raises(DataError, match=r"utterances\.bin"):
        adapter(folder, target_cache="cache")
    for name in ("targets.bin", "scales.bin"):
        flip(copy() / name, 5)
        dataset = adapter(folder, target_cache="cache").dataloader.dataset
        assert "u11.flac" in dataset[0].problem
        assert not dataset[1].problem
    flip(copy() / "utterances.json", 4)
    with pytest.raises(DataError, match=r"utterances\.json"):
        adapter(folder, target_cache="cache")
    (copy() / "targets.bin").unlink()
    os.mkfifo(folder / "cache/targets.bin")
    with pytest.raises(DataError, match=r"targets\.bin.*\b(pipe|FIFO|regular file)\b"):
        adapter(folder, target_cache="cache")
    for text in (b"", b"{", b"[]", b'{"format": 3}', b"\xff" * 9, b"[" * 9000):
        (copy() / "index.json").write_bytes(text)
        with pytest.raises(DataError, match=r"index\.json.*s3prl-ekd cache"):
            adapter(folder, target_cache="cache")
    with pytest.raises(DataError, match="nowhere"):
        adapter(folder, target_cache="nowhere")


@pytest.mark.parametrize(
    "change",
    [
        {"key": {}},
        {"key": {"contents": "per teacher", "teachers": 3}},
        {"layout": [["hubert", 2, 48], ["robust", 2, 48], ["wavlm", 4, 24]]},
        {"layout": []},
        {"layout": [["hubert", -2, 48]]},
        {"dtype": "float8"},
        {"utterances": "u1.flac"},
        {"utterances": [1, 2]},
        {"digest": 7},
        {"complete": "yes"},
        {"version": 0},
        {"seed": None},
    ],
    ids=str,
)
def test_an_invalid_index(folder, stored, change):
    shutil.copytree(stored / "float16", "cache")
    data = json.loads((folder / "cache/index.json").read_text())
    (folder / "cache/index.json").write_text(json.dumps(data | change))
    with pytest.raises(DataError, match=r"\bcache/index\.json\b|\b0\b.*s3prl-ekd cache"):
        adapter(folder, target_cache="cache")


def test_changed_audio(folder, stored, teachers, corpus):
    shutil.copytree(corpus / "audio", folder / "audio")
    sound, rate = soundfile.read(corpus / "audio/u4.flac")
    soundfile.write(folder / "audio/u4.flac", sound[:-321], rate)
    expert = adapter(folder, libri_root=str(folder / "audio"), target_cache=str(stored / "float16"))
    problems = [expert.dataloader.dataset[i].problem for i in range(4)]
    assert [bool(problem) for problem in problems].count(True) == 1
    problem = next(filter(None, problems))
    assert re.search(r"u4\.flac\b.*\b14079\b.*\b14400\b", problem)
