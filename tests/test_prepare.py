"""`prepare asr` and `prepare unlabeled`: layouts, s3prl's reading of them, invalid manifests."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import soundfile

from s3prl_ekd import compat
from s3prl_ekd.prepare.asr import speaker_names

from . import preparing
from .conftest import REPO
from .corpora import write_noise
from .preparing import check_message

SPEECH = Path(__file__).parents[1].parent / "shared" / "speech"
HEADER = "path\tduration\tspeaker\ttext\tsplit\n"


@pytest.fixture
def manifest(tmp_path):
    """Five utterances of three speakers, one of them without a text."""
    lines = [
        "a/one.flac\t0.1\tann-1\tHello  world\ttrain\n",
        "a/two.flac\t0.1\tann-1\tit's me\ttrain\n",
        "b/three.wav\t0.1\tbob\tGOOD DAY\tdev\n",
        "c/four.flac\t0.1\tann-1\tgood night\ttest\n",
        "c/five.flac\t0.1\tann-1\t\ttest\n",
    ]
    for number, line in enumerate(lines):
        write_noise(tmp_path / "corpus" / line.split("\t")[0], 2000 + number)
    path = tmp_path / "corpus/all.tsv"
    path.write_text(HEADER + "".join(lines), encoding="utf-8")
    return path


def prepare(task, manifest, out, *options):
    return preparing.prepare(task, manifest, "-o", out, *options)


def fails(capsys, task, manifest, out, *options):
    return preparing.fails(capsys, task, manifest, "-o", out, *options)


def test_layout(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("asr", manifest, out) == 0
    assert re.search(r"^1 lines", capsys.readouterr().out, re.MULTILINE)  # without a text
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == [
        "dev-clean/bob/2/bob-2-0000.wav",
        "dev-clean/bob/2/bob-2.trans.txt",
        "len_for_bucket/dev-clean.csv",
        "len_for_bucket/test-clean.csv",
        "len_for_bucket/train-clean.csv",
        "prepared.tsv",
        "test-clean/ann1/3/ann1-3-0000.flac",
        "test-clean/ann1/3/ann1-3.trans.txt",
        "train-clean/ann1/1/ann1-1-0000.flac",
        "train-clean/ann1/1/ann1-1-0001.flac",
        "train-clean/ann1/1/ann1-1.trans.txt",
    ]
    assert (out / "train-clean/ann1/1/ann1-1.trans.txt").read_text() == (
        "ann1-1-0000 HELLO WORLD\nann1-1-0001 IT'S ME\n"
    )
    assert (out / "len_for_bucket/train-clean.csv").read_text() == (
        ",file_path,length,label\n"
        "0,train-clean/ann1/1/ann1-1-0001.flac,2001,\n"
        "1,train-clean/ann1/1/ann1-1-0000.flac,2000,\n"
    )
    assert (out / "prepared.tsv").read_text().splitlines()[:2] == [
        "id\tpath\tspeaker\tsplit\tsamples",
        "ann1-1-0000\ta/one.flac\tann-1\ttrain\t2000",
    ]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_links_are_relative_and_copy_writes_files(manifest, tmp_path):
    prepare("asr", manifest, tmp_path / "linked")
    prepare("asr", manifest, tmp_path / "copied", "--copy")
    name = "dev-clean/bob/2/bob-2-0000.wav"
    link, copy = tmp_path / "linked" / name, tmp_path / "copied" / name
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert not copy.is_symlink()
    original = manifest.parent / "b/three.wav"
    assert link.read_bytes() == copy.read_bytes() == original.read_bytes()
    # The links stay valid if corpus and layout are moved together.
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(tmp_path / "linked", moved)
    shutil.move(tmp_path / "corpus", moved)
    assert (moved / "linked" / name).is_file()


def test_copies_where_links_fail(manifest, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no symlinks")

    monkeypatch.setattr("os.symlink", fail)
    prepare("asr", manifest, tmp_path / "out")
    assert re.search(r"^4 files", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "out/dev-clean/bob/2/bob-2-0000.wav").stat().st_size > 2000


def test_s3prl_reads_the_layout(manifest, tmp_path):
    compat.apply()
    from s3prl.downstream.asr.dataset import SequenceDataset
    from s3prl.downstream.asr.dictionary import Dictionary

    prepare("asr", manifest, tmp_path / "out")
    dictionary = Dictionary.load(str(REPO / "downstream_recipes/asr/char.dict"))
    dataset = SequenceDataset(
        "train",
        bucket_size=2,
        dictionary=dictionary,
        libri_root=str(tmp_path / "out"),
        bucket_file=str(tmp_path / "out/len_for_bucket"),
        train=["train-clean"],
    )
    utterances = {}
    for index in range(len(dataset)):
        for wave, label, name in zip(*dataset[index], strict=True):
            utterances[name] = (len(wave), dictionary.string(label))
    assert utterances == {
        "ann1-1-0000": (2000, "H E L L O | W O R L D |"),
        "ann1-1-0001": (2001, "I T ' S | M E |"),
    }


def test_unlabeled(manifest, tmp_path):
    assert prepare("unlabeled", manifest, tmp_path / "out") == 0
    folder = tmp_path / "out/len_for_bucket"
    train = pandas.read_csv(folder / "train.csv")
    assert list(train["file_path"]) == ["a/two.flac", "a/one.flac"]
    assert list(train["length"]) == [2001, 2000]
    assert (manifest.parent / train["file_path"][0]).is_file()
    assert list(pandas.read_csv(folder / "test.csv")["length"]) == [2004, 2003]


def test_audio_root(manifest, tmp_path):
    moved = tmp_path / "lists/all.tsv"
    moved.parent.mkdir()
    shutil.move(manifest, moved)
    prepare("unlabeled", moved, tmp_path / "out", "--audio-root", str(manifest.parent))
    assert len(pandas.read_csv(tmp_path / "out/len_for_bucket/train.csv")) == 2


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("speaker", "talker", [1, "speaker"]),
        ("\ttext\tsplit", "\twords\tset", [1, "text", "split"]),
        ("a/two.flac", "a/gone.flac", [3]),
        ("a/two.flac", "/a/two.flac", [3, "/a/two.flac"]),
        ("a/two.flac", "C:/a/two.flac", [3, "C:/a/two.flac"]),
        ("a/two.flac", "../corpus/a/two.flac", [3, ".."]),
        ("a/two.flac", "a//one.flac", [3, "a/one.flac", 2]),
        ("a/two.flac", "all.tsv", [3, ".flac"]),
        ("a/two.flac", "", [3, "path"]),
        ("\tbob", "", [4, 5]),  # cells, columns
        ("bob", "", [4, "speaker"]),
        ("\tdev", "\tvalid", [4, "valid"]),
        ("\tdev", "\t", [4, "split"]),
        ("GOOD DAY", "GÓOD D4Y", [4, "4Ó"]),
    ],
)
def test_errors_name_the_line(manifest, tmp_path, capsys, old, new, parts):
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1), encoding="utf-8")
    error = fails(capsys, "asr", manifest, tmp_path / "out")
    assert error.count("\n") == 1
    check_message(error, *parts)
    assert not (tmp_path / "out").exists()


def test_missing_empty_and_binary_manifests(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no.tsv" in fails(capsys, "asr", tmp_path / "no.tsv", out)
    manifest.write_text(HEADER)
    # `unlabeled`, because `asr` has another check that fails: no line with a text
    assert str(manifest) in fails(capsys, "unlabeled", manifest, out)
    manifest.write_bytes(HEADER.encode() + b"\xff\xfe\n")
    assert "UTF-8" in fails(capsys, "asr", manifest, out)


def test_crlf_and_byte_order_mark(manifest, tmp_path):
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes().replace(b"\n", b"\r\n"))
    assert prepare("asr", manifest, tmp_path / "out") == 0
    assert (tmp_path / "out/dev-clean/bob/2/bob-2.trans.txt").read_text() == "bob-2-0000 GOOD DAY\n"


def test_drop_bad(manifest, tmp_path, capsys):
    manifest.write_text(manifest.read_text().replace("GOOD DAY", "42!"))
    prepare("asr", manifest, tmp_path / "out", "--drop-bad")
    assert re.search(r"^1 lines .*characters", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "out/dev-clean").exists()


@pytest.mark.parametrize("rate, channels", [(8000, 1), (16_000, 2)])
def test_other_rates_and_stereo_are_rejected(manifest, tmp_path, capsys, rate, channels):
    """For the recipes; training resamples, so ``unlabeled`` accepts them."""
    write_noise(manifest.parent / "b/three.wav", 500, rate, channels)
    error = fails(capsys, "asr", manifest, tmp_path / "out")
    check_message(error, 4, "b/three.wav", rate, channels, "--convert")
    assert prepare("unlabeled", manifest, tmp_path / "unlabeled") == 0
    lengths = pandas.read_csv(tmp_path / "unlabeled/len_for_bucket/dev.csv")["length"]
    assert list(lengths) == [500 * 16_000 // rate]


def test_audio_beyond_full_scale_is_scaled(manifest, tmp_path, caplog):
    """Training hears such floating-point audio as it is."""
    wave = 3 * np.sin(np.arange(24_000) / 20)
    soundfile.write(manifest.parent / "b/three.wav", wave, 48_000, subtype="FLOAT")
    assert prepare("asr", manifest, tmp_path / "out", "--convert") == 0
    result, _ = soundfile.read(tmp_path / "out/dev-clean/bob/2/bob-2-0000.flac")
    expected = np.sin(np.arange(8_000) * 3 / 20)
    assert np.abs(result - expected)[50:-50].max() < 0.01
    assert re.search(r"b/three\.wav exceeds full scale \(peak 3\.0", caplog.text)


def test_replace_only_replaces_a_layout(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("asr", manifest, out)
    assert "--replace" in fails(capsys, "asr", manifest, out)
    (out / "old.txt").write_text("x")
    assert prepare("asr", manifest, out, "--replace") == 0
    assert not (out / "old.txt").exists() and (out / "prepared.tsv").is_file()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    error = fails(capsys, "asr", manifest, precious, "--replace")
    assert str(precious) in error and "--replace" not in error
    assert (precious / "thesis.txt").is_file()


def test_speaker_names():
    names = speaker_names(["a-b", "a.b", "AB", "abx2", "Ж", "x"])
    assert len({name.lower() for name in names.values()}) == 6
    assert all(name.isascii() and name.isalnum() for name in names.values())
    assert names["x"] == "x" and names == speaker_names(reversed(list(names)))


@pytest.mark.skipif(not SPEECH.is_dir(), reason="the speech corpus beside the repository is absent")
def test_real_speech(tmp_path):
    assert prepare("asr", SPEECH / "asr.tsv", tmp_path / "out") == 0
    rows = (SPEECH / "asr.tsv").read_text(encoding="utf-8").splitlines()[1:]
    prepared = (tmp_path / "out/prepared.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(prepared) == len(rows) == 1232
    seconds = sum(float(row.split("\t")[1]) for row in rows)  # rounded to 1 ms in the manifest
    samples = sum(int(row.split("\t")[4]) for row in prepared)
    assert samples / 16_000 == pytest.approx(seconds, abs=0.001 * len(rows))
