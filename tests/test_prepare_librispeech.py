"""`prepare librispeech`: checks of the corpus, length tables, and pronunciations."""

import ast
import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pandas
import pytest
import soundfile
from s3prl.downstream.asr.dataset import SequenceDataset
from s3prl.downstream.asr.dictionary import Dictionary

from s3prl_ekd.errors import SetupError
from s3prl_ekd.prepare.lexicon import predict_phones

from .conftest import REPO, make_sound, run_python
from .corpora import write_librispeech
from .phone_corpus import TOKENIZER, dataset
from .preparing import check_message, fails, numbers, prepare

TEXTS = {
    "train-clean-100": ["A CAT SAT", "THE DOG", "A ZORBLAX"],
    "dev-clean": ["THE CAT"],
    "test-clean": ["A DOG ZORBLAX", "SAT"],
    "train-other-500": ["NOBODY ASKED"],
}
CMUDICT = """\
;;; a comment
A  AH0
A(1)  EY1
THE  DH AH0
CAT  K AE1 T
"""
MORE = "CAT\tXX\nDOG\tD AO1 G\nSAT\tS AE1 T\n"  # CAT is also in CMUDICT, which comes first


@pytest.fixture
def root(tmp_path):
    (tmp_path / "cmudict.dict").write_text(CMUDICT)
    (tmp_path / "more.txt").write_text(MORE)
    return write_librispeech(tmp_path / "LibriSpeech", TEXTS, 0.4)


@pytest.fixture
def model(monkeypatch):
    """Replace g2p_en by a stub; return the list of words that it is called with."""
    calls = []

    class G2p:
        def __init__(self):
            assert package.g2p.cmudict.dict() == {}  # NLTK's dictionary is not loaded

        def predict(self, word):
            calls.append(word)
            return {"odd": ["UW", "T"], "bad": ["<unk>"], "long": ["T"] * 20}.get(
                word, ["Z", "AO1"]
            )

    package, nltk = ModuleType("g2p_en"), ModuleType("nltk")
    package.g2p = SimpleNamespace(G2p=G2p, cmudict=None)
    nltk.download = lambda *names: pytest.fail("a download was tried")
    monkeypatch.setitem(sys.modules, "g2p_en", package)
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    return calls


def lexicon_counts(printed):
    """Return the numbers of words: all, from each file, predicted, missing."""
    (line,) = [line for line in printed.splitlines() if "cmudict.dict, " in line]
    return numbers(line)


def lexicons(root):
    return ["--lexicon", root.parent / "cmudict.dict", root.parent / "more.txt"]


# --- output


def test_s3prl_reads_the_tables_and_the_lexicon(root, tmp_path, model, capsys):
    out = tmp_path / "data" / "librispeech"
    assert prepare("librispeech", root, "-o", out, *lexicons(root), "--g2p") == 0
    printed = capsys.readouterr().out
    assert lexicon_counts(printed) == [6, 3, 2, 1, 0] and model == ["zorblax"]
    assert "train-clean-100: 3 " in printed and "train-other-500: 1 " in printed
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

    # s3prl's data sets of PR and ASR
    data = dataset(root, split="test-clean", lexicon=[str(out / "lexicon.txt")], ascending=True)
    assert [TOKENIZER.decode(text) for text in data.text] == ["S AE1 T", "AH0 D AO1 G Z AO1"]
    characters = Dictionary.load(str(REPO / "downstream_recipes/asr/char.dict"))
    asr_data = SequenceDataset(
        "test-clean",
        4,
        characters,
        str(root),
        str(out / "len_for_bucket"),
        **{"test-clean": ["test-clean"]},
    )
    names = [name for bucket in asr_data.X for name in bucket]
    assert names == ["test-clean/12/200/12-200-0001.flac", "test-clean/12/200/12-200-0000.flac"]
    text = characters.string(asr_data.Y["12-200-0001"])
    assert text.replace(" ", "").replace("|", " ").split() == ["SAT"]


def test_without_g2p_missing_words_are_listed(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("librispeech", root, "-o", out, "--lexicon", root.parent / "cmudict.dict") == 0
    printed = capsys.readouterr().out
    assert lexicon_counts(printed) == [6, 3, 3]
    (note,) = [line for line in printed.splitlines() if "words_without.txt" in line]
    assert numbers(note) == [3, 5] and "DOG, SAT, ZORBLAX" in note
    assert "--g2p" in note and "downstream_expert.corpus.skip_unknown_words: true" in note
    assert (out / "words_without.txt").read_text() == "DOG\nSAT\nZORBLAX\n"
    assert "--replace" in fails(capsys, "librispeech", root, "-o", out)
    assert prepare("librispeech", root, "-o", out, "--replace") == 0
    assert re.search("lexicon.txt.* --lexicon FILE", capsys.readouterr().out)
    assert sorted(path.name for path in out.iterdir()) == [
        "LibriSpeech",
        "len_for_bucket",
        "prepared.tsv",
    ]
    assert (root / "dev-clean").is_dir()  # --replace removes the link and not the corpus


def test_errors_name_what_is_missing(root, tmp_path, capsys):
    out = ("-o", tmp_path / "out")
    assert str(tmp_path / "no") in fails(capsys, "librispeech", tmp_path / "no", *out)
    assert str(root) in fails(capsys, "librispeech", tmp_path, *out)
    error = fails(capsys, "librispeech", root / "dev-clean", *out)
    assert re.search(rf"{re.escape(str(root))}(?!/)", error)
    for split in ("dev-clean", "test-clean"):
        (root / split).rename(tmp_path / split)
    error = fails(capsys, "librispeech", root, *out)
    assert "dev-clean.tar.gz" in error and "test-clean.tar.gz" in error
    assert "train-clean-100.tar.gz" not in error
    for split in ("dev-clean", "test-clean"):
        (tmp_path / split).rename(root / split)
    transcript = root / "dev-clean/11/200/11-200.trans.txt"
    transcript.rename(tmp_path / "aside")
    error = fails(capsys, "librispeech", root, *out)
    assert "11-200-0000.flac" in error and str(transcript) in error
    (tmp_path / "aside").rename(transcript)
    audio = root / "train-other-500/13/200/13-200-0000.flac"
    audio.write_bytes(b"half an archive")
    error = fails(capsys, "librispeech", root, *out)
    assert str(audio) in error
    soundfile.write(audio, make_sound(0.5, rate=8000), 8000)
    error = fails(capsys, "librispeech", root, *out)
    check_message(error, audio.relative_to(root).as_posix(), 8000)
    assert not (tmp_path / "out").exists()


# --- g2p


def test_invalid_predictions_are_left_out(model):
    words = ["ZORBLAX", "DON'T", "ODD", "BAD", "LONG", "2ND", "'", "DÉJÀ", "A-B"]
    steps = []
    predicted = predict_phones(words, steps.append)
    assert predicted == {"ZORBLAX": ("Z", "AO1"), "DON'T": ("Z", "AO1"), "ODD": ("UW1", "T")}
    assert model == ["zorblax", "don't", "odd", "bad", "long"] and sum(steps) == len(words)


@pytest.mark.parametrize("absent", ["nltk", "g2p_en"])
def test_error_without_the_package_has_the_pip_command(model, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SetupError, match="pip install espnet-g2p-en"):
        predict_phones(["ZORBLAX"])


def test_prepare_pr_with_g2p(tmp_path, model, capsys):
    soundfile.write(tmp_path / "a.flac", make_sound(0.4), 16000)
    table = tmp_path / "pr.tsv"
    lines = [f"a.flac\tann\tthe zorblax{more}\ttest\n" for more in ("", " 2ND")]
    table.write_text("path\tspeaker\ttext\tsplit\n" + lines[0])
    (tmp_path / "lexicon.txt").write_text("THE\tDH AH0\n")
    argv = ("pr", table, "-o", tmp_path / "out")
    check_message(fails(capsys, *argv), "--lexicon", "--g2p")
    lexicon = ("--lexicon", tmp_path / "lexicon.txt")
    check_message(fails(capsys, *argv, *lexicon), 1, "ZORBLAX", "--g2p", "--drop-bad")
    assert prepare(*argv, *lexicon, "--g2p") == 0
    (line,) = re.findall(".*lexicon.txt, .*", capsys.readouterr().out)
    assert numbers(line) == [2, 1, 1, 0]
    assert (tmp_path / "out/lexicon.txt").read_text() == "THE\tDH AH0\nZORBLAX\tZ AO1\n"
    table.write_text("path\tspeaker\ttext\tsplit\n" + lines[1])
    error = fails(capsys, "pr", table, "-o", tmp_path / "out2", "--g2p")
    check_message(error, 1, "2ND", "--drop-bad")
    assert "--g2p" not in error


def test_the_real_model(tmp_path):
    """If g2p_en is installed: words of CMUdict, in a process without NLTK's data or network."""
    if importlib.util.find_spec("g2p_en") is None:
        pytest.skip("the extra [g2p] is not installed")
    code = (
        "import socket, sys\n"
        "def fail(*args): raise SystemExit('it used the network')\n"
        "socket.getaddrinfo = fail\n"
        "from s3prl_ekd.prepare.lexicon import predict_phones\n"
        "print(predict_phones(['CLERGYMAN', 'XYLOPHONE', 'SMITHSONS']))"
    )
    predicted = ast.literal_eval(run_python(code))
    assert predicted["CLERGYMAN"] == tuple("K L ER1 JH IY0 M AH0 N".split())
    assert predicted["XYLOPHONE"][0] == "Z" and predicted["SMITHSONS"][-1] == "Z"


def test_help_has_the_example(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare("librispeech", "--help")
    assert stop.value.code == 0 and "--lexicon cmudict.dict --g2p" in capsys.readouterr().out
