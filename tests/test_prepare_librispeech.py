"""`prepare librispeech`: checks of the corpus, tables, and where the pronunciations come from."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas
import pytest
import soundfile
from s3prl.downstream.asr.dataset import SequenceDataset
from s3prl.downstream.asr.dictionary import Dictionary

from s3prl_ekd.errors import SetupError
from s3prl_ekd.prepare import lexicon as g2p

from .conftest import REPO, make_sound, run_python
from .phone_corpus import dataset, make_tokenizer
from .preparing import fails, prepare

TEXTS = {
    "train-clean-100": ["A CAT SAT", "THE DOG", "A ZORBLAX"],
    "dev-clean": ["THE CAT"],
    "test-clean": ["A DOG ZORBLAX", "SAT"],
    "train-other-500": ["NOBODY ASKED"],
}
CMUDICT = """\
;;; comments are passed over
A  AH0
A(1)  EY1
THE  DH AH0
CAT  K AE1 T
"""
MORE = "CAT\tXX\nDOG\tD AO1 G\nSAT\tS AE1 T\n"  # a CAT that the first file has already


def make_librispeech(folder: Path, splits=tuple(TEXTS)) -> Path:
    """LibriSpeech's shape, an utterance a text, of 0.4 s and more."""
    for number, split in enumerate(splits):
        chapter = folder / split / f"1{number}" / "200"
        chapter.mkdir(parents=True)
        lines = []
        for index, text in enumerate(TEXTS[split]):
            name = f"1{number}-200-{index:04d}"
            soundfile.write(chapter / f"{name}.flac", make_sound(0.4 + 0.1 * index), 16000)
            lines.append(f"{name} {text}\n")
        (chapter / f"1{number}-200.trans.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def root(tmp_path):
    (tmp_path / "cmudict.dict").write_text(CMUDICT)
    (tmp_path / "more.txt").write_text(MORE)
    return make_librispeech(tmp_path / "LibriSpeech")


@pytest.fixture
def model(monkeypatch):
    """A stand-in of g2p_en that spells: its predictions, and what it was asked for."""
    asked = []

    class G2p:
        def __init__(self):
            assert package.g2p.cmudict.dict() == {}  # NLTK's own dictionary is not loaded

        def predict(self, word):
            asked.append(word)
            return {"odd": ["UW", "T"], "bad": ["<unk>"], "long": ["T"] * 20}.get(
                word, ["Z", "AO1"]
            )

    package, nltk = ModuleType("g2p_en"), ModuleType("nltk")
    package.g2p = SimpleNamespace(G2p=G2p, cmudict=None)
    nltk.download = lambda *names: pytest.fail("nothing may be fetched")
    monkeypatch.setitem(sys.modules, "g2p_en", package)
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    return asked


def lexicons(root):
    return ["--lexicon", root.parent / "cmudict.dict", root.parent / "more.txt"]


# --- what is written


def test_tables_and_lexicon_as_s3prl_reads_them(root, tmp_path, model, capsys):
    out = tmp_path / "data" / "librispeech"
    assert prepare("librispeech", root, "-o", out, *lexicons(root), "--g2p") == 0
    printed = capsys.readouterr().out
    assert f"6 words: 3 from {tmp_path}/cmudict.dict, 2 from {tmp_path}/more.txt" in printed
    assert "1 guessed by g2p, 0 without" in printed and model == ["zorblax"]
    assert "train-clean-100: 3 utterances" in printed and "train-other-500: 1 utt" in printed
    assert (out / "lexicon.txt").read_text() == (
        "A\tAH0\nCAT\tK AE1 T\nDOG\tD AO1 G\nSAT\tS AE1 T\nTHE\tDH AH0\nZORBLAX\tZ AO1\n"
    )
    table = pandas.read_csv(out / "len_for_bucket/train-clean-100.csv")
    assert list(table["length"]) == [9600, 8000, 6400]  # longest first
    assert table["file_path"][0] == "train-clean-100/10/200/10-200-0002.flac"
    for row in table.itertuples():
        assert soundfile.info(root / row.file_path).frames == row.length
    assert (out / "LibriSpeech").resolve() == root
    assert not (out / "words_without.txt").exists()

    # PR's data set finds every phone, ASR's every text
    tokenizer = make_tokenizer()
    data = dataset(
        root, tokenizer, split="test-clean", lexicon=[str(out / "lexicon.txt")], ascending=True
    )
    assert [tokenizer.decode(text) for text in data.text] == ["S AE1 T", "AH0 D AO1 G Z AO1"]
    characters = Dictionary.load(str(REPO / "downstream_recipes/asr/char.dict"))
    read = SequenceDataset(
        "test-clean",
        4,
        characters,
        str(root),
        str(out / "len_for_bucket"),
        **{"test-clean": ["test-clean"]},
    )
    # longest first
    names = [name for bucket in read.X for name in bucket]
    assert names == ["test-clean/12/200/12-200-0001.flac", "test-clean/12/200/12-200-0000.flac"]
    spelt = characters.string(read.Y["12-200-0001"])
    assert spelt.replace(" ", "").replace("|", " ").split() == ["SAT"]


def test_without_g2p_the_missing_words_are_counted_and_named(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("librispeech", root, "-o", out, "--lexicon", root.parent / "cmudict.dict") == 0
    printed = capsys.readouterr().out
    assert f"6 words: 3 from {tmp_path}/cmudict.dict, 3 without" in printed
    assert "note: 3 words of 5 utterances have no pronunciation (DOG, SAT, ZORBLAX;" in printed
    assert "add --g2p, or set downstream_expert.corpus.skip_unknown_words: true" in printed
    assert (out / "words_without.txt").read_text() == "DOG\nSAT\nZORBLAX\n"
    assert "--replace" in fails(capsys, "librispeech", root, "-o", out)
    assert prepare("librispeech", root, "-o", out, "--replace") == 0
    assert "no lexicon.txt: for PR add --lexicon FILE" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "LibriSpeech",
        "len_for_bucket",
        "prepared.tsv",
    ]
    assert (root / "dev-clean").is_dir()  # --replace removed the link and not the corpus


def test_what_is_missing_is_named(root, tmp_path, capsys):
    out = ("-o", tmp_path / "out")
    assert "not a folder" in fails(capsys, "librispeech", tmp_path / "no", *out)
    assert f"give {root}" in fails(capsys, "librispeech", tmp_path, *out)
    assert f"the folder above, {root}" in fails(capsys, "librispeech", root / "dev-clean", *out)
    for split in ("dev-clean", "test-clean"):
        (root / split).rename(tmp_path / split)
    error = fails(capsys, "librispeech", root, *out)
    assert "lacks dev-clean/, test-clean/; unpack dev-clean.tar.gz, test-clean.tar.gz" in error
    for split in ("dev-clean", "test-clean"):
        (tmp_path / split).rename(root / split)
    transcript = root / "dev-clean/11/200/11-200.trans.txt"
    transcript.rename(tmp_path / "aside")
    error = fails(capsys, "librispeech", root, *out)
    assert "11-200-0000.flac has no transcript" in error and str(transcript) in error
    (tmp_path / "aside").rename(transcript)
    audio = root / "train-other-500/13/200/13-200-0000.flac"
    audio.write_bytes(b"half an archive")
    error = fails(capsys, "librispeech", root, *out)
    assert "1 of the 1 files of train-other-500 cannot be used" in error and str(audio) in error
    soundfile.write(audio, make_sound(0.5, rate=8000), 8000)
    assert "0000.flac is 8000 Hz with 1" in fails(capsys, "librispeech", root, *out)
    assert not (tmp_path / "out").exists()


# --- g2p


def test_what_no_model_should_guess_is_left_out(model):
    words = ["ZORBLAX", "DON'T", "ODD", "BAD", "LONG", "2ND", "'", "DÉJÀ", "A-B"]
    steps = []
    found = g2p.guess(words, steps.append)
    assert found == {"ZORBLAX": ("Z", "AO1"), "DON'T": ("Z", "AO1"), "ODD": ("UW1", "T")}
    assert model == ["zorblax", "don't", "odd", "bad", "long"] and sum(steps) == len(words)


@pytest.mark.parametrize("absent", ["nltk", "g2p_en"])
def test_without_the_package_it_says_what_to_type(model, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SetupError, match=r"pip install 's3prl_ekd\[g2p\]'"):
        g2p.guess(["ZORBLAX"])


def test_prepare_pr_guesses_too(tmp_path, model, capsys):
    soundfile.write(tmp_path / "a.flac", make_sound(0.4), 16000)
    table = tmp_path / "pr.tsv"
    lines = [f"a.flac\tann\tthe zorblax{more}\ttest\n" for more in ("", " 2ND")]
    table.write_text("path\tspeaker\ttext\tsplit\n" + lines[0])
    (tmp_path / "lexicon.txt").write_text("THE\tDH AH0\n")
    words = ("pr", table, "-o", tmp_path / "out")
    assert "--lexicon FILE (such as CMUdict), --g2p, or both" in fails(capsys, *words)
    lexicon = ("--lexicon", tmp_path / "lexicon.txt")
    error = fails(capsys, *words, *lexicon)
    assert "lacks 1 word of" in error and "let --g2p guess them" in error
    assert prepare(*words, *lexicon, "--g2p") == 0
    assert "2 words: 1 from" in capsys.readouterr().out
    assert (tmp_path / "out/lexicon.txt").read_text() == "THE\tDH AH0\nZORBLAX\tZ AO1\n"
    table.write_text("path\tspeaker\ttext\tsplit\n" + lines[1])
    error = fails(capsys, "pr", table, "-o", tmp_path / "out2", "--g2p")
    assert "lexicon (none given) lacks 1 word" in error and ": 2ND; add them, or leave" in error


def test_the_real_model(tmp_path):
    """Where it is installed: words of CMUdict, in a process without NLTK's data or network."""
    if importlib.util.find_spec("g2p_en") is None:
        pytest.skip("the extra [g2p] is not installed")
    code = (
        "import socket, sys\n"
        "def refuse(*args): raise SystemExit('it asked the network')\n"
        "socket.getaddrinfo = refuse\n"
        "from s3prl_ekd.prepare.lexicon import guess\n"
        "print(guess(['CLERGYMAN', 'XYLOPHONE', 'SMITHSONS']))"
    )
    found = ast.literal_eval(run_python(code))
    assert found["CLERGYMAN"] == tuple("K L ER1 JH IY0 M AH0 N".split())
    assert found["XYLOPHONE"][0] == "Z" and found["SMITHSONS"][-1] == "Z"


def test_help_has_the_example(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare("librispeech", "--help")
    assert stop.value.code == 0 and "--lexicon cmudict.dict --g2p" in capsys.readouterr().out
