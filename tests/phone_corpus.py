"""Helpers: a small corpus with words, prepared for PR, and its data set."""

from pathlib import Path

from s3prl.downstream.ctc.text import load_text_encoder

from s3prl_ekd.downstream.libriphone import LibriPhoneDataset

from .conftest import REPO, make_sound
from .corpora import write_manifest
from .preparing import prepare

RECIPE = REPO / "downstream_recipes" / "ctc"
VOCABULARY = RECIPE / "vocab" / "phoneme.txt"
TOKENIZER = load_text_encoder("word", str(VOCABULARY))
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


def make_manifest(folder: Path) -> Path:
    """Write ``speech/all.tsv`` with 14 utterances of 0.4 to 1 s (6 train, 4 dev, 4 test), and
    ``cmudict.txt``."""
    (folder / "cmudict.txt").write_text(CMUDICT)
    rows = []
    for i in range(14):
        split = "train" if i < 6 else "dev" if i < 10 else "test"
        cells = (f"{split}/{i}.flac", "ann", WORDS[i % 6], split)
        rows.append((make_sound(0.4 + 0.1 * (i % 6), seed=i), cells))
    return write_manifest(folder / "speech/all.tsv", ("speaker", "text", "split"), rows)


def prepare_argv(manifest: Path, out: Path, *options) -> list:
    """The arguments of ``s3prl-ekd prepare`` for this corpus."""
    return ["pr", manifest, "-o", out, "--lexicon", manifest.parents[1] / "cmudict.txt", *options]


def make_layout(manifest: Path) -> Path:
    """Run ``prepare pr``; return its output folder."""
    out = manifest.parents[1] / "layout"
    assert prepare(*prepare_argv(manifest, out)) == 0
    return out


def dataset(layout, bucket_size=1, split="train-clean", **more):
    lexicon = more.pop("lexicon", [str(layout / "lexicon.txt")])
    return LibriPhoneDataset([split], TOKENIZER, bucket_size, str(layout), lexicon, **more)
