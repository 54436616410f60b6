"""Phone recognition: vocabulary, lexicon, corpus module, and both commands over a tiny corpus."""

import pickle
import re
import sys
from collections import defaultdict
from importlib import util
from pathlib import Path

import editdistance
import pytest
import s3prl
import soundfile
import yaml
from s3prl.downstream.ctc.data import collect_audio_batch, load_dataset
from s3prl.downstream.ctc.text import load_text_encoder

from s3prl_ekd import cli, plugin
from s3prl_ekd.data.lexicon import read_lexicon, write_lexicon
from s3prl_ekd.data.libriphone import LibriPhoneDataset
from s3prl_ekd.data.phones import PHONES, vocabulary_text
from s3prl_ekd.errors import DataError

from .conftest import REPO, command, make_sound, run_python

RECIPE = REPO / "downstream_recipes" / "ctc"
VOCABULARY = RECIPE / "vocab" / "phoneme.txt"
SPEECH = REPO.parent / "shared" / "speech"
HOST = Path(s3prl.__file__).parent / "downstream" / "ctc"
NAME = "s3prl.downstream.ctc.corpus.libriphone"
CMUDICT = """\
;;; a comment
A  AH0
A(1)  EY1
dog  D AO1 G # as in Boston
CAT\tK AE1 T
CAT\tK AE0 T
ITS  IH1 T S
CAT'S  K AE1 T S
ODD  XX
"""
WORDS = ["A CAT", "A DOG", "A CAT'S DOG", "ITS A CAT", "DOG DOG", "CAT"]


@pytest.fixture
def tokenizer():
    return load_text_encoder("word", str(VOCABULARY))


@pytest.fixture
def manifest(tmp_path):
    """Fourteen utterances of 0.4 to 1 s: six to train on, four each of dev and test."""
    lines = ["path\tspeaker\ttext\tsplit\n"]
    for i in range(14):
        split = "train" if i < 6 else "dev" if i < 10 else "test"
        lines.append(f"{split}/{i}.flac\tann\t{WORDS[i % 6]}\t{split}\n")
        path = tmp_path / "speech" / f"{split}/{i}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, make_sound(0.4 + 0.1 * (i % 6), seed=i), 16_000)
    (tmp_path / "speech/all.tsv").write_text("".join(lines))
    (tmp_path / "cmudict.txt").write_text(CMUDICT)
    return tmp_path / "speech/all.tsv"


@pytest.fixture
def layout(manifest):
    """The same as ``prepare pr`` makes it."""
    out = manifest.parents[1] / "layout"
    assert prepare(manifest, out) == 0
    return out


def prepare(manifest, out, *options):
    lexicon = str(manifest.parents[1] / "cmudict.txt")
    words = ["prepare", "pr", str(manifest), "-o", str(out), "--lexicon", lexicon, *options]
    return cli.main(words)


def refused(capsys, manifest, out, *options):
    with pytest.raises(SystemExit) as stop:
        prepare(manifest, out, *options)
    assert stop.value.code == 2 and not out.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def recipe(name):
    return yaml.safe_load((RECIPE / name).read_text(encoding="utf-8"))


def dataset(layout, tokenizer, bucket_size=1, split="train-clean", **more):
    lexicon = more.pop("lexicon", [str(layout / "lexicon.txt")])
    return LibriPhoneDataset([split], tokenizer, bucket_size, str(layout), lexicon, **more)


def contents(data):
    """File name -> indices of its phones."""
    return {
        Path(file).name: list(text) for file, text in zip(data.file_list, data.text, strict=True)
    }


# --- vocabulary and configurations


def test_the_vocabulary_is_what_the_generator_gives():
    assert VOCABULARY.read_text(encoding="utf-8") == vocabulary_text()
    assert len(PHONES) == 24 + 3 * 15 and len(vocabulary_text().split()) == 71
    assert len({phone.rstrip("012") for phone in PHONES}) == 39


def test_s3prl_loads_it_and_every_phone_comes_back(tokenizer):
    assert tokenizer.vocab_size == 74
    indices = tokenizer.encode(" ".join(sorted(PHONES)))
    assert tokenizer.unk_idx not in indices and len(set(indices)) == len(PHONES) + 1
    assert indices[-1] == tokenizer.eos_idx and min(indices[:-1]) == 5  # behind SIL and SPN
    assert tokenizer.decode(indices).split() == sorted(PHONES)


@pytest.mark.parametrize("name", ["libriphone.yaml", "tiny.yaml"])
def test_steps_divide_the_run(name):
    config = recipe(name)
    for key in ("log_step", "eval_step", "save_step"):
        assert config["runner"]["total_steps"] % config["runner"][key] == 0, key
    splits = config["downstream_expert"]["corpus"].keys()
    assert {*config["runner"]["eval_dataloaders"], "train", "dev", "test"} <= splits
    assert (RECIPE / name).read_text(encoding="utf-8").startswith("# PR")


def test_full_size_is_superb():
    config = recipe("libriphone.yaml")
    assert config["runner"]["total_steps"] == 100_000
    assert config["runner"]["gradient_accumulate_steps"] == 2
    assert config["optimizer"] == {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-2}
    assert config["downstream_expert"]["corpus"]["batch_size"] == 16
    assert config["downstream_expert"]["model"]["select"] == "FrameLevel"
    assert config["downstream_expert"]["model"]["project_dim"] == 256


def test_vocabulary_and_full_size_equal_a_checkout_of_s3prl():
    if not (HOST / "libriphone.yaml").is_file():
        pytest.skip("s3prl from PyPI has no downstream/ctc/libriphone.yaml; a checkout has")
    assert (HOST / "vocab/phoneme.txt").read_text().split() == vocabulary_text().split()
    theirs, ours = yaml.safe_load((HOST / "libriphone.yaml").read_text()), recipe("libriphone.yaml")
    for config in (ours, theirs):
        for key in ("path", "lexicon", "num_workers", "skip_unknown_words"):
            config["downstream_expert"]["corpus"].pop(key, None)
    assert ours == theirs


# --- lexicon


def test_lexicon_takes_first_pronunciations_of_the_words_asked_for(manifest, tmp_path):
    words = {"A", "CAT", "DOG", "EMU"}
    found = read_lexicon([tmp_path / "cmudict.txt"], words)
    assert found == {"A": ("AH0",), "CAT": ("K", "AE1", "T"), "DOG": ("D", "AO1", "G")}
    write_lexicon(tmp_path / "short.txt", found)
    assert (tmp_path / "short.txt").read_text() == "A\tAH0\nCAT\tK AE1 T\nDOG\tD AO1 G\n"
    (tmp_path / "more.txt").write_bytes(b"A  EY1\nEMU  IY1 M Y UW0\nD\xc9J\xc0  D EY1\n")
    both = read_lexicon([tmp_path / "short.txt", tmp_path / "more.txt"], words | {"DÉJÀ"})
    assert both == {**found, "EMU": ("IY1", "M", "Y", "UW0"), "DÉJÀ": ("D", "EY1")}


@pytest.mark.parametrize(
    "line, message", [("CAT", "line 1 has the word CAT and no phones"), ("CAT K AE T", "'AE'")]
)
def test_bad_lexicons_name_the_line(tmp_path, line, message):
    (tmp_path / "l.txt").write_text(line + "\n")
    assert read_lexicon([tmp_path / "l.txt"], {"DOG"}) == {}
    with pytest.raises(DataError, match=message):
        read_lexicon([tmp_path / "l.txt"], {"CAT"})
    with pytest.raises(DataError, match="cannot read the lexicon"):
        read_lexicon([tmp_path / "none.txt"], {"CAT"})


# --- prepare pr


def test_prepare_writes_layout_and_lexicon(layout):
    assert (layout / "lexicon.txt").read_text() == (
        "A\tAH0\nCAT\tK AE1 T\nCAT'S\tK AE1 T S\nDOG\tD AO1 G\nITS\tIH1 T S\n"
    )
    assert (layout / "dev-clean/ann/2/ann-2.trans.txt").read_text() == (
        "ann-2-0000 A CAT\nann-2-0001 A DOG\nann-2-0002 A CAT'S DOG\nann-2-0003 ITS A CAT\n"
    )
    assert (layout / "train-clean/ann/1/ann-1-0005.flac").is_file()


def test_prepare_names_words_without_a_pronunciation(manifest, tmp_path, capsys):
    manifest.write_text(manifest.read_text().replace("A CAT'S DOG", "2 CATS DOG"))
    error = refused(capsys, manifest, tmp_path / "out")
    assert "lacks 2 words" in error and ": 2, CATS;" in error and "--drop-bad" in error
    assert prepare(manifest, tmp_path / "out", "--drop-bad") == 0
    printed = capsys.readouterr().out
    assert "2 lines with words that the lexicon lacks left out" in printed
    assert "2 words without a pronunciation: 2, CATS" in printed
    assert "CAT'S" not in (tmp_path / "out/lexicon.txt").read_text()


def test_prepare_refuses_phones_that_the_vocabulary_lacks(manifest, tmp_path, capsys):
    manifest.write_text(manifest.read_text().replace("DOG DOG", "ODD DOG"))
    assert "line 9 has the phone 'XX'" in refused(capsys, manifest, tmp_path / "out")


# --- the corpus module


def test_items_and_buckets(layout, tokenizer):
    single, buckets = dataset(layout, tokenizer), dataset(layout, tokenizer, bucket_size=4)
    lengths = [len(text) for text in single.text]
    assert lengths == sorted(lengths, reverse=True) and len(single) == 6
    file, text = single[0]
    assert file.name == "ann-1-0002.flac"
    assert tokenizer.decode(text) == "AH0 K AE1 T S D AO1 G" and text[-1] == tokenizer.eos_idx
    assert type(single[0]) is tuple  # s3prl's collate tells items from buckets by that
    assert [buckets[i] for i in (0, 5)] == [
        [single[i] for i in range(4)],
        [single[i] for i in range(2, 6)],
    ]
    ascending = dataset(layout, tokenizer, ascending=True)
    assert [len(text) for text in ascending.text] == lengths[::-1]
    few = dataset(layout, tokenizer, bucket_size=8, split="dev-clean")
    assert len(few) == 4 and len(few[3]) == 4  # all there are


def test_same_as_the_corpus_module_of_a_checkout(layout, tokenizer):
    path = HOST / "corpus" / "libriphone.py"
    if not path.is_file():
        pytest.skip("s3prl from PyPI has no downstream/ctc/corpus; a checkout has")
    spec = util.spec_from_file_location("libriphone_of_the_checkout", path)
    theirs = util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    args = (["train-clean", "dev-clean"], tokenizer, 4, str(layout), [str(layout / "lexicon.txt")])
    others = {"num_workers": 0, "train": ["train-clean"], "ratio": 1.0, "offset": 0}
    for ascending in (False, True):
        ours = LibriPhoneDataset(*args, ascending=ascending, **others)
        host = theirs.LibriPhoneDataset(*args, ascending=ascending, **others)
        assert contents(ours) == contents(host) and len(ours) == len(host)
        assert [len(text) for text in ours.text] == [len(text) for text in host.text]
        for index in range(len(ours)):
            mine, other = ours[index], host[index]
            assert (type(mine), type(mine[0])) == (type(other), type(other[0]))
            assert [len(text) for _, text in mine] == [len(text) for _, text in other]


def test_unknown_words_stop_or_are_skipped_with_a_count(layout, tokenizer, caplog):
    short = layout / "short.txt"
    short.write_text("A\tAH0\nDOG\tD AO1 G\nITS\tIH1 T S\n")
    with pytest.raises(DataError) as raised:
        dataset(layout, tokenizer, lexicon=[str(short)])
    assert "lacks the word CAT of the utterance ann-1-0000.flac (and 1 more" in str(raised.value)
    data = dataset(layout, tokenizer, lexicon=str(short), skip_unknown_words=True)
    assert sorted(contents(data)) == ["ann-1-0001.flac", "ann-1-0004.flac"]
    dataset(layout, tokenizer, lexicon=str(short), skip_unknown_words=True)
    assert caplog.text.count("4 of 6 utterances left out") == 1
    short.write_text("EMU\tIY1 M\n")
    with pytest.raises(DataError, match="every utterance"):
        dataset(layout, tokenizer, lexicon=[str(short)], skip_unknown_words=True)


def test_corpora_that_are_not_whole_are_one_sentence(layout, tokenizer):
    with pytest.raises(DataError, match="train-other is not a folder"):
        dataset(layout, tokenizer, split="train-other")
    transcript = layout / "train-clean/ann/1/ann-1.trans.txt"
    transcript.write_text(transcript.read_text().replace("ann-1-0003 ", "x "))
    with pytest.raises(DataError, match="no text for the utterance ann-1-0003"):
        dataset(layout, tokenizer)
    transcript.unlink()
    with pytest.raises(DataError, match="has no transcript"):
        dataset(layout, tokenizer)


@pytest.fixture
def provided(tmp_path, monkeypatch):
    """Our module under s3prl's name, for this test only."""
    if (HOST / "corpus").is_dir():
        pytest.skip("this s3prl is a checkout, whose own corpus module is used")
    for name in (plugin.CTC_CORPUS, NAME):
        monkeypatch.setitem(sys.modules, name, None)
    plugin.provide_ctc_corpus(tmp_path)
    return sys.modules[NAME]


def test_provided_where_the_host_lacks_it(provided, layout, tokenizer):
    """s3prl's own loaders over it, with forked workers."""
    assert provided.LibriPhoneDataset is LibriPhoneDataset
    corpus = {
        **recipe("tiny.yaml")["downstream_expert"]["corpus"],
        "path": str(layout),
        "lexicon": [str(layout / "lexicon.txt")],
        "num_workers": 2,
    }
    seen = defaultdict(set)
    for waves, labels, names in load_dataset("dev", tokenizer, corpus):
        for wave, label, name in zip(waves, labels, names, strict=True):
            seen[name].add((len(wave), tokenizer.decode(label.tolist())))
    assert seen == {
        "ann-2-0000": {(6400, "AH0 K AE1 T")},
        "ann-2-0001": {(8000, "AH0 D AO1 G")},
        "ann-2-0002": {(9600, "AH0 K AE1 T S D AO1 G")},
        "ann-2-0003": {(11200, "IH1 T S AH0 K AE1 T")},
    }
    waves, labels, _ = next(iter(load_dataset("train", tokenizer, {**corpus, "num_workers": 0})))
    assert len(waves) == len(labels) == 6  # a bucket of 8, of 6 that there are


def test_a_spawned_worker_has_what_it_needs(layout, tokenizer, tmp_path):
    """What such a worker does: unpickle the dataset and the collate function, read a batch."""
    work = (dataset(layout, tokenizer), collect_audio_batch)
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    code = (
        "import pickle, sys\n"
        "data, collate = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(len(collate([data[0]], 'dev')[0][0]))"
    )
    assert run_python(code, str(tmp_path / "work")) == str(soundfile.info(work[0][0][0]).frames)


def test_the_module_of_a_checkout_is_used(tmp_path):
    """In the working folder, where the installed s3prl has none."""
    corpus = tmp_path / "downstream/ctc/corpus"
    corpus.mkdir(parents=True)
    (corpus / "libriphone.py").write_text("LibriPhoneDataset = 'theirs'\n")
    code = (
        "import sys\nfrom pathlib import Path\nfrom s3prl_ekd.plugin import provide_ctc_corpus\n"
        "for _ in range(2): provide_ctc_corpus(Path(sys.argv[1]))\n"
        "import s3prl.downstream.ctc.corpus.libriphone as m; print(m.__file__)"
    )
    where = HOST if (HOST / "corpus").is_dir() else tmp_path / "downstream/ctc"
    assert run_python(code, str(tmp_path)) == str(where / "corpus/libriphone.py")


# --- the commands


def test_train_and_evaluate(layout, tmp_path):
    command("init", ".", cwd=tmp_path)
    overrides = {
        "runner.total_steps": 4,
        "runner.log_step": 2,
        "runner.eval_step": 4,
        "runner.save_step": 4,
        "downstream_expert.corpus.path": str(layout),
        "downstream_expert.corpus.lexicon": [str(layout / "lexicon.txt")],
    }
    override = ",,".join(f"config.{key}={value!r}" for key, value in overrides.items())
    recipe = ("-u", "fbank", "-d", "ctc", "-c", "downstream/ctc/tiny.yaml")
    run = ("run_downstream.py", "-m", "train", *recipe, "-n", "pr", "-o", override)
    done = command(*run, cwd=tmp_path)
    assert len(re.findall(r"train per: \d", done.stdout)) == 2
    folder = tmp_path / "result/downstream/pr"
    assert printed_per(done.stdout, "dev") == pytest.approx(per(folder, "dev"))
    best = str(folder / "dev-best.ckpt")
    done = command("run_downstream.py", "-m", "evaluate", "-t", "test", "-e", best, cwd=tmp_path)
    assert printed_per(done.stdout, "test") == pytest.approx(per(folder, "test"))
    refs = (folder / "test-ref.ark").read_text().splitlines()
    assert sorted(refs)[0] == "ann-3-0000 D AO1 G D AO1 G" and len(refs) == 4


def printed_per(log, split):
    (value,) = re.findall(rf"^{split} per: ([\d.e-]+)$", log, re.MULTILINE)
    return float(value)


def per(folder, split):
    """Phone errors over phones, from the files of a run."""
    hyp, ref = (
        dict(line.split(" ", 1) for line in (folder / f"{split}-{kind}.ark").open())
        for kind in ("hyp", "ref")
    )
    errors = sum(editdistance.eval(hyp[name].split(), ref[name].split()) for name in ref)
    return errors / sum(len(text.split()) for text in ref.values())


@pytest.mark.skipif(not SPEECH.is_dir(), reason="the speech corpus beside the repository is absent")
def test_real_speech(tmp_path, tokenizer):
    lexicon = str(SPEECH / "lexicon.txt")
    out = tmp_path / "out"
    assert (
        cli.main(["prepare", "pr", str(SPEECH / "pr.tsv"), "-o", str(out), "--lexicon", lexicon])
        == 0
    )
    lines = (SPEECH / "pr.tsv").read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    rows = [dict(zip(header, line.split("\t"), strict=True)) for line in lines[1:]]
    data = dataset(out, tokenizer, split="test-clean")
    phones = sorted(tokenizer.decode(text) for text in data.text)
    assert phones == sorted(row["phones"] for row in rows if row["split"] == "test")
