"""QbE: QUESST's folder against s3prl's reader, MTWV against a slow twin, and runs of `superb`."""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from s3prl_ekd import compat
from s3prl_ekd.compat.dtw_pool import EXPERT, DtwPool, pool_ends_with_run
from s3prl_ekd.downstream.metrics.mtwv import (
    BETA,
    Reference,
    measure_detections,
    read_reference,
    read_scores,
    write_reference,
)
from s3prl_ekd.downstream.run import prepare as prepare_run
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.downstream.tasks.corpus_check import check_corpus
from s3prl_ekd.errors import ConfigError, DataError, SetupError
from s3prl_ekd.prepare.qbe import read_truth

from .conftest import REPO, command
from .corpora import tone, write_manifest, write_quesst14
from .preparing import check_message, fails, prepare

QBE = TASKS["qbe"]
PITCHES = {"ba": (200, 900), "da": (1500, 300), "ga": (500, 2500), "fa": (3000, 1200)}
DOCUMENTS = ("ba da ga", "Da ga fa", "ga fa ba", "fa ba da", "ba ga", "da fa", "ba ba", "fa da")
QUERIES = {"dev": ("ba", "da", "ga fa", "da ba"), "test": ("fa", "GA", "ba da", "ga da", "fa fa")}


def write_words(folder: Path) -> Path:
    """Documents and queries of made-up words, each two tones."""
    rng, rows = np.random.default_rng(0), []
    for split, texts in {"train": DOCUMENTS, **QUERIES}.items():
        for number, text in enumerate(texts):
            pitches = [pitch for word in text.lower().split() for pitch in PITCHES[word]]
            wave = np.concatenate([tone(rng, pitch, 2000 + 70 * number) for pitch in pitches])
            rows.append((wave, (f"{split}-{number}.flac", split, text)))
    return write_manifest(folder / "qbe.tsv", ("split", "text"), rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory, student_file) -> Path:
    """A working folder with the corpus in data/qbe, and a student of three hidden states."""
    folder = tmp_path_factory.mktemp("work")
    command("init", folder / "work", cwd=folder)
    (folder / "work/student.pt").symlink_to(student_file)
    assert prepare("qbe", write_words(folder / "words"), "-o", folder / "work/data/qbe") == 0
    return folder / "work"


def dataset(root: Path, split: str):
    compat.apply()
    from s3prl.downstream.quesst14_dtw.dataset import QUESST14Dataset

    return QUESST14Dataset(split, dataset_root=root)


# --- folders


def test_s3prl_reads_the_queries_and_documents(work):
    for split, name in (("dev", "dev"), ("test", "eval")):
        data = dataset(work / "data/qbe", name)
        assert (data.n_queries, data.n_docs) == (len(QUERIES[split]), len(DOCUMENTS))
        sources = [os.path.basename(os.readlink(path)) for path in data.data]
        assert sources[: data.n_queries] == [f"{split}-{i}.flac" for i in range(data.n_queries)]
        assert sources[data.n_queries :] == [f"train-{i}.flac" for i in range(data.n_docs)]
        wave, own = data[0]
        assert len(wave) == 2 * 2000 * len(QUERIES[split][0].split())
        truth = read_truth(work / f"data/qbe/scoring/groundtruth_quesst14_{name}", DataError)
        assert own in truth
        names = [Path(path).stem for path in data.data[data.n_queries :]]
        for number, text in enumerate(QUERIES[split]):
            # each word has two letters, so no word begins within another
            found = {n for n, t in zip(names, DOCUMENTS, strict=True) if text.lower() in t.lower()}
            assert truth.get(Path(data.data[number]).stem, set()) == found


def test_the_real_corpus_is_checked_and_linked(tmp_path, capsys):
    write_quesst14(tmp_path / "quesst14Database")
    assert prepare("quesst14", tmp_path / "quesst14Database", "-o", tmp_path / "out") == 0
    assert "documents: 2 utterances" in capsys.readouterr().out
    data = dataset(tmp_path / "out", "eval")
    assert (data.n_queries, data.n_docs) == (2, 2)
    wave, name = data[1]
    assert name == "quesst14_eval_00001" and len(wave) == 16_002  # 8 kHz -> 16 kHz
    (tmp_path / "quesst14Database/Audio/quesst14_00001.wav").unlink()
    message = fails(capsys, "quesst14", tmp_path / "quesst14Database", "-o", tmp_path / "x")
    check_message(message, "quesst14_00001.wav", 2)
    check_message(fails(capsys, "quesst14", tmp_path, "-o", tmp_path / "x"), "quesst14Database")


@pytest.mark.parametrize(
    "old, new, part",
    [
        ("\ttext", "\twords", "text"),
        ("\tdev\tba", "\tdev\t ", 10),
        ("\tdev\t", "\ttrain\t", "dev"),
        ("\ttrain\t", "\ttest\t", "train"),
        ("\tdev\t", "\tdev\tx", "dev"),  # no query is in a document
    ],
)
def test_invalid_manifests(old, new, part, tmp_path, capsys):
    manifest = write_words(tmp_path / "corpus")
    manifest.write_text(manifest.read_text().replace(old, new))
    check_message(fails(capsys, "qbe", manifest, "-o", tmp_path / "out"), part)
    assert not (tmp_path / "out").exists()


def test_a_query_that_s3prl_would_not_search_is_refused(tmp_path, capsys):
    manifest = write_words(tmp_path / "corpus")
    rows = [(0.1 * np.ones(1679), ("short.flac", "dev", "ba"))]
    write_manifest(tmp_path / "corpus/short.tsv", ("split", "text"), rows)
    text = (tmp_path / "corpus/short.tsv").read_text().splitlines()[1]
    manifest.write_text(f"{manifest.read_text()}{text}\n")
    check_message(fails(capsys, "qbe", manifest, "-o", tmp_path / "out"), 1679, 1680)


def check(root: Path, split: str | None = None, **settings) -> None:
    config = yaml.safe_load((REPO / "downstream_recipes/quesst14_dtw/tiny.yaml").read_text())
    expert = config["downstream_expert"]
    expert["datarc"]["dataset_root"] = str(root)
    for section in (expert, expert["dtwrc"]):
        section.update({key: value for key, value in settings.items() if key in section})
    check_corpus("quesst14_dtw", config, "recipe.yaml", split)


@pytest.mark.parametrize(
    "file, old, new, part",
    [
        ("language_key_utterances.lst", " nnenglish", "", "line 1"),
        ("language_key_utterances.lst", "nnenglish", "czech", "nnenglish"),
        ("language_key_dev.lst", "00001", "00000", "line 2"),
        ("language_key_dev.lst", "dev_queries/quesst14_dev_00001", "x/y", "x/y.wav"),
        ("language_key_dev.lst", "dev_queries/quesst14_dev_", "Audio/quesst14_", "quesst14_00000"),
        ("language_key_dev.lst", "/dev_queries", "/../dev_queries", "line 1"),
        ("language_key_dev.lst", None, None, "language_key_dev.lst"),
        ("groundtruth_quesst14_dev/quesst14_dev.rttm", " lex", "", None),
        (
            "groundtruth_quesst14_dev/quesst14_dev.rttm",
            " 0.1 0.5 quesst14_dev_00000 lex <NA> <NA>",
            "",
            "line 2",
        ),
        ("groundtruth_quesst14_dev/quesst14_dev.rttm", "dev_0000", "dev_1000", "nnenglish"),
        ("groundtruth_quesst14_dev/quesst14_dev.rttm", None, None, "*.rttm"),
    ],
)
def test_what_s3prl_cannot_read_is_a_sentence_before_the_run(file, old, new, part, tmp_path):
    write_quesst14(tmp_path)
    check(tmp_path)
    path = tmp_path / "scoring" / file
    if old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    if part is None:
        return check(tmp_path)
    check_test = "utterances" in file
    if not check_test:
        check(tmp_path, "test")  # which does not read the queries of dev
    with pytest.raises(ConfigError) as raised:
        check(tmp_path, "dev")
    message = str(raised.value)
    assert message.startswith("recipe.yaml: ") and part in message and "\n" not in message


def test_a_folder_too_high_is_named(work):
    with pytest.raises(ConfigError, match="data/qbe has them"):
        check(work / "data")


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"dist_method": "cosine_neg_log"}, "feature_normalization: False"),
        ({"step_pattern": "symmetric2"}, "asymmetric"),
        ({"max_workers": 0}, "max_workers"),
        ({"max_workers": "all"}, "max_workers"),
    ],
)
def test_settings_at_which_s3prl_fails(settings, part, work):
    check(work / "data/qbe", dist_method="euclidean", max_workers=None)
    check(work / "data/qbe", subsequence=False, step_pattern="symmetric2")
    with pytest.raises(ConfigError, match=part):
        check(work / "data/qbe", **settings)


# --- the metric


def slow_mtwv(scores, reference: Reference, queries=None) -> float:
    """MTWV at each of all scores, pair by pair; ``queries``: those that count, with repetitions."""
    queries = list(reference.truth) if queries is None else queries
    thresholds = {score for own in scores.values() for score in own.values()} | {np.inf}
    best = -np.inf
    for threshold in thresholds:
        values = []
        for query in queries:
            truth, own = reference.truth[query], scores.get(query, {})
            missed = sum(not own.get(document, -10) >= threshold for document in truth)
            false = sum(s >= threshold for d, s in own.items() if d not in truth)
            others = max(1, reference.documents - len(truth))
            values.append(1 - missed / len(truth) - BETA * false / others)
        best = max(best, sum(values) / len(values))
    return 100 * best


def made_up_scores(seed: int, documents: int = 40, queries: int = 12):
    """Scores with ties, for the first queries and documents of a ground truth."""
    rng = np.random.default_rng(seed)
    truth = {}
    for query in range(queries):
        count = rng.integers(1, 5)
        names = rng.choice(documents, count, replace=False)
        truth[f"q{query:02d}"] = frozenset(f"d{name}" for name in names)
    reference = Reference(documents + 200, truth)
    scores = {
        name: {
            f"d{d}": round(rng.normal() + 2.5 * (f"d{d}" in truth.get(name, ())), 1)
            for d in range(documents - 5)
        }
        for name in [*list(truth)[: queries - 3], "in no document"]
    }
    return scores, reference


def test_mtwv_by_hand():
    """Two queries, all found at 0, with a false detection each in 999 and 998 other documents."""
    assert pytest.approx(12.49) == BETA
    reference = Reference(1000, {"a": frozenset("x"), "b": frozenset("yz")})
    scores = {"a": {"x": 2.0, "y": 1.5}, "b": {"y": 1.5, "z": 0.0, "x": 0.0}}
    value = measure_detections(scores, reference).value
    assert value == pytest.approx(100 - 100 * 12.49 / 2 * (1 / 999 + 1 / 998))
    # above 1.5 only x is found; with few documents a false detection costs more than a query
    few = Reference(4, reference.truth)
    assert measure_detections(scores, few).value == pytest.approx(50)
    # nothing is worth a detection
    bad = {"a": {"x": 0.0, "y": 1.0}}
    assert measure_detections(bad, few).value == 0


@pytest.mark.parametrize("seed", range(8))
def test_mtwv_equals_the_slow_twin(seed):
    scores, reference = made_up_scores(seed)
    sample = measure_detections(scores, reference)
    assert sample.names == tuple(list(reference.truth)[:9])  # of twelve; the others are missed
    assert sample.value == pytest.approx(slow_mtwv(scores, reference))
    # a resample draws from the scored queries, and the share of the others stays the same
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sample.names), size=(3, len(sample.names)))
    weights = np.stack([np.bincount(row, minlength=len(sample.names)) for row in drawn])
    for value, row in zip(sample.values(weights.astype(float)), drawn, strict=True):
        slow = slow_mtwv(scores, reference, [sample.names[i] for i in row])
        assert value == pytest.approx(9 / 12 * slow)


def test_mtwv_at_the_size_of_quesst_is_fast():
    rng = np.random.default_rng(0)
    names = [f"d{i}" for i in range(2438)]
    truth = {f"q{i:03d}": frozenset(rng.choice(names, 10)) for i in range(138)}
    scores = {query: dict(zip(names, rng.normal(size=2438), strict=True)) for query in truth}
    sample = measure_detections(scores, Reference(12_492, truth))
    start = time.perf_counter()
    sample.values(rng.poisson(1, (2000, 138)).astype(float))
    assert time.perf_counter() - start < 5


def test_the_reference_file_is_read_as_written(tmp_path):
    _, reference = made_up_scores(0)
    write_reference(reference, tmp_path / "r.txt")
    assert read_reference(tmp_path / "r.txt") == reference
    for text in ("", "documents x\nq d\n", "documents 1\nq d e\n", "documents 3\nq\n", "q d\n"):
        (tmp_path / "r.txt").write_text(text)
        with pytest.raises(DataError, match=r"r\.txt is damaged"):
            read_reference(tmp_path / "r.txt")


TERM = '<detected_termlist termid="q"><term file="d" score="{}"/></detected_termlist>'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<stdlist>",
        '<!DOCTYPE s [<!ENTITY a "b">]><stdlist>&a;</stdlist>',
        '<stdlist><term file="d" score="1"/></stdlist>',
        f"<stdlist>{TERM.format('nan')}</stdlist>",
        f"<stdlist>{TERM.format('x')}</stdlist>",
        f"<stdlist>{TERM.format(1)}{TERM.format(1)}</stdlist>",
        f"<stdlist>{TERM.format(1).replace('termid', 'x')}</stdlist>",
    ],
)
def test_damaged_scores_are_a_sentence(text, tmp_path):
    path = tmp_path / "s.xml"
    path.write_text(f"<stdlist>{TERM.format(1.5)}</stdlist>")
    assert read_scores(path) == {"q": {"d": 1.5}}
    path.write_text(text)
    with pytest.raises(DataError) as raised:
        read_scores(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_scores_of_another_corpus_are_a_sentence():
    scores, _ = made_up_scores(0)
    with pytest.raises(DataError, match="different corpora"):
        measure_detections(scores, Reference(3, {"other": frozenset("x")}))


# --- the pool of s3prl's DTW


def sleep(seconds: float) -> None:
    if not seconds:
        raise ValueError("no path")
    time.sleep(seconds)


def test_the_pool_drops_its_tasks_after_an_error():
    start = time.perf_counter()
    with pytest.raises(SetupError, match="no path"), DtwPool(1) as pool:
        futures = [pool.submit(sleep, 0), *(pool.submit(sleep, 0.2) for _ in range(200))]
        futures[0].result()
    assert time.perf_counter() - start < 10


KILLED = """
import os, signal, sys, time
from s3prl_ekd.compat.dtw_pool import DtwPool
if __name__ == "__main__":
    with DtwPool(3) as pool:
        for pid in {f.result() for f in [pool.submit(os.getpid) for _ in range(200)]}:
            print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_processes_of_a_killed_run_end(tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    result = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    pids, end = result.stdout.split(), time.monotonic() + 20
    assert pids and result.returncode < 0

    def runs(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except OSError:
            return False

    while any(map(runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_s3prls_expert_has_the_pool_only_during_a_run():
    compat.apply()
    with pool_ends_with_run():
        import s3prl.downstream.quesst14_dtw.expert as expert

        assert expert.ProcessPoolExecutor is DtwPool
    assert expert.ProcessPoolExecutor is concurrent.futures.ProcessPoolExecutor
    with pool_ends_with_run():
        assert sys.modules[EXPERT].ProcessPoolExecutor is DtwPool


# --- runs


@pytest.mark.parametrize(
    "options, part",
    [
        (("-m", "train"), "-m evaluate -t test -l LAYER"),
        (("-m", "evaluate", "-t", "eval"), "dev or test"),
    ],
)
def test_training_and_other_splits_are_refused(options, part, work, monkeypatch):
    """s3prl would fail in the training, and evaluate its test set for any other name than dev."""
    monkeypatch.chdir(work)
    argv = [*options, "-u", "fbank", "-d", "quesst14_dtw", "-n", "x"]
    with pytest.raises((SetupError, ConfigError), match=part):
        prepare_run([*argv, "-c", QBE.tiny])


def mtwv_of(folder: Path) -> float:
    """MTWV by the slow twin, from s3prl's scores and our reference."""
    root = ElementTree.parse(folder / "benchmark.stdlist.xml").getroot()
    scores = {
        terms.get("termid"): {term.get("file"): float(term.get("score")) for term in terms}
        for terms in root
    }
    return slow_mtwv(scores, read_reference(folder / "benchmark.reference.txt"))


def test_superb_tests_the_layer_that_is_best_on_dev(work):
    argv = ["superb", "student.pt", "--tasks", "qbe", "--recipes", "tiny", "-o", "out"]
    command(*argv, cwd=work)
    command("report", "out", cwd=work)
    (folder,) = (work / "out/student/qbe").iterdir()
    record = json.loads((folder / "superb.json").read_text())
    dev = [mtwv_of(folder / f"layer{layer}_dev") for layer in range(3)]
    assert record["finished"] and record["lr"] is None
    assert record["dev"]["layer"] == dev.index(max(dev))
    assert record["dev"]["value"] == pytest.approx(max(dev))
    (row,) = csv.DictReader((work / "out/report/report.csv").open())
    assert float(row["value"]) == pytest.approx(mtwv_of(folder), abs=0.01)
    assert float(row["value"]) > 15  # tones; at random it would be 0
    names = {"query_eval_000001", "query_eval_000002", "query_eval_000003"}
    assert QBE.measure(folder, None)[0].names == tuple(sorted(names))  # two are in no document
    command("predict-zip", "out", "-o", "p.zip", "--partial", cwd=work)
    with zipfile.ZipFile(work / "p.zip") as archive:
        data = archive.read("predict/qbe_public/benchmark.stdlist.xml")
    assert data == (folder / "benchmark.stdlist.xml").read_bytes()
    log = (folder / "log.txt").read_text()
    for path in folder.glob("benchmark.*"):
        path.unlink()
    command(*argv, cwd=work)  # tested again
    assert (folder / "benchmark.stdlist.xml").read_bytes() == data
    assert float(row["value"]) == pytest.approx(mtwv_of(folder), abs=0.01)
    # 12 waveforms of dev and 5 queries of test, once for all layers; one more counts the layers
    assert sum(int(line.split(" misses")[0].split()[-1]) for line in log.splitlines()
               if " misses, " in line) == 17  # fmt: skip


RUNS = """
import multiprocessing, sys
from s3prl_ekd.launch import run_downstream

if __name__ == "__main__":
    for line in open("runs.txt"):
        name, method, *argv = line.split()
        multiprocessing.set_start_method(method, force=True)
        argv = ["-m", "evaluate", "-t", "dev", "-d", "quesst14_dtw", "-p", name, *argv]
        argv += ["-c", "downstream/quesst14_dtw/tiny.yaml", "-u", "ekd_student"]
        sys.argv = ["run_downstream.py", *argv, "-k", "student.pt"]
        try:
            code = run_downstream()
        except SystemExit as stop:
            code = stop.code
        print("done", name, code, flush=True)
"""


def test_cached_noisy_and_spawned_evaluations(work, noise_folder):
    """Cached scores equal s3prl's up to the rounding of the cache; noise is added to all audio."""
    noise = f"--noise {noise_folder} --snr"
    runs = {
        "plain": "fork -l 1",
        "cached": "fork -l 1 --cache-features features",
        "spawned": "spawn -l 1 --cache-features features",
        "noisy": f"fork -l 1 {noise} -30",
        "none": "fork -l 3",
    }
    (work / "runs.txt").write_text("".join(f"{name} {argv}\n" for name, argv in runs.items()))
    (work / "script.py").write_text(RUNS)  # spawned children import __main__
    result = subprocess.run(
        [sys.executable, "script.py"],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    done = [line for line in result.stdout.splitlines() if line.startswith("done")]
    codes = {"plain": "0", "cached": "0", "spawned": "0", "noisy": "0", "none": "2"}
    assert done == [f"done {name} {code}" for name, code in codes.items()], result.stderr
    assert "error: -l 3: the upstream has no such layer" in result.stderr
    folders = {**{name: work / name for name in runs}, "noisy": work / "noisy/noisy/street_snr-30"}
    scores = {name: read_scores(folders[name] / "benchmark.stdlist.xml") for name in list(runs)[:4]}
    values = {name: np.array([list(map(own[q].get, sorted(own[q]))) for q in sorted(own)])
              for name, own in scores.items()}  # fmt: skip
    np.testing.assert_allclose(values["cached"], values["plain"], atol=0.05)
    np.testing.assert_allclose(values["spawned"], values["cached"], atol=2e-4)
    assert np.abs(values["noisy"] - values["plain"]).max() > 0.5
