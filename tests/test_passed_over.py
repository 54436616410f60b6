"""Hidden and system files: everything that lists a folder of audio ignores the same names."""

import json
import logging
import re

import numpy as np
import pytest
import soundfile

from s3prl_ekd import cli
from s3prl_ekd.analysis.choice import choose_audio
from s3prl_ekd.data.audio_files import find_audio, is_hidden_or_system
from s3prl_ekd.data.distortion.sources import AudioPool
from s3prl_ekd.demo.corpus import RECORD, corpus_checksum, make_corpus
from s3prl_ekd.demo.labels import make_labels
from s3prl_ekd.downstream.noise import find_noises
from s3prl_ekd.errors import DataError
from s3prl_ekd.export.features import collect_audio
from s3prl_ekd.hidden_states.store import Index
from s3prl_ekd.prepare.er import SESSIONS, check_iemocap, read_iemocap
from s3prl_ekd.prepare.librispeech import measure_splits, read_texts
from s3prl_ekd.prepare.sid import check_voxceleb1
from s3prl_ekd.pretrain.target_cache.build import start_build

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "  # start of a ._ file of macOS
IGNORED = (
    "._a.flac",
    "7/._b.flac",
    ".DS_Store",
    ".flac",
    ".hidden/x.flac",
    ".Trash-1000/files/x.flac",
    "__MACOSX/7/._b.flac",
    "__MACOSX/x.flac",
    "7/.ipynb_checkpoints/b-checkpoint.wav",
    "7/@eaDir/b.flac/x.wav",
    "lost+found/x.wav",
    "System Volume Information/x.wav",
    "$RECYCLE.BIN/x.wav",
    "#recycle/x.wav",
)


@pytest.fixture
def folder(tmp_path):
    """A hidden folder, like ~/.cache, with two recordings and the files to ignore."""
    root = tmp_path / ".cache" / "._corpus"
    for name in ("a.flac", "7/b.flac"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.1 * np.random.default_rng(0).standard_normal(4000)
        soundfile.write(root / name, wave, 16000)
    for name in IGNORED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(APPLE_DOUBLE)
    return root


RECORDINGS = ["7/b.flac", "a.flac"]


def test_ignored_files_are_counted_in_the_log(folder, caplog):
    caplog.set_level(logging.INFO)
    assert find_audio(folder) == RECORDINGS == find_audio(folder)
    (message,) = [message for message in caplog.messages if str(folder) in message]
    # hidden folders, and files with the suffix of audio; not .DS_Store
    assert re.search(r"\b12\b", message.replace(str(folder), ""))


def test_links_into_a_hidden_folder_are_recordings(folder):
    # as git-annex, datalad and DVC store files
    (folder / ".git/annex").mkdir(parents=True)
    (folder / "a.flac").rename(folder / ".git/annex/SHA256.flac")
    (folder / "a.flac").symlink_to(".git/annex/SHA256.flac")
    assert find_audio(folder) == RECORDINGS


def test_commands_that_list_folders(folder, tmp_path):
    assert cli.main(["length-tables", str(folder), "-o", str(tmp_path / "t"), "--name", "all"]) == 0
    assert not (tmp_path / "t/skipped.txt").exists()
    assert [part.path.name for part in choose_audio(folder, None, 9)] == ["b.flac", "a.flac"]
    assert list(find_noises(folder).names) == RECORDINGS
    assert list(AudioPool.of_folder("noise", str(folder)).names) == RECORDINGS
    assert list(collect_audio([str(folder)])) == RECORDINGS
    # a file given by its path is used
    assert list(collect_audio([str(folder / "._a.flac")])) == [str(folder / "._a.flac")]


def test_librispeech(folder):
    for name in ("a", "7/b"):
        utterance = (folder / f"{name}.flac").rename(folder / f"{name[:-1]}7-1-000.flac")
        utterance.with_name("7-1.trans.txt").write_text("7-1-000 WORD\n")
    names = ["7-1-000.flac", "7/7-1-000.flac"]
    transcripts = read_texts(folder.parent, [folder.name])
    assert transcripts == {folder / name: ["WORD"] for name in names}
    rows = measure_splits(folder.parent, [folder.name], 1)[folder.name]
    assert [row.path for row in rows] == [f"{folder.name}/{name}" for name in names]


def test_voxceleb1(tmp_path):
    for part in ("dev", "test", ".Trash-1000", "__MACOSX"):
        (tmp_path / part / "wav/id10001").mkdir(parents=True)
    assert check_voxceleb1(tmp_path) == ["dev", "test"]


def test_iemocap(tmp_path):
    root = tmp_path / "IEMOCAP"
    for session in SESSIONS:
        (root / session / "dialog/EmoEvaluation").mkdir(parents=True)
        (root / session / "sentences/wav/Ses01_x").mkdir(parents=True)
        labels = root / session / "dialog/EmoEvaluation/Ses01_x.txt"
        labels.write_text("[0 - 1]\tSes01_x_F000\tneu\t[1, 1, 1]\n")
        labels.with_name(f"._{labels.name}").write_bytes(b"\xff" + APPLE_DOUBLE)
        (root / session / "sentences/wav/Ses01_x/Ses01_x_F000.wav").touch()
    assert len(read_iemocap(root)) == 5
    (tmp_path / "__MACOSX/Session1").mkdir(parents=True)
    with pytest.raises(DataError, match="IEMOCAP") as error:
        check_iemocap(tmp_path)
    assert str(root) in str(error.value) and "__MACOSX" not in str(error.value)


def test_the_corpus_of_the_demo(folder, tmp_path, monkeypatch):
    corpus = tmp_path / "demo"
    (corpus / "train-clean/101/1").mkdir(parents=True)
    sound, _ = soundfile.read(folder / "a.flac")
    soundfile.write(corpus / "train-clean/101/1/101-1-0000.flac", sound, 16000)
    expected = corpus_checksum(corpus)
    for name in (".DS_Store", "train-clean/101/1/._101-1-0000.flac"):
        (corpus / name).write_bytes(APPLE_DOUBLE)
    assert corpus_checksum(corpus) == expected
    monkeypatch.setattr("s3prl_ekd.demo.labels._moods", lambda *args: [])
    make_labels(corpus, tmp_path / "labels")
    assert (tmp_path / "labels/sid.tsv").read_text().count("101-1-0000.flac") == 1
    parameters = {"version": 1, "seed": 1, "speakers": {"x": 1}, "utterances": {"x": 1}}
    record = {"parameters": parameters, "checksum": expected}
    (corpus / RECORD).write_text(json.dumps(record))
    result = make_corpus(corpus, seed=1, speakers={"x": 1}, utterances={"x": 1})
    assert result == record and (corpus / ".DS_Store").exists()  # the corpus is reused


def test_a_target_cache_folder_with_a_ds_store(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(APPLE_DOUBLE)
    index = Index("float16", (("a", 1, 4),), 1, {}, ("a.flac",))
    start_build(tmp_path, index, force=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="notes.txt"):
        start_build(tmp_path, index, force=False)


@pytest.mark.parametrize("name", ["a.flac", "_a.flac", "MACOSX", "a.", "…"])
def test_names_that_are_not_ignored(name):
    assert not is_hidden_or_system(name)
