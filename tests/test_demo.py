"""A short demo as a user starts it: all steps, and a second run that keeps finished steps."""

import csv
import json
import re

import pytest

from s3prl_ekd.demo.run import PAIRS, UPSTREAMS
from s3prl_ekd.student_file import load_student

from .conftest import command

SHORT = ("--steps", "6", "--downstream-steps", "8", "--utterances", "24", "--tasks", "er", "asr")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("demo")
    process = command("demo", "d", *SHORT, cwd=folder, timeout=900)
    return folder / "d", process.stdout


@pytest.mark.slow
def test_all_steps_are_done(demo):
    folder, printed = demo
    assert re.search(r"\b0 failed\b", printed) and "Traceback" not in printed
    files = ("ekd.safetensors", "single.safetensors", "distillation.png", "cache/index.json")
    files += ("report/scores.png", "submission/expert.py")
    for name in (*files, "data/corpus/corpus.json", "data/labels/er.tsv"):
        assert (folder / name).is_file(), name
    for name in ("ekd", "single"):
        assert load_student(folder / f"{name}.safetensors").about["step"] == 6


@pytest.mark.slow
def test_the_report_has_s3prls_scores(demo):
    """The report's values, from prediction files, equal those that s3prl's experts print."""
    folder, _ = demo
    with open(folder / "report/report.csv", encoding="utf-8") as file:
        rows = {(row["upstream"], row["task"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(name, task) for name in UPSTREAMS for task in ("er", "asr")}
    for (name, task), row in rows.items():
        (log,) = (folder / "result/superb" / name / task).glob("*/log.txt")
        metric, scale = {"er": ("test acc", 100), "asr": ("test-clean wer", 1)}[task]
        printed = re.findall(rf"^{metric}: ([\d.]+)", log.read_text(), re.M)[-1]
        assert float(row["value"]) == pytest.approx(scale * float(printed), abs=1e-4)


@pytest.mark.slow
def test_the_summary_agrees_with_the_report(demo):
    """The score table and the differences follow from report.csv."""
    folder, printed = demo
    summary = printed.split("== done")[1]
    with open(folder / "report/report.csv", encoding="utf-8") as file:
        value = {
            (row["upstream"], row["task"]): float(row["value"]) for row in csv.DictReader(file)
        }
    for name in UPSTREAMS:
        (line,) = re.findall(rf"^{name} +[\d.]+ \[.*", summary, re.M)
        scores = re.findall(r"([\d.]+) \[", line)
        assert [float(score) for score in scores] == [
            round(value[name, t], 1) for t in ("er", "asr")
        ]
    for upstream, baseline in PAIRS:
        (line,) = re.findall(rf"^  {upstream} against {baseline}: (.*)", summary, re.M)
        differences = dict(re.findall(r"(ER|ASR) \(([+-][\d.]+)\)", line))
        for task in ("er", "asr"):
            difference = value[upstream, task] - value[baseline, task]
            assert float(differences[task.upper()]) == pytest.approx(difference, abs=0.06)


@pytest.mark.slow
def test_a_second_run_keeps_finished_steps(demo):
    folder, _ = demo
    names = ("data/corpus/corpus.json", "result/superb/ekd/er/lr0.001-seed1337-fold1/log.txt")
    before = [(folder / name).stat().st_mtime_ns for name in names]
    printed = command("demo", "d", *SHORT, cwd=folder.parent, timeout=900).stdout
    assert len(re.findall(r"^kept: .*\b6\b", printed, re.M)) == 2  # both distillations
    assert re.search(r"(?m)^14 runs\b.*s3prl-ekd report", printed)  # the downstream runs
    assert [(folder / name).stat().st_mtime_ns for name in names] == before


@pytest.mark.parametrize("value", ["0", "x", "-5"])
def test_an_invalid_number(tmp_path, value):
    process = command("demo", "d", f"--steps={value}", cwd=tmp_path, check=False)
    assert process.returncode == 2 and "--steps" in process.stderr
    assert re.search(rf"\b4\b.*'{value}'", process.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_demo_with_another_corpus_is_refused(tmp_path):
    corpus = tmp_path / "d/data/corpus"
    speakers = {"train-clean": 2, "dev-clean": 2, "test-clean": 2}
    utterances = {"train-clean": 24, "dev-clean": 40, "test-clean": 40}
    parameters = {"version": 1, "seed": 0, "speakers": speakers, "utterances": utterances}
    corpus.mkdir(parents=True)
    record = json.dumps({"parameters": parameters, "checksum": ""})
    (corpus / "corpus.json").write_text(record)
    process = command("demo", "d", "--utterances", "30", cwd=tmp_path, check=False)
    assert process.returncode == 2 and "another --utterances" in process.stderr
    assert (corpus / "corpus.json").read_text() == record


def test_an_unknown_task(tmp_path):
    process = command("demo", "d", "--tasks", "ks", cwd=tmp_path, check=False)
    assert process.returncode == 2 and "'ks'" in process.stderr
    assert list(tmp_path.iterdir()) == []
