"""`prepare alignments`: phones by forced alignment of synthesised sentences."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from s3prl_ekd import cli
from s3prl_ekd.demo.voices import make_voices, speak
from s3prl_ekd.probe.labels import read_labels

from .conftest import error_of
from .corpora import write_manifest

LEXICON = "A  AH0\nTHE  DH AH0\nCAT  K AE1 T\nDOG  D AO1 G\nSAT  S AE1 T\n"
PHONES = {"THE DOG SAT": "DH AH D AO G S AE T", "A CAT SAT": "AH K AE T S AE T"}
SILENCE = 8000  # samples before each sentence


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Two sentences after half a second of silence, and one whose audio is far too short."""
    folder = tmp_path_factory.mktemp("aligned")
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate(PHONES):
        wave = speak(text.lower(), make_voices(1)[0], rate=0.7)
        wave = wave.astype(np.float64) / max(1.0, np.abs(wave).max())
        wave = np.concatenate([np.zeros(SILENCE), 0.5 * wave, np.zeros(4000)])
        wave += 1e-4 * rng.normal(size=len(wave))
        rows.append((wave, (f"{number}.wav", "ann", text, "train")))
    rows.append((0.01 * rng.normal(size=900), ("short.wav", "ann", "THE DOG SAT", "test")))
    write_manifest(folder / "asr.tsv", ("speaker", "text", "split"), rows)
    (folder / "lexicon.txt").write_text(LEXICON)
    return folder / "asr.tsv"


def prepare(manifest, out, *more):
    lexicon = manifest.parent / "lexicon.txt"
    argv = ["prepare", "alignments", manifest, "--lexicon", lexicon, "-o", out, *more]
    return cli.main([str(part) for part in argv])


def test_segments_have_the_phones_of_the_text_after_the_silence(manifest, tmp_path, capsys):
    assert prepare(manifest, tmp_path / "out") == 0
    utterances = read_labels(tmp_path / "out/aligned.tsv")
    found = {}
    with open(tmp_path / "out/aligned.tsv") as file:
        texts = {row["path"]: row["text"] for row in csv.DictReader(file, delimiter="\t")}
    for utterance in utterances:
        spoken = [s for s in utterance.segments if s.phone != "SIL"]
        found[texts[f"audio/{utterance.path.name}"]] = " ".join(s.phone for s in spoken)
        assert abs(spoken[0].start - SILENCE) < 3200  # 0.2 s
        assert utterance.path.exists() and utterance.speaker == "ann"
    assert found == PHONES
    out = capsys.readouterr().out
    assert "aligned 2 of 3 utterances" in out and "short.wav" in out


def test_the_order_of_utterances_does_not_change_an_alignment(manifest, tmp_path):
    lines = manifest.read_text().splitlines()
    reversed_manifest = manifest.with_name("reversed.tsv")
    reversed_manifest.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    segments = []
    for name, path in (("a", manifest), ("b", reversed_manifest)):
        assert prepare(path, tmp_path / name) == 0
        rows = read_labels(tmp_path / name / "aligned.tsv")
        segments.append({row.path.name: row.segments for row in rows})
    assert segments[0] == segments[1]


def test_without_pronunciations_the_error_says_what_to_add(manifest, tmp_path, capsys):
    message = error_of(capsys, "prepare", "alignments", manifest, "-o", tmp_path / "out")
    assert "--lexicon" in message
    (tmp_path / "other.txt").write_text("ZEBRA\tZ IY1 B R AH0\n")
    argv = ("prepare", "alignments", manifest, "-o", tmp_path / "out")
    message = error_of(capsys, *argv, "--lexicon", tmp_path / "other.txt")
    assert "no pronunciation of" in message
