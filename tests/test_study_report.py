"""The study's report: its numbers, its sentences, and errors on inconsistent results."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest
import study as tool
import yaml
from marked_text import between
from study_parts.compare import make_study
from study_parts.design import students
from study_parts.folder import StudyFolder
from study_parts.report import BEGIN, END
from study_parts.report_differences import sentence
from study_parts.scores import read_study

from s3prl_ekd.errors import DataError, SetupError

from .study_cases import CER, SID, SINGLE, parse
from .superb_runs import write_run

pytestmark = pytest.mark.slow  # of the developers' tools

WORDS = ("A B C D", "E F G H", "I J K L", "M N O P", "Q R S T", "U V W X")


def pairs(task: str, wrong: int, shift: int = 0) -> dict[str, tuple[str, str]]:
    """Six utterances with errors in ``wrong`` of their 24 tokens, or of the 6 labels."""
    result = {}
    for i, text in enumerate(WORDS):
        if task in ("sid", "er"):
            result[f"u{i}"] = ("no" if (i + shift) % 6 < wrong else text[0], text[0])
            continue
        tokens = text.split()
        for k in range(4):
            if (4 * i + k + shift) % 24 < wrong:
                tokens[k] = "NO"
        result[f"u{i}"] = (" ".join(tokens), text)
    return result


def write_students(root: Path, setting, skip=(), **changes) -> None:
    """Write results with separate best, then average, concat, and the single teachers in order;
    none has as many errors as the last of them."""
    errors = {"separate": 0, "average": 1, "concat": 2}
    errors |= {name: 3 + i for i, name in enumerate(setting.teachers)}
    errors["none"] = max(errors.values())
    for student in students(setting):
        for task in setting.tasks:
            if (student.name, task) in skip:
                continue
            labels = task in ("sid", "er")
            wrong = errors[student.row.learned_from] + (0 if labels else 4)
            results = {
                "clean": pairs(task, wrong, student.seed),
                "esc10_snr5": pairs(task, wrong + (not labels), student.seed),
            }
            dev = 100 - wrong if labels else wrong
            fold = "fold1" if task == "er" else None
            write_run(root, student.name, task, results, seed=student.seed, dev=dev, fold=fold,
                      **changes)  # fmt: skip


def test_the_numbers_of_a_small_study(tmp_path):
    setting = parse("--seeds", "1", "2")
    write_students(tmp_path / "superb", setting)
    results = read_study(setting, tmp_path / "superb")
    assert (results.finished, results.planned) == (112, 112)
    study = make_study(setting, results, 200)
    assert study.complete_cells == 14 * 5 * 2
    assert study.best == {(s, t): "tiny_hubert" for s in ("small", "large") for t in setting.tasks}
    assert study.means["small-average", "pr per", "clean"].value == pytest.approx(100 * 5 / 24)
    assert study.means["large-average", "sid accuracy", "clean"].value == pytest.approx(100 * 5 / 6)
    # a wrong word has two character edits (substitution and insertion), a text 7 characters
    assert study.means["small-average", "asr cer", "clean"].value == pytest.approx(100 * 10 / 42)
    assert len(study.comparisons) == 2 * 5 * 2 * 6
    by_key = {(c.size, c.metric.key, c.condition, c.row, c.baseline): c for c in study.comparisons}
    c = by_key["small", "pr per", "esc10_snr5", "average", "tiny_hubert"]
    assert c.is_best_single and c.improves and c.estimate.value == pytest.approx(-100 * 2 / 24)
    c = by_key["small", "sid accuracy", "clean", "concat", "average"]
    assert not c.is_best_single and not c.improves and c.estimate.value == pytest.approx(-100 / 6)
    assert not c.is_control and c.label == "concat − average"
    c = by_key["large", "er accuracy", "clean", "average", "none"]  # 1 of 6 is wrong, and 3 + 2
    assert c.is_control and c.improves and c.estimate.value == pytest.approx(100 * 4 / 6)
    assert not c.is_best_single and c.label == "average − none"


def test_the_report_has_the_numbers_and_keeps_the_text_outside_the_marks(tmp_path, capsys):
    out, docs = tmp_path / "out", tmp_path / "docs"
    setting = parse("--seeds", "1", "2")
    StudyFolder(out).start(setting, tmp_path, {})
    skipped = ("large-separate-seed2", "pr")
    write_students(out / "result/superb", setting, skip=[skipped])
    reference = tmp_path / "reference"
    write_run(reference, "fbank", "pr", pairs("pr", 20), seed=1)
    docs.mkdir()
    (docs / "study.md").write_text(f"# Ours\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    argv = [str(tmp_path), "-o", str(out), "--docs", str(docs), "--seeds", "1", "2"]
    argv += ["--report-only", "--reference", str(reference)]
    assert tool.main(argv) == 0
    assert "111 of 112 " in capsys.readouterr().out
    text = (docs / "study.md").read_text()
    assert text.startswith("# Ours\n\nbefore\n\n" + BEGIN) and text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    # PR of one row lacks a seed under two conditions
    assert re.search(r"^111 of 112 .* 138 of 140 .* 2 ", text, re.M)
    # and so do its two differences, to the best single teacher and to average
    assert sum(line.count("†") for line in text.splitlines() if line.startswith("|")) == 2 + 4
    assert re.search(r"^†.*\b4 of 120\b", text, re.M)
    assert " of 96 intervals " in text and " of 20 intervals " in text
    row = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert [c.strip() for c in row.split("|")[2:5]][0] == "fbank" and "83.3 [" in row
    assert "(PR at small: tiny_hubert;" in text
    assert " tie " not in text and "References with" not in text and "--cache-features" not in text
    with open(docs / "study.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sum(line["kind"] == "mean" for line in lines) == 14 * 5 * 2 + 1
    assert sum(line["kind"] == "difference" for line in lines) == 120
    separate = next(
        line
        for line in lines
        if (line["size"], line["row"], line["metric"], line["condition"])
        == ("small", "separate", "PER", "clean")
    )
    assert float(separate["value"]) == pytest.approx(100 * 4 / 24, abs=1e-3)
    assert separate["test_utterances"] == "6" and separate["seeds"] == "2"
    for name in ("study.png", "study.differences.png"):
        assert (docs / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    assert tool.main(argv) == 0
    assert (docs / "study.md").read_text() == text


def test_a_study_without_results_has_a_report(tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    StudyFolder(out).start(parse(), tmp_path, {})
    assert tool.main([str(tmp_path), "-o", str(out), "--docs", str(docs), "--report-only"]) == 0
    text = (docs / "study.md").read_text()
    assert re.search(r"^0 of 168 .* 0 of 140 ", text, re.M)


def test_sentences_agree_with_the_numbers(tmp_path):
    setting = parse()
    write_students(tmp_path, setting)
    study = make_study(setting, read_study(setting, tmp_path), 200)
    c = next(
        c for c in study.comparisons
        if (c.size, c.metric, c.condition, c.row) == ("small", SID, "clean", "average")
    )  # fmt: skip
    estimate = dataclasses.replace(c.estimate, value=12.34, low=2.0, high=22.68)
    better = sentence(dataclasses.replace(c, estimate=estimate))
    assert better.startswith("SID accuracy, clean, size small: average ")
    assert better.endswith(" the best single teacher (tiny_hubert) by 12.3 [2.0, 22.7] points.")
    c = dataclasses.replace(c, metric=CER, condition="esc10_snr5", baseline="average", row="concat",
                            is_best_single=False, estimate=estimate)  # fmt: skip
    worse = sentence(c)  # more errors
    assert worse.startswith("ASR CER, under noise: esc10, 5 dB SNR, size small: concat ")
    assert worse.endswith(" average by 12.3 [2.0, 22.7] points.")
    assert " better " in better and " worse " in worse
    assert " average by" not in sentence(dataclasses.replace(c, baseline="none"))


def test_students_with_different_downstream_settings_are_an_error(tmp_path):
    setting = parse()
    write_students(tmp_path, setting)
    student = students(setting)[0]
    write_run(tmp_path, student.name, "pr", pairs("pr", 1), seed=1, steps=99)
    with pytest.raises(DataError, match=r"\bsteps\b"):
        read_study(setting, tmp_path)


def test_single_teachers_that_tie_on_dev_have_no_best(tmp_path):
    """As in ASR while every word is wrong; without this, the order of the teachers would decide."""
    out, docs = tmp_path / "out", tmp_path / "docs"
    options = ["--seeds", "1", "2", "--tasks", "asr", "sid"]
    setting = parse(*options)
    StudyFolder(out).start(setting, tmp_path, {})
    write_students(out / "result/superb", setting)
    for student in students(setting):
        for dev, tied in ((100.0, SINGLE), (99.0, SINGLE[1:])):
            if student.row.learned_from in tied and (dev == 100 or student.row.size == "small"):
                result = {c: pairs("asr", 9, student.seed) for c in ("clean", "esc10_snr5")}
                write_run(out / "result/superb", student.name, "asr", result, seed=student.seed,
                          dev=dev)  # fmt: skip
    study = make_study(setting, read_study(setting, out / "result/superb"), 50)
    assert study.best == {(s, t): None if t == "asr" else "tiny_hubert"
                          for s in ("small", "large") for t in ("asr", "sid")}  # fmt: skip
    assert not any(c.is_best_single and c.metric.task == "asr" for c in study.comparisons)
    assert any(c.is_best_single and c.metric.task == "sid" for c in study.comparisons)
    argv = [str(tmp_path), "-o", str(out), "--docs", str(docs), *options, "--report-only"]
    assert tool.main(argv) == 0
    text = (docs / "study.md").read_text()
    for size in ("small", "large"):
        assert re.search(rf"\bASR at {size}: .*\btie\b", text)
        assert f"SID at {size}: tiny_hubert" in text
    assert "ASR at small: tiny" not in text


def test_references_with_other_settings_than_the_students_are_named(tmp_path):
    out, docs, references = tmp_path / "out", tmp_path / "docs", tmp_path / "other"
    options = ["--seeds", "1", "2", "--tasks", "pr", "sid", "er"]
    setting = parse(*options)
    StudyFolder(out).start(setting, tmp_path, {})
    write_students(out / "result/superb", setting, features_alone=True)
    linear = {"downstream_expert": {"model": {"select": "FrameLevel"}}}
    for folder in (out / "result/superb").glob("*/pr/*"):
        (folder / "config_2026.yaml").write_text(yaml.safe_dump(linear))

    def reference(name: str, task: str, tested=None, **changes) -> Path:
        fold = "fold1" if task == "er" else None
        tested = tested or pairs(task, 3)
        return write_run(references, name, task, tested, seed=1, lr=0.5, fold=fold,
                         **{"features_alone": True, **changes})  # fmt: skip

    same_run = reference("same", "pr")
    (same_run / "config_2026.yaml").write_text(yaml.safe_dump(linear))
    reference("same", "sid")
    reference("same", "er")
    reference("padded", "pr", features_alone=False)
    reference("longer", "pr", steps=9999, recipe="mine.yaml")
    deep = reference("deep", "pr")
    deep_model = {"downstream_expert": {"model": {"select": "RNNs"}}}
    (deep / "config_2026.yaml").write_text(yaml.safe_dump(deep_model))
    fewer = {k: v for k, v in pairs("sid", 1).items() if k != "u0"}
    reference("fewer", "sid", {"clean": fewer})
    reference("noisy", "er", {"clean": pairs("er", 1), "esc10_snr0": fewer})
    results = read_study(setting, out / "result/superb", [references])
    assert results.reference_differences == {
        "padded/pr": ("features",),
        "longer/pr": ("steps", "recipe"),
        "deep/pr": ("probe",),
        "fewer/sid": ("test set",),
    }
    assert results.features_alone == ("pr", "sid", "er")
    argv = [str(tmp_path), "-o", str(out), "--docs", str(docs), *options, "--report-only"]
    assert tool.main([*argv, "--reference", str(references)]) == 0
    text = (docs / "study.md").read_text()
    line = next(line for line in text.splitlines() if "longer/pr" in line)
    assert "longer/pr (steps, recipe)" in line and "fewer/sid (test set)" in line
    assert line.startswith("References with") and "same" not in line and "noisy" not in line
    assert re.search(r"^- .*\bPR, SID, ER\b.*--cache-features", text, re.M)


def test_only_the_tasks_with_features_alone_are_named(tmp_path):
    setting = parse("--tasks", "pr", "sid")
    for task in ("pr", "sid"):
        write_run(tmp_path, "small-average-seed1", task, pairs(task, 1), seed=1,
                  features_alone=task == "sid")  # fmt: skip
    assert read_study(setting, tmp_path).features_alone == ("sid",)


def test_a_condition_without_all_folds_is_skipped(tmp_path):
    setting = parse("--tasks", "er")
    clean = pairs("er", 1)
    for fold, tested in (("fold1", {"clean": clean, "esc10_snr5": clean}),
                         ("fold2", {"clean": clean})):  # fmt: skip
        write_run(tmp_path, "small-average-seed1", "er", tested, seed=1, fold=fold)
    results = read_study(setting, tmp_path)
    assert results.cells.keys() == {("small-average", "er accuracy", "clean")}
    study = make_study(setting, results, 50)
    assert study.means["small-average", "er accuracy", "clean"].value == pytest.approx(100 * 5 / 6)


def test_a_reference_with_the_name_of_a_row_is_an_error(tmp_path):
    setting = parse()
    write_run(tmp_path / "r", "small-average", "pr", pairs("pr", 1))
    with pytest.raises(DataError, match="small-average"):
        read_study(setting, tmp_path / "superb", [tmp_path / "r"])


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_missing_repeated_or_swapped_marks_are_an_error(text):
    with pytest.raises(SetupError, match="study.md"):
        between(text, BEGIN, END, "body", Path("study.md"))
