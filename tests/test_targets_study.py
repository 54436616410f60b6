"""tools/targets_study.py: configs of its rows, weights of added terms, intervals, a tiny study."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from scipy import stats
from study_parts.training import TrainingFolder

from s3prl_ekd import cli
from tools import targets_study
from tools.targets_study import (
    PROBES,
    ROWS,
    Study,
    difference,
    differences_from,
    report,
    student_gradient,
)

pytestmark = pytest.mark.slow  # of tools/


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path / "study", tmp_path / "corpus", steps=2, rate=1e-3)


def test_every_row_is_a_config_that_the_package_reads(study):
    from s3prl_ekd.files.config import from_plain_data
    from s3prl_ekd.pretrain.settings import ModelFile

    weights = {"relation": 2.5, "units": 0.25}
    settings = {
        row: from_plain_data(ModelFile, study.model(row, weights), row)
        for row in ROWS
        if row != "none"
    }
    assert [row for row in settings if settings[row].aggregation == "separate"] == [
        "separate",
        "separate_units",
    ]
    assert [row for row in settings if settings[row].relation.weight == 2.5] == [
        "average_relation",
        "relation",
    ]
    assert [row for row in settings if settings[row].loss.weight == 0] == ["relation", "units"]
    for row in ("separate_units", "units"):
        assert [unit.weight for unit in settings[row].unit_loss] == [0.25] * 3
        assert settings[row].student.mask is not None
    norms = {row: s.target_norm for row, s in settings.items() if s.target_norm != "none"}
    assert norms == {"average_mean_std": "mean_std", "average_procrustes": "procrustes"}


def test_intervals_are_those_of_a_paired_t_test():
    a, b = {0: 50.0, 1: 52.5, 2: 51.0}, {2: 47.5, 1: 50.0, 0: 49.0, 3: 10.0}
    expected = stats.ttest_rel([50.0, 52.5, 51.0], [49.0, 50.0, 47.5]).confidence_interval(0.95)
    mean, half = difference(a, b)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert difference({0: 1.0}, {0: 2.0}) is None


def test_only_differences_whose_interval_excludes_0_are_bold():
    def results(*values):
        return [
            {"seed": seed, "phones": value, "speakers": value, "noisy_speakers": 10.0 + seed % 2}
            for seed, value in enumerate(values)
        ]

    count, cells = differences_from(results(12.0, 14.1, 16.2), results(10.0, 12.0, 14.0))
    assert count == 3 and cells == ["**+2.1 ± 0.2**", "**+2.1 ± 0.2**", "+0.0 ± 0.0"]
    assert differences_from(results(20.0, 12.0), results(10.0, 12.0))[1][0] == "+5.0 ± 63.5"


@pytest.mark.parametrize(
    ("steps", "rate", "parts"), [(3, 1e-3, ["--steps 2", "--steps 3"]), (2, 0.5, ["--lr 0.5"])]
)
def test_a_folder_has_runs_of_the_same_steps_and_learning_rate(study, steps, rate, parts):
    study.check_options()
    study.check_options()
    before = (study.folder / "study.json").read_text()
    with pytest.raises(SystemExit) as stop:
        Study(study.folder, study.corpus.folder, steps, rate).check_options()
    for part in [str(study.folder), *parts]:
        assert part in str(stop.value)
    assert (study.folder / "study.json").read_text() == before


def test_results_without_a_record_count_as_those_of_their_own_steps(study):
    for name, steps in (("none_0", 0), ("average_0", 2)):
        (study.folder / f"results/{name}.json").write_text(json.dumps({"steps": steps}))
    with pytest.raises(SystemExit, match=r"--steps 2\b"):
        Study(study.folder, study.corpus.folder, 3, 1e-3).check_options()
    assert not (study.folder / "study.json").exists()
    study.check_options()
    assert json.loads((study.folder / "study.json").read_text()) == {"steps": 2, "lr": 1e-3}


def test_the_report_counts_its_intervals(study):
    """Two rows besides the reference, three seeds in one of them and one in the other."""
    for row, seeds in (("average", 3), ("relation", 3), ("units", 1)):
        for seed in range(seeds):
            values = {name: 10.0 + seed * len(row) for name in PROBES}
            result = {"row": row, "seed": seed, "steps": 2, **values}
            (study.folder / f"results/{row}_{seed}.json").write_text(json.dumps(result))
    last = report(study).splitlines()[-1]
    assert re.findall(r"\d+", last) == [str(len(PROBES)), "1", "20"]


def test_the_gradient_is_that_of_the_student_only():
    student, head = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1)
    student.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))

    def expert(batch, records, global_step):
        return (student(batch) + head(batch)).sum(), records

    expert.distiller = SimpleNamespace(student=student)
    gradient = student_gradient(expert, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    # the unused parameter first: it belongs to the module itself, as the weight does
    assert sorted(gradient.tolist()) == [0.0, 4.0, 6.0]


def test_a_tiny_study_and_its_report(tmp_path, monkeypatch, pretrain_script):
    """Two steps of two rows on noise; the second call computes nothing."""

    def command(study, name, *argv, log="log"):
        monkeypatch.chdir(study.folder)
        if name == "run_pretrain.py":
            code, output = pretrain_script(*argv)
            assert code == 0, output
        else:
            assert cli.main([name, *argv]) == 0

    monkeypatch.setattr(TrainingFolder, "command", command)
    corpus = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(targets_study, "CLUSTERS", 4)
    monkeypatch.setattr(targets_study, "TEACHERS", {"hubert": "tiny_hubert"})
    argv = [str(tmp_path / "study"), "--corpus", str(corpus), "--steps", "2", "--jobs", "1"]
    argv += ["--seeds", "0", "--rows", "none", "separate_units"]
    monkeypatch.setattr(targets_study, "ProcessPoolExecutor", InProcess)
    assert targets_study.main(argv) == 0
    weights = json.loads((tmp_path / "study/weights.json").read_text())
    assert weights.keys() == {"relation", "units"} and min(weights.values()) > 0
    files = {path.name: path for path in (tmp_path / "study/results").glob("*.json")}
    rows = ["none", "separate_units", "tiny_hubert"]
    assert sorted(files) == [f"{row}_0.json" for row in rows]
    steps = [json.loads(files[f"{row}_0.json"].read_text())["steps"] for row in rows]
    assert steps == [0, 2, 0]
    report = (tmp_path / "study/report.md").read_text().splitlines()
    assert [line.split()[1] for line in report if line.startswith("| ")][1:] == rows
    assert (tmp_path / "study/report.png").stat().st_size > 1000
    files["none_0.json"].write_text(files["none_0.json"].read_text().replace('"none"', '"units"'))
    assert targets_study.main(argv) == 0
    assert '"units"' in files["none_0.json"].read_text()  # not computed again


class InProcess:
    """A pool of no process, so that the constants above hold in the work."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*args))
        return future


def write_corpus(folder):
    """Ten utterances of noise by two speakers, and the tables of the study."""
    folder.mkdir()
    random = np.random.default_rng(0)
    tables = {
        "unlabeled": ["path\tsplit\tduration"],
        "pr": ["path\tsplit"],
        "sid": ["path\tsplit\tspeaker"],
        "noise": ["path", "u0.flac"],
        "alignments": ["path\tsegments"],
    }
    for i in range(10):
        path, speaker = f"u{i}.flac", i % 2
        wave = (0.05 + 0.1 * speaker) * random.standard_normal(16_000).clip(-4, 4)
        soundfile.write(folder / path, wave, 16_000, subtype="PCM_16")
        test = "test" if i > 7 else "train"
        tables["unlabeled"].append(f"{path}\t{'dev' if i > 7 else 'train'}\t1.0")
        tables["pr"].append(f"{path}\t{test}")
        tables["sid"].append(f"{path}\t{test}\t{speaker}")
        tables["alignments"].append(f"{path}\tSIL:0+10 AH:10+40 B:50+50")
    for name, lines in tables.items():
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
