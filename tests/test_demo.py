"""The demo, short: every step of the way as a user starts it, and again when it was cut."""

import csv
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
    done = command("demo", "d", *SHORT, cwd=folder, timeout=900)
    return folder / "d", done.stdout


def test_it_goes_all_the_way(demo):
    folder, said = demo
    assert "0 failed" in said and "Traceback" not in said
    files = ("ekd.safetensors", "single.safetensors", "distillation.png", "cache/index.json")
    files += ("report/scores.png", "submission/expert.py")
    for name in (*files, "data/corpus/corpus.json", "data/labels/er.tsv"):
        assert (folder / name).is_file(), name
    for name in ("ekd", "single"):
        assert load_student(folder / f"{name}.safetensors").about["step"] == 6


def test_the_table_is_s3prls_numbers(demo):
    """The report's values, from the prediction files, and those that s3prl's experts printed."""
    folder, _ = demo
    with open(folder / "report/report.csv", encoding="utf-8") as file:
        rows = {(row["upstream"], row["task"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(name, task) for name in UPSTREAMS for task in ("er", "asr")}
    for (name, task), row in rows.items():
        (log,) = (folder / "result/superb" / name / task).glob("*/log.txt")
        metric, scale = {"er": ("test acc", 100), "asr": ("test-clean wer", 1)}[task]
        printed = re.findall(rf"^{metric}: ([\d.]+)", log.read_text(), re.M)[-1]
        assert float(row["value"]) == pytest.approx(scale * float(printed), abs=1e-4)


def test_it_ends_with_what_the_table_says(demo):
    """Each line's tasks are better, worse or neither as the intervals of report.csv have it."""
    folder, said = demo
    said = said.split("== done")[1]
    with open(folder / "report/report.csv", encoding="utf-8") as file:
        value = {
            (row["upstream"], row["task"]): float(row["value"]) for row in csv.DictReader(file)
        }
    for name in UPSTREAMS:
        (line,) = re.findall(rf"^{name} +[\d.]+ \[.*", said, re.M)
        printed = re.findall(r"([\d.]+) \[", line)
        assert [float(n) for n in printed] == [round(value[name, t], 1) for t in ("er", "asr")]
    for one, other in PAIRS:
        (line,) = re.findall(rf"^  {one} against {other}: (.*)", said, re.M)
        told = dict(re.findall(r"(ER|ASR) \(([+-][\d.]+)\)", line))
        for task in ("er", "asr"):
            difference = value[one, task] - value[other, task]
            assert float(told[task.upper()]) == pytest.approx(difference, abs=0.06)


def test_again_keeps_what_is_finished(demo):
    folder, _ = demo
    kept = ("data/corpus/corpus.json", "result/superb/ekd/er/lr0.001-seed1337-fold1/log.txt")
    before = [(folder / name).stat().st_mtime_ns for name in kept]
    said = command("demo", "d", *SHORT, cwd=folder.parent, timeout=900).stdout
    assert said.count("is at step 6 already") == 2 and "14 runs finished" in said
    assert [(folder / name).stat().st_mtime_ns for name in kept] == before


@pytest.mark.parametrize("value", ["0", "x", "-5"])
def test_a_wrong_number(tmp_path, value):
    done = command("demo", "d", f"--steps={value}", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "whole number of 4 or more" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task(tmp_path):
    done = command("demo", "d", "--tasks", "ks", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "unknown task 'ks'" in done.stderr
    assert list(tmp_path.iterdir()) == []
