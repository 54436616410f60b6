"""The tiny teachers' model cards are complete."""

import re

import pytest

from s3prl_ekd.teachers import zoo

from .conftest import REPO

# From the sources' pages and the LICENSES.md of the training data.
REQUIRED = (
    "Librispeech: an ASR corpus based on public domain audio books",
    "Vassil Panayotov, Guoguo Chen, Daniel Povey, Sanjeev Khudanpur",
    "https://creativecommons.org/licenses/by/4.0/",
    "speechocean762: An Open-Source Non-native English Speech Corpus",
    "Junbo Zhang, Zhiwen Zhang, Yongqing Wang, Zhiyong Yan, Qiong Song, Yukai Huang, Ke Li",
    "Apache-2.0",
    "A Database of German Emotional Speech",
    "F. Burkhardt, A. Paeschke, M. Rolfes, W. F. Sendlmeier, B. Weiss",
    "CC0 1.0",
    "48 voices",
    "espeak-ng",
    "tools/train_tiny_teachers.py",
    "tools/make_voices.py",
)


@pytest.fixture(params=zoo.TEACHERS)
def name(request):
    return request.param


def test_a_card_names_its_sources_and_their_licences(name):
    text = re.sub(r"\s+", " ", zoo.card(name).read_text(encoding="utf-8"))
    for part in REQUIRED:
        assert part in text, part
    for teacher in zoo.TEACHERS:
        assert (f"# {teacher} " in f"{text} ") == (teacher == name)
    for section in ("Data", "Licence", "Recipe", "Scores", "Limits"):
        assert f"## {section}" in text, section


def test_the_card_of_tiny_robust_hubert_names_its_noise():
    text = re.sub(r"\s+", " ", zoo.card("tiny_robust_hubert").read_text(encoding="utf-8"))
    for part in ("CC BY 3.0", "K. J. Piczak", "UncleSigmund", "vhlam", "ESC: Dataset for"):
        assert part in text, part


def test_a_card_has_no_placeholders(name):
    """No number is still `{{...}}`, to be filled in after training."""
    assert re.findall(r"\{\{.*?\}\}", zoo.card(name).read_text(encoding="utf-8")) == []


def test_a_card_compares_scores_with_random_weights(name):
    text = zoo.card(name).read_text(encoding="utf-8")
    scores = text.split("<!-- scores:")[1].split("<!-- end of scores -->")[0]
    rows = [line.split("|")[1].strip() for line in scores.splitlines() if line.startswith("|")]
    assert rows.count(name) == 1 and rows.count("less") == 1
    assert sum(row.endswith("_random") for row in rows) == 2  # scores, and difference to them


def test_the_readme_has_no_placeholders():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\{\{.*?\}\}", text) == []
