"""Reading runs, and choosing learning rates by the dev metric."""

import json
import re

import pytest

from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.errors import EkdError
from s3prl_ekd.superb.report import make_report
from s3prl_ekd.superb.results import FinishedRun, incomplete, read_results, select_best_lr
from s3prl_ekd.superb.score import ANCHORS, PUBLISHED, superb_score

from .superb_runs import write_cost, write_run

PAIRS = {"a": ("x", "x")}


def test_folders_of_roots_upstreams_tasks_and_runs(tmp_path):
    root = tmp_path / "superb"
    first = write_run(root, "student", "pr", PAIRS)
    second = write_run(root, "student", "sid", PAIRS)
    third = write_run(root, "fbank", "pr", PAIRS)
    write_cost(root, "student", 23_491_200, 8e11)
    for folders, expected in (
        ([root], {first, second, third}),
        ([root / "student"], {first, second}),
        ([root / "student" / "pr"], {first}),
        ([first], {first}),
        ([first, root / "fbank", root / "student"], {first, second, third}),  # without duplicates
    ):
        results = read_results(folders)
        assert {run.folder for run in results.runs} == expected
        assert results.unfinished == ()
    assert read_results([root]).upstreams == ("fbank", "student")
    assert read_results([root]).costs["student"].parameters == 23_491_200
    assert read_results([first]).costs["student"].macs == 8e11
    assert set(read_results([root]).costs) == {"student"}


def test_unfinished_runs_are_listed_but_not_used(tmp_path):
    finished = write_run(tmp_path, "student", "pr", PAIRS)
    cut = write_run(tmp_path, "student", "pr", PAIRS, lr=0.1)
    record = json.loads((cut / "superb.json").read_text())
    begun = {"dev": None, "tested": {}, "finished": False}
    (cut / "superb.json").write_text(json.dumps(record | begun))
    without_record = tmp_path / "student" / "er" / "lr0.001-seed1337-fold2"
    without_record.mkdir(parents=True)
    (tmp_path / "report").mkdir()
    results = read_results([tmp_path])
    assert [run.folder for run in results.runs] == [finished]
    assert set(results.unfinished) == {cut, without_record}


def test_runs_with_and_without_padding_are_not_mixed(tmp_path):
    for upstream, alone in (("a", True), ("b", False)):
        write_run(tmp_path, upstream, "pr", PAIRS, seed=1, features_alone=alone)
    notes = make_report(read_results([tmp_path]), 100).notes
    assert len(notes) == 1 and "--cache-features" in notes[0]
    assert "a/pr" in notes[0] and "b/pr" not in notes[0]
    (note,) = make_report(read_results([tmp_path / "a"]), 100).notes
    assert "--cache-features" in note and "a/pr" not in note  # all runs: none is named
    assert make_report(read_results([tmp_path / "b"]), 100).notes == ()
    write_run(
        tmp_path, "a", "pr", PAIRS, seed=2
    )  # a record without features_alone, of an earlier version
    with pytest.raises(EkdError, match="-seed[12] .*-seed[12] .*--cache-features"):
        read_results([tmp_path])


def test_prediction_files(tmp_path):
    folder = write_run(tmp_path, "s", "er", {"clean": PAIRS, "hum_snr5": PAIRS}, fold="fold3")
    run = read_results([folder]).runs[0]
    noisy = folder / "noisy" / "hum_snr5"
    assert run.files("hum_snr5") == (
        noisy / "test_fold3_predict.txt",
        noisy / "test_fold3_truth.txt",
    )
    folder = write_run(tmp_path, "s", "asr", PAIRS)
    run = read_results([folder]).runs[0]
    assert run.files("clean")[0] == folder / "test-clean-noLM-hyp.ark"


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"unknown": 1}, r"\bunknown\b"),
        ({"lr": "fast"}, r"\blr\b.*\bfast\b"),
        ({"lr": -1.0}, r"\blr\b.*-1"),
        ({"seed": 1.5}, r"\bseed\b"),
        ({"task": "xx"}, r"\btask\b.*\bxx\b"),
        ({"format": 2}, r"\b2\b.*pip install"),
        ({"format": 0}, r"\bformat\b.*\b0\b"),
        ({"fold": "fold1"}, r"\bfold\b.*\bpr\b.*'fold1'"),
        ({"task": "er", "fold": "../x"}, r"\bfold\b.*'\.\./x'"),
        ({"task": "er", "fold": "fold1", "folds": ["fold2"]}, r"\bfolds\b.*fold1.*fold2"),
        ({"task": "er", "fold": "fold1", "folds": ["fold1", "x"]}, r"\bfolds\b.*'x'"),
        ({"folds": ["fold1"]}, r"\bfolds\b.*fold1"),
        (
            {"dev": {"metric": "wer", "value": 1.0, "checkpoint": "a.ckpt"}},
            r"dev\.metric.* per\b.*'wer'",
        ),
        ({"dev": {"metric": "per", "value": float("nan")}}, "NaN"),
        ({"dev": None}, r"\bdev\b"),
        ({"lr": None}, r"\blr\b.*\bpr\b.*None"),
        (
            {"dev": {"metric": "per", "value": 1.0, "checkpoint": "../a.ckpt"}},
            r"dev\.checkpoint.*\.\./a",
        ),
        ({"dev": {"metric": "per", "value": 1.0, "layer": 1}}, r"dev\.layer.*\b1\b"),
        ({"split": "../test"}, r"\bsplit\b.* test .*'\.\./test'"),
        ({"tested": {}}, r"\btested\b"),
        ({"tested": {"clean": "/etc"}}, "tested.clean.*'/etc'"),
        ({"tested": {"clean": "../other"}}, r"tested\.clean.*'\.\./other'"),
        ({"finished": "yes"}, r"\bfinished\b.*\byes\b"),
    ],
)
def test_errors_of_a_damaged_record(tmp_path, change, pattern):
    path = write_run(tmp_path, "student", "pr", PAIRS) / "superb.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EkdError) as caught:
        read_results([tmp_path])
    folder, _, message = str(caught.value).partition("superb.json")
    assert re.search(pattern, message) and str(tmp_path) in folder and "\n" not in message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000])
def test_errors_of_a_file_that_is_not_a_record(tmp_path, text):
    folder = write_run(tmp_path, "student", "pr", PAIRS)
    (folder / "superb.json").write_bytes(text)
    with pytest.raises(EkdError, match="superb.json"):
        read_results([tmp_path])


def test_errors_of_a_damaged_cost(tmp_path):
    write_run(tmp_path, "student", "pr", PAIRS)
    write_cost(tmp_path, "student", -1, 1e9)
    with pytest.raises(EkdError, match="cost.json.*parameters"):
        read_results([tmp_path])


def test_errors_of_folders_without_runs(tmp_path):
    with pytest.raises(EkdError, match=str(tmp_path / "nowhere")):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(EkdError, match=str(tmp_path)):
        read_results([tmp_path])


def test_runs_that_are_not_comparable_are_an_error(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    first = write_run(one, "student", "pr", PAIRS)
    second = write_run(other, "student", "pr", PAIRS)
    with pytest.raises(EkdError, match=f"{first} .*{second} .*seed"):
        read_results([one, other])
    for seed, change in ((2, {"recipe": "other.yaml"}), (3, {"steps": 10})):
        folder = write_run(other / "a", "student", "pr", PAIRS, seed=seed, **change)
        with pytest.raises(EkdError, match=f"{first} .*{folder} .*recipe.*steps"):
            read_results([one, folder])
    folder = write_run(other / "b", "student", "sid", PAIRS, checkpoint="another.pt")
    with pytest.raises(EkdError, match=f"{first} .*{folder} .*model.* student"):
        read_results([one, folder])


def test_runs_of_different_recipe_settings_are_not_averaged(tmp_path):
    """Same YAML file, but with --override, edited in between, or on a corpus prepared again."""
    for seed, digest in ((1, None), (2, "a"), (3, "a")):  # None: a record of an old version
        write_run(tmp_path, "s", "pr", PAIRS, seed=seed, recipe_digest=digest)
    write_run(tmp_path, "s", "sid", PAIRS, seed=2, recipe_digest="b")
    assert select_best_lr(read_results([tmp_path]).runs)["s", "pr"].recipe_digest == "a"
    other = write_run(tmp_path, "s", "pr", PAIRS, lr=0.1, seed=4, recipe_digest="b")
    with pytest.raises(EkdError, match=f"seed2 .*{other} .*--override.*corpus.*move one"):
        read_results([tmp_path])


def test_a_model_under_two_paths_is_one_model(tmp_path):
    """Its digest decides, and the path only in records of old versions, which have none."""
    write_run(tmp_path / "one", "student", "pr", PAIRS, model="a")
    moved = write_run(tmp_path, "student", "sid", PAIRS, model="a", checkpoint="/elsewhere.pt")
    assert len(read_results([tmp_path / "one", moved]).runs) == 2
    changed = write_run(tmp_path, "student", "asr", PAIRS, model="b")
    with pytest.raises(EkdError, match="different models"):
        read_results([tmp_path / "one", changed])


def selections_of(root):
    return select_best_lr(read_results([root]).runs)


def test_the_learning_rate_with_the_best_mean_on_dev(tmp_path):
    # with seed 1 alone 0.01 would be best; the mean over seeds is 12, that of 0.001 is 11
    for lr, devs in ((0.001, (11.0, 11.0)), (0.01, (9.0, 15.0))):
        for seed, dev in enumerate(devs, start=1):
            write_run(tmp_path, "student", "pr", PAIRS, lr=lr, seed=seed, dev=dev)
            write_run(tmp_path, "student", "sid", PAIRS, lr=lr, seed=seed, dev=dev)
    selections = selections_of(tmp_path)
    pr, sid = selections["student", "pr"], selections["student", "sid"]
    assert pr.lr == 0.001 and pr.dev == 11.0
    assert sid.lr == 0.01 and sid.dev == 12.0
    assert [run.seed for run in sid.runs] == [1, 2]
    assert incomplete(read_results([tmp_path]).runs) == []


def test_only_learning_rates_with_all_seeds_and_folds(tmp_path):
    for lr, keys, dev in (
        (0.001, [(1, "fold1"), (1, "fold2"), (2, "fold1"), (2, "fold2")], 40.0),
        (0.01, [(1, "fold1"), (1, "fold2"), (2, "fold1")], 90.0),
    ):
        for seed, fold in keys:
            write_run(tmp_path, "s", "er", PAIRS, lr=lr, seed=seed, fold=fold, dev=dev)
    er = selections_of(tmp_path)["s", "er"]
    assert er.lr == 0.001 and er.seeds == (1, 2) and er.folds == ("fold1", "fold2")
    runs = read_results([tmp_path]).runs
    assert incomplete(runs) == ["s, er, lr 0.01: no seed 2 fold2"]


def test_er_needs_all_folds(tmp_path):
    for i in (1, 2):
        write_run(tmp_path, "s", "er", PAIRS, fold=f"fold{i}")
        write_run(tmp_path, "other", "er", PAIRS, fold=f"fold{i}")
    write_run(tmp_path, "s", "er", PAIRS, fold="fold3", finished=False)
    results = read_results([tmp_path])
    assert set(select_best_lr(results.runs, results.unfinished)) == {("other", "er")}
    assert incomplete(results.runs, results.unfinished) == ["s, er, lr 0.001: no seed 1337 fold3"]


def test_er_needs_the_folds_that_were_planned(tmp_path):
    """Also those without a folder: removed, or never begun."""
    folds = ["fold1", "fold2", "fold3"]
    for fold in ("fold1", "fold3"):
        write_run(tmp_path, "s", "er", PAIRS, fold=fold, folds=folds)
        write_run(tmp_path, "old", "er", PAIRS, fold=fold)  # a record of an old version
        write_run(tmp_path, "two", "er", PAIRS, fold=fold, folds=["fold1", "fold3"])
    runs = read_results([tmp_path]).runs
    assert {name for name, _ in select_best_lr(runs)} == {"old", "two"}
    assert incomplete(runs) == ["s, er, lr 0.001: no seed 1337 fold2"]
    notes = make_report(read_results([tmp_path]), 100).notes
    assert len(notes) == 2 and "fold2" in notes[0] and notes[1].startswith("ER, old: no fold2;")
    write_run(tmp_path, "s", "er", PAIRS, fold="fold2")  # a record of an old version
    assert ("s", "er") in select_best_lr(read_results([tmp_path]).runs)


def test_no_complete_learning_rate(tmp_path):
    write_run(tmp_path, "s", "pr", PAIRS, lr=0.1, seed=1)
    write_run(tmp_path, "s", "pr", PAIRS, lr=0.2, seed=2)
    runs = read_results([tmp_path]).runs
    assert select_best_lr(runs) == {}
    assert incomplete(runs) == ["s, pr, lr 0.1: no seed 2", "s, pr, lr 0.2: no seed 1"]


def test_the_order_of_equal_learning_rates_and_of_folds(tmp_path):
    for lr in (0.01, 0.001):
        for i in (10, 2, 1):
            write_run(tmp_path, "s", "er", PAIRS, lr=lr, fold=f"fold{i}", dev=50.0)
    er = selections_of(tmp_path)["s", "er"]
    assert er.lr == 0.001 and er.folds == ("fold1", "fold2", "fold10")
    assert all(isinstance(run, FinishedRun) for run in er.runs)


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


def test_the_anchors_have_scores_0_and_1000():
    assert superb_score({task: pair[0] for task, pair in ANCHORS.items()}) == 0
    assert superb_score({task: pair[1] for task, pair in ANCHORS.items()}) == 1000
    assert superb_score({"pr": 5.0, "sid": 80.0, "er": 60.0}) is None
    for index, score in enumerate((0, 1000)):
        metrics = {column: pair[index] for column, pair in ANCHORS.items()}
        assert superb_score(metrics, tuple(TASKS)) == score


def test_the_ten_task_score_of_distilhubert_by_hand():
    """Of its paper's table (arXiv 2110.01900); the score of SF is the mean of its two metrics."""
    metrics = {"pr": 16.27, "sid": 73.54, "er": 63.02, "asr": 13.37, "ks": 95.98, "ic": 94.99}
    metrics |= {"sf": 82.57, "sf_cer": 35.39, "asv": 8.55, "sd": 6.19, "qbe": 5.11}
    four = 837.666 + 761.396 + 762.681 + 501.534
    others = (
        1000 * (95.98 - 41.3826674) / (96.66 - 41.3826674),  # 987.698
        1000 * (94.99 - 9.649354219) / (98.76 - 9.649354219),  # 957.692
        500 * (82.57 - 69.64) / (89.81 - 69.64)
        + 500 * (52.94 - 35.39) / (52.94 - 21.76),  # 601.957
        1000 * (9.56 - 8.55) / (9.56 - 5.11),  # 226.966
        1000 * (10.05 - 6.19) / (10.05 - 5.62),  # 871.332
        1000 * (5.11 - 0.58) / (7.36 - 0.58),  # 668.142
    )
    score = superb_score(metrics, tuple(TASKS))
    assert score == pytest.approx((four + sum(others)) / 10, abs=0.001)
    assert superb_score(metrics) == pytest.approx(four / 4, abs=0.001)
    del metrics["sf_cer"]
    assert superb_score(metrics, tuple(TASKS)) is None


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"lr": 0.1}, r"\blr\b.*null.*\bqbe\b.*0\.1"),
        ({"dev": {"metric": "mtwv", "value": 1.0}}, r"dev\.layer.*None"),
        ({"dev": {"metric": "mtwv", "value": 1.0, "layer": -3}}, r"dev\.layer.*-3"),
        (
            {"dev": {"metric": "mtwv", "value": 1.0, "layer": 1, "checkpoint": "../x"}},
            r"dev\.checkpoint.*'\.\./x'",
        ),
    ],
)
def test_errors_of_a_record_without_training(tmp_path, change, pattern):
    folder = write_run(tmp_path, "student", "sid", PAIRS)
    record = json.loads((folder / "superb.json").read_text())
    dev = {"metric": "mtwv", "value": 1.0, "checkpoint": None, "layer": 2}
    record |= {"task": "qbe", "lr": None, "dev": dev}
    (folder / "superb.json").write_text(json.dumps(record))
    chosen = read_results([tmp_path]).runs[0].dev
    assert chosen.layer == 2 and chosen.chosen == "layer 2"
    (folder / "superb.json").write_text(json.dumps(record | change))
    with pytest.raises(EkdError, match=pattern):
        read_results([tmp_path])
