"""Reading runs, and choosing among them by dev."""

import json

import pytest

from s3prl_ekd.errors import EkdError
from s3prl_ekd.superb.report import make_report
from s3prl_ekd.superb.results import Run, incomplete, read_results, select
from s3prl_ekd.superb.score import ANCHORS, PUBLISHED, superb_score

from .superb_runs import write_cost, write_run

ONE = {"a": ("x", "x")}


def test_roots_upstreams_tasks_and_runs_are_all_understood(tmp_path):
    root = tmp_path / "superb"
    first = write_run(root, "student", "pr", ONE)
    second = write_run(root, "student", "sid", ONE)
    third = write_run(root, "fbank", "pr", ONE)
    write_cost(root, "student", 23_491_200, 8e11)
    for given, expected in (
        ([root], {first, second, third}),
        ([root / "student"], {first, second}),
        ([root / "student" / "pr"], {first}),
        ([first], {first}),
        ([first, root / "fbank", root / "student"], {first, second, third}),  # each once
    ):
        results = read_results(given)
        assert {run.folder for run in results.runs} == expected
        assert results.unfinished == ()
    assert read_results([root]).upstreams == ("fbank", "student")
    assert read_results([root]).costs["student"].parameters == 23_491_200
    assert read_results([first]).costs["student"].macs == 8e11
    assert set(read_results([root]).costs) == {"student"}


def test_unfinished_runs_are_counted_and_not_used(tmp_path):
    done = write_run(tmp_path, "student", "pr", ONE)
    cut = write_run(tmp_path, "student", "pr", ONE, lr=0.1)
    # what a cut run has not yet written is not asked for
    (cut / "superb.json").write_text(json.dumps({"format": 1, "finished": False}))
    bare = tmp_path / "student" / "er" / "lr0.001-seed1337-fold2"
    bare.mkdir(parents=True)
    (tmp_path / "report").mkdir()
    results = read_results([tmp_path])
    assert [run.folder for run in results.runs] == [done]
    assert set(results.unfinished) == {cut, bare}


def test_padded_batches_and_utterances_alone_are_not_mixed(tmp_path):
    for upstream, alone in (("a", True), ("b", False)):
        write_run(tmp_path, upstream, "pr", ONE, seed=1, features_alone=alone)
    notes = make_report(read_results([tmp_path]), 100).notes
    assert len(notes) == 1 and "alone (--cache-features) for a/pr, of padded" in notes[0]
    only = make_report(read_results([tmp_path / "a"]), 100).notes
    assert only == ("Features of each utterance alone (--cache-features).",)
    assert make_report(read_results([tmp_path / "b"]), 100).notes == ()  # as before the option
    write_run(tmp_path, "a", "pr", ONE, seed=2)  # a record from before the option
    with pytest.raises(EkdError, match="one ran with --cache-features and one without it"):
        read_results([tmp_path])


def test_where_the_predictions_are(tmp_path):
    folder = write_run(tmp_path, "s", "er", {"clean": ONE, "hum_snr5": ONE}, fold="fold3")
    run = read_results([folder]).runs[0]
    where = folder / "noisy" / "hum_snr5"
    assert run.files("hum_snr5") == (
        where / "test_fold3_predict.txt",
        where / "test_fold3_truth.txt",
    )
    folder = write_run(tmp_path, "s", "asr", ONE)
    run = read_results([folder]).runs[0]
    assert run.files("clean")[0] == folder / "test-clean-noLM-hyp.ark"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"unknown": 1}, "unknown key 'unknown'"),
        ({"lr": "fast"}, "lr: a number is expected, not 'fast'"),
        ({"lr": -1.0}, "lr is -1; a number above 0 is expected"),
        ({"seed": 1.5}, "seed: a whole number is expected"),
        ({"task": "ks"}, "task: 'ks' is not known; use one of: pr, sid, er, asr"),
        ({"format": 2}, "has format version 2"),
        ({"format": 0}, "format: 0 is not known"),
        ({"fold": "fold1"}, "fold must be named for er, and null for every other task"),
        ({"task": "er", "fold": "../x"}, "fold is '../x'; fold1, fold2, ... is expected"),
        ({"dev": {"metric": "wer", "value": 1.0}}, "must be test and per"),
        ({"dev": {"metric": "per", "value": float("nan")}}, "a finite number is expected"),
        ({"dev": None}, "dev: a mapping of settings is expected, not None"),
        ({"split": "../test"}, "must be test and per"),
        ({"tested": {}}, "tested must not be empty"),
        ({"tested": {"clean": "/etc"}}, "which is outside the run"),
        ({"tested": {"clean": "../other"}}, "which is outside the run"),
        ({"finished": "yes"}, "finished: 'yes' is not known"),
    ],
)
def test_a_damaged_record_is_a_sentence(tmp_path, change, said):
    path = write_run(tmp_path, "student", "pr", ONE) / "superb.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EkdError) as caught:
        read_results([tmp_path])
    message = str(caught.value)
    assert said in message and "superb.json" in message and "\n" not in message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000])
def test_no_record_at_all_is_a_sentence(tmp_path, text):
    folder = write_run(tmp_path, "student", "pr", ONE)
    (folder / "superb.json").write_bytes(text)
    with pytest.raises(EkdError, match="superb.json"):
        read_results([tmp_path])


def test_a_damaged_cost_is_a_sentence(tmp_path):
    write_run(tmp_path, "student", "pr", ONE)
    write_cost(tmp_path, "student", -1, 1e9)
    with pytest.raises(EkdError, match="cost.json: parameters and macs must not be negative"):
        read_results([tmp_path])


def test_folders_without_runs_are_a_sentence(tmp_path):
    with pytest.raises(EkdError, match="nowhere is not a folder"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(EkdError, match="no runs in .*; s3prl-ekd superb writes them"):
        read_results([tmp_path])


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write_run(one, "student", "pr", ONE)
    write_run(other, "student", "pr", ONE)
    with pytest.raises(EkdError, match="say they are the same run"):
        read_results([one, other])
    for seed, change in ((2, {"recipe": "mine.yaml"}), (3, {"steps": 10})):
        folder = write_run(other / "a", "student", "pr", ONE, seed=seed, **change)
        with pytest.raises(EkdError, match="differ in recipe, steps or test set"):
            read_results([one, folder])
    folder = write_run(other / "b", "student", "sid", ONE, checkpoint="another.pt")
    with pytest.raises(EkdError, match="are of different models under one name, student"):
        read_results([one, folder])


def chosen(root):
    return select(read_results([root]).runs)


def test_the_best_mean_on_dev_is_chosen(tmp_path):
    # seed 1 alone would choose 0.01; its mean is 12, that of 0.001 is 11
    for lr, devs in ((0.001, (11.0, 11.0)), (0.01, (9.0, 15.0))):
        for seed, dev in enumerate(devs, start=1):
            write_run(tmp_path, "student", "pr", ONE, lr=lr, seed=seed, dev=dev)
            write_run(tmp_path, "student", "sid", ONE, lr=lr, seed=seed, dev=dev)
    found = chosen(tmp_path)
    assert found["student", "pr"].lr == 0.001 and found["student", "pr"].dev == 11.0
    assert found["student", "sid"].lr == 0.01 and found["student", "sid"].dev == 12.0
    assert [run.seed for run in found["student", "sid"].runs] == [1, 2]
    assert incomplete(read_results([tmp_path]).runs) == []


def test_only_learning_rates_with_all_seeds_and_folds(tmp_path):
    for lr, keys, dev in (
        (0.001, [(1, "fold1"), (1, "fold2"), (2, "fold1"), (2, "fold2")], 40.0),
        (0.01, [(1, "fold1"), (1, "fold2"), (2, "fold1")], 90.0),
    ):
        for seed, fold in keys:
            write_run(tmp_path, "s", "er", ONE, lr=lr, seed=seed, fold=fold, dev=dev)
    found = chosen(tmp_path)["s", "er"]
    assert found.lr == 0.001 and found.seeds == (1, 2) and found.folds == ("fold1", "fold2")
    runs = read_results([tmp_path]).runs
    assert incomplete(runs) == ["s, er, lr 0.01: no seed 2 fold2"]


def test_some_of_the_folds_are_not_er(tmp_path):
    for i in (1, 2):
        write_run(tmp_path, "s", "er", ONE, fold=f"fold{i}")
        write_run(tmp_path, "other", "er", ONE, fold=f"fold{i}")
    write_run(tmp_path, "s", "er", ONE, fold="fold3", finished=False)
    results = read_results([tmp_path])
    assert set(select(results.runs, results.unfinished)) == {("other", "er")}
    assert incomplete(results.runs, results.unfinished) == ["s, er, lr 0.001: no seed 1337 fold3"]


def test_no_complete_learning_rate_is_no_selection(tmp_path):
    write_run(tmp_path, "s", "pr", ONE, lr=0.1, seed=1)
    write_run(tmp_path, "s", "pr", ONE, lr=0.2, seed=2)
    runs = read_results([tmp_path]).runs
    assert select(runs) == {}
    assert incomplete(runs) == ["s, pr, lr 0.1: no seed 2", "s, pr, lr 0.2: no seed 1"]


def test_equal_learning_rates_and_many_folds_have_one_order(tmp_path):
    for lr in (0.01, 0.001):
        for i in (10, 2, 1):
            write_run(tmp_path, "s", "er", ONE, lr=lr, fold=f"fold{i}", dev=50.0)
    found = chosen(tmp_path)["s", "er"]
    assert found.lr == 0.001 and found.folds == ("fold1", "fold2", "fold10")
    assert all(isinstance(run, Run) for run in found.runs)


def test_the_score_of_hubert_base_by_hand():
    hubert = {"pr": 5.41, "sid": 81.42, "er": 64.92, "asr": 6.42}
    parts = [
        1000 * (5.41 - 82.01) / (3.53 - 82.01),  # 976.045
        1000 * (81.42 - 20.058174) / (90.3 - 20.058174),  # 873.580
        1000 * (64.92 - 48.23672168) / (67.62 - 48.23672168),  # 860.705
        1000 * (6.42 - 23.18) / (3.62 - 23.18),  # 856.851
    ]
    assert sum(parts) / 4 == pytest.approx(891.795, abs=0.001)
    assert superb_score(hubert) == pytest.approx(891.795, abs=0.001)
    row = next(row for row in PUBLISHED if row.name == "HuBERT Base")
    assert row.metrics == hubert


def test_the_anchors_score_0_and_1000_and_a_missing_task_nothing():
    assert superb_score({task: pair[0] for task, pair in ANCHORS.items()}) == 0
    assert superb_score({task: pair[1] for task, pair in ANCHORS.items()}) == 1000
    assert superb_score({"pr": 5.0, "sid": 80.0, "er": 60.0}) is None
