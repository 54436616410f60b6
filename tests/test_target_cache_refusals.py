"""Targets stored once: those of something else, or damaged ones, are refused."""

import json
import os
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


# What does not fit


def other_weights(folder, teachers):
    return {"teachers": {"hubert": {"model": str(teachers["robust"]), "layers": [2, 4]}}}


MISFITS = {
    "weights": (other_weights, {}, "teachers.hubert has other weights"),
    "class": (
        lambda folder, t: {"teachers": {"robust": {"model": str(t["wavlm"]), "layers": [2]}}},
        {},
        "teachers.robust has other weights",
    ),
    "layer": (
        lambda folder, t: {"teachers": {"hubert": {"model": str(t["hubert"]), "layers": [2, 3]}}},
        {},
        "teachers.hubert has no target of layer 3 in it; it has 2, 4",
    ),
    "teacher": (
        lambda folder, t: {"teachers": {"wide": {"model": str(t["wide"]), "layers": [2]}}},
        {},
        "there is no teacher wide in it; it has hubert, robust, wavlm",
    ),
    "precision": (
        lambda folder, t: {"teacher_path": "fast", "teacher_precision": "float16"},
        {},
        "teacher_precision is float16 and was float32",
    ),
    "crop": (lambda *_: {}, {"sequence_length": 8000}, "sequence_length is 8000 and was 0"),
    "table": (lambda *_: {}, {"sets": ["half"]}, "the corpus table half is not among those"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_cache_of_something_else_is_refused_by_name(folder, stored, teachers, corpus, what):
    model, data, words = MISFITS[what]
    changed = model(folder, teachers)
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["init"] = {}
    (folder / "model.yaml").write_text(yaml.safe_dump(config | changed))
    shutil.copytree(corpus / "tables", folder / "tables")
    lines = (corpus / "tables/train.csv").read_text().splitlines()
    (folder / "tables/half.csv").write_text("\n".join(lines[:7]) + "\n")
    with pytest.raises(DataError) as told:
        adapter(
            folder, file_path=str(folder / "tables"), target_cache=str(stored / "float16"), **data
        )
    said = str(told.value)
    assert words in said and str(stored / "float16") in said
    assert "build another with: s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o" in said


def test_the_same_teacher_under_another_path_fits(folder, stored, teachers):
    shutil.copy(teachers["hubert"], folder / "renamed.pt")
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"]["hubert"]["model"] = str(folder / "renamed.pt")
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    adapter(folder, target_cache=str(stored / "float16"))


def test_a_teacher_with_the_same_weights_that_answers_otherwise_is_refused(folder, stored):
    shutil.copytree(stored / "float16", "cache")
    index = read_index(folder / "cache")
    index.key["teachers"]["wavlm"]["answer"][1] *= 1.1
    write_index(folder / "cache", index)
    with pytest.raises(DataError, match="teachers.wavlm answers otherwise"):
        adapter(folder, target_cache="cache")


def test_an_aggregate_serves_no_other(folder, stored, teachers, corpus):
    configs(folder, teachers, corpus, aggregation="average")
    assert cache(folder, "cache", "--aggregated") == 0
    config = yaml.safe_load((folder / "model.yaml").read_text())
    config["teachers"]["hubert"]["weight"] = 2.0
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="it holds aggregated targets, and weights is "):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus, aggregation="concat")
    with pytest.raises(DataError, match="aggregation is concat and was average"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus, aggregation="average", targets={"standardise": "phi_s"})
    with pytest.raises(ConfigError, match="cannot be stored with targets.standardise"):
        adapter(folder, target_cache="cache")
    configs(folder, teachers, corpus)
    with pytest.raises(DataError, match="aggregation is separate and was average"):
        adapter(folder, target_cache="cache")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"distortion": {"setup": "setup2"}}, "distortion.setup setup2 lets the teachers hear"),
        ({"distortion": {"setup": "same"}}, "distortion.setup same lets the teachers hear"),
        ({"teacher_dropout": True}, "teacher_dropout: true gives other targets"),
        ({"loss": {"mask_padding": False}}, "loss.mask_padding: false has"),
    ],
    ids=str,
)
def test_experiments_without_fixed_targets_are_refused(
    folder, stored, teachers, corpus, model, words
):
    configs(folder, teachers, corpus, **model)
    with pytest.raises(ConfigError, match=words):
        adapter(folder, target_cache=str(stored / "float16"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "with aggregation separate the targets are each teacher's own; leave it out"),
        ({"aggregation": "average", "targets": {"standardise": "running"}}, "targets.standardise"),
        (
            {"targets": {"drop_teachers": 0.5, "residual_heads": True}},
            "cannot be stored with targets.drop_teachers",
        ),
        ({"aggregation": "average", "essence": {"keep": 0.5}}, "essence.keep"),
        ({"teacher_dropout": True}, "teacher_dropout: true"),
    ],
    ids=str,
)
def test_what_cannot_be_aggregated_before(folder, teachers, corpus, model, words, capfd):
    configs(folder, teachers, corpus, **model)
    assert cache(folder, "cache", "--aggregated") == 2
    assert words in capfd.readouterr().err and not (folder / "cache").exists()


def test_another_build_in_the_same_folder_is_refused(folder, stored, capfd):
    shutil.copytree(stored / "float16", "cache")
    assert cache(folder, "cache", "--dtype", "int8") == 2
    said = capfd.readouterr().err
    assert "dtype is int8 and was float16; name another folder, or add --force" in said
    assert cache(folder, "cache", "--dtype", "int8", "--force") == 0
    assert read_index(folder / "cache").dtype == "int8"
    (folder / "full").mkdir()
    (folder / "full/letter.txt").write_text("dear")
    assert cache(folder, "full", "--force") == 2
    assert "holds something else than a target cache (letter.txt)" in capfd.readouterr().err


# Damage


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_files_are_refused(folder, stored):
    def copy():
        shutil.rmtree("cache", ignore_errors=True)
        shutil.copytree(stored / "int8", "cache")
        return folder / "cache"

    os.truncate(copy() / "targets.bin", 1000)
    with pytest.raises(DataError, match="targets.bin: it has 1000 bytes and should have"):
        adapter(folder, target_cache="cache")
    (copy() / "scales.bin").unlink()
    with pytest.raises(DataError, match="scales.bin: No such file"):
        adapter(folder, target_cache="cache")
    flip(copy() / "utterances.bin", 8)  # a checksum
    with pytest.raises(DataError, match="utterances.bin: its contents have changed"):
        adapter(folder, target_cache="cache")
    for name in ("targets.bin", "scales.bin"):
        flip(copy() / name, 5)
        dataset = adapter(folder, target_cache="cache").dataloader.dataset
        assert "the targets of u11.flac have changed since" in dataset[0].problem
        assert not dataset[1].problem
    flip(copy() / "utterances.json", 4)
    with pytest.raises(DataError, match="utterances.json has changed"):
        adapter(folder, target_cache="cache")
    (copy() / "targets.bin").unlink()
    os.mkfifo(folder / "cache/targets.bin")
    with pytest.raises(DataError, match="it is a pipe or a device"):
        adapter(folder, target_cache="cache")
    for text in (b"", b"{", b"[]", b'{"format": 3}', b"\xff" * 9, b"[" * 9000):
        (copy() / "index.json").write_bytes(text)
        with pytest.raises(DataError, match="index.json.*; build one with: s3prl-ekd cache"):
            adapter(folder, target_cache="cache")
    with pytest.raises(DataError, match="cannot read the index of the target cache nowhere"):
        adapter(folder, target_cache="nowhere")


@pytest.mark.parametrize(
    "spoil",
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
def test_a_spoiled_index_is_refused(folder, stored, spoil):
    shutil.copytree(stored / "float16", "cache")
    data = json.loads((folder / "cache/index.json").read_text())
    (folder / "cache/index.json").write_text(json.dumps(data | spoil))
    with pytest.raises(DataError, match="damaged|version 0"):
        adapter(folder, target_cache="cache")


def test_audio_that_has_changed_is_refused(folder, stored, teachers, corpus):
    shutil.copytree(corpus / "audio", folder / "audio")
    sound, rate = soundfile.read(corpus / "audio/u4.flac")
    soundfile.write(folder / "audio/u4.flac", sound[:-321], rate)
    expert = adapter(folder, libri_root=str(folder / "audio"), target_cache=str(stored / "float16"))
    problems = [expert.dataloader.dataset[i].problem for i in range(4)]
    assert [bool(problem) for problem in problems].count(True) == 1
    said = next(filter(None, problems))
    assert "u4.flac has 14079 samples to hear and the teachers heard 14400" in said
