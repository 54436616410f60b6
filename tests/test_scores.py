"""Errors of each utterance: by hand, against s3prl's metric, and against jiwer."""

import random
import re

import jiwer
import pytest

from s3prl_ekd.downstream.metrics.error_counts import count_errors
from s3prl_ekd.downstream.metrics.predictions import read_pairs, read_predictions
from s3prl_ekd.errors import DataError
from s3prl_ekd.superb.results import read_results

from .superb_runs import write_run


def test_three_utterances_by_hand(tmp_path):
    pairs = {
        "u3": ("", "ONE TWO"),  # two deletions of 2
        "u1": ("THE CAT SAT", "THE CAT SAT DOWN"),  # one deletion of 4
        "u2": ("A BIG DOG RAN OFF", "A PIG RAN OFF"),  # a substitution and an insertion of 4
    }
    folder = write_run(tmp_path, "student", "asr", pairs)
    (counts,) = read_results([folder]).runs[0].measure("clean")
    assert counts.names == ("u1", "u2", "u3")
    assert counts.errors.tolist() == [1, 2, 2] and counts.lengths.tolist() == [4, 4, 2]
    assert counts.value == 50.0  # 5 of 10, not the mean of 25, 50 and 100


def test_labels_are_right_or_wrong(tmp_path):
    pairs = {"a": ("id1", "id1"), "b": ("id2", "id1"), "c": ("id3", "id3"), "d": ("id1", "id3")}
    folder = write_run(tmp_path, "student", "sid", pairs)
    (counts,) = read_results([folder]).runs[0].measure("clean")
    assert counts.errors.tolist() == [0, 1, 0, 1] and counts.lengths.tolist() == [1, 1, 1, 1]


def random_pairs(tokens, seed, count=40):
    """Utterance -> (hypothesis, reference), with errors in about a third of the tokens."""
    rng = random.Random(seed)
    pairs = {}
    for i in range(count):
        reference = [rng.choice(tokens) for _ in range(rng.randint(1, 25))]
        hypothesis = []
        for token in reference:
            draw = rng.random()
            if draw < 0.1:
                continue
            hypothesis.append(rng.choice(tokens) if draw < 0.25 else token)
            if draw > 0.9:
                hypothesis.append(rng.choice(tokens))
        pairs[f"spk-{i:04d}"] = (" ".join(hypothesis), " ".join(reference))
    return pairs


PHONES = "AA AE AH B D EH ER IH IY K L M N P S T Z".split()
WORDS = "THE A CAT DOG RAN FAR UPON IT'S BLUE SEA".split()


@pytest.mark.parametrize("task, tokens", [("pr", PHONES), ("asr", WORDS)])
def test_equal_to_jiwer_on_the_same_files(tmp_path, task, tokens):
    folder = write_run(tmp_path, "student", task, random_pairs(tokens, seed=task))
    run = read_results([folder]).runs[0]
    hyp, ref = (
        dict(line.split(" ", 1) for line in path.read_text().splitlines())
        for path in run.files("clean")
    )
    names = sorted(ref)
    expected = jiwer.process_words([ref[n] for n in names], [hyp[n] for n in names])
    (counts,) = run.measure("clean")
    assert counts.value == pytest.approx(100 * expected.wer, abs=1e-9)
    assert 20 < counts.value < 60
    errors = expected.substitutions + expected.deletions + expected.insertions
    assert counts.errors.sum() == errors
    assert counts.errors.tolist() == [
        round(jiwer.wer(ref[n], hyp[n]) * len(ref[n].split())) for n in names
    ]
    if task == "asr":
        cer = jiwer.cer([ref[n] for n in names], [hyp[n] for n in names])
        pairs = read_pairs(*run.files("clean"))
        assert count_errors(pairs, "character").value == pytest.approx(100 * cer, abs=1e-9)


def test_equal_to_s3prl(tmp_path):
    metric = pytest.importorskip("s3prl.downstream.ctc.metric")
    pairs = random_pairs(PHONES, seed=3)
    folder = write_run(tmp_path, "student", "pr", pairs)
    expected = metric.per(
        hypothesis=[hyp for hyp, _ in pairs.values()],
        groundtruth=[ref for _, ref in pairs.values()],
    )
    (counts,) = read_results([folder]).runs[0].measure("clean")
    assert counts.value == pytest.approx(100 * expected, abs=1e-9)


def test_repeated_names_are_numbered(tmp_path):
    path = tmp_path / "test_predict.txt"
    path.write_text("a happy\nb sad\na angry\n")
    assert read_predictions(path) == {"a": "happy", "b": "sad", "a (2)": "angry"}


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    path = tmp_path / "hyp.ark"
    path.write_text("a ONE\x85TWO\u2028THREE\n", encoding="utf-8")
    assert list(read_predictions(path)) == ["a"]


@pytest.mark.parametrize(
    "hyp, ref, pattern",
    [
        (None, "a x\n", "/hyp: No such file"),
        ("a x\n", None, "/ref: No such file"),
        ("a x\n", "a x\nb y\n", r"/hyp .*\bref\b.*\bb\b"),
        ("a x\nb y\n", "a x\n", r"/hyp .*\bref\b.*\bb\b"),
        ("", "", r"/ref\b.*empty"),
        ("a x\n", "a \n", r"/ref: .*\ba\b.*empty"),
        ("a x\n", "a\n", r"/ref: .*\ba\b.*empty"),
        (" x\n", "a x\n", "/hyp: line 1"),
        ("a x\n\nb y\n", "a x\n", "/hyp: line 2"),
        (b"a \xff\n", "a x\n", "/hyp: .*UTF-8"),
    ],
)
def test_errors_of_damaged_files(tmp_path, hyp, ref, pattern):
    for name, text in (("hyp", hyp), ("ref", ref)):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        read_pairs(tmp_path / "hyp", tmp_path / "ref")
    message = str(caught.value)
    assert re.search(pattern, message) and "\n" not in message


def test_an_empty_hypothesis_has_only_deletions():
    counts = count_errors([("u", "", "a b c")], "word")
    assert counts.errors.tolist() == [3] and counts.value == 100
