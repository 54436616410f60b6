"""The maker's tool that synthesises the voices of the tiny teachers' training."""

import re

import make_voices
import pytest

from s3prl_ekd.demo.corpus import corpus_checksum, make_corpus


def test_it_is_that_call_of_make_corpus(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    words = [str(tmp_path / "v"), "--voices", "3", "--utterances", "6", "--seed", "5"]
    assert make_voices.main(words) == 0
    said = capsys.readouterr().out
    assert "6 utterances" in said and "3 voices" in said
    made = make_corpus(
        tmp_path / "same",
        seed=5,
        speakers={"train-clean": 3, "dev-clean": 2},
        utterances={"train-clean": 6, "dev-clean": 50},
    )
    assert corpus_checksum(tmp_path / "v") == made["checksum"]
    assert len(list((tmp_path / "v" / "train-clean").rglob("*.flac"))) == 6


def test_the_defaults_are_what_the_package_was_trained_on(monkeypatch, tmp_path):
    asked = {}

    def remember(out, **more):
        asked.update(more)
        train = {"utterances": 1200, "seconds": 1.0, "speakers": []}
        return {"splits": {"train-clean": train}}

    monkeypatch.setattr(make_voices, "make_corpus", remember)
    assert make_voices.main([str(tmp_path / "v")]) == 0
    assert asked == {
        "seed": 8,
        "speakers": {"train-clean": 48, "dev-clean": 2},
        "utterances": {"train-clean": 1200, "dev-clean": 50},
    }


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as left:
        make_voices.main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "make_voices.py voices --voices 48 --utterances 1200 --seed 8" in said


def test_mistakes_are_a_sentence(tmp_path, capsys):
    words = [str(tmp_path / "v"), "--voices", "7", "--utterances", "6"]
    assert make_voices.main(words) == 2 and list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.startswith("error: train-clean: ") and error.count("\n") == 1
    assert re.search(r"\b6\b.*\b7\b", error)
