"""tools/make_voices.py: the synthesised part of the tiny teachers' training data."""

import re

import make_voices
import pytest

from s3prl_ekd.demo.corpus import corpus_checksum, make_corpus

pytestmark = pytest.mark.slow  # of the developers' tools


def test_it_writes_the_corpus_of_make_corpus(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    argv = [str(tmp_path / "v"), "--voices", "3", "--utterances", "6", "--seed", "5"]
    assert make_voices.main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"\b6\b", out) and re.search(r"\b3\b", out)
    record = make_corpus(
        tmp_path / "same",
        seed=5,
        speakers={"train-clean": 3, "dev-clean": 2},
        utterances={"train-clean": 6, "dev-clean": 50},
    )
    assert corpus_checksum(tmp_path / "v") == record["checksum"]
    assert len(list((tmp_path / "v" / "train-clean").rglob("*.flac"))) == 6


def test_the_defaults_are_those_of_the_packages_teachers(monkeypatch, tmp_path):
    arguments = {}

    def fake_make_corpus(out, **options):
        arguments.update(options)
        train = {"utterances": 1200, "seconds": 1.0, "speakers": []}
        return {"splits": {"train-clean": train}}

    monkeypatch.setattr(make_voices, "make_corpus", fake_make_corpus)
    assert make_voices.main([str(tmp_path / "v")]) == 0
    assert arguments == {
        "seed": 8,
        "speakers": {"train-clean": 48, "dev-clean": 2},
        "utterances": {"train-clean": 1200, "dev-clean": 50},
    }


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        make_voices.main(["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "make_voices.py voices --voices 48 --utterances 1200 --seed 8" in out


def test_more_voices_than_utterances_are_an_error(tmp_path, capsys):
    argv = [str(tmp_path / "v"), "--voices", "7", "--utterances", "6"]
    assert make_voices.main(argv) == 2 and list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(r"^error: .*train-clean.*\b6\b.*\b7\b", error)
