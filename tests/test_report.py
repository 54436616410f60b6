"""Task metrics, the report's tables, and the command."""

import csv
import io
import re
import sys

import numpy as np
import pytest

from s3prl_ekd.cli import main
from s3prl_ekd.errors import DataError
from s3prl_ekd.superb.metrics import compute_metrics
from s3prl_ekd.superb.report import make_report, sort_conditions
from s3prl_ekd.superb.report_text import MARK, as_csv, as_markdown
from s3prl_ekd.superb.results import read_results, select_best_lr
from s3prl_ekd.superb.score import LABEL, superb_score

from .conftest import command, error_of
from .superb_runs import write_cost, write_run


def labels(right, wrong, prefix="u"):
    """Utterances with ``right`` right and ``wrong`` wrong labels."""
    marks = [True] * right + [False] * wrong
    return {f"{prefix}{i:03d}": ("x" if ok else "y", "x") for i, ok in enumerate(marks)}


def words(errors, length=10, count=20):
    """``count`` utterances of ``length`` words, of which the first ``errors`` are wrong."""
    ref = ["w"] * length
    return {
        f"u{i:03d}": (" ".join(["z"] * errors + ref[errors:]), " ".join(ref)) for i in range(count)
    }


def write_four(root, upstream, *, pr=2, sid=60, er=50, asr=3, seed=1337, noise=()):
    """Write all four tasks of one upstream: PER 10·pr, WER 10·asr, accuracies of 100 utterances.

    Under each noise the word error rates are 10 higher, the accuracies 9 lower.
    """

    def by_condition(clean, noisy):
        return {"clean": clean, **dict.fromkeys(noise, noisy)}

    options = {"seed": seed, "hub": upstream, "checkpoint": None}
    write_run(root, upstream, "pr", by_condition(words(pr), words(pr + 1)), **options)
    write_run(root, upstream, "asr", by_condition(words(asr), words(asr + 1)), **options)
    pairs = by_condition(labels(sid, 100 - sid), labels(sid - 9, 109 - sid))
    write_run(root, upstream, "sid", pairs, **options)
    for i in range(1, 6):
        fold = by_condition(labels(er, 100 - er, f"f{i}-"), labels(er - 9, 109 - er, f"f{i}-"))
        write_run(root, upstream, "er", fold, fold=f"fold{i}", **options)


def report_of(*folders, resamples=400):
    return make_report(read_results(folders), resamples)


# Metrics


def test_er_is_the_mean_of_its_folds(tmp_path):
    # 3 of 4 right and 1 of 10: the mean of 75 and 10 is 42.5; of all 14 it would be 28.6
    write_run(tmp_path, "s", "er", labels(3, 1, "a"), fold="fold1")
    write_run(tmp_path, "s", "er", labels(1, 9, "b"), fold="fold2")
    selections = list(select_best_lr(read_results([tmp_path]).runs).values())
    (metric,) = compute_metrics(selections, "clean", 4000)
    assert metric.value == 42.5 and metric.units == 14 and metric.deviation is None
    # folds are resampled separately: variances p(1-p)/n add, and the mean of two halves the sd
    sd = 50 * (0.75 * 0.25 / 4 + 0.1 * 0.9 / 10) ** 0.5
    assert metric.resampled.std() == pytest.approx(sd, rel=0.05)
    assert metric.resampled.mean() == pytest.approx(42.5, abs=5 * sd / 4000**0.5)


def test_the_interval_lies_around_the_metric(tmp_path):
    # 80 of 100 right: 80 -+ 1.96 * sqrt(0.8 * 0.2 / 100) = 72.2 to 87.8; errors would be 12 to 28
    write_run(tmp_path, "s", "sid", labels(80, 20))
    metric = report_of(tmp_path, resamples=4000).metrics["s", "sid", "clean"]
    assert metric.value == 80 and metric.interval == pytest.approx((72.2, 87.8), abs=1.01)


def test_seeds_are_averaged_on_the_same_resamples(tmp_path):
    # Two seeds with errors on complementary utterances: on any resample their mean is 50 %.
    one = {f"u{i}": ("x" if i % 2 else "y", "x") for i in range(40)}
    two = {f"u{i}": ("y" if i % 2 else "x", "x") for i in range(40)}
    write_run(tmp_path, "s", "sid", one, seed=1)
    write_run(tmp_path, "s", "sid", two, seed=2)
    selections = list(select_best_lr(read_results([tmp_path]).runs).values())
    (metric,) = compute_metrics(selections, "clean", 200)
    assert metric.by_seed == (50, 50) and metric.deviation == 0
    assert metric.resampled == pytest.approx(np.full(200, 50.0)) and metric.interval == (50, 50)


def test_the_deviation_over_seeds_by_hand(tmp_path):
    for seed, right in ((1, 60), (2, 70), (3, 80)):
        write_run(tmp_path, "s", "sid", labels(right, 100 - right), seed=seed)
    metric = report_of(tmp_path).metrics["s", "sid", "clean"]
    assert metric.value == pytest.approx(70) and metric.deviation == pytest.approx(10)


def test_seeds_tested_on_different_utterances_are_an_error(tmp_path):
    one = write_run(tmp_path, "s", "sid", labels(3, 1), seed=1)
    two = write_run(tmp_path, "s", "sid", labels(3, 2), seed=2)
    with pytest.raises(DataError, match=f"{one} .*{two} .*clean"):
        report_of(tmp_path)


def test_seeds_tested_with_different_labels_are_an_error(tmp_path):
    one = write_run(tmp_path, "s", "sid", labels(3, 1), seed=1)
    two = write_run(
        tmp_path, "s", "sid", {u: (h, "z") for u, (h, _) in labels(3, 1).items()}, seed=2
    )
    with pytest.raises(DataError, match=f"{one} .*{two} .*clean"):
        report_of(tmp_path)


def test_upstreams_reported_together_or_separately(tmp_path):
    write_four(tmp_path, "a", pr=2)
    write_four(tmp_path, "b", pr=4)
    write_run(tmp_path, "c", "pr", words(3, count=7))  # another test set
    together = report_of(tmp_path).metrics
    for name in "abc":
        alone = report_of(tmp_path / name).metrics[name, "pr", "clean"]
        assert (alone.resampled == together[name, "pr", "clean"].resampled).all()
        assert alone.value == together[name, "pr", "clean"].value
    assert [together[n, "pr", "clean"].value for n in "abc"] == pytest.approx([20, 40, 30])


# The report


def test_the_score_and_its_interval(tmp_path):
    write_four(tmp_path, "a", pr=2, sid=60, er=50, asr=3)
    report = report_of(tmp_path)
    expected = superb_score({"pr": 20.0, "sid": 60.0, "er": 50.0, "asr": 30.0})
    score = report.scores["a"]
    assert score.value == pytest.approx(expected)
    # PR and ASR have no variance here; SID and ER have a weight of 1000 / 4 / (best - FBANK) each
    deviations = [np.sqrt(0.6 * 0.4 / 100), np.sqrt(0.5 * 0.5 / 500)]
    parts = [25000 * s / w for s, w in zip(deviations, (90.3 - 20.058174, 67.62 - 48.23672168))]  # noqa: B905
    assert score.resampled.std() == pytest.approx(np.hypot(*parts), rel=0.15)


def test_no_score_without_all_tasks(tmp_path):
    write_four(tmp_path, "a")
    write_run(tmp_path, "b", "pr", words(2))
    report = report_of(tmp_path)
    assert set(report.scores) == {"a"}
    row = next(line for line in as_markdown(report).splitlines() if line.startswith("| b "))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "–", "–", "20.00 [20.00, 20.00]", "–", "–", "–", "–"
    ]  # fmt: skip
    assert report.score_difference("a", "b") is None


def test_differences_by_hand(tmp_path):
    write_four(tmp_path, "a", pr=2, sid=60)
    write_four(tmp_path, "b", pr=3, sid=60)
    report = report_of(tmp_path)
    d = report.difference("a", "b", "pr", "clean")
    # every utterance of b has one more error in ten words: the same difference on any resample
    assert (d.value, d.low, d.high, d.better) == pytest.approx((-10, -10, -10, 1.0))
    assert report.difference("b", "a", "pr", "clean").better == 0
    tie = report.difference("a", "b", "sid", "clean")
    assert (tie.value, tie.low, tie.high, tie.better) == (0, 0, 0, 0.5)
    score = report.score_difference("a", "b")
    assert score.value == pytest.approx(1000 * -10 / (3.53 - 82.01) / 4) and score.better == 1
    assert report.difference("a", "b", "pr", "no_such") is None


def test_no_differences_between_different_test_sets(tmp_path):
    write_run(tmp_path, "a", "pr", words(2, count=20))
    write_run(tmp_path, "b", "pr", words(2, count=19))
    other_reference = {k: (h, r.replace("w", "v", 1) + " w") for k, (h, r) in words(2).items()}
    write_run(tmp_path, "c", "pr", other_reference)
    other_labels = {k: (h, r.replace("w", "v", 1)) for k, (h, r) in words(2).items()}
    write_run(tmp_path, "d", "pr", other_labels)  # as long as those of a
    report = report_of(tmp_path)
    for name in "bcd":
        assert report.difference("a", name, "pr", "clean") is None
    (note,) = report.notes
    assert "PR, clean" in note and "a 20, b 19, c 20, d 20" in note
    text = as_markdown(report, "a")
    assert "n/a" in text and note in text


def test_noises_of_one_name_with_different_contents(tmp_path):
    pairs = {"clean": words(1), "hum_snr5": words(2)}
    for name, digest in (("a", "1"), ("b", "2"), ("c", None), ("d", "1")):
        noises = {} if digest is None else {"hum_snr5": digest}  # none in an old record
        write_run(tmp_path, name, "pr", pairs, seed=1, noises=noises)
    report = report_of(tmp_path)
    noisy = {n for n in "bcd" if report.difference("a", n, "pr", "hum_snr5") is not None}
    assert noisy == {"c", "d"} and report.difference("a", "b", "pr", "clean") is not None
    (note,) = report.notes
    assert "PR, hum_snr5: noises" in note and " a, d and b," in note
    write_run(tmp_path, "a", "pr", pairs, seed=2)
    report_of(tmp_path)
    folder = write_run(tmp_path, "a", "pr", pairs, seed=3, noises={"hum_snr5": "2"})
    with pytest.raises(DataError, match=f"seed1/noisy/hum_snr5 and {folder}/noisy/hum_snr5 "):
        report_of(tmp_path)


def test_no_differences_between_different_recipe_settings(tmp_path):
    for name, digest in (("a", "1"), ("b", "2"), ("c", None), ("d", "1")):
        write_run(tmp_path, name, "pr", words(2), recipe_digest=digest)
    report = report_of(tmp_path)
    comparable = {n for n in "bcd" if report.difference("a", n, "pr", "clean") is not None}
    assert comparable == {"c", "d"}  # c: a record of an old version, without a digest
    (note,) = report.notes
    assert note.startswith("PR: ") and "--override" in note and " a, d and b," in note
    text = as_markdown(report, "a")
    row = next(s for s in text.split("## Differences")[1].splitlines() if s.startswith("| b "))
    assert row.split("|")[2].strip() == "n/a" and note in text


def test_tables(tmp_path):
    for seed in (1, 2):
        write_four(tmp_path, "a", seed=seed, sid=50 + 10 * seed, noise=("hum_snr5", "hum_snr10"))
    write_four(tmp_path, "b", seed=1)
    write_cost(tmp_path, "a", 27_034_752, 825.64e9)
    write_run(tmp_path, "b", "pr", words(1), seed=7, finished=False)
    report = report_of(tmp_path)
    assert report.conditions == ("clean", "hum_snr10", "hum_snr5")
    text = as_markdown(report, "b")
    lines = text.splitlines()
    assert lines[0] == MARK
    head = next(line for line in lines if line.startswith("| upstream | params (M) | GMACs"))
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    assert columns[3:] == [
        "PR PER ↓", "PR sd", "SID ACC ↑", "SID sd", "ER ACC ↑", "ER sd", "ASR WER ↓", "ASR sd",
        "SUPERB score ↑",
    ]  # fmt: skip
    a, b = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in lines[lines.index(head) + 2 : lines.index(head) + 4]
    )
    assert a[:5] == ["a", "27.03", "825.64", "20.00 [20.00, 20.00]", "0.00"]
    assert a[5].startswith("65.00 [") and a[6] == "7.07"  # 60 and 70: sd 7.07
    assert b[:5] == ["b", "–", "–", "20.00 [20.00, 20.00]", "–"]
    assert LABEL in text
    assert "## Under noise: hum, 5 dB SNR" in text and "## Differences to b" in text
    assert "1 (b/pr/lr0.001-seed7)" in text
    assert "arXiv" not in text
    published = as_markdown(report, published=True)
    row = next(line for line in published.splitlines() if line.startswith("| HuBERT Base"))
    assert "| 891.8 " in row and "2105.01051" in row


def test_a_task_that_was_not_tested_under_noise_has_no_column_there(tmp_path):
    write_run(tmp_path, "a", "pr", {"clean": words(1), "hum_snr5": words(2)})
    write_run(tmp_path, "a", "sid", labels(3, 1))
    report = report_of(tmp_path)
    assert report.tested("clean") == ("pr", "sid") and report.tested("hum_snr5") == ("pr",)
    noisy = as_markdown(report).split("## Under noise: hum, 5 dB SNR")[1].split("##")[0]
    assert "PR PER" in noisy and "SID" not in noisy


def test_a_further_task_does_not_take_the_difference_of_scores_away(tmp_path):
    write_four(tmp_path, "a")
    write_four(tmp_path, "b", pr=4)
    write_run(tmp_path, "a", "ks", labels(3, 1), hub="a", checkpoint=None)
    report = report_of(tmp_path)
    assert report.score_difference("a", "b").value > 0
    assert report.difference("a", "b", "ks", "clean") is None


def test_csv_is_tidy(tmp_path):
    for seed in (1, 2):
        write_four(tmp_path, "a", seed=seed, noise=("hum_snr5",))
    write_four(tmp_path, "b", seed=1)
    report = report_of(tmp_path)
    rows = list(csv.DictReader(io.StringIO(as_csv(report, "b"))))
    assert len(rows) == 4 * 2 + 1 + 4 + 1  # a: clean, noisy and score; b: clean and score
    row = next(
        r for r in rows if (r["upstream"], r["task"], r["condition"]) == ("a", "er", "clean")
    )
    assert float(row["value"]) == 50 and float(row["low"]) < 50 < float(row["high"])
    assert row["seeds"] == "1 2" and row["folds"] == "fold1 fold2 fold3 fold4 fold5"
    assert row["units"] == "500" and row["lr"] == "0.001" and row["sd_over_seeds"] == "0"
    assert row["against"] == "b" and float(row["difference"]) == 0 and row["better"] == "0.5"
    noisy = next(r for r in rows if r["condition"] == "hum_snr5" and r["task"] == "asr")
    assert float(noisy["value"]) == 40 and noisy["against"] == "b" and noisy["difference"] == ""
    score = [r for r in rows if r["metric"] == "superb_score"]
    assert len(score) == 2 and float(score[0]["value"]) == pytest.approx(
        report.scores["a"].value, rel=1e-5
    )
    assert "against" not in as_csv(report).splitlines()[0]


def test_the_order_of_conditions():
    conditions = ["hum_snr-5", "babble_snr0", "hum_snr10", "clean", "babble_snr2.5", "reverb"]
    assert sort_conditions(conditions) == (
        "clean", "babble_snr2.5", "babble_snr0", "hum_snr10", "hum_snr-5", "reverb"
    )  # fmt: skip


def test_incomplete_runs_alone_are_an_error(tmp_path):
    write_run(tmp_path, "s", "pr", words(1), lr=0.1, seed=1)
    write_run(tmp_path, "s", "pr", words(1), lr=0.2, seed=2)
    with pytest.raises(DataError, match="lr 0.1: no seed 2"):
        report_of(tmp_path)
    folder = write_run(tmp_path / "u", "s", "pr", words(1), finished=False)
    with pytest.raises(DataError, match=rf"\b1 .*{folder}"):
        report_of(tmp_path / "u")


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "superb"
    write_four(root, "fbank", pr=6, sid=20, er=40, asr=7, noise=("hum_snr5", "hum_snr0"))
    write_four(root, "student", noise=("hum_snr5", "hum_snr0"))
    write_cost(root, "fbank", 0, 1e9)
    write_cost(root, "student", 23_491_200, 785e9)
    return root


def test_the_command_writes_tables_and_plots(finished, tmp_path, capsys):
    argv = ("report", finished, "-o", "out", "--resamples", "200", "--against", "fbank")
    first = command(*argv, "--published", cwd=tmp_path)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "noise.png", "params.png", "report.csv", "report.md", "scores.png"
    ]  # fmt: skip
    for plot in out.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert text.split("\n", 1)[1].strip() in first.stdout and "out/report.md" in first.stdout

    assert main([*map(str, argv[:2]), "-o", str(out), *argv[4:]]) == 0  # overwrites its own files
    assert "HuBERT Base" in text and "HuBERT Base" not in (out / "report.md").read_text()
    table = [line for line in first.stdout.splitlines() if line.startswith("| student")]
    assert table == [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| student")
    ]


def test_plots_of_an_earlier_report_are_removed(finished, tmp_path):
    out = str(tmp_path / "out")
    assert main(["report", str(finished), "-o", out, "--resamples", "100"]) == 0
    assert (tmp_path / "out" / "noise.png").exists()
    clean = tmp_path / "clean"
    write_run(clean, "s", "pr", words(1))
    assert main(["report", str(clean), "-o", out, "--resamples", "100"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.csv", "report.md", "scores.png"
    ]  # fmt: skip


def test_tables_without_matplotlib(finished, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert main(["report", str(finished), "-o", str(out), "--resamples", "100"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["report.csv", "report.md"]
    assert re.search("matplotlib.*pip install", capsys.readouterr().out)


def test_other_files_are_overwritten_only_with_force(finished, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.md").write_text("written by hand\n")
    argv = ["report", str(finished), "-o", str(out), "--resamples", "100"]
    assert re.search(rf"{out / 'report.md'}.*--force", error_of(capsys, *argv))
    assert (out / "report.md").read_text() == "written by hand\n" and len(list(out.iterdir())) == 1
    assert main([*argv, "--force"]) == 0
    assert (out / "report.md").read_text().startswith(MARK)


@pytest.mark.parametrize(
    "options, pattern",
    [
        (["--against", "studnet"], r"\bstudnet\b.*\bstudent\?.*fbank, student"),
        (["--resamples", "5"], r"--resamples .*\b100\b.*\b1000000\b.*\b5\b"),
    ],
)
def test_errors(finished, tmp_path, capsys, options, pattern):
    error = error_of(capsys, "report", finished, "-o", tmp_path / "out", *options)
    assert re.search(pattern, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("upstreams", [1, 10])
def test_plots_of_one_and_of_ten_upstreams(tmp_path, upstreams):
    pytest.importorskip("matplotlib")
    from s3prl_ekd.superb.report_plots import plots

    for i in range(upstreams):
        write_run(
            tmp_path, f"model{i}", "pr", {c: words(i % 9) for c in ("clean", "x_snr5", "x_snr0")}
        )
        write_cost(tmp_path, f"model{i}", 0 if i == 1 else 23_491_200, 1e9)
    drawers = plots(report_of(tmp_path, resamples=100))
    assert set(drawers) == {"scores.png", "params.png", "noise.png"}
    for draw in drawers.values():
        file = io.BytesIO()
        draw(file)
        assert file.getvalue().startswith(b"\x89PNG")


def test_no_parameter_plot_without_parameters(tmp_path):
    from s3prl_ekd.superb.report_plots import plots

    write_run(tmp_path, "fbank", "pr", words(1))
    assert set(plots(report_of(tmp_path, resamples=100))) == {"scores.png"}
    write_cost(tmp_path, "fbank", 0, 1e9)
    assert set(plots(report_of(tmp_path, resamples=100))) == {"scores.png"}


def test_the_table_of_runs_names_the_tested_checkpoints(tmp_path):
    for seed, name in ((1, "dev-best"), (2, "states-20"), (3, "dev-best")):
        record = write_run(tmp_path, "s", "sid", labels(1, 1), seed=seed) / "superb.json"
        record.write_text(record.read_text().replace("dev-best", name))
    runs = as_markdown(report_of(tmp_path)).split("## Runs")[1]
    head, _, row = [line for line in runs.splitlines() if line.startswith("|")]
    titles, cells = ([cell.strip() for cell in line.split("|")] for line in (head, row))
    assert cells[titles.index("chosen")] == "dev-best, states-20"
