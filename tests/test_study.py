"""tools/study.py: rows, results, contrasts against hand-made constants, the report, a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import study
import torch
import yaml
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from study_parts import folder, rows, run
from study_parts.analysis import Scores, estimate, estimate_hypotheses, holm
from study_parts.report import BEGIN, END, report
from study_parts.results import NOISY, StudyResult, read_result, write_result
from study_parts.rows import EXPERTS, NONE, PLAIN, Row

from s3prl_ekd.data.lengths import write_table
from s3prl_ekd.data.tables import Utterance
from s3prl_ekd.errors import SetupError
from s3prl_ekd.pretrain.expert import UpstreamPretrainExpert
from s3prl_ekd.pretrain.settings import load_model_config
from s3prl_ekd.probe.measure import CLEAN
from s3prl_ekd.student_file import load_student
from s3prl_ekd.teachers.zoo import checkpoint_path

from .corpora import write_labelled_tones, write_noise

pytestmark = pytest.mark.slow  # of the developers' tools

SPEAKERS = [f"s{i:02}" for i in range(40)]
COLUMNS = [(s, c) for s in ("phone frames", "speaker", "emotion") for c in (CLEAN, NOISY)]


def result(row, seed, accuracy, spread=0.0, teachers=None):
    """A result with this accuracy, in per cent, for all scores; speakers differ by ``spread``."""
    counts = {}
    for i, speaker in enumerate(SPEAKERS):
        share = accuracy + spread * math.sin(1 + i)
        counts[speaker] = (10 * (100 - share), 1000)
    scores = {column: counts for column in COLUMNS}
    return StudyResult(row, seed, scores, teachers or {}, 3000, 60.0, 1.0, "a machine")


def all_results(accuracy, seeds=(1, 2, 3, 4), noise=0.2):
    """Results of all rows, teachers and sets; ``accuracy`` maps names to per cent (default: 50)."""
    rng = np.random.default_rng(0)
    results = [
        result(row.name, seed, accuracy.get(row.name, 50) + noise * rng.normal())
        for seed in seeds
        for row in rows.rows()
    ]
    singles = [(name,) for name in rows.PROBED_TEACHERS]
    results += [
        result(rows.set_name(names), 0, accuracy.get(f"teacher {rows.set_name(names)}", 60))
        for names in [*singles, *rows.PROBED_SETS]
    ]
    return results


def test_each_row_is_a_valid_model_config_of_its_teachers(tmp_path):
    files = {name: f"{name}.pt" for name in rows.SINGLES}
    for row in rows.rows():
        if not row.teachers:
            continue
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump(rows.model_config(row, files, "noise"), sort_keys=False))
        settings = load_model_config(path)
        assert tuple(settings.teachers) == row.teachers
        assert settings.distortion.setup == "setup1"
    names = [row.name for row in rows.rows()]
    assert len(set(names)) == len(names)
    assert len({row.file_name for row in rows.rows()}) == len(names)


def test_holm_by_hand():
    # 0.01 * 3, then the larger of 0.03 and 0.02 * 2, then the larger of 0.04 and 0.3
    assert holm({"a": 0.02, "b": 0.01, "c": 0.3}) == pytest.approx({"b": 0.03, "a": 0.04, "c": 0.3})


def test_without_variation_of_speakers_an_estimate_is_a_t_test_over_seeds():
    by_seed = np.array([0.1, 0.3, 0.2, 0.4])
    e = estimate(np.repeat(by_seed[:, None], 50, axis=1))
    expected = stats.ttest_1samp(by_seed, 0)
    interval = expected.confidence_interval(0.95)
    assert (e.low, e.high) == pytest.approx((interval.low, interval.high))
    assert e.p == pytest.approx(expected.pvalue)


def test_variation_of_speakers_widens_the_interval():
    rng = np.random.default_rng(0)
    by_seed = np.array([0.1, 0.3, 0.2, 0.4])
    speakers = rng.normal(0, 0.1, 2000)
    values = np.concatenate([by_seed[:, None], by_seed[:, None] + speakers[None]], axis=1)
    error = math.sqrt(by_seed.var(ddof=1) / 4 + 0.1**2)
    freedom = 3 * (error**2 / (by_seed.var(ddof=1) / 4)) ** 2
    e = estimate(values)
    assert e.high - e.value == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=0.05)


def test_small_differences_are_shown_to_be_small_and_large_ones_are_not():
    tight = estimate(np.repeat(np.array([[0.01], [-0.01], [0.02], [0.0]]), 9, axis=1))
    assert tight.p_equivalent < 0.05 < tight.p
    wide = estimate(np.repeat(np.array([[0.2], [-0.2], [0.3], [-0.3]]), 9, axis=1))
    assert wide.p_equivalent > 0.05 and wide.p > 0.05


def test_the_score_is_the_share_of_the_way_to_the_best_teacher():
    results = all_results({"teacher hubert": 70, "hubert": 55}, noise=0)
    scores = Scores(results)
    assert scores.normalised("hubert", 1)[0] == pytest.approx((55 - 50) / (70 - 50))
    assert scores.normalised("none", 2)[0] == pytest.approx(0)


def test_the_worst_score_is_that_of_the_weaker_task():
    results = all_results({"teacher hubert": 70}, noise=0)  # the way is from 50 to 70
    for r in results:
        if r.row == "hubert" and r.seed == 1:  # 60 % of the speakers' examples, 65 % of the phones
            r.scores["speaker", NOISY] = dict.fromkeys(SPEAKERS, (400, 1000))
            r.scores["phone frames", CLEAN] = dict.fromkeys(SPEAKERS, (350, 1000))
    scores = Scores(results)
    assert scores.worst("hubert", 1)[0] == pytest.approx(10 / 20)
    assert scores.normalised("hubert", 1)[0] == pytest.approx((10 + 15) / 40)


def test_the_best_single_teacher_is_chosen_on_speakers_that_are_not_tested():
    results = all_results({}, noise=0)
    scores = Scores(results)
    assert scores.dev and not scores.dev & set(scores.tested)
    for r in results:  # phones is best for dev speakers, resemblyzer for the tested ones
        if r.row in EXPERTS:
            for counts in r.scores.values():
                better = scores.dev if r.row == "phones" else set(scores.tested)
                counts.update({s: (1, 1000) for s in better})
    # the columns share one dict in result(), so the update is seen by all of them
    assert Scores(results).best_single(EXPERTS) == "phones"


def test_headroom_is_the_gain_of_the_set_over_its_best_member():
    accuracy = {"teacher hubert": 70, "teacher hubert+wavlm": 75}
    scores = Scores(all_results(accuracy, noise=0))  # the way is from 50 to 70
    assert scores.headroom(("hubert", "wavlm"))[0] == pytest.approx(5 / 20)


def test_teachers_that_are_good_at_different_things_leave_headroom():
    """Both are in the middle of the way in the mean of two scores; together they reach its end."""
    results = all_results({"teacher hubert+wavlm": 70}, noise=0)
    for r in results:
        if r.seed == 0 and r.row in ("hubert", "wavlm"):
            good = ("phone frames" if r.row == "hubert" else "speaker", CLEAN)
            for column in COLUMNS:
                wrong = 300 if column == good else 500
                r.scores[column] = dict.fromkeys(SPEAKERS, (wrong, 1000))
    assert Scores(results).headroom(("hubert", "wavlm"))[0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("missing", ["none", "teachers", "way"])
def test_without_a_way_from_untrained_to_teachers_nothing_is_scored(missing):
    results = all_results({"none": 59.5} if missing == "way" else {}, noise=0)
    if missing == "none":
        results = [r for r in results if r.row != "none"]
    if missing == "teachers":
        results = [r for r in results if r.seed > 0]
    with pytest.raises(SetupError, match="not 2 points" if missing == "way" else "--rows none"):
        report(results)


def test_effects_that_are_there_are_found_and_others_are_not():
    accuracy = {Row(EXPERTS).name: 56, "teacher phones+resemblyzer": 66}
    tested = estimate_hypotheses(Scores(all_results(accuracy, seeds=range(1, 9))))
    assert tested["H1"][1].p < 0.001 and tested["H1"][1].value == pytest.approx(0.6, abs=0.05)
    assert tested["H2"][1].p > 0.01 and tested["H2"][1].p_equivalent < 0.05
    # The other sets have a headroom of 0 and no gain: the slope is 0.6 over a headroom of 0.6.
    assert tested["H1b"][1].value == pytest.approx(1, abs=0.1)


def test_noise_that_only_robust_teachers_resist_is_an_interaction():
    results = all_results({}, seeds=range(1, 9))
    for r in results:
        if r.row == Row(PLAIN).name:
            for (score, condition), counts in list(r.scores.items()):
                gain = 50 if condition == NOISY else 0  # of 1000 examples
                r.scores[score, condition] = {s: (e - gain, n) for s, (e, n) in counts.items()}
    e = estimate_hypotheses(Scores(results))["H4"][1]
    assert e.value == pytest.approx(0.5, abs=0.05) and e.p < 0.01


def test_results_survive_being_written(tmp_path):
    before = result("hubert", 3, 51.5, 1.0, {"hubert": "abc"})
    write_result(before, tmp_path / "r.json")
    after = read_result(tmp_path / "r.json")
    assert after == StudyResult(**{**vars(before), "scores": after.scores})
    assert after.accuracy("speaker", CLEAN) == pytest.approx(
        before.accuracy("speaker", CLEAN), 0.01
    )
    (tmp_path / "r.json").write_text(json.dumps({"row": "x", "scores": {"a": 1}}))
    with pytest.raises(SetupError, match="damaged"):
        read_result(tmp_path / "r.json")


def test_fewer_than_four_seeds_give_no_verdict():
    accuracy = {Row(EXPERTS).name: 56, "teacher phones+resemblyzer": 66}
    for seeds, shown in ((3, "fewer than 4 seeds"), (4, "> 0")):
        pages, _ = report(all_results(accuracy, seeds=range(1, seeds + 1)))
        text = pages["study.md"]
        (line,) = (line for line in text.splitlines() if line.startswith("| H1 "))
        assert shown in line


def test_results_of_other_teachers_or_updates_are_refused(tmp_path):
    for row, seed in (("hubert", 0), ("hubert", 1), ("wavlm", 2)):
        write_result(
            result(row, seed, 50, teachers={"hubert": "a"}), tmp_path / f"{row}{seed}.json"
        )
    run.check_results(tmp_path, 3000)
    run.check_results(tmp_path, 3000, {"hubert": "a"}, [1, 2])
    run.check_results(tmp_path, 3000, {"hubert": "c"}, [3])  # other seeds may have other teachers
    with pytest.raises(SetupError, match="different trainings of the teacher hubert"):
        run.check_results(tmp_path, 3000, {"hubert": "c"}, [2, 3])
    with pytest.raises(SetupError, match="3000 updates, not of 20"):
        run.check_results(tmp_path, 20)
    write_result(result("none", 2, 50, teachers={"hubert": "b"}), tmp_path / "none2.json")
    with pytest.raises(SetupError, match="different trainings of the teacher hubert"):
        run.check_results(tmp_path, 3000)


@pytest.mark.parametrize("kept", ["all", "teachers", "one seed", "some rows"])
def test_the_report_is_written_from_whatever_is_there(kept, tmp_path, capsys):
    results = all_results({})
    chosen = {
        "all": results,
        "teachers": [r for r in results if r.seed == 0 or (r.row, r.seed) == ("none", 1)],
        "one seed": [r for r in results if r.seed < 2],
        "some rows": [r for r in results if "+" not in r.row or r.seed == 0],
    }[kept]
    for r in chosen:
        write_result(r, tmp_path / f"results/{r.row.replace(', ', '-')}_{r.seed}.json")
    for page in ("study.md", "study_details.md"):
        (tmp_path / page).write_text(f"# Title\n\n{BEGIN}\n{END}\n\n## By hand\n")
    argv = ["--report-only", "--results", str(tmp_path / "results"), "--docs", str(tmp_path)]
    assert study.main(argv) == 0
    text, tables = ((tmp_path / page).read_text() for page in ("study.md", "study_details.md"))
    assert text.endswith("## By hand\n") and tables.endswith("## By hand\n")
    assert "| hubert+sibling " in tables
    assert ("| H1 " in text) == (kept == "all") == ("| H1 " in tables)
    assert (tmp_path / "study.png").exists() == (kept in ("all", "some rows"))


def test_a_table_has_the_means_of_its_results():
    pages, _ = report(all_results({"hubert": 53.0}, noise=0))
    (line,) = (
        line
        for line in pages["study_details.md"].splitlines()
        if line.startswith("| hubert ") and "±" in line
    )
    assert [cell.strip() for cell in line.split("|")][2:4] == ["4", "53.0 ± 0.0"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--rows", "nobody"], "no row 'nobody'"),
        (["--seeds", "0", "--dry-run"], "must be 1 or more"),
        ([], "no folder SPEECH"),
    ],
)
def test_wrong_options_are_explained(argv, problem, tmp_path, capsys):
    assert study.main([*argv, "-o", str(tmp_path)]) == 2
    assert problem in capsys.readouterr().err


def test_a_dry_run_lists_what_is_missing(tmp_path, capsys):
    write_result(result("none", 1, 50), run.student_path(tmp_path, NONE, 1))
    argv = ["--dry-run", "--results", str(tmp_path), "--seeds", "1", "2", "--teachers", "hubert"]
    assert study.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "none: seeds [2] are missing",
        "hubert: seeds [1, 2] are missing",
        "none, from hubert: seeds [1, 2] are missing",
        "hubert, from hubert: seeds [1, 2] are missing",
    ]


def test_a_set_is_reduced_to_the_principal_components_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(run, "WIDTH", 3)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 5, generator=generator)

    def states_of(wave):
        hidden = torch.stack([wave, wave.roll(1)], dim=1) @ mixing
        return [hidden + 3, 10 * hidden.square()[:, :2]]

    waves = [torch.randn(400, generator=generator) for _ in range(5)]
    reduce = run.reduced(states_of, waves)
    frames = torch.cat([torch.cat(states_of(wave), dim=1)[::10] for wave in waves])
    scaler = StandardScaler().fit(frames)
    pca = PCA(3).fit(scaler.transform(frames))
    (found,) = reduce(waves[0])
    expected = pca.transform(scaler.transform(torch.cat(states_of(waves[0]), dim=1)))
    assert found.shape == (400, 3)
    for column in range(3):  # the order is reversed, signs and the divisor n - 1 are free
        correlation = np.corrcoef(found[:, 2 - column], expected[:, column])[0, 1]
        assert abs(correlation) > 0.999


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A corpus of tones with the tables that the study reads."""
    folder = tmp_path_factory.mktemp("speech")
    labelled = write_labelled_tones(folder)
    for kind, fold in (("rain", 1), ("dog", 2), ("rain", 3)):
        write_noise(folder / f"esc10/{kind}/{fold}-1.flac", 16_000 + fold)

    def write(name, columns, table):
        lines = ["\t".join(row[column] for column in columns) for row in table]
        (folder / f"{name}.tsv").write_text("\n".join(["\t".join(columns), *lines]) + "\n")

    heard = [dict(row, duration="2.4", split="dev" if i % 6 == 0 else "train")
             for i, row in enumerate(labelled)]  # fmt: skip
    write("unlabeled", ("path", "duration", "split"), heard)
    write("pr", ("path", "split", "speaker"), labelled)
    write("sid", ("path", "split", "speaker"), labelled)
    write("er", ("path", "split", "speaker", "emotion"), labelled)
    write("alignments", ("path", "segments"), labelled)
    return folder


def test_a_small_study_runs_once_and_goes_on_from_its_results(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "VOICES", {"voices": "2", "utterances": "4", "seed": "8"})
    monkeypatch.setattr("study_parts.report.write_report", lambda results, docs: [])
    results = tmp_path / "results"
    argv = [str(speech), "-o", str(tmp_path / "out"), "--results", str(results)]
    argv += ["--teachers", "hubert", "--steps", "2", "--seeds", "1"]
    assert study.main(argv) == 0
    names = ["hubert_1.json", "none_1.json", "teacher_hubert.json"]
    started = ["hubert-from-hubert_1.json", "none-from-hubert_1.json"]
    assert sorted(path.name for path in results.iterdir()) == sorted([*names, *started])
    trained, untrained, teacher = (read_result(results / name) for name in names)
    assert [read_result(results / name).steps for name in started] == [2, 0]
    assert trained.steps == 2 and untrained.steps == 0 and trained.loss > 0
    assert trained.teachers == teacher.teachers and len(trained.teachers["hubert"]) == 12
    for column in COLUMNS:
        speakers = trained.scores[column]
        assert set(speakers) == {"s0", "s1", "s2", "s3"}
        assert all(0 <= errors <= examples for errors, examples in speakers.values())
        assert {s: n for s, (_, n) in speakers.items()} == {
            s: n for s, (_, n) in teacher.scores[column].items()
        }
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    (results / "none_1.json").unlink()
    assert study.main(argv) == 0
    after = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    changed = [path.name for path in before if before[path] != after[path]]
    assert changed == ["none_1.json"]
    assert read_result(results / "none_1.json").scores == untrained.scores
    assert study.main([*argv, "--steps", "3"]) == 2  # of other updates


def write_length_tables(tmp_path):
    (tmp_path / "tables").mkdir()
    for name in ("train", "dev"):
        two = [Utterance(f"{path}.flac", 38_400) for path in ("s0-0", "s1-0")]
        write_table(tmp_path / f"tables/{name}.csv", two)


def test_untrained_students_have_the_first_weights_of_all_rows_of_their_seed(speech, tmp_path):
    """Rows of one seed share them, whatever their teachers."""
    small = folder.StudyFolder(tmp_path, speech)
    write_length_tables(tmp_path)
    first = load_student(small.untrained(rows.STUDENT, 3)).student.state_dict()
    for row in (Row(("hubert",)), Row(("hubert", "wavlm"), "concat")):
        datarc = {**small.data(cached=False), "libri_root": str(speech), "num_workers": 0}
        datarc["file_path"] = str(tmp_path / "tables")
        config = rows.model_config(row, small.files, str(speech / "esc10"))
        torch.manual_seed(3)
        expert = UpstreamPretrainExpert(datarc, config, device="cpu")
        weights = expert.distiller.student.state_dict()
        assert all(torch.equal(first[name], weights[name]) for name in first)


def test_students_that_start_from_a_teacher_have_the_weights_of_its_first_layers(speech, tmp_path):
    small = folder.StudyFolder(tmp_path, speech)
    small.write_start()
    checkpoint = torch.load(checkpoint_path("tiny_hubert"), weights_only=True)["model_weight"]
    write_length_tables(tmp_path)
    row = Row(PLAIN, start=rows.START)
    datarc = {**small.data(cached=False), "libri_root": str(speech), "num_workers": 0}
    datarc["file_path"] = str(tmp_path / "tables")
    config = rows.model_config(row, small.files, str(speech / "esc10"), str(tmp_path))
    student = UpstreamPretrainExpert(datarc, config, device="cpu").distiller.student
    weights = student.backbone.state_dict()
    copied = [name for name in weights if ".layers." in name or "conv" in name or "proj" in name]
    assert len(copied) > 40
    assert all(torch.equal(weights[name], checkpoint[name]) for name in copied)
    assert small.first_weights(row, 1) == small.first_weights(row, 2)


def test_a_killed_study_leaves_no_process(tmp_path):
    """A job of the pool runs a command; after SIGKILL of the study both end."""
    (tmp_path / "slow").mkdir()
    record = "pathlib.Path('pids').write_text(f'{os.getpid()} {os.getppid()}')"
    sleep = f"import os, pathlib, time\n{record}\ntime.sleep(600)\n"
    (tmp_path / "slow/command.py").write_text(sleep)
    start = """
from pathlib import Path
from study_parts.processes import process_pool
from study_parts.training import TrainingFolder

if __name__ == "__main__":
    folder = TrainingFolder(Path("."), Path("."))
    with process_pool(1) as pool:
        pool.submit(folder.command, "slow.command").result()
"""
    (tmp_path / "start.py").write_text(start)
    path = {"PYTHONPATH": os.pathsep.join(sys.path), **os.environ}
    process = subprocess.Popen([sys.executable, "start.py"], cwd=tmp_path, env=path)
    try:
        pids = wait_for(lambda: [int(pid) for pid in read(tmp_path / "pids").split()])
    finally:
        process.kill()
        process.wait()
    assert len(pids) == 2 and process.pid not in pids
    assert wait_for(lambda: not any(map(is_running, pids)))


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def is_running(pid):
    state = Path(f"/proc/{pid}/stat")  # the third field; Z: ended, and not yet waited for
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
