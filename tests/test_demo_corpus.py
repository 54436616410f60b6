"""The synthetic corpus: it is deterministic and has the layout that s3prl reads."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys

import numpy as np
import pandas
import pytest
import soundfile

from s3prl_ekd.demo import espeak as espeak_module
from s3prl_ekd.demo.corpus import corpus_checksum, make_corpus
from s3prl_ekd.demo.sentences import GRAMMAR, sentences
from s3prl_ekd.demo.voices import ACCENTS, make_voices, speak, to_int16
from s3prl_ekd.errors import DataError, SetupError

SMALL = {
    "speakers": {"train-clean": 3, "dev-clean": 1, "test-clean": 2},
    "utterances": {"train-clean": 8, "dev-clean": 2, "test-clean": 2},
}
needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader is not installed (pip install '.[demo]')",
)


def digest(samples):
    return hashlib.sha256(samples.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "corpus"
    return root, make_corpus(root, seed=7, **SMALL)


def test_sentences():
    first = list(itertools.islice(sentences(random.Random(1)), 3000))
    assert first == list(itertools.islice(sentences(random.Random(1)), 3000))
    assert first[:50] != list(itertools.islice(sentences(random.Random(2)), 50))
    assert len(set(first)) == 3000
    assert {len(sentence.split()) for sentence in first} == set(range(4, 11))
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", sentence) for sentence in first)
    words = {word for sentence in first for word in sentence.split()}
    rules = (text for expansions in GRAMMAR.values() for text in expansions)
    assert words == set(re.findall("(?<!<)\\b[a-z]+", " ".join(rules))) and 150 <= len(words) <= 250
    assert len(set("".join(words))) >= 24  # nearly all letters, for ASR


def test_voices_are_distinct_and_do_not_depend_on_their_number():
    voices = make_voices(24)
    assert len({voice.file() for voice in voices}) == 24
    assert make_voices(5) == voices[:5] and make_voices(5, seed=1) != voices[:5]
    women = [voice.pitch[0] for voice in voices if voice.female]
    men = [voice.pitch[0] for voice in voices if not voice.female]
    assert len(women) == len(men) == 12 and max(men) < min(women)


@needs_espeak
def test_speech_does_not_depend_on_earlier_utterances():
    voices, texts = make_voices(6), ["we see the river", "seven friends found a small boat"]
    jobs = list(itertools.product(range(6), texts, (0.9, 1.1), (44, 56)))
    digests_of = {}
    for seed in (1, 2):
        random.Random(seed).shuffle(jobs)
        for number, text, rate, pitch in jobs:
            wave = speak(text, voices[number], rate=rate, pitch=pitch)
            digests_of.setdefault((number, text, rate, pitch), set()).add(digest(wave))
    assert len(digests_of) == 48
    assert all(len(digests) == 1 for digests in digests_of.values())
    assert len(set.union(*digests_of.values())) == 48


@needs_espeak
def test_speech_is_the_same_in_another_process():
    code = (
        "import hashlib; from s3prl_ekd.demo.voices import *; v = make_voices(3);"
        "speak('something else', v[0]);"
        "print(hashlib.sha256(speak('the old boat', v[2]).tobytes()).hexdigest())"
    )
    argv = [sys.executable, "-c", code]
    process = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == digest(speak("the old boat", make_voices(3)[2]))


@needs_espeak
def test_speech_has_16_khz_and_a_fixed_loudness():
    short = speak("yes", make_voices(1)[0])
    long = speak("the old teacher found a small wooden boat near the river", make_voices(1)[0])
    assert long.dtype == np.int16 and long.ndim == 1
    assert 2 * 16_000 < len(long) < 6 * 16_000 and len(short) < len(long) / 2
    assert np.sqrt(np.mean((long / 32768) ** 2)) == pytest.approx(0.06, rel=0.05)
    slow = speak("the old boat", make_voices(1)[0], rate=0.7)
    assert len(slow) > 1.2 * len(speak("the old boat", make_voices(1)[0], rate=1.1))


def test_an_empty_text_is_rejected():
    with pytest.raises(DataError, match="empty"):
        speak("  ", make_voices(1)[0])


def test_to_int16_keeps_the_peak_in_range():
    loud = to_int16(np.array([0.0, 2.0, -1.0]))
    assert loud.tolist() == [0, round(0.95 * 32767), round(-0.475 * 32767)]
    assert to_int16(np.array([0.5])).tolist() == [round(0.5 * 32767)]


def test_error_without_the_wheel_has_the_pip_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak_module.espeak.cache_clear()
    try:
        with pytest.raises(SetupError, match="pip install espeakng-loader"):
            make_corpus(tmp_path / "corpus", **SMALL)
    finally:
        espeak_module.espeak.cache_clear()
    assert list(tmp_path.iterdir()) == []


@needs_espeak
def test_accents_differ():
    # espeak-ng ignores an unknown phoneme table without an error.
    text = "the father was a tired painter in the small garden before dinner"
    base = make_voices(1)[0]
    digests = {
        accent: digest(speak(text, dataclasses.replace(base, accent=accent))) for accent in ACCENTS
    }
    assert len(set(digests.values())) == len(ACCENTS) == 4


def test_a_library_that_does_not_load(tmp_path):
    with pytest.raises(SetupError, match="none.so"):
        espeak_module.Espeak(str(tmp_path / "none.so"), str(tmp_path))


def test_long_data_paths_are_replaced_by_a_symlink(tmp_path):
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    (deep / "phontab").write_text("data")
    short = espeak_module._short_path(str(deep))
    assert len(short) <= 140
    with open(short + "/phontab") as file:
        assert file.read() == "data"
    assert espeak_module._short_path("/usr/share") == "/usr/share"


@needs_espeak
def test_layout(small):
    root, record = small
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.flac"))
    assert names[:4] == [
        "dev-clean/104/1/104-1-0000.flac",
        "dev-clean/104/1/104-1-0001.flac",
        "noise/babble-few.flac",
        "noise/babble-many.flac",
    ]
    texts, speakers = [], []
    for split, count in SMALL["utterances"].items():
        table = pandas.read_csv(root / f"len_for_bucket/{split}.csv")
        assert len(table) == count == record["splits"][split]["utterances"]
        assert list(table["length"]) == sorted(table["length"], reverse=True)
        for path, length in zip(table["file_path"], table["length"], strict=True):
            info = soundfile.info(root / path)
            assert (info.frames, info.samplerate, info.channels) == (length, 16_000, 1)
            chapter = (root / path).parent
            transcript = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
            lines = dict(line.split(" ", 1) for line in transcript.read_text().splitlines())
            texts.append(lines[(root / path).stem])
        assert record["splits"][split]["seconds"] == pytest.approx(
            table["length"].sum() / 16_000, abs=0.06
        )
        speakers += record["splits"][split]["speakers"]
    assert len(set(texts)) == 12 and all(re.fullmatch("[A-Z' ]+", text) for text in texts)
    assert len(set(speakers)) == 6


@needs_espeak
def test_noise(small):
    root, record = small
    assert len(record["noise"]) == 7
    for name in record["noise"]:
        clip, rate = soundfile.read(root / name)
        assert len(clip) == 10 * rate == 160_000
        assert np.sqrt(np.mean(clip**2)) == pytest.approx(0.06, rel=0.02)
    spectra = {}
    for name in ("white", "pink", "hum-50"):
        clip, rate = soundfile.read(root / f"noise/{name}.flac")
        spectra[name] = np.abs(np.fft.rfft(clip)) ** 2  # 0.1 Hz per bin
    for name, ratio in (("white", 1), ("pink", 10)):  # power at 400 Hz / power at 4 kHz
        low, high = spectra[name][3500:4500].mean(), spectra[name][35_000:45_000].mean()
        assert low / high == pytest.approx(ratio, rel=0.25)
    assert spectra["hum-50"].argmax() == 500


@needs_espeak
def test_two_runs_write_the_same_bytes(small, tmp_path):
    root, record = small
    again = make_corpus(tmp_path / "again", seed=7, **SMALL)
    assert again == record
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(root)).read_bytes()
    other = make_corpus(tmp_path / "other", seed=8, **SMALL)
    assert other["checksum"] != record["checksum"]


@needs_espeak
def test_a_complete_corpus_is_kept_and_others_are_made_again(tmp_path):
    sizes = {"speakers": {"train": 1}, "utterances": {"train": 2}}
    root = tmp_path / "corpus"
    record = make_corpus(root, **sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    written = (root / "corpus.json").stat().st_mtime_ns
    assert make_corpus(root, **sizes) == record
    assert (root / "corpus.json").stat().st_mtime_ns == written

    deleted = next(root.rglob("101-1-0001.flac"))
    deleted.unlink()
    assert make_corpus(root, **sizes) == record and deleted.is_file()
    assert corpus_checksum(root) == record["checksum"]

    larger = make_corpus(root, speakers={"train": 1}, utterances={"train": 3})
    assert len(list((root / "train").rglob("*.flac"))) == 3
    assert json.loads((root / "corpus.json").read_text()) == larger


def test_other_folders_and_invalid_numbers_are_rejected(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        make_corpus(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match=r"\b1 to 2\b.*\b3\b"):
        make_corpus(tmp_path / "x", speakers={"train": 3}, utterances={"train": 2})
    with pytest.raises(DataError, match="train.*dev"):
        make_corpus(tmp_path / "x", speakers={"train": 1}, utterances={"dev": 2})
