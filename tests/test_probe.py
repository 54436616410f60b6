"""Closed-form probes: against scikit-learn, by hand, and end to end as a command."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from s3prl_ekd import cli
from s3prl_ekd.data.manifest.phones import Segment
from s3prl_ekd.errors import DataError
from s3prl_ekd.probe import measure
from s3prl_ekd.probe.classifiers import PENALTIES, predict_by_lda, predict_by_ridge
from s3prl_ekd.probe.conditions import NoisyCondition
from s3prl_ekd.probe.labels import LabelledUtterance, read_labels, speaker_folds
from s3prl_ekd.probe.measure import ProbeScore, probe
from s3prl_ekd.probe.report import accuracy_interval, difference_interval, table
from s3prl_ekd.probe.tasks import ALWAYS_TRAIN, ProbeExcerpt, ProbeTask, choose_tasks

from .conftest import error_of
from .corpora import write_audio, write_labelled_tones

STRIDE = 320


def examples(seed=0, count=240, dim=6, classes=4, folds=4):
    """Features of classes with overlapping means, labels and folds."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    features = rng.normal(size=(classes, dim))[labels] + rng.normal(size=(count, dim))
    return (3 * features + 5).astype(np.float32), labels, rng.integers(folds, size=count)


def ridge_by_sklearn(x, y, folds):
    """The same choice of penalty and the same regression, in loops, by scikit-learn."""
    result = np.zeros_like(y)
    one_hot = np.eye(y.max() + 1)

    def fit(rows, penalty):
        scaler = StandardScaler().fit(x[rows])
        model = Ridge(alpha=penalty * rows.sum(), solver="cholesky")
        model.fit(scaler.transform(x[rows]), one_hot[y[rows]])
        return lambda z: model.predict(scaler.transform(z)).argmax(1)

    count = folds.max() + 1
    for fold in range(count):
        dev = folds == (fold + 1) % count
        inner = ~dev & (folds != fold)
        right = [np.mean(fit(inner, p)(x[dev]) == y[dev]) for p in PENALTIES]
        test = folds == fold
        result[test] = fit(~test, PENALTIES[int(np.argmax(right))])(x[test])
    return result


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 0), (0, 20_000)])
def test_ridge_predicts_as_scikit_learn_in_loops(seed, offset):
    x, y, folds = examples(seed)
    x = x + np.float32(offset)
    (predicted,) = predict_by_ridge(x, y, folds, [x])
    np.testing.assert_array_equal(predicted, ridge_by_sklearn(x.astype(np.float64), y, folds))


def test_a_prediction_does_not_depend_on_labels_of_its_own_fold():
    x, y, folds = examples()
    changed = y.copy()
    changed[folds == 2] = (changed[folds == 2] + 1) % 4
    for predict in (predict_by_ridge, predict_by_lda):
        before, after = (predict(x, labels, folds, [x])[0] for labels in (y, changed))
        np.testing.assert_array_equal(before[folds == 2], after[folds == 2])
        assert (before[folds != 2] != after[folds != 2]).any()


def test_lda_never_predicts_examples_for_training_only():
    x, y, folds = examples()
    folds = np.where(folds == 0, 0, ALWAYS_TRAIN)
    (predicted,) = predict_by_lda(x, y, folds, [x])
    assert (predicted[folds == ALWAYS_TRAIN] == -1).all()
    assert np.mean(predicted[folds == 0] == y[folds == 0]) > 0.5  # chance: 0.25


def test_the_training_is_clean_and_only_the_test_is_distorted():
    x, y, folds = examples()
    other = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    clean, noisy = predict_by_ridge(x, y, folds, [x, other])
    np.testing.assert_array_equal(clean, predict_by_ridge(x, y, folds, [x])[0])
    assert np.mean(noisy == y) < 0.45 < np.mean(clean == y)


def utterance(name, speaker="a", split="train", emotion="", segments=()):
    return LabelledUtterance(name, split, speaker, emotion, tuple(segments))


def test_folds_hold_all_utterances_of_a_speaker_and_are_of_similar_size():
    counts = {"a": 9, "b": 5, "c": 4, "d": 4, "e": 1}
    utterances = [utterance(f"{s}{i}", s) for s, n in counts.items() for i in range(n)]
    folds = speaker_folds(utterances, 3)
    sizes = [sum(counts[s] for s in counts if folds[s] == fold) for fold in range(3)]
    assert sorted(sizes) == [6, 8, 9]
    assert len(set(speaker_folds(utterances, 10).values())) == 5


def test_the_phone_of_a_frame_is_the_one_at_its_centre():
    # centres at 200, 520, 840, 1160, 1480 samples
    segments = [Segment("SIL", 0, 480), Segment("AA", 480, 1160), Segment("B", 1160, 1600)]
    task = ProbeTask("phones", ())
    excerpt = ProbeExcerpt(utterance("u", segments=segments), 0, 1600, 0)
    states = np.arange(5.0)[:, None]
    (_, frames, labels), (_, means, phones) = task.examples(states, excerpt, STRIDE)
    assert labels == ["AA", "AA", "B", "B"] and frames[:, 0].tolist() == [1, 2, 3, 4]
    assert phones == ["AA", "B"] and means[:, 0].tolist() == [1.5, 3.5]


def test_a_phone_shorter_than_a_frame_is_left_out():
    segments = [Segment("AA", 0, 480), Segment("T", 540, 700), Segment("B", 700, 1600)]
    excerpt = ProbeExcerpt(utterance("u", segments=segments), 0, 1600, 0)
    (_, _, labels), (_, _, phones) = ProbeTask("phones", ()).examples(
        np.zeros((5, 1)), excerpt, STRIDE
    )
    assert "T" not in labels and phones == ["AA", "B"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    write_labelled_tones(folder)
    return folder


def spectrum(wave: torch.Tensor) -> list[torch.Tensor]:
    """Two layers: log power in bands of the spectrum, and noise."""
    frames = wave.unfold(0, 400, STRIDE) * torch.hann_window(400)
    power = torch.fft.rfft(frames).abs().square()[:, :64] + 1e-6
    noise = torch.randn(len(frames), 8, generator=torch.Generator().manual_seed(len(wave)))
    return [power.log(), noise]


def test_probes_find_phones_speakers_and_emotions_in_the_spectrum_only(corpus):
    tasks = choose_tasks(read_labels(corpus / "labels.tsv"))
    assert [task.label for task in tasks] == ["phones", "speaker", "emotion"]
    scores = {s.score: s for s in probe(spectrum, tasks, by_layer=True)}
    for name, chance in (("phone frames", 50), ("speaker", 25), ("emotion", 67)):
        assert scores[name].accuracy > 95
        assert scores[name].layers[0] > 95
        assert scores[name].layers[1] < chance + 20
    assert scores["speaker"].counts.sum() == 16  # 8 test utterances of 2.4 s
    assert scores["emotion"].counts.sum() == 24
    assert scores["phone frames"].counts.sum() == pytest.approx(24 * 119, abs=24)


def test_wide_layers_are_reduced_and_keep_what_they_tell(corpus, monkeypatch):
    tasks = choose_tasks(read_labels(corpus / "labels.tsv"))
    monkeypatch.setattr(measure, "MOST_DIMS", 20)
    scores = {s.score: s for s in probe(spectrum, tasks, by_layer=True)}
    assert scores["phone frames"].accuracy > 95 and len(scores["phone frames"].layers) == 2


def test_noise_in_a_room_lowers_the_scores_and_is_the_same_for_all_upstreams(corpus):
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(1))
    noisy = NoisyCondition("noisy", [noise], -5.0, room=True)
    wave = torch.sin(torch.arange(16_000) / 20)
    torch.testing.assert_close(noisy(wave), noisy(wave.clone()))
    assert not torch.equal(noisy(wave), NoisyCondition("n", [noise], -5.0, room=False)(wave))
    task = next(t for t in choose_tasks(read_labels(corpus / "labels.tsv")) if t.label == "phones")
    clean, distorted = (s for s in probe(spectrum, [task], noisy) if s.score == "phone frames")
    assert distorted.condition == "noisy" and distorted.accuracy < clean.accuracy - 5


def test_intervals_cover_utterances_and_are_paired():
    rng = np.random.default_rng(0)
    counts = np.full(400, 10.0)
    names = tuple(f"u{i}" for i in range(400))
    errors = rng.binomial(10, 0.3, 400)
    a = ProbeScore("emotion", "clean", names, errors, counts)
    b = ProbeScore("emotion", "clean", names, np.maximum(errors - 1, 0), counts)
    low, high = accuracy_interval(a)
    half = 100 * 1.96 * (errors / 10).std() / 20  # of a mean of 400 utterances
    assert high - low == pytest.approx(2 * half, rel=0.1)
    low, high = difference_interval(b, a)
    share = np.minimum(errors, 1) / 10
    assert high - low == pytest.approx(2 * 100 * 1.96 * share.std() / 20, rel=0.15)
    rows = table({"a": [a], "b": [b]})
    assert [row[0] for row in rows] == ["upstream", "a", "b", "b - a"]
    assert rows[3][1].startswith(f"{b.accuracy - a.accuracy:+.1f}")


LINES = ["a.flac\ttrain\tx\tsad", "b.flac\ttrain\ty\tglad", "c.flac\ttrain\tz\tmad"]
SILENT = [f"{name}.flac\ttrain\t{name}\tSIL:0+50" for name in "abc"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["path\tsplit", "a.flac\ttrain"], "no labels"),
        (["path\tsplit\tsegments", "a.flac\ttrain\tAA:1-2"], "line 2: a segment must be"),
        (["path\tsplit\tspeaker", "a.flac\ttrain\tx", "b.flac\ttest\ty"], "speakers or more"),
        (["path\tsplit\tspeaker", "a.flac\ttrain\tx", "b.flac\ttrain\ty"], "split test"),
        (
            ["path\tsplit\tspeaker", "a.flac\ttrain\tx", "b.flac\ttrain\ty", "c.flac\ttest\ty"],
            "more excerpts of 1 s than speakers",
        ),
        (["path\tsplit\tspeaker\temotion", *LINES], "more utterances than emotions"),
        (["path\tsplit\tspeaker\tsegments", *SILENT], "phones needs its labels"),
    ],
)
def test_bad_manifests_are_explained(tmp_path, lines, problem):
    (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
    for name in "abc":
        write_audio(tmp_path / f"{name}.flac", np.random.default_rng(0).normal(size=16_000) / 9)
    with pytest.raises(DataError, match=problem):
        choose_tasks(read_labels(tmp_path / "m.tsv"))


def test_tasks_that_cannot_be_probed_are_explained_and_the_others_probed(corpus, tmp_path):
    rows = [line.split("\t") for line in (corpus / "labels.tsv").read_text().splitlines()]
    emotions = {"s0": "loud"}  # without s0, one emotion is left
    lines = [rows[0], *([*row[:3], emotions.get(row[2], "soft"), row[4]] for row in rows[1:])]
    write_audio(corpus / "short.flac", np.random.default_rng(0).normal(size=900) / 9)
    lines.append(["short.flac", "train", "s1", "soft", ""])
    (corpus / "changed.tsv").write_text("\n".join("\t".join(line) for line in lines) + "\n")
    notes = []
    tasks = choose_tasks(read_labels(corpus / "changed.tsv"), notes.append)
    assert [task.label for task in tasks] == ["phones", "speaker"]
    assert any("two emotions" in note for note in notes)
    assert any("1 utterances are shorter" in note for note in notes)


def test_a_speaker_without_labelled_frames_is_named(corpus):
    """The phones lie between the centres of frames."""
    utterances = read_labels(corpus / "labels.tsv")
    speaker = utterances[-1].speaker
    short = (Segment("AA", 0, 100),)
    changed = [
        dataclasses.replace(u, segments=short) if u.speaker == speaker else u for u in utterances
    ]
    with pytest.raises(DataError, match=rf"no frame of {speaker} has a label"):
        probe(spectrum, [task for task in choose_tasks(changed) if task.label == "phones"])


def test_hidden_states_that_are_not_finite_are_refused(corpus):
    tasks = choose_tasks(read_labels(corpus / "labels.tsv"))
    with pytest.raises(DataError, match=r"\.flac: hidden state 1 .* not finite"):
        probe(lambda wave: [*spectrum(wave)[:1], spectrum(wave)[1] * float("nan")], tasks)


def test_of_long_corpora_evenly_spaced_utterances_are_used_for_phones(corpus, monkeypatch):
    monkeypatch.setattr("s3prl_ekd.probe.tasks.PHONE_SAMPLES", 12 * 38_400)  # half of them
    notes = []
    task = choose_tasks(read_labels(corpus / "labels.tsv"), notes.append)[0]
    names = [excerpt.utterance.path.name for excerpt in task.excerpts]
    assert len(names) == 12 and len({name[:2] for name in names}) == 4 and notes


@pytest.mark.parametrize("name", ["probe.md", "probe.json", "layers.png"])
def test_the_command_replaces_only_its_own_files(corpus, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    argv = ["probe", "fbank", "--data", str(corpus / "labels.tsv"), "-o", str(tmp_path)]
    assert str(tmp_path / name) in error_of(capsys, *argv)
    assert (tmp_path / name).read_text() == "{}"


def test_the_command_prints_a_table_and_writes_a_picture(corpus, teachers, tmp_path, capsys):
    argv = [
        "probe", f"small=hubert_local:{teachers['hubert']}",
        f"other=wavlm_local:{teachers['wavlm']}", "--data", str(corpus / "labels.tsv"),
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "phone frames" in out and "other - small" in out
    results = json.loads((tmp_path / "out/probe.json").read_text())
    record = next(r for r in results["small"] if r["score"] == "speaker")
    errors, examples_ = np.array(list(record["utterances"].values())).sum(0)
    assert record["accuracy"] == pytest.approx(100 - 100 * errors / examples_)
    assert len(record["layers"]) == 5  # the input of the first layer, and four layers
    assert (tmp_path / "out/layers.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out/probe.md").write_text("my own notes\n")
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert re.search(r"probe\.md exists\b", capsys.readouterr().err)
