"""The corpus module of PR: ours replaces s3prl's where s3prl has none."""

import functools
import sys
from collections import defaultdict
from importlib import util
from pathlib import Path

import pytest
import s3prl
import soundfile
import yaml
from s3prl.downstream.ctc.data import collect_audio_batch, load_dataset
from torch.utils.data import DataLoader

from s3prl_ekd.downstream import requirements
from s3prl_ekd.downstream.libriphone import LibriPhoneDataset
from s3prl_ekd.errors import DataError

from .conftest import run_python
from .phone_corpus import RECIPE, TOKENIZER, dataset, make_layout, make_manifest
from .preparing import numbers

HOST = Path(s3prl.__file__).parent / "downstream" / "ctc"
NAME = "s3prl.downstream.ctc.corpus.libriphone"


@pytest.fixture
def layout(tmp_path):
    return make_layout(make_manifest(tmp_path))


def contents(data):
    """Map file name -> indices of its phones."""
    return {
        Path(file).name: list(text) for file, text in zip(data.file_list, data.text, strict=True)
    }


def test_items_and_buckets(layout):
    single, buckets = dataset(layout), dataset(layout, bucket_size=4)
    lengths = [len(text) for text in single.text]
    assert lengths == sorted(lengths, reverse=True) and len(single) == 6
    file, text = single[0]
    assert file.name == "ann-1-0002.flac"
    assert TOKENIZER.decode(text) == "AH0 K AE1 T S D AO1 G" and text[-1] == TOKENIZER.eos_idx
    assert type(single[0]) is tuple  # s3prl's collate function tests the type
    assert [buckets[i] for i in (0, 5)] == [
        [single[i] for i in range(4)],
        [single[i] for i in range(2, 6)],
    ]
    ascending = dataset(layout, ascending=True)
    assert [len(text) for text in ascending.text] == lengths[::-1]
    few = dataset(layout, bucket_size=8, split="dev-clean")
    assert len(few) == 4 and len(few[3]) == 4  # all utterances of the split


def test_same_as_the_corpus_module_of_a_checkout(layout):
    path = HOST / "corpus" / "libriphone.py"
    if not path.is_file():
        pytest.skip("s3prl from PyPI has no downstream/ctc/corpus; a checkout has")
    spec = util.spec_from_file_location("libriphone_of_the_checkout", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = (["train-clean", "dev-clean"], TOKENIZER, 4, str(layout), [str(layout / "lexicon.txt")])
    options = {"num_workers": 0, "train": ["train-clean"], "ratio": 1.0, "offset": 0}
    for ascending in (False, True):
        data = LibriPhoneDataset(*args, ascending=ascending, **options)
        expected = module.LibriPhoneDataset(*args, ascending=ascending, **options)
        assert contents(data) == contents(expected) and len(data) == len(expected)
        assert [len(text) for text in data.text] == [len(text) for text in expected.text]
        for index in range(len(data)):
            bucket, reference = data[index], expected[index]
            assert (type(bucket), type(bucket[0])) == (type(reference), type(reference[0]))
            assert [len(text) for _, text in bucket] == [len(text) for _, text in reference]


def test_unknown_words_are_an_error_or_are_skipped(layout, caplog):
    short = layout / "short.txt"
    short.write_text("A\tAH0\nDOG\tD AO1 G\nITS\tIH1 T S\n")
    with pytest.raises(DataError) as raised:
        dataset(layout, lexicon=[str(short)])
    assert "CAT" in str(raised.value) and "ann-1-0000.flac" in str(raised.value)
    assert 1 in numbers(str(raised.value))  # one more word, CAT'S
    data = dataset(layout, lexicon=str(short), skip_unknown_words=True)
    assert sorted(contents(data)) == ["ann-1-0001.flac", "ann-1-0004.flac"]
    dataset(layout, lexicon=str(short), skip_unknown_words=True)
    assert [numbers(message) for message in caplog.messages].count([4, 6]) == 1
    short.write_text("EMU\tIY1 M\n")
    with pytest.raises(DataError, match="short.txt"):
        dataset(layout, lexicon=[str(short)], skip_unknown_words=True)


def test_incomplete_corpora(layout):
    with pytest.raises(DataError, match="train-other"):
        dataset(layout, split="train-other")
    transcript = layout / "train-clean/ann/1/ann-1.trans.txt"
    transcript.write_text(transcript.read_text().replace("ann-1-0003 ", "x "))
    with pytest.raises(DataError, match="ann-1-0003"):
        dataset(layout)
    transcript.unlink()
    with pytest.raises(DataError, match="ann-1.trans.txt"):
        dataset(layout)


@pytest.fixture
def provided(tmp_path, monkeypatch):
    """Our module under s3prl's name, for one test."""
    if (HOST / "corpus").is_dir():
        pytest.skip("this s3prl is a checkout, whose own corpus module is used")
    for name in (requirements.CTC_CORPUS, NAME):
        monkeypatch.setitem(sys.modules, name, None)
    requirements.provide_ctc_corpus(tmp_path)
    return sys.modules[NAME]


def test_s3prls_loaders_use_our_module(provided, layout):
    """With forked workers."""
    assert provided.LibriPhoneDataset is LibriPhoneDataset
    corpus = {
        **yaml.safe_load((RECIPE / "tiny.yaml").read_text())["downstream_expert"]["corpus"],
        "path": str(layout),
        "lexicon": [str(layout / "lexicon.txt")],
        "num_workers": 2,
    }
    utterances = defaultdict(set)
    for waves, labels, names in load_dataset("dev", TOKENIZER, corpus):
        for wave, label, name in zip(waves, labels, names, strict=True):
            utterances[name].add((len(wave), TOKENIZER.decode(label.tolist())))
    assert utterances == {
        "ann-2-0000": {(6400, "AH0 K AE1 T")},
        "ann-2-0001": {(8000, "AH0 D AO1 G")},
        "ann-2-0002": {(9600, "AH0 K AE1 T S D AO1 G")},
        "ann-2-0003": {(11200, "IH1 T S AH0 K AE1 T")},
    }
    waves, labels, _ = next(iter(load_dataset("train", TOKENIZER, {**corpus, "num_workers": 0})))
    assert len(waves) == len(labels) == 6  # bucket size 8, but 6 utterances


def test_spawned_workers_can_load_the_data_set(layout):
    collate = functools.partial(collect_audio_batch, split="dev")
    data = dataset(layout)
    options = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = DataLoader(data, collate_fn=collate, **options)
    waves, _, _ = next(iter(loader))
    assert len(waves[0]) == soundfile.info(data.file_list[0]).frames


def test_the_module_of_a_checkout_is_used(tmp_path):
    """The checkout is the working folder, unless the installed s3prl is one."""
    corpus = tmp_path / "downstream/ctc/corpus"
    corpus.mkdir(parents=True)
    (corpus / "libriphone.py").write_text("LibriPhoneDataset = 'checkout'\n")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from s3prl_ekd.downstream.requirements import provide_ctc_corpus\n"
        "for _ in range(2): provide_ctc_corpus(Path(sys.argv[1]))\n"
        "import s3prl.downstream.ctc.corpus.libriphone as m; print(m.__file__)"
    )
    folder = HOST if (HOST / "corpus").is_dir() else tmp_path / "downstream/ctc"
    assert run_python(code, str(tmp_path)) == str(folder / "corpus/libriphone.py")
