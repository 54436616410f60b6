"""Length tables: lengths, order, exact bytes, and bad files."""

import csv
import re

import numpy as np
import pandas
import pytest
import soundfile

from s3prl_ekd import cli, compat
from s3prl_ekd.data.audio_files import find_audio, read_header
from s3prl_ekd.data.bad_audio import BadAudio
from s3prl_ekd.data.lengths import write_length_tables, write_table
from s3prl_ekd.data.tables import Utterance, read_table
from s3prl_ekd.errors import DataError

from .conftest import error_of
from .corpora import write_noise


@pytest.fixture
def corpus(tmp_path):
    """A corpus with the folders of LibriSpeech and given lengths in samples at 16 kHz."""
    root = tmp_path / "Corpus"
    write_noise(root / "train-clean-100/19/198/19-198-0000.flac", 4000)
    write_noise(root / "train-clean-100/19/198/19-198-0001.FLAC", 9000, format="FLAC")
    write_noise(root / "train-clean-100/26/495/26-495-0000.wav", 22_050, rate=44_100)  # 8000
    write_noise(root / "dev-clean/84/1/84-1-0000.ogg", 5000)
    write_noise(root / "dev-clean/84/1/84-1-0001.opus", 4800, 48_000, format="OGG", subtype="OPUS")
    (root / "train-clean-100/19/198/19-198.trans.txt").write_text("19-198-0000 A\n")
    return root


def test_one_table_for_each_split_longest_first(corpus, tmp_path):
    write_length_tables(corpus, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dev-clean.csv",
        "train-clean-100.csv",
    ]
    assert (tmp_path / "out/train-clean-100.csv").read_text() == (
        ",file_path,length,label\n"
        "0,train-clean-100/19/198/19-198-0001.FLAC,9000,\n"
        "1,train-clean-100/26/495/26-495-0000.wav,8000,\n"
        "2,train-clean-100/19/198/19-198-0000.flac,4000,\n"
    )
    dev = pandas.read_csv(tmp_path / "out/dev-clean.csv")
    assert list(dev["length"]) == [5000, 1600]  # ogg at 16 kHz, opus 4800 at 48 kHz


def test_tables_equal_those_of_s3prl(corpus, tmp_path):
    # As in s3prl's script: the frames of every file, descending, in a DataFrame with label None.
    write_length_tables(corpus, tmp_path, name="all")
    paths = [path for path in corpus.rglob("*") if path.suffix.lower() == ".flac"]
    frames = {str(path.relative_to(corpus)): soundfile.info(path).frames for path in paths}
    ordered = sorted(frames, key=frames.get, reverse=True)
    expected = pandas.DataFrame(
        {"file_path": ordered, "length": [frames[path] for path in ordered], "label": None}
    )
    expected.to_csv(tmp_path / "expected.csv")
    table = pandas.read_csv(tmp_path / "all.csv")
    table = table[table["file_path"].str.lower().str.endswith(".flac")].reset_index(drop=True)
    expected = pandas.read_csv(tmp_path / "expected.csv")
    assert list(table.columns) == list(expected.columns)
    assert table.drop(columns="Unnamed: 0").equals(expected.drop(columns="Unnamed: 0"))


def test_the_bytes_do_not_depend_on_jobs(corpus, tmp_path):
    for number in range(150):  # more than two chunks, all of one length, so ordered by path
        write_noise(corpus / f"dev-clean/1/1/1-1-{number:04d}.wav", 100)
    write_length_tables(corpus, tmp_path / "a", jobs=1)
    write_length_tables(corpus, tmp_path / "b", jobs=7)
    table = (tmp_path / "a/dev-clean.csv").read_bytes()
    assert table == (tmp_path / "b/dev-clean.csv").read_bytes()
    ties = [row.split(",")[1] for row in table.decode().splitlines() if ",100," in row]
    assert len(ties) == 150 and ties == sorted(ties)


def test_one_table_if_a_folder_is_not_a_split(corpus, tmp_path):
    write_noise(corpus / "noise/hum.wav", 100)
    tables = write_length_tables(corpus, tmp_path / "out")
    assert list(tables.rows) == ["Corpus"] and len(tables.rows["Corpus"]) == 6
    assert "noise/" in tables.summary()


def test_single_and_name(corpus, tmp_path):
    assert list(write_length_tables(corpus, tmp_path / "out", single=True).rows) == ["Corpus"]
    assert list(write_length_tables(corpus, tmp_path / "out", name="x").rows) == ["x"]
    for name in ("../x", "train.csv"):
        with pytest.raises(DataError, match=f"--name.*'{name}'"):
            write_length_tables(corpus, tmp_path / "out", name=name)


def test_bad_files_are_listed_and_counted(corpus, tmp_path):
    (corpus / "dev-clean/empty.flac").write_bytes(b"")
    (corpus / "dev-clean/text.wav").write_text("not audio\n" * 9)
    soundfile.write(corpus / "dev-clean/silent.wav", np.zeros(0), 16_000)
    streamed = bytearray((corpus / "train-clean-100/19/198/19-198-0000.flac").read_bytes())
    streamed[21] &= 0xF0  # the 36 bits of the number of samples in STREAMINFO; 0 is "unknown"
    streamed[22:26] = bytes(4)
    (corpus / "dev-clean/streamed.flac").write_bytes(streamed)
    tables = write_length_tables(corpus, tmp_path / "out")
    assert len(tables.rows["dev-clean"]) == 2
    for rows in tables.rows.values():
        assert rows == sorted(rows, key=lambda row: (-row.length, row.path))
    text = (tmp_path / "out/skipped.txt").read_text()
    reasons = dict(line.split("\t") for line in text.splitlines())
    assert set(reasons) == {
        f"dev-clean/{name}" for name in ("empty.flac", "text.wav", "silent.wav", "streamed.flac")
    }
    kinds = {
        "empty.flac": "empty",
        "text.wav": "not audio",
        "silent.wav": "no samples",
        "streamed.flac": "unknown length",
    }
    for name, kind in kinds.items():
        with pytest.raises(BadAudio) as error:
            read_header(corpus / "dev-clean" / name)
        assert error.value.kind == kind and reasons[f"dev-clean/{name}"] == str(error.value)
    (line,) = [line for line in tables.summary().splitlines() if "skipped.txt" in line]
    assert re.search(r"\b4\b", line) and "dev-clean/empty.flac" in line
    for name in reasons:
        (corpus / name).unlink()
    write_length_tables(corpus, tmp_path / "out")
    assert not (tmp_path / "out/skipped.txt").exists()


def test_a_table_without_rows_is_an_error(corpus, tmp_path):
    (corpus / "test-clean").mkdir()
    (corpus / "test-clean/x.flac").write_bytes(b"")
    with pytest.raises(DataError, match="test-clean"):
        write_length_tables(corpus, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["skipped.txt"]


def test_commas_quotes_and_newlines_in_names(tmp_path):
    names = ["a, b.wav", 'say "c".wav', "line\nbreak.wav"]
    for number, name in enumerate(names):
        write_noise(tmp_path / "root" / name, 100 + number)
    write_length_tables(tmp_path / "root", tmp_path / "out")
    table = pandas.read_csv(tmp_path / "out/root.csv")
    assert list(table["file_path"]) == names[::-1]
    with open(tmp_path / "out/root.csv", newline="") as file:
        assert [row[1] for row in csv.reader(file)][1:] == names[::-1]


def test_a_carriage_return_in_a_name_is_listed_and_the_table_stays_readable(tmp_path):
    for name in ("a\rb.wav", "c.wav"):
        write_noise(tmp_path / "root" / name, 100)
    write_length_tables(tmp_path / "root", tmp_path / "out")
    assert [row.path for row in read_table(tmp_path / "out/root.csv")] == ["c.wav"]
    (line,) = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert line.startswith(r"a\rb.wav")


def test_an_audio_root_without_a_manifest_is_an_error(corpus, tmp_path):
    with pytest.raises(DataError, match="--audio-root"):
        write_length_tables(corpus, tmp_path / "out", audio_root=corpus)


def test_a_failed_write_leaves_the_old_table(tmp_path):
    write_table(tmp_path / "t.csv", [Utterance("a", 1)])
    content = (tmp_path / "t.csv").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_table(tmp_path / "t.csv", [Utterance("b", 2), Utterance("\udcff", 1)])
    assert (tmp_path / "t.csv").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_links_are_followed_but_not_in_cycles(tmp_path):
    write_noise(tmp_path / "real/x.wav", 100)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/linked").symlink_to(tmp_path / "real")
    (tmp_path / "root/up").symlink_to(tmp_path / "root")
    assert find_audio(tmp_path / "root") == ["linked/x.wav"]


def test_header_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no.flac"):
        read_header(tmp_path / "no.flac")


def test_command(corpus, tmp_path, capsys):
    assert cli.main(["length-tables", str(corpus), "-o", str(tmp_path / "out"), "--jobs", "2"]) == 0
    dev, train, total, *_ = capsys.readouterr().out.splitlines()
    for line, name, count in ((dev, "dev-clean.csv", 2), (train, "train-clean-100.csv", 3)):
        assert name in line and re.search(rf"\b{count}\b", line)
    assert re.search(r"\b5\b.*\b0\.00 h", total)


@pytest.mark.parametrize("folder, part", [("nowhere", "nowhere"), ("", ".flac")])
def test_command_without_audio(tmp_path, capsys, folder, part):
    error = error_of(capsys, "length-tables", tmp_path / folder, "-o", tmp_path / "out")
    assert str(tmp_path / folder) in error and part in error
    assert not (tmp_path / "out").exists()


def test_command_with_a_file_as_output_folder(corpus, tmp_path, capsys):
    (tmp_path / "out").write_text("x")
    error = error_of(capsys, "length-tables", corpus, "-o", tmp_path / "out")
    assert str(tmp_path / "out") in error
    assert (tmp_path / "out").read_text() == "x"


def test_s3prl_reads_the_tables(tmp_path):
    compat.apply()
    from s3prl.downstream.asr.dataset import SequenceDataset
    from s3prl.downstream.asr.dictionary import Dictionary

    for number in range(4):
        write_noise(tmp_path / f"root/train/7/1/7-1-000{number}.flac", 3000 + number)
    (tmp_path / "root/train/7/1/7-1.trans.txt").write_text(
        "".join(f"7-1-000{number} ONE TWO\n" for number in range(4))
    )
    write_length_tables(tmp_path / "root", tmp_path / "tables")
    dataset = SequenceDataset(
        "train",
        bucket_size=4,
        dictionary=Dictionary(),
        libri_root=str(tmp_path / "root"),
        bucket_file=str(tmp_path / "tables"),
        train=["train"],
    )
    waves = [len(wave) for batch in range(len(dataset)) for wave in dataset[batch][0]]
    assert waves == [3003, 3002, 3001, 3000]  # two batches of two, longest first
