"""Target caches that do not fit a run, and damaged ones, are rejected."""

import json
import os
import re
import shutil

import pytest
import soundfile

from s3prl_ekd.errors import ConfigError, DataError
from s3prl_ekd.hidden_states.store import read_index, write_index

from .cache_cases import adapter, cache, configs
from .conftest import edit_yaml

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
def test_an_error_names_the_difference(cache_folder, cached_targets, teachers, corpus, name):
    model, data, pattern = MISFITS[name]
    changed = model(cache_folder, teachers)
    with edit_yaml(cache_folder / "model.yaml") as config:
        config.update({"init": {}, **changed})
    shutil.copytree(corpus / "tables", cache_folder / "tables")
    lines = (corpus / "tables/train.csv").read_text().splitlines()
    (cache_folder / "tables/half.csv").write_text("\n".join(lines[:7]) + "\n")
    with pytest.raises(DataError) as raised:
        adapter(
            cache_folder,
            file_path=str(cache_folder / "tables"),
            target_cache=str(cached_targets / "float16"),
            **data,
        )
    error = str(raised.value)
    assert re.search(pattern, error) and str(cached_targets / "float16") in error
    assert "s3prl-ekd cache -c RUNNER.yaml -g MODEL.yaml -o" in error


def test_the_same_teacher_under_another_path_fits(cache_folder, cached_targets, teachers):
    shutil.copy(teachers["hubert"], cache_folder / "renamed.pt")
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["teachers"]["hubert"]["model"] = str(cache_folder / "renamed.pt")
    adapter(cache_folder, target_cache=str(cached_targets / "float16"))


def test_a_teacher_with_the_same_weights_and_other_outputs(cache_folder, cached_targets):
    shutil.copytree(cached_targets / "float16", "cache")
    index = read_index(cache_folder / "cache")
    index.key["teachers"]["wavlm"]["answer"][1] *= 1.1
    write_index(cache_folder / "cache", index)
    with pytest.raises(DataError, match=r"teachers.wavlm\b"):
        adapter(cache_folder, target_cache="cache")


def test_an_aggregated_cache_fits_no_other_aggregation(
    cache_folder, cached_targets, teachers, corpus
):
    configs(cache_folder, teachers, corpus, aggregation="average")
    assert cache(cache_folder, "cache", "--aggregated") == 0
    with edit_yaml(cache_folder / "model.yaml") as config:
        config["teachers"]["hubert"]["weight"] = 2.0
    with pytest.raises(DataError, match=r"\bteachers\.NAME\.weight\b"):
        adapter(cache_folder, target_cache="cache")
    configs(cache_folder, teachers, corpus, aggregation="concat")
    with pytest.raises(DataError, match=r"\bconcat\b.*\baverage\b"):
        adapter(cache_folder, target_cache="cache")
    configs(cache_folder, teachers, corpus, aggregation="average", target_norm="phi_s")
    with pytest.raises(ConfigError, match="target_norm"):
        adapter(cache_folder, target_cache="cache")
    configs(cache_folder, teachers, corpus)
    with pytest.raises(DataError, match=r"\bseparate\b.*\baverage\b"):
        adapter(cache_folder, target_cache="cache")


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
def test_settings_without_fixed_targets(
    cache_folder, cached_targets, teachers, corpus, model, pattern
):
    configs(cache_folder, teachers, corpus, **model)
    with pytest.raises(ConfigError, match=pattern):
        adapter(cache_folder, target_cache=str(cached_targets / "float16"))


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
def test_settings_that_exclude_aggregated_targets(
    cache_folder, teachers, corpus, model, pattern, capfd
):
    configs(cache_folder, teachers, corpus, **model)
    assert cache(cache_folder, "cache", "--aggregated") == 2
    assert pattern in capfd.readouterr().err and not (cache_folder / "cache").exists()


def test_another_build_in_the_same_folder(cache_folder, cached_targets, capfd):
    shutil.copytree(cached_targets / "float16", "cache")
    assert cache(cache_folder, "cache", "--dtype", "int8") == 2
    error = capfd.readouterr().err
    assert re.search(r"\bdtype\b.*\bint8\b.*\bfloat16\b", error) and "--force" in error
    assert cache(cache_folder, "cache", "--dtype", "int8", "--force") == 0
    assert read_index(cache_folder / "cache").dtype == "int8"
    (cache_folder / "full").mkdir()
    (cache_folder / "full/notes.txt").write_text("notes")
    assert cache(cache_folder, "full", "--force") == 2
    assert "notes.txt" in capfd.readouterr().err


# Damage


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_files(cache_folder, cached_targets):
    def copy():
        shutil.rmtree("cache", ignore_errors=True)
        shutil.copytree(cached_targets / "int8", "cache")
        return cache_folder / "cache"

    os.truncate(copy() / "targets.bin", 1000)
    with pytest.raises(DataError, match=r"targets\.bin.*\b1000\b"):
        adapter(cache_folder, target_cache="cache")
    (copy() / "scales.bin").unlink()
    with pytest.raises(DataError, match=r"scales\.bin.*No such file"):
        adapter(cache_folder, target_cache="cache")
    flip(copy() / "utterances.bin", 8)  # a checksum
    with pytest.raises(DataError, match=r"utterances\.bin"):
        adapter(cache_folder, target_cache="cache")
    for name in ("targets.bin", "scales.bin"):
        flip(copy() / name, 5)
        dataset = adapter(cache_folder, target_cache="cache").dataloader.dataset
        assert "u11.flac" in dataset[0].problem
        assert not dataset[1].problem
    flip(copy() / "utterances.json", 4)
    with pytest.raises(DataError, match=r"utterances\.json"):
        adapter(cache_folder, target_cache="cache")
    (copy() / "targets.bin").unlink()
    os.mkfifo(cache_folder / "cache/targets.bin")
    with pytest.raises(DataError, match=r"targets\.bin.*\b(pipe|FIFO|regular file)\b"):
        adapter(cache_folder, target_cache="cache")
    for text in (b"", b"{", b"[]", b'{"format": 3}', b"\xff" * 9, b"[" * 9000):
        (copy() / "index.json").write_bytes(text)
        with pytest.raises(DataError, match=r"index\.json.*s3prl-ekd cache"):
            adapter(cache_folder, target_cache="cache")
    with pytest.raises(DataError, match="nowhere"):
        adapter(cache_folder, target_cache="nowhere")


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
def test_an_invalid_index(cache_folder, cached_targets, change):
    shutil.copytree(cached_targets / "float16", "cache")
    data = json.loads((cache_folder / "cache/index.json").read_text())
    (cache_folder / "cache/index.json").write_text(json.dumps(data | change))
    with pytest.raises(DataError, match=r"\bcache/index\.json\b|\b0\b.*s3prl-ekd cache"):
        adapter(cache_folder, target_cache="cache")


def test_changed_audio(cache_folder, cached_targets, teachers, corpus):
    shutil.copytree(corpus / "audio", cache_folder / "audio")
    sound, rate = soundfile.read(corpus / "audio/u4.flac")
    soundfile.write(cache_folder / "audio/u4.flac", sound[:-321], rate)
    expert = adapter(
        cache_folder,
        libri_root=str(cache_folder / "audio"),
        target_cache=str(cached_targets / "float16"),
    )
    problems = [expert.dataloader.dataset[i].problem for i in range(4)]
    assert [bool(problem) for problem in problems].count(True) == 1
    problem = next(filter(None, problems))
    assert re.search(r"u4\.flac\b.*\b14079\b.*\b14400\b", problem)
