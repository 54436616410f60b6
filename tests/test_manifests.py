"""Manifests as people have them: Kaldi folders, Common Voice, lhotse's cuts, tables of segments."""

import csv
import os
import shlex
import sys

import numpy as np
import pandas
import pytest
import soundfile

from s3prl_ekd import cli
from s3prl_ekd.data.audio_files import find_audio
from s3prl_ekd.data.manifest import read_manifest
from s3prl_ekd.errors import DataError
from s3prl_ekd.prepare.asr import normalise

from .conftest import error_of, make_sound
from .corpora import SEGMENTS, write_common_voice, write_kaldi


@pytest.fixture
def kaldi(tmp_path):
    """``data/train`` and ``data/test``, with the same recordings."""
    test = {name.replace("-", "-t"): cells for name, cells in SEGMENTS.items()}
    test = {name: (recording, start + 0.1, end) for name, (recording, start, end) in test.items()}
    write_kaldi(tmp_path / "data/test", tmp_path / "sound", test)
    return write_kaldi(tmp_path / "data/train", tmp_path / "sound").parent


def cut_by_hand(sound, recording, start, end):
    wave, rate = soundfile.read(sound / f"{recording}.flac", dtype="int16")
    return wave[round(start * rate) : round(end * rate)]


def test_length_tables_of_kaldi_folders(kaldi, tmp_path, capsys):
    out = tmp_path / "tables"
    argv = ["length-tables", str(kaldi / "train"), str(kaldi / "test"), "-o", str(out)]
    assert cli.main(argv) == 0
    assert f"libri_root: {tmp_path / 'sound'}\n" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "train.csv").open()))
    assert [(row["file_path"], row["offset"], row["length"]) for row in rows] == [
        ("chat.flac", "24000", "24000"),  # cut at the end of the recording
        ("chat.flac", "0", "14400"),
        ("talk.flac", "8000", "12000"),
        ("talk.flac", "20000", "12000"),
    ]
    assert len(pandas.read_csv(out / "test.csv")) == 4


def test_recordings_without_segments_are_utterances(kaldi):
    (kaldi / "train/segments").unlink()
    (kaldi / "train/text").unlink()
    (kaldi / "train/utt2spk").unlink()
    manifest = read_manifest(kaldi / "train")
    assert [(e.path, e.offset, e.cells["id"]) for e in manifest.entries] == [
        ("chat.flac", None, "chat"),
        ("talk.flac", None, "talk"),
    ]


def test_paths_are_relative_to_the_current_folder_or_the_audio_root(kaldi, tmp_path, monkeypatch):
    (kaldi / "train/wav.scp").write_text("talk sound/talk.flac\nchat sound/chat.flac\n")
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(kaldi / "train")
    assert (manifest.root, manifest.entries[0].path) == (tmp_path / "sound", "talk.flac")
    monkeypatch.chdir(kaldi / "train")
    assert read_manifest(".", audio_root=tmp_path).tables == ["train"] * 4
    monkeypatch.chdir("/")
    manifest = read_manifest(kaldi / "train", audio_root=tmp_path)
    assert (manifest.root, manifest.entries[0].path) == (tmp_path, "sound/talk.flac")
    with pytest.raises(DataError, match="--audio-root"):
        read_manifest(kaldi / "test", audio_root=tmp_path / "data")


@pytest.mark.parametrize("task", ["asr", "sid", "er"])
def test_segments_become_files_of_the_recipes(kaldi, tmp_path, task):
    """Each has exactly the samples that numpy cuts out of the recording."""
    out, sound = tmp_path / "out", tmp_path / "sound"
    if task == "er":  # Kaldi has no emotions
        lines = ["path\toffset\tduration\temotion\tsplit"]
        for name, (recording, start, end) in SEGMENTS.items():
            for split in ("train", "test"):
                shift = 0.05 * (split == "test")
                cells = (f"{recording}.flac", start + shift, end - start, name[:3], split)
                lines.append("\t".join(map(str, cells)))
        (sound / "er.tsv").write_text("\n".join(lines) + "\n")
        sources = [sound / "er.tsv"]
    else:
        sources = [kaldi / "train", kaldi / "test"]
        if task == "sid":
            sources.append(write_kaldi(tmp_path / "data/dev", sound))
            (tmp_path / "data/dev/segments").write_text("ann-d talk 0 0.7\nbob-d chat 0.1 0.7\n")
            (tmp_path / "data/dev/utt2spk").write_text("ann-d ann\nbob-d bob\n")
    assert cli.main(["prepare", task, *map(str, sources), "-o", str(out)]) == 0
    written = [soundfile.read(path, dtype="int16")[0] for path in out.rglob("*.*[cv]")
               if path.suffix in (".flac", ".wav")]  # fmt: skip
    assert len(written) >= 8
    for recording, start, end in SEGMENTS.values():
        expected = cut_by_hand(sound, recording, start, end)
        assert any(np.array_equal(wave, expected) for wave in written)
    assert all(not path.is_symlink() for path in out.rglob("*.*"))


def test_a_command_in_wav_scp_is_not_executed(kaldi, tmp_path, capsys):
    touched = tmp_path / "touched"
    text = (kaldi / "train/wav.scp").read_text().splitlines()
    for command in (f"touch {touched} |", f"| touch {touched}", f"touch {touched}; cat x.wav|"):
        (kaldi / "train/wav.scp").write_text(f"{text[0]}\ntalk {command}\n")
        error = error_of(capsys, "length-tables", kaldi / "train", "-o", tmp_path / "out")
        assert "wav.scp: line 2" in error and "talk" in error
    assert not touched.exists() and not (tmp_path / "out").exists()
    (kaldi / "train/wav.scp").write_text(f"{text[0]}\ntalk flac -c -d -s /x/talk.flac |\n")
    error = error_of(capsys, "length-tables", kaldi / "train", "-o", tmp_path / "out")
    assert error.rstrip().endswith("put /x/talk.flac there")


@pytest.mark.parametrize(
    ("file", "line", "parts"),
    [
        ("wav.scp", "talk data/raw.ark:123", ["line 2", "archive"]),
        ("wav.scp", "talk /x/talk.m4a", ["line 2", "ffmpeg -i /x/talk.m4a -ac 1 -ar 16000"]),
        ("wav.scp", "talk /x/talk.txt", ["line 2", ".flac"]),
        ("wav.scp", "talk /x/a\tb.wav", ["line 2", r"a\tb.wav"]),
        ("wav.scp", "chat again.wav", ["line 2", "chat", "line 1"]),
        ("segments", "u nothing 0 1", ["line 2", "nothing"]),
        ("segments", "u talk 0", ["line 2", "3 cells"]),
        ("segments", "u talk one 2", ["line 2", "'one'"]),
        ("segments", "u talk 2 1", ["line 2", "-1 s"]),
        ("segments", "u talk nan 1", ["line 2", "'nan'"]),
        ("segments", "u talk -1 1", ["line 2", "-1 s"]),
        ("segments", "u talk 0 1e9", ["line 2", "day"]),
        ("segments", "u talk 0.5 1.25", ["line 2", "line 1"]),
    ],
)  # fmt: skip
def test_invalid_lines_of_kaldi_folders(kaldi, tmp_path, capsys, file, line, parts):
    path = kaldi / "train" / file
    first = "ann-1 talk 0.5 1.25" if file == "segments" else path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{line}\n")
    error = error_of(capsys, "length-tables", kaldi / "train", "-o", tmp_path / "out")
    assert file in error and all(part in error for part in parts), error


def test_a_segment_far_after_the_end_is_left_out_and_listed(kaldi, tmp_path, capsys):
    (kaldi / "train/segments").write_text("a talk 2.5 3.6\nb talk 0 1\nc talk 4 5\n")
    assert cli.main(["length-tables", str(kaldi / "train"), "-o", str(tmp_path / "out")]) == 0
    skipped = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == [
        "talk.flac@40000+17600", "talk.flac@64000+16000",
    ]  # fmt: skip
    assert len(pandas.read_csv(tmp_path / "out/train.csv")) == 1
    error = error_of(capsys, "prepare", "unlabeled", kaldi / "train", "-o", tmp_path / "asr")
    assert "segments: line 1" in error


def test_splits_of_sources(kaldi, tmp_path, capsys):
    os.rename(kaldi / "train", kaldi / "t1")
    argv = ["prepare", "asr", kaldi / "t1", "-o", tmp_path / "out"]
    assert f"train={kaldi / 't1'}" in error_of(capsys, *argv)
    argv[2] = f"test={kaldi / 't1'}"
    assert cli.main([str(word) for word in argv]) == 0
    assert (tmp_path / "out/test-clean").is_dir()
    (kaldi / "t1/text").unlink()
    assert "no file text" in error_of(capsys, *argv, "--replace")


def test_a_split_is_given_once(tmp_path, capsys):
    table, argv = tmp_path / "all.tsv", ["length-tables", "-o", tmp_path / "out"]
    table.write_text("path\tsplit\na.flac\ttrain\n")
    assert "leave out test=" in error_of(capsys, *argv, f"test={table}")
    table.write_text("path\tsplit\na.flac\ttrain\nb.flac\t\n")
    assert "line 3" in error_of(capsys, *argv, table)  # its length table would have no name


@pytest.fixture
def common_voice(tmp_path):
    """Three splits of MP3 at 32 kHz, as Common Voice writes them."""
    for split in ("train", "dev", "test"):
        write_common_voice(tmp_path / "cv/en", split)
    return tmp_path / "cv/en"


def test_common_voice(common_voice, tmp_path, capsys):
    sources = [common_voice / f"{split}.tsv" for split in ("train", "dev", "test")]
    assert cli.main(["length-tables", *map(str, sources), "-o", str(tmp_path / "tables")]) == 0
    assert f"libri_root: {common_voice / 'clips'}\n" in capsys.readouterr().out
    assert list(pandas.read_csv(tmp_path / "tables/dev.csv")["length"]) == [16000, 16000]

    out = tmp_path / "out"
    assert "train.tsv: line 2" in error_of(capsys, "prepare", "asr", *sources, "-o", out)
    argv = ["prepare", "asr", *sources, "-o", out, "--strip-punctuation"]
    assert "--convert" in error_of(capsys, *argv)
    assert cli.main([*map(str, argv), "--convert"]) == 0
    (speaker,) = (path.parent for path in out.rglob("client0-1-0000.flac"))
    info = soundfile.info(speaker / "client0-1-0000.flac")
    assert (info.samplerate, info.channels, info.frames) == (16000, 1, 16000)
    text = (speaker / "client0-1.trans.txt").read_text()
    assert text == "client0-1-0000 WELL IT'S A WELL KNOWN WORD\n"
    other = common_voice / "validated.tsv"
    os.rename(sources[0], other)
    assert f"train={other}" in error_of(capsys, "prepare", "asr", other, "-o", tmp_path / "n")


def test_punctuation():
    assert normalise("  Don't stop--he said: 'go!'", True) == "DON'T STOP HE SAID GO"
    assert normalise("rock 'n' roll, the 1990s'", True) == "ROCK N ROLL THE 1990S"
    assert normalise("a, b") == "A, B"


def test_segments_in_a_table(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", make_sound(2.0), 16000)
    head = "path\toffset\tduration\tsplit\n"
    rows = ["a.wav\t0.5\t1\ttrain", "a.wav\t\t9\ttrain", "a.wav\t0\t2\tdev"]
    (tmp_path / "m.tsv").write_text(head + "\n".join(rows) + "\n")
    names = [entry.name for entry in read_manifest(tmp_path / "m.tsv").entries]
    assert names == ["a.wav@8000+16000", "a.wav", "a.wav@0+32000"]
    assert cli.main(["length-tables", str(tmp_path / "m.tsv"), "-o", str(tmp_path / "t")]) == 0
    lines = (tmp_path / "t/train.csv").read_text().splitlines()
    assert lines == [",file_path,length,label,offset", "0,a.wav,32000,,", "1,a.wav,16000,,8000"]
    far = "a.wav\t1e308\t1e308\ttrain"
    for row in ("a.wav\t1\t\ttrain", "a.wav\t-1\t2\ttrain", "a.wav\tinf\t2\ttrain", far):
        (tmp_path / "m.tsv").write_text(f"{head}{row}\n")
        argv = ("length-tables", tmp_path / "m.tsv", "-o", tmp_path / "t")
        assert "m.tsv: line 2" in error_of(capsys, *argv)


def test_files_and_columns_that_are_given_twice(tmp_path, capsys):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", make_sound(1.0), 16000)
    (tmp_path / "one.tsv").write_text("path\na.wav\n")
    (tmp_path / "two.tsv").write_text("path\nb.wav\na.wav\n")
    argv = ["length-tables", tmp_path / "one.tsv", tmp_path / "two.tsv", "-o", tmp_path / "t"]
    assert "two.tsv: line 3: the path a.wav is also in" in error_of(capsys, *argv)
    assert not (tmp_path / "t").exists()
    (tmp_path / "two.tsv").write_text("path\tsplit\tsplit\na.wav\ttrain\ttest\n")
    assert "column split is there twice" in error_of(capsys, *argv[:1], *argv[2:])


def test_formats_that_cannot_be_read(tmp_path, capsys, caplog, student_file):
    """Each mention is followed by the command that converts the file, quoted for a shell."""
    m4a = tmp_path / "audio/my talk.m4a"
    m4a.parent.mkdir()
    m4a.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    target = m4a.with_suffix(".flac")
    command = f"ffmpeg -i {shlex.quote(str(m4a))} -ac 1 -ar 16000 {shlex.quote(str(target))}"
    table = tmp_path / "audio/all.tsv"
    table.write_text("path\tspeaker\tsplit\nmy talk.m4a\tann\ttrain\n")
    assert command in error_of(capsys, "length-tables", m4a.parent, "-o", tmp_path / "out")
    with pytest.raises(SystemExit):
        cli.main(["features", str(student_file), str(m4a), "-o", str(tmp_path / "f")])
    assert command in capsys.readouterr().err
    assert "ffmpeg -i 'my talk.m4a'" in error_of(capsys, "prepare", "sid", table, "-o", "out")
    soundfile.write(m4a.parent / "good.mp3", make_sound(1.0), 16000)
    assert find_audio(m4a.parent) == ["good.mp3"]
    assert command in caplog.text


# lhotse


@pytest.fixture
def cuts(tmp_path, kaldi):
    lhotse = pytest.importorskip("lhotse", reason="lhotse is not installed")
    recordings = {
        path.stem: lhotse.Recording.from_file(path) for path in (tmp_path / "sound").glob("*.flac")
    }
    cuts = [recordings["talk"].to_cut()]
    for name, (recording, start, end) in SEGMENTS.items():
        cut = recordings[recording].to_cut().truncate(offset=start, duration=min(end, 3) - start)
        cut.id = name
        supervision = lhotse.SupervisionSegment(
            name, recording, 0, cut.duration, text=f"WORD {name[0]}", speaker=name.split("-")[0]
        )
        cut.supervisions = [supervision]
        cuts.append(cut)
    path = tmp_path / "cuts_train.jsonl.gz"
    lhotse.CutSet.from_cuts(cuts).to_file(path)
    return path


def test_cuts_are_the_same_utterances_as_a_kaldi_folder(cuts, kaldi, tmp_path):
    manifest, expected = read_manifest(cuts), read_manifest(kaldi / "train")
    assert manifest.root == expected.root == tmp_path / "sound"
    whole, *entries = manifest.entries
    assert (whole.name, whole.split) == ("talk.flac", "train")
    for entry, other in zip(entries, expected.entries, strict=True):
        assert (entry.path, entry.offset) == (other.path, other.offset)
        assert entry.cells["speaker"] == other.cells["speaker"]
        assert entry.cells["id"] == other.cells["id"]
    assert [e.length for e in entries[:3]] == [e.length for e in expected.entries[:3]]
    assert cli.main(["length-tables", str(cuts), "-o", str(tmp_path / "tables")]) == 0
    assert len(pandas.read_csv(tmp_path / "tables/cuts_train.csv")) == 5


@pytest.mark.parametrize("kind", ["command", "url", "stereo", "mixed", "padded", "json"])
def test_cuts_that_are_refused(cuts, tmp_path, capsys, kind):
    import lhotse

    touched, cut = tmp_path / "touched", lhotse.CutSet.from_file(cuts)[1]
    if kind in ("command", "url"):
        cut.recording.sources[0].type = kind
        cut.recording.sources[0].source = f"touch {touched}; cat x.wav"
    elif kind == "stereo":
        cut.recording.channel_ids = cut.recording.sources[0].channels = [0, 1]
    elif kind == "padded":
        cut = cut.pad(duration=10)
    else:
        cut = cut.mix(cut)
    path = tmp_path / "dev_cuts.jsonl"
    lhotse.CutSet.from_cuts([cut]).to_file(path)
    if kind == "json":
        path.write_text("{not json\n")
    error = error_of(capsys, "length-tables", path, "-o", tmp_path / "out")
    assert f"{path}: line 1" in error
    assert not touched.exists() and not (tmp_path / "out").exists()


def test_without_lhotse(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    (tmp_path / "c.jsonl").write_text("{}\n")
    error = error_of(capsys, "length-tables", tmp_path / "c.jsonl", "-o", tmp_path / "out")
    assert "pip install 'lhotse>=1.33,<2'" in error
