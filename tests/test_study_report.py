"""The study's report: its numbers, its sentences, and what it refuses to compare."""

from __future__ import annotations

import csv
import dataclasses
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

from .study_cases import CER, SID, SINGLE, typed
from .superb_runs import write_run

WORDS = ("A B C D", "E F G H", "I J K L", "M N O P", "Q R S T", "U V W X")


def pairs(task: str, wrong: int, shift: int = 0) -> dict[str, tuple[str, str]]:
    """Six utterances; ``wrong`` of their 24 tokens, or of the 6 labels, are mistaken."""
    found = {}
    for i, text in enumerate(WORDS):
        if task in ("sid", "er"):
            found[f"u{i}"] = ("no" if (i + shift) % 6 < wrong else text[0], text[0])
            continue
        tokens = text.split()
        for k in range(4):
            if (4 * i + k + shift) % 24 < wrong:
                tokens[k] = "NO"
        found[f"u{i}"] = (" ".join(tokens), text)
    return found


def write_students(root: Path, setting, skip=(), **changes) -> None:
    """Results in which separate is best, average second; single teachers by their order; none is as
    bad as the last of them."""
    worth = {"separate": 0, "average": 1, "concat": 2}
    worth |= {name: 3 + i for i, name in enumerate(setting.teachers)}
    worth["none"] = max(worth.values())
    for student in students(setting):
        for task in setting.tasks:
            if (student.name, task) in skip:
                continue
            labels = task in ("sid", "er")
            wrong = worth[student.row.learned_from] + (0 if labels else 4)
            results = {
                "clean": pairs(task, wrong, student.seed),
                "esc10_snr5": pairs(task, wrong + (not labels), student.seed),
            }
            dev = 100 - wrong if labels else wrong
            fold = "fold1" if task == "er" else None
            write_run(root, student.name, task, results, seed=student.seed, dev=dev, fold=fold,
                      **changes)  # fmt: skip


def test_the_numbers_of_a_small_study(tmp_path):
    setting = typed("--seeds", "1", "2")
    write_students(tmp_path / "superb", setting)
    found = read_study(setting, tmp_path / "superb")
    assert (found.finished, found.planned) == (112, 112)
    study = make_study(setting, found, 200)
    assert study.complete_cells == 14 * 5 * 2
    assert study.best == {(s, t): "tiny_hubert" for s in ("small", "large") for t in setting.tasks}
    assert study.means["small-average", "pr per", "clean"].value == pytest.approx(100 * 5 / 24)
    assert study.means["large-average", "sid accuracy", "clean"].value == pytest.approx(100 * 5 / 6)
    # a wrong word has two edits (a letter in place of another, one more): of 7 characters a text
    assert study.means["small-average", "asr cer", "clean"].value == pytest.approx(100 * 10 / 42)
    assert len(study.comparisons) == 2 * 5 * 2 * 6
    by = {(c.size, c.metric.key, c.condition, c.row, c.baseline): c for c in study.comparisons}
    c = by["small", "pr per", "esc10_snr5", "average", "tiny_hubert"]
    assert c.is_best_single and c.improves and c.estimate.value == pytest.approx(-100 * 2 / 24)
    c = by["small", "sid accuracy", "clean", "concat", "average"]
    assert not c.is_best_single and not c.improves and c.estimate.value == pytest.approx(-100 / 6)
    assert not c.is_control and c.label == "concat − average"
    c = by["large", "er accuracy", "clean", "average", "none"]  # 1 of 6 is wrong, and 3 + 2
    assert c.is_control and c.improves and c.estimate.value == pytest.approx(100 * 4 / 6)
    assert not c.is_best_single and c.label == "average − none"


def test_the_report_has_the_numbers_and_keeps_the_prose(tmp_path, capsys):
    out, docs = tmp_path / "out", tmp_path / "docs"
    setting = typed("--seeds", "1", "2")
    StudyFolder(out).start(setting, tmp_path, {})
    left_out = ("large-separate-seed2", "pr")
    write_students(out / "result/superb", setting, skip=[left_out])
    reference = tmp_path / "reference"
    write_run(reference, "fbank", "pr", pairs("pr", 20), seed=1)
    docs.mkdir()
    prose = f"# Ours\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    (docs / "study.md").write_text(prose)
    words = [str(tmp_path), "-o", str(out), "--docs", str(docs), "--seeds", "1", "2"]
    assert tool.main([*words, "--report-only", "--reference", str(reference)]) == 0
    assert "111 of 112 downstream models are finished" in capsys.readouterr().out
    text = (docs / "study.md").read_text()
    assert text.startswith("# Ours\n\nbefore\n\n" + BEGIN) and text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    # PR of one row under two conditions lacks a seed
    assert "111 of 112 downstream models are finished; 138 of 140 cells have all 2 seeds." in text
    # and so do its two differences, to the best single teacher and to average
    assert sum(line.count("†") for line in text.splitlines() if line.startswith("|")) == 2 + 4
    assert "of one seed alone, 4 of 120;" in text
    assert "Among those who learned, " in text and " of 96 intervals leave 0 out" in text
    assert "Against no teacher, " in text and " of 20 intervals leave 0 out" in text
    row = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert [c.strip() for c in row.split("|")[2:5]][0] == "fbank" and "83.3 [" in row
    assert "best on dev, clean, over the seeds (PR at small: tiny_hubert;" in text
    assert "tie on dev" not in text and "so its CER takes the same choice." in text
    assert "not run like the students" not in text and "(--cache-features)" not in text
    with open(docs / "study.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sum(line["kind"] == "mean" for line in lines) == 14 * 5 * 2 + 1
    assert sum(line["kind"] == "difference" for line in lines) == 120
    chosen = next(
        line
        for line in lines
        if (line["size"], line["row"], line["metric"], line["condition"])
        == ("small", "separate", "PER", "clean")
    )
    assert float(chosen["value"]) == pytest.approx(100 * 4 / 24, abs=1e-3)
    assert chosen["test_utterances"] == "6" and chosen["seeds"] == "2"
    for name in ("study.png", "study.differences.png"):
        assert (docs / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    first = text
    assert tool.main([*words, "--report-only", "--reference", str(reference)]) == 0
    assert (docs / "study.md").read_text() == first


def test_a_study_that_has_just_begun_has_a_report(tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    StudyFolder(out).start(typed(), tmp_path, {})
    assert tool.main([str(tmp_path), "-o", str(out), "--docs", str(docs), "--report-only"]) == 0
    text = (docs / "study.md").read_text()
    assert "0 of 168 downstream models are finished; 0 of 140 cells" in text


def test_sentences_say_what_the_numbers_say(tmp_path):
    setting = typed()
    write_students(tmp_path, setting)
    study = make_study(setting, read_study(setting, tmp_path), 200)
    c = next(
        c for c in study.comparisons
        if (c.size, c.metric, c.condition, c.row) == ("small", SID, "clean", "average")
    )  # fmt: skip
    estimate = dataclasses.replace(c.estimate, value=12.34, low=2.0, high=22.68)
    assert sentence(dataclasses.replace(c, estimate=estimate)) == (
        "SID accuracy, clean, size small: average beats the best single teacher (tiny_hubert) by "
        "12.3 [2.0, 22.7] points."
    )
    c = dataclasses.replace(c, metric=CER, condition="esc10_snr5", other="average", one="concat",
                            is_best_single=False, estimate=estimate)  # fmt: skip
    assert sentence(c) == (
        "ASR CER, under noise: esc10, 5 dB SNR, size small: concat is behind average by 12.3 "
        "[2.0, 22.7] points."
    )
    assert sentence(dataclasses.replace(c, other="none")) == (
        "ASR CER, under noise: esc10, 5 dB SNR, size small: concat is behind no teacher by 12.3 "
        "[2.0, 22.7] points."
    )


def test_students_that_were_not_evaluated_alike_are_refused(tmp_path):
    setting = typed()
    write_students(tmp_path, setting)
    student = students(setting)[0]
    write_run(tmp_path, student.name, "pr", pairs("pr", 1), seed=1, steps=99)
    with pytest.raises(DataError, match="differ in steps"):
        read_study(setting, tmp_path)


def test_single_teachers_that_tie_on_dev_have_no_best(tmp_path):
    """As ASR does while every word is wrong: the order of the teachers would decide."""
    out, docs = tmp_path / "out", tmp_path / "docs"
    words = ["--seeds", "1", "2", "--tasks", "asr", "sid"]
    setting = typed(*words)
    StudyFolder(out).start(setting, tmp_path, {})
    write_students(out / "result/superb", setting)
    for student in students(setting):
        for dev, among in ((100.0, SINGLE), (99.0, SINGLE[1:])):
            if student.row.learned_from in among and (dev == 100 or student.row.size == "small"):
                result = {c: pairs("asr", 9, student.seed) for c in ("clean", "esc10_snr5")}
                write_run(out / "result/superb", student.name, "asr", result, seed=student.seed,
                          dev=dev)  # fmt: skip
    study = make_study(setting, read_study(setting, out / "result/superb"), 50)
    assert study.best == {(s, t): None if t == "asr" else "tiny_hubert"
                          for s in ("small", "large") for t in ("asr", "sid")}  # fmt: skip
    assert not any(c.is_best_single and c.metric.task == "asr" for c in study.comparisons)
    assert any(c.is_best_single and c.metric.task == "sid" for c in study.comparisons)
    words = [str(tmp_path), "-o", str(out), "--docs", str(docs), *words, "--report-only"]
    assert tool.main(words) == 0
    text = (docs / "study.md").read_text()
    for size in ("small", "large"):
        assert f"ASR at {size}: single teachers tie on dev, none is best." in text
        assert f"SID at {size}: tiny_hubert" in text
    assert "ASR at small: tiny" not in text


def test_references_that_were_not_run_like_the_students_are_named(tmp_path):
    out, docs, other = tmp_path / "out", tmp_path / "docs", tmp_path / "other"
    words = ["--seeds", "1", "2", "--tasks", "pr", "sid", "er"]
    setting = typed(*words)
    StudyFolder(out).start(setting, tmp_path, {})
    write_students(out / "result/superb", setting, features_alone=True)
    linear = {"downstream_expert": {"model": {"select": "FrameLevel"}}}
    for folder in (out / "result/superb").glob("*/pr/*"):
        (folder / "config_2026.yaml").write_text(yaml.safe_dump(linear))

    def reference(name: str, task: str, tested=None, **changes) -> Path:
        fold = "fold1" if task == "er" else None
        return write_run(other, name, task, tested or pairs(task, 3), seed=1, lr=0.5, fold=fold,
                         **{"features_alone": True, **changes})  # fmt: skip

    like = reference("same", "pr")
    (like / "config_2026.yaml").write_text(yaml.safe_dump(linear))
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
    found = read_study(setting, out / "result/superb", [other])
    assert found.reference_differences == {
        "padded/pr": ("features",),
        "longer/pr": ("steps", "recipe"),
        "deep/pr": ("probe",),
        "fewer/sid": ("test set",),
    }
    assert found.features_alone == ("pr", "sid", "er")
    words = [str(tmp_path), "-o", str(out), "--docs", str(docs), *words, "--report-only"]
    assert tool.main([*words, "--reference", str(other)]) == 0
    text = (docs / "study.md").read_text()
    said = next(line for line in text.splitlines() if line.startswith("References not run"))
    assert said.startswith("References not run like the students: ")
    assert "longer/pr (steps, recipe)" in said and "fewer/sid (test set)" in said
    assert "same" not in said and "noisy" not in said
    assert "- Features of PR, SID, ER: of each utterance alone (--cache-features)." in text


def test_only_the_tasks_with_features_alone_are_named(tmp_path):
    setting = typed("--tasks", "pr", "sid")
    for task in ("pr", "sid"):
        write_run(tmp_path, "small-average-seed1", task, pairs(task, 1), seed=1,
                  features_alone=task == "sid")  # fmt: skip
    assert read_study(setting, tmp_path).features_alone == ("sid",)


def test_a_condition_in_which_some_folds_were_not_tested_is_left_out(tmp_path):
    setting = typed("--tasks", "er")
    clean = pairs("er", 1)
    for fold, tested in (("fold1", {"clean": clean, "esc10_snr5": clean}),
                         ("fold2", {"clean": clean})):  # fmt: skip
        write_run(tmp_path, "small-average-seed1", "er", tested, seed=1, fold=fold)
    found = read_study(setting, tmp_path)
    assert found.cells.keys() == {("small-average", "er accuracy", "clean")}
    study = make_study(setting, found, 50)
    assert study.means["small-average", "er accuracy", "clean"].value == pytest.approx(100 * 5 / 6)


def test_a_reference_may_not_have_a_students_name(tmp_path):
    setting = typed()
    write_run(tmp_path / "r", "small-average", "pr", pairs("pr", 1))
    with pytest.raises(DataError, match="small-average"):
        read_study(setting, tmp_path / "superb", [tmp_path / "r"])


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}"])
def test_marks_that_are_no_pair_are_refused(text):
    with pytest.raises(SetupError, match="once"):
        between(text, BEGIN, END, "body", Path("study.md"))
