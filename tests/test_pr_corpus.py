"""The corpus module of PR: s3prl's own, where it has one, and ours in its place."""

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
from .phone_corpus import RECIPE, dataset, make_layout, make_manifest, make_tokenizer

HOST = Path(s3prl.__file__).parent / "downstream" / "ctc"
NAME = "s3prl.downstream.ctc.corpus.libriphone"


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def layout(tmp_path):
    return make_layout(make_manifest(tmp_path))


def contents(data):
    """File name -> indices of its phones."""
    return {
        Path(file).name: list(text) for file, text in zip(data.file_list, data.text, strict=True)
    }


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
    for name in (requirements.CTC_CORPUS, NAME):
        monkeypatch.setitem(sys.modules, name, None)
    requirements.provide_ctc_corpus(tmp_path)
    return sys.modules[NAME]


def test_provided_where_the_host_lacks_it(provided, layout, tokenizer):
    """s3prl's own loaders over it, with forked workers."""
    assert provided.LibriPhoneDataset is LibriPhoneDataset
    corpus = {
        **yaml.safe_load((RECIPE / "tiny.yaml").read_text())["downstream_expert"]["corpus"],
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


def test_a_spawned_worker_has_what_it_needs(layout, tokenizer):
    collate = functools.partial(collect_audio_batch, split="dev")
    data = dataset(layout, tokenizer)
    how = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = DataLoader(data, collate_fn=collate, **how)
    waves, _, _ = next(iter(loader))
    assert len(waves[0]) == soundfile.info(data.file_list[0]).frames


def test_the_module_of_a_checkout_is_used(tmp_path):
    """In the working folder, where the installed s3prl has none."""
    corpus = tmp_path / "downstream/ctc/corpus"
    corpus.mkdir(parents=True)
    (corpus / "libriphone.py").write_text("LibriPhoneDataset = 'theirs'\n")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from s3prl_ekd.downstream.requirements import provide_ctc_corpus\n"
        "for _ in range(2): provide_ctc_corpus(Path(sys.argv[1]))\n"
        "import s3prl.downstream.ctc.corpus.libriphone as m; print(m.__file__)"
    )
    where = HOST if (HOST / "corpus").is_dir() else tmp_path / "downstream/ctc"
    assert run_python(code, str(tmp_path)) == str(where / "corpus/libriphone.py")
