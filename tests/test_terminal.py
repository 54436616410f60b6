"""Texts from files are escaped: no control characters, line breaks or markup in output."""

import logging

import numpy as np
import pytest
import soundfile

from s3prl_ekd import cli
from s3prl_ekd.commands import validate
from s3prl_ekd.data.bad_audio import BadUtterance
from s3prl_ekd.errors import DataError, EkdError, exit_with, printable
from s3prl_ekd.export.hidden_set.outcome import CheckOutcome
from s3prl_ekd.export.model_card import how_made
from s3prl_ekd.pretrain.bad_audio import BadAudioList
from s3prl_ekd.superb.results import DevMetric, RunRecord
from s3prl_ekd.system.tables import markdown_table
from s3prl_ekd.system.terminal import PrintableFormatter, printable_stdout

HOSTILE = "a\x1b[31m\x1b]0;title\x07\nerror: gone\r\t\x9b\u202e\udcff|<b>"


def is_escaped(text, lines=1):
    """Whether ``text`` is ``lines`` lines without other control characters."""
    *complete, rest = text.split("\n")
    return len(complete) == lines and rest == "" and all(map(str.isprintable, complete))


def test_printable():
    text = printable(HOSTILE)
    assert text.isprintable() and text == printable(text)
    assert text.startswith("a\\x1b[31m") and "\\nerror" in text and "\\udcff" in text
    assert printable("Grüße, 音声 – ⅓ (a|b)") == "Grüße, 音声 – ⅓ (a|b)"


@pytest.mark.parametrize("kind", [EkdError, DataError])
def test_error_is_one_line(kind, capsys):
    with pytest.raises(SystemExit) as exit_info:
        exit_with(kind(f"cannot use {HOSTILE}"))
    assert exit_info.value.code == 2 and is_escaped(capsys.readouterr().err)


def test_log_lines():
    record = logging.LogRecord("s3prl_ekd.x", 20, "", 1, "left out %s", (HOSTILE,), None)
    text = PrintableFormatter("%(levelname)s %(message)s").format(record)
    assert is_escaped(f"{text}\n") and text.startswith("INFO left out a\\x1b")
    record = logging.LogRecord("s3prl.x", 20, "", 1, "two\nlines \x1b", (), None)
    assert PrintableFormatter().format(record) == "two\nlines \\x1b"
    try:
        raise ValueError("x")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("s3prl_ekd.x", 40, "", 1, "x", (), info)
    assert "\n  File " in PrintableFormatter().format(record)  # tracebacks keep their lines


def test_stdout(capsys):
    with printable_stdout():
        print(f"wrote {HOSTILE}")
        print("a\tb", end="", flush=True)
    out = capsys.readouterr().out
    assert is_escaped(out.replace("\t", "") + "\n", lines=3) and out.endswith("\na\tb")
    print("\x1b")
    assert capsys.readouterr().out == "\x1b\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a valid and an unreadable audio file; all names have control characters."""
    root = tmp_path / "a\x1b[2J\nb"
    root.mkdir()
    wave = 0.1 * np.random.default_rng(0).standard_normal(4000)
    soundfile.write(root / "good\x1b[31m\nerror: x.wav", wave, 16000)
    (root / "bad\x1b[32m\ntotal: 7 utterances.wav").write_bytes(b"")
    return root


def test_lengths(folder, tmp_path, capsys):
    assert (
        cli.main(["length-tables", str(folder), "-o", str(tmp_path / "out"), "--name", "all"]) == 0
    )
    # a table, the total, the skipped files, the folders of the audio and of the tables
    assert is_escaped(capsys.readouterr().out, lines=5)
    (line,) = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert line.count("\t") == 1 and line.replace("\t", "").isprintable()
    assert cli.main(["length-tables", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert is_escaped(capsys.readouterr().out, lines=6)
    with pytest.raises(SystemExit):
        cli.main(["length-tables", str(folder / "nowhere"), "-o", str(tmp_path / "out")])
    assert is_escaped(capsys.readouterr().err)


def test_validate(capsys, tmp_path, monkeypatch):
    def checks(package, lengths, timeout, say):
        outcomes = [CheckOutcome("files", "fail", HOSTILE)]
        say(outcomes[0])
        return outcomes, None

    monkeypatch.setattr("s3prl_ekd.export.hidden_set.sandbox.validate", checks)
    assert cli.main(["validate", str(tmp_path)]) == 1
    assert is_escaped(capsys.readouterr().out, lines=2)
    validate._print(CheckOutcome("files", "fail", HOSTILE))  # also without the redirected stdout
    assert is_escaped(capsys.readouterr().out)


def test_bad_audio_list(tmp_path, monkeypatch):
    # pytest-xdist cannot transfer captured log lines with bytes that are not UTF-8.
    monkeypatch.setattr(logging.getLogger("s3prl_ekd.pretrain.bad_audio"), "disabled", True)
    listed = BadAudioList(tmp_path, [])
    listed.record([BadUtterance(HOSTILE[:-5], "kind", HOSTILE)], 0)
    listed.write()
    text = (tmp_path / "bad_audio.tsv").read_text()
    assert is_escaped(text.replace("\t", ""), lines=2) and text.count("\t") == 6


def test_markdown_table():
    lines = markdown_table([["upstream", "per"], [HOSTILE, "1 | 2"]]).splitlines()
    assert len(lines) == 3 and all(map(str.isprintable, lines))
    assert "<" not in lines[2] and lines[2].replace("\\|", "").count("|") == 3


def test_record_with_control_characters_in_a_name():
    facts = dict(
        format=1, upstream="x", hub="fbank", checkpoint=None, task="asr", lr=1.0, seed=1, fold=None,
        steps=1, recipe="tiny", split="test-clean", digest="",
        dev=DevMetric("wer", 1.0, "dev-clean-best.ckpt"),
        tested={"clean": "."}, seconds=1.0, finished=True,
    )  # fmt: skip
    RunRecord(**facts)
    for key, value in (("upstream", HOSTILE), ("recipe", HOSTILE), ("tested", {HOSTILE: "."})):
        with pytest.raises(ValueError, match="x1b"):
            RunRecord(**{**facts, key: value})


def test_model_card():
    teachers = {HOSTILE: {"model": f"x/{HOSTILE}", "layers": [1]}}
    config = {"teachers": teachers, "aggregation": HOSTILE}
    lines = how_made({"config": config, "step": 3, "source": HOSTILE}).split("\n")
    assert len(lines) == 5
    assert all(line.isprintable() and line[0] == "-" and "<" not in line for line in lines)
