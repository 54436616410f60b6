"""The study's command: what it plans, that it resumes, its statistics, its report."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from s3prl_ekd import zoo
from s3prl_ekd.commands import superb
from s3prl_ekd.config import apply_overrides, load_model_config, load_runner_config
from s3prl_ekd.errors import ConfigError, DataError, SetupError

from .superb_runs import write_run

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "tools"))

import study as tool  # noqa: E402
from marked_text import between  # noqa: E402
from study_parts import children, run  # noqa: E402
from study_parts.cells import METRICS, Cell, Fold  # noqa: E402
from study_parts.compare import make_study  # noqa: E402
from study_parts.design import Row, model_config, runner_config, students  # noqa: E402
from study_parts.folder import Folder, Spent, inputs_of  # noqa: E402
from study_parts.intervals import difference, draw, mean  # noqa: E402
from study_parts.parts import plan  # noqa: E402
from study_parts.report import BEGIN, END  # noqa: E402
from study_parts.report_differences import sentence  # noqa: E402
from study_parts.scores import read_study  # noqa: E402

PR, _, CER, SID, _ = METRICS
SINGLE = ["tiny_hubert", "tiny_robust_hubert", "tiny_wavlm"]


def typed(*words: str):
    return tool.setting_of(tool.make_parser().parse_args(["FOLDER", *words]))


# --- planning


def test_36_students_that_differ_in_nothing_but_what_is_compared():
    setting = typed()
    found = students(setting)
    assert len(found) == len({s.name for s in found}) == 36
    sources = [*SINGLE, "average", "concat", "separate"]
    expected = set(itertools.product(["small", "large"], sources, [1, 2, 3]))
    assert {(s.row.size, s.row.learned_from, s.seed) for s in found} == expected
    configs = {s.row: model_config(setting, s.row) for s in found}
    assert len(configs) == 12
    for row, config in configs.items():
        assert config["init"] == {"teacher": None}
        teachers = config.pop("teachers")
        wanted = SINGLE if row.learned_from in sources[3:] else [row.learned_from]
        assert teachers == {name: {"model": name, "layers": [2, 4, 6]} for name in wanted}
        assert config.pop("aggregation") == (
            row.learned_from if row.learned_from in sources[3:] else "separate"
        )
        assert config == configs[Row(row.size, "average")] or row.learned_from != "average"
    for size in ("small", "large"):  # what is left is the same for all of a size
        left = [json.dumps(c, sort_keys=True) for row, c in configs.items() if row.size == size]
        assert len(set(left)) == 1


def test_the_configs_are_what_the_product_takes(tmp_path):
    setting = typed()
    folder = Folder(tmp_path)
    folder.begin(setting, Path("/speech"), {})
    for row in {s.row for s in students(setting)}:
        loaded = load_model_config(tmp_path / f"configs/{row.name}.yaml")
        assert all(t.layers == (2, 4, 6) for t in loaded.teachers.values())
    loaded = load_runner_config(tmp_path / "configs/runner.yaml")
    assert loaded.runner.total_steps == 240
    assert loaded.pretrain_expert.datarc.sequence_length == 32_000


@pytest.mark.parametrize("steps", [4, 5, 7, 30, 2000])
def test_any_number_of_steps_makes_a_runner_config(tmp_path, steps):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(runner_config(typed("--steps", str(steps)), tmp_path)))
    assert load_runner_config(path).runner.total_steps == steps


def test_the_plan_computes_targets_once_and_evaluates_seed_after_seed():
    parts = plan(typed(), Path("/s"), Path("/s/esc10"), 2)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    kinds = [part.kind for part in parts if part.kind != "prepare"]
    assert kinds == ["cache"] + (["distil"] * 12 + ["evaluate"]) * 3
    cache = next(part for part in parts if part.kind == "cache")
    assert model_config(typed(), Row("large", "separate"))["teachers"].keys() == set(SINGLE)
    assert "configs/large-separate.yaml" in cache.commands[0]
    for part in parts:
        assert set(part.needs) <= set(names[: names.index(part.name)])
    for part in parts:
        if part.kind == "distil":
            train = part.commands[0]
            seed = part.name[-1]
            assert train[train.index("--seed") + 1] == seed
            assert train[-1].endswith("target_cache='cache'")
    words = parts[-1].commands[0]
    assert words[words.index("--seeds") + 1] == "3"
    assert sum(word.endswith("-seed3.pt") for word in words) == 12
    assert words[-1] == "--cache-features"


def test_the_evaluation_is_what_superb_takes():
    """PR: a linear probe; its learning rate and steps, and ASR's, are the study's own."""
    words = plan(typed(), Path("/s"), Path("/s/esc10"), 2)[-1].commands[0]
    parser = argparse.ArgumentParser()
    superb.configure(parser)
    args = parser.parse_args(words[1:])
    assert sorted(args.lr) == ["asr=3e-3", "pr=1e-2"]
    assert sorted(args.steps) == ["asr=300", "er=120", "pr=600", "sid=160"]
    changes = dict(text.split("=", 1) for text in args.override)
    assert changes.keys() == {"pr", "sid"}
    recipe = yaml.safe_load((REPO / "downstream_recipes/ctc/tiny.yaml").read_text())
    assert recipe["downstream_expert"]["model"]["select"] == "RNNs"
    changed = apply_overrides(recipe, changes["pr"])
    assert changed["downstream_expert"]["model"].pop("select") == "FrameLevel"
    del recipe["downstream_expert"]["model"]["select"]
    assert changed == recipe
    only = plan(typed("--tasks", "er"), Path("/s"), Path("/s/esc10"), 2)[-1].commands[0]
    assert "--lr" not in only and "--override" not in only


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--teacher", "a"], "two teachers"),
        (["--teacher", "a", "--teacher", "b=nowhere/b.pt"], "nowhere/b.pt"),
        (["--teacher", "a", "--teacher", "a=b"], "twice"),
        (["--teacher", "average", "--teacher", "b"], "'average'"),
        (["--size", "small=48,96"], "CHANNELS,WIDTH,LAYERS"),
        (["--size", "small=48,97,2"], "multiple of 4"),
        (["--size", "a/b=48,96,2"], "'a/b'"),
        (["--seeds", "1", "1"], "twice"),
        (["--steps", "3"], "4 or more"),
        (["--lr", "nan"], "--lr"),
        (["--seconds", "-1"], "--seconds"),
        (["--task-steps", "pr=0"], "4 or more"),
        (["--task-steps", "xx=8"], "pr, asr, sid, er"),
        (["--jobs", "0"], "--jobs"),
        ([], "unlabeled.tsv"),
        (["--report-only"], "holds no study"),
        (["--report-only", "--reference", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert tool.main([str(tmp_path), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error
    assert not (tmp_path / "study_run").exists()


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    Folder(tmp_path).begin(typed(), tmp_path, {})
    Folder(tmp_path).begin(typed(), tmp_path, {})
    with pytest.raises(ConfigError, match=r"steps \(240, now 10\)"):
        Folder(tmp_path).begin(typed("--steps", "10"), tmp_path, {})


def test_inputs_change_with_what_is_in_them_and_not_with_where_they_are(tmp_path):
    def made(name: str) -> tuple[Path, Path]:
        root = tmp_path / name
        (root / "esc10" / "rain").mkdir(parents=True)
        for file in ("unlabeled.tsv", "pr.tsv", "sid.tsv", "lexicon.txt", "esc10/rain/1.wav"):
            (root / file).write_text(file)
        return root, root / "esc10"

    setting = typed("--tasks", "pr", "sid")
    before = inputs_of(setting, *made("a"))
    assert before.keys() == {"unlabeled.tsv", "pr.tsv", "sid.tsv", "lexicon.txt", "noise"}
    assert before["pr.tsv"] == hashlib.sha256(b"pr.tsv").hexdigest()[:16]
    where = made("b")
    assert inputs_of(setting, *where) == before
    for file, key in (("pr.tsv", "pr.tsv"), ("lexicon.txt", "lexicon.txt"),
                      ("esc10/rain/1.wav", "noise"), ("esc10/2.wav", "noise")):  # fmt: skip
        last = inputs_of(setting, *where)
        (where[0] / file).write_text("another length")
        now = inputs_of(setting, *where)
        assert {k for k in now if now[k] != last[k]} == {key}
    assert "lexicon.txt" not in inputs_of(typed("--tasks", "sid"), *where)
    (where[0] / "pr.tsv").unlink()
    with pytest.raises(SetupError, match=r"pr\.tsv cannot be read"):
        inputs_of(setting, *where)


def test_a_tiny_teacher_counts_by_its_file_and_its_name(tmp_path, monkeypatch):
    found = typed("--teacher", "a=tiny_hubert", "--teacher", "b=tiny_hubert_random").plain()
    digest = hashlib.sha256(zoo.weights("tiny_hubert").read_bytes()).hexdigest()[:16]
    wanted = {"a": f"tiny_hubert {digest}", "b": f"tiny_hubert_random {digest}"}
    assert found["teachers"] == wanted
    other = tmp_path / "other.pt"
    other.write_bytes(b"another version")
    monkeypatch.setattr(zoo, "weights", lambda name: other)
    assert typed().plain()["teachers"] != {name: f"{name} {digest}" for name in SINGLE}
    digest = hashlib.sha256(b"another version").hexdigest()[:16]
    assert typed().plain()["teachers"] == {name: f"{name} {digest}" for name in SINGLE}


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert tool.main([str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    said = f"error: the study needs {name}; type: pip install 's3prl_ekd[analysis]'\n"
    assert capsys.readouterr().err == said


def test_an_os_error_names_its_file(monkeypatch, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/students/x.pt")

    monkeypatch.setattr(tool, "run", full)
    assert tool.main(["x"]) == 2
    assert capsys.readouterr().err == "error: /disk/students/x.pt: No space left on device\n"


def test_a_teachers_file_counts_by_what_is_in_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").write_text("weights")
    words = ["--teacher", f"x={tmp_path}/a.pt", "--teacher", "y"]
    moved = ["--teacher", f"x={tmp_path}/b.pt", "--teacher", "y"]
    assert typed(*words).plain() == typed(*moved).plain()
    before = typed(*words).plain()
    (tmp_path / "a.pt").write_text("others")
    assert typed(*words).plain() != before


# --- running and resuming: stand-ins for the commands

FAKE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
with open("calls.txt", "a") as file:
    file.write(" ".join(words) + chr(10))
def mark(what):
    with open("times.txt", "a") as file:
        file.write(what + " " + words[0] + chr(10))
mark("begin")
if words[0] == "superb":
    time.sleep(float(os.environ.get("SLOW", 0)))
if words[0] == "run_pretrain.py":
    run = pathlib.Path(words[words.index("-p") + 1])
    run.mkdir(parents=True, exist_ok=True)
    if os.environ.get("FAIL", "?") in run.name:
        sys.exit("error: no luck with " + run.name)
    while os.environ.get("HANG", "?") in run.name and not (run / "half").exists():
        (run / "half").touch()
        time.sleep(60)
if words[0] == "export":
    pathlib.Path(words[words.index("-o") + 1]).touch()
if words[0] in ("cache", "prepare"):
    pathlib.Path(words[words.index("-o") + 1]).mkdir(parents=True, exist_ok=True)
mark("end")
"""


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """A study of 5 students of one seed, whose commands take no time; gives a function that runs
    it and returns (exit code, lines of commands of this start)."""
    speech, out = tmp_path / "speech", tmp_path / "out"
    (speech / "esc10").mkdir(parents=True)
    for name in ("pr", "asr", "sid", "er", "unlabeled"):
        (speech / f"{name}.tsv").touch()
    (speech / "lexicon.txt").touch()
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(children, "LAUNCH", (sys.executable, "-IS", str(tmp_path / "fake.py")))
    monkeypatch.setattr(run, "PAUSE", 0.02)
    words = [str(speech), "-o", str(out), "--docs", str(tmp_path / "docs"), "--seeds", "7"]
    words += ["--size", "s=16,32,1", "--teacher", "a", "--teacher", "b"]

    def start(*more: str) -> tuple[int, list[str]]:
        calls = out / "calls.txt"
        calls.unlink(missing_ok=True)
        code = tool.main([*words, *more])
        return code, calls.read_text().splitlines() if calls.exists() else []

    start.words, start.out = words, out
    return start


def test_everything_is_run_once(faked, capsys):
    code, calls = faked("--jobs", "2")
    assert code == 0
    first = [call.split()[0] for call in calls]
    assert first.count("prepare") == 5 and first.count("cache") == 1
    assert first.count("run_pretrain.py") == first.count("export") == 5
    assert first.count("superb") == 1 and first[-1] == "superb"
    assert first.index("cache") < first.index("run_pretrain.py")
    assert "0 of 20 downstream models are finished" in capsys.readouterr().out  # it was a stand-in
    assert faked("--jobs", "2") == (0, [])


def test_an_evaluation_has_all_jobs_for_as_long_as_it_runs(faked, monkeypatch):
    monkeypatch.setenv("SLOW", "0.5")
    code, calls = faked("--jobs", "2", "--seeds", "7", "8")
    assert code == 0 and sum(call.startswith("superb") for call in calls) == 2
    assert calls[-1].startswith("superb")
    times = (faked.out / "times.txt").read_text().splitlines()
    for i, line in enumerate(times):
        if line == "begin superb":  # what had begun has ended, and nothing begins meanwhile
            before = [each.split()[0] for each in times[:i]]
            assert before.count("begin") == before.count("end")
            assert times[i + 1] == "end superb"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_another_corpus_cannot_go_on_with_a_study(faked, tmp_path, capsys):
    assert faked()[0] == 0
    before = contents(faked.out)
    other = tmp_path / "other"
    (other / "esc10").mkdir(parents=True)
    assert tool.main([str(other), *faked.words[1:], "--report-only"]) == 0
    assert contents(faked.out) == before
    for path in (tmp_path / "speech").glob("*.t*"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "asr.tsv").write_text("another one")
    capsys.readouterr()
    assert tool.main([str(other), *faked.words[1:]]) == 2
    error = capsys.readouterr().err
    assert "other settings or data: asr.tsv (" in error and "\n" not in error.strip()
    noise = tmp_path / "noise"
    noise.mkdir()
    assert faked("--noise", str(noise)) == (2, [])
    assert "other settings or data: noise (" in capsys.readouterr().err
    assert faked("--report-only", "--steps", "10")[0] == 2
    assert "steps (240, now 10)" in capsys.readouterr().err
    after = contents(faked.out)
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k not in (".lock", "calls.txt")
    }


def test_nothing_is_written_into_a_folder_that_another_start_holds(faked, capsys):
    faked.out.mkdir()
    code = (
        "import sys; from s3prl_ekd.training.lock import FolderLock\n"
        f"with FolderLock({str(faked.out)!r}): print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert faked() == (2, [])
        holder.stdin.close()
    assert "is in use" in capsys.readouterr().err
    assert [path.name for path in faked.out.iterdir()] == [".lock"]


def test_a_failed_part_is_named_and_the_others_are_run(faked, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "s-concat")
    code, calls = faked()
    assert code == 2
    assert "distil-s-concat-seed7: no luck with s-concat-seed7" in capsys.readouterr().err
    evaluated = [call for call in calls if call.startswith("superb")]
    assert len(evaluated) == 1 and "s-concat" not in evaluated[0] and "s-average" in evaluated[0]
    monkeypatch.delenv("FAIL")
    code, calls = faked()
    assert code == 0
    assert [call.split()[0] for call in calls] == ["run_pretrain.py", "export", "superb"]
    assert "s-concat" in calls[0] and "s-concat" in calls[2] and "s-average" in calls[2]


def test_minutes_end_what_runs_and_the_next_start_takes_it_up(faked, monkeypatch, capsys):
    monkeypatch.setenv("HANG", "s-b-")
    half = faked.out / "result/pretrain/s-b-seed7/half"
    clock = SimpleNamespace(monotonic=lambda: 1e9 if half.exists() else 0.0)
    monkeypatch.setattr(tool, "time", clock)
    code, calls = faked("--minutes", "5")
    assert code == 0 and "goes on from here" in capsys.readouterr().out
    assert "s-b-seed7" in calls[-1]
    assert not (faked.out / "running.json").exists()
    monkeypatch.setattr(tool, "time", time)
    code, calls = faked()
    assert code == 0
    assert "s-b-seed7" in calls[0]  # what was cut is run again, what was finished is not
    trained = [call for call in calls if call.startswith("run_pretrain.py")]
    assert len(trained) == 4 and not any("s-a-seed7" in call for call in trained)


def test_a_kill_leaves_a_study_that_goes_on(faked, tmp_path):
    code = (
        "import sys; sys.path.insert(0, {tools!r})\n"
        "import study; from study_parts import children\n"
        "children.LAUNCH = {launch!r}\n"
        "sys.exit(study.main({words!r}))\n"
    ).format(tools=str(REPO / "tools"), launch=children.LAUNCH, words=faked.words)
    env = {**os.environ, "HANG": "s-b-"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL) as one:
        half = faked.out / "result/pretrain/s-b-seed7/half"
        late = time.monotonic() + 240
        while not half.exists() or not (faked.out / "running.json").exists():
            assert time.monotonic() < late and one.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # it notes what runs
        one.send_signal(signal.SIGKILL)
    groups = json.loads((faked.out / "running.json").read_text())["groups"]
    assert len(groups) == 1
    try:
        with pytest.raises(SetupError, match="still running"):
            children.check_none_left(faked.out / "running.json")
        assert faked() == (2, [])  # it would meet the one that is left
    finally:
        for pid in groups:
            os.killpg(int(pid), signal.SIGKILL)
    late = time.monotonic() + 20
    while any(children._birth(int(pid)) for pid in groups) and time.monotonic() < late:
        time.sleep(0.05)
    code, calls = faked()
    assert code == 0 and "s-b-seed7" in calls[0]
    assert sum(call.startswith("run_pretrain.py") for call in calls) == 4


def test_processor_time_has_that_of_processes_nobody_waits_for(tmp_path, monkeypatch):
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    busy = "import os, time\nif os.fork() == 0:\n while time.process_time() < 0.6: pass\n"
    busy += " open('done', 'w').close()\n time.sleep(60)\n"
    busy += "while not os.path.exists('done'): time.sleep(0.01)\ntime.sleep(0.3)\n"
    monkeypatch.setattr(children, "LAUNCH", (sys.executable, "-IS", "-c", busy))
    monkeypatch.setattr(children, "LOOK", 0.01)
    child = children.Child([()], tmp_path, tmp_path / "log")
    try:
        while child.poll() is None:
            time.sleep(0.01)
        assert 0.55 <= child.spent.cpu < 3
    finally:
        child.signal(signal.SIGKILL)


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_a_group_that_is_gone_is_no_mistake(tmp_path, monkeypatch, error):
    """macOS refuses to signal a group of ended processes; Linux does not know it any more."""
    monkeypatch.setattr(children, "LAUNCH", (sys.executable, "-IS", "-c", ""))
    child = children.Child([()], tmp_path, tmp_path / "log")
    while child.poll() is None:
        time.sleep(0.01)
    sent = []

    def refuse(group, number):
        sent.append((group, number))
        raise error

    monkeypatch.setattr(os, "killpg", refuse)
    child.signal(signal.SIGKILL)
    assert sent == [(child.process.pid, signal.SIGKILL)]


def test_dry_run_writes_nothing_and_prints_what_is_left(faked, capsys):
    assert faked("--dry-run") == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("run_pretrain.py") for line in lines) == 5
    words = shlex.split(next(line for line in lines if line.startswith("s3prl-ekd superb")))
    for pair in (
        ["--lr", "pr=1e-2"],
        ["--lr", "asr=3e-3"],
        ["--steps", "pr=600"],
        ["--steps", "asr=300"],
        ["--override", "pr=config.downstream_expert.model.select='FrameLevel'"],
    ):
        assert pair in [words[i : i + 2] for i in range(len(words))]
    assert not faked.out.exists()
    faked()
    capsys.readouterr()
    faked("--dry-run")
    assert not any("s3prl-ekd" in line for line in capsys.readouterr().out.splitlines())


def test_time_left_follows_the_parts_that_were_measured(faked, tmp_path):
    setting = typed("--seeds", "7", "--size", "s=16,32,1", "--teacher", "a", "--teacher", "b")
    folder = Folder(tmp_path / "f")
    folder.begin(setting, tmp_path, {})
    parts = plan(setting, tmp_path, tmp_path, 2)
    for part in parts[:7]:
        (folder.root / part.makes).mkdir(parents=True, exist_ok=True)
        folder.finish(part.name, Spent(1.0, 1.0))
    distils = [part for part in parts if part.kind == "distil"]
    for part in distils[:2]:
        (folder.root / part.makes).touch()
        folder.finish(part.name, Spent(600.0, 600.0))
    with run.Progress(parts, setting, folder, jobs=2) as progress:
        progress.show({}, always=True)
        assert (progress.bar.n, progress.total) == (9, 12 + 20)
        guessed = 5 * (run.GUESS["pr"] + run.GUESS["asr"] + run.GUESS["sid"] + run.GUESS["er"])
        minutes = (3 * 600 + guessed) / 2 / 60
        assert f"about {minutes:.0f} min left" in progress.bar.postfix


# --- statistics


def cell(errors, lengths=None, metric=PR, seeds=(1, 2, 3), row="r", names=None) -> Cell:
    errors = np.array(errors)
    lengths = np.full(errors.shape[1], 10) if lengths is None else np.array(lengths)
    names = names or tuple(f"u{i}" for i in range(errors.shape[1]))
    return Cell(row, metric, "clean", tuple(seeds), (Fold(names, lengths, errors),))


def test_seeds_alone_give_students_t_by_hand():
    # All utterances alike, so the test set adds nothing: rates 10, 20, 30 %; s = 10,
    # t(0.975, 2) = 4.302653, half width 4.302653 * 10 / sqrt(3) = 24.8413.
    found = mean(draw(cell([[1] * 6, [2] * 6, [3] * 6])))
    assert found.value == pytest.approx(20)
    assert found.high - found.value == pytest.approx(24.8413, abs=1e-3)
    assert found.low == 0  # 20 - 24.8 is no error rate
    assert found.by_seed == pytest.approx((10, 20, 30)) and found.over_seeds


def test_utterances_alone_give_the_normal_interval_by_hand():
    # Three seeds with the same errors: 0 or 10 of 10 on half of 400 utterances. The rate's standard
    # error is 50 / sqrt(400) = 2.5, half width 1.96 * 2.5 = 4.9.
    errors = [[0, 10] * 200] * 3
    found = mean(draw(cell(errors)))
    assert found.value == pytest.approx(50)
    assert found.high - found.low == pytest.approx(2 * 4.9, rel=0.04)
    one = mean(draw(cell(errors[:1], seeds=(1,))))
    assert not one.over_seeds and one.high - one.low == pytest.approx(found.high - found.low)


def test_accuracies_are_what_errors_leave_and_end_at_100():
    found = mean(draw(cell([[0] * 20, [0] * 19 + [1]], [1] * 20, SID, seeds=(1, 2))))
    assert found.value == pytest.approx(97.5) and found.high == 100
    worst = mean(draw(cell([[1] * 5, [1] * 5], [1] * 5, SID, seeds=(1, 2))))
    assert (worst.value, worst.low, worst.high) == (0, 0, 0)


def test_differences_equal_a_slow_twin():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 10, (3, 40)), rng.integers(2, 10, (3, 40))
    lengths = rng.integers(5, 15, 40)
    names = tuple(f"u{i}" for i in range(40))
    one, other = (draw(cell(x, lengths, names=names), 3000) for x in (a, b))
    found = difference(one, other)
    by_seed = []
    for s in range(3):
        by_seed.append(100 * (sum(a[s]) - sum(b[s])) / sum(lengths))
    assert found.by_seed == pytest.approx(tuple(by_seed))
    means = []
    for _ in range(3000):
        chosen = rng.integers(0, 40, 40)
        size = sum(lengths[i] for i in chosen)
        rates = [100 * sum(a[s][i] - b[s][i] for i in chosen) / size for s in range(3)]
        means.append(sum(rates) / 3)
    centre = sum(by_seed) / 3
    seeds = sum((d - centre) ** 2 for d in by_seed) / 2 / 3
    utterances = np.var(means, ddof=1)
    total = seeds + utterances
    freedom = total**2 / (seeds**2 / 2)
    # Student's t by its density, summed
    x = np.linspace(0, 60, 600_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    cumulated = np.cumsum(density) / density.sum() / 2 + 0.5
    t = x[np.searchsorted(cumulated, 0.975)]
    assert found.high - found.value == pytest.approx(t * math.sqrt(total), rel=0.05)
    assert found.low + found.high == pytest.approx(2 * found.value)


def test_a_constant_gap_is_told_apart_though_the_seeds_scatter():
    base = np.array([[1, 4, 2, 6, 3, 5] * 5, [4, 7, 5, 9, 6, 8] * 5, [2, 5, 3, 7, 4, 6] * 5])
    a, b = draw(cell(base + 1)), draw(cell(base))
    assert mean(a).low < mean(b).high  # the rows overlap
    found = difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((10, 10, 10)) and found.clear


def test_differences_want_the_same_test_set_and_shared_seeds():
    a = draw(cell([[1, 2], [2, 3]], seeds=(1, 2)))
    assert difference(a, draw(cell([[1, 2], [2, 3]], seeds=(1, 2), names=("u0", "x")))) is None
    assert difference(a, draw(cell([[1, 2], [2, 3]], seeds=(3, 4)))) is None
    found = difference(a, draw(cell([[9, 9], [1, 1]], seeds=(5, 2))))
    assert found.by_seed == pytest.approx((15,)) and not found.over_seeds and not found.clear


def test_intervals_cover_what_they_say():
    """Worlds with a known mean: seeds and utterances both drawn; 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    hits, trials = 0, 400
    for trial in range(trials):
        hard = rng.normal(0, 15, 60)  # utterances
        luck = rng.normal(0, 2, 3)  # seeds
        rates = np.clip(50 + hard[None] + luck[:, None] + rng.normal(0, 8, (3, 60)), 0, 100)
        names = tuple(f"{trial}-{i}" for i in range(60))
        found = mean(draw(cell(np.round(rates), np.full(60, 100), names=names), 300))
        hits += found.low <= 50 <= found.high
    assert 0.92 <= hits / trials <= 0.99


# --- the report

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
    """Results in which separate is best, average second; single teachers by their order."""
    worth = {"separate": 0, "average": 1, "concat": 2}
    worth |= {name: 3 + i for i, name in enumerate(setting.teachers)}
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
    assert (found.finished, found.wanted) == (96, 96)
    study = make_study(setting, found, 200)
    assert study.whole == 12 * 5 * 2
    assert study.best == {(s, t): "tiny_hubert" for s in ("small", "large") for t in setting.tasks}
    assert study.means["small-average", "pr per", "clean"].value == pytest.approx(100 * 5 / 24)
    assert study.means["large-average", "sid accuracy", "clean"].value == pytest.approx(100 * 5 / 6)
    # a wrong word has two edits (a letter in place of another, one more): of 7 characters a text
    assert study.means["small-average", "asr cer", "clean"].value == pytest.approx(100 * 10 / 42)
    assert len(study.comparisons) == 2 * 5 * 2 * 5
    by = {(c.size, c.metric.key, c.condition, c.one, c.other): c for c in study.comparisons}
    c = by["small", "pr per", "esc10_snr5", "average", "tiny_hubert"]
    assert c.best_single and c.better and c.estimate.value == pytest.approx(-100 * 2 / 24)
    c = by["small", "sid accuracy", "clean", "concat", "average"]
    assert not c.best_single and not c.better and c.estimate.value == pytest.approx(-100 / 6)


def test_the_report_has_the_numbers_and_keeps_the_prose(tmp_path, capsys):
    out, docs = tmp_path / "out", tmp_path / "docs"
    setting = typed("--seeds", "1", "2")
    Folder(out).begin(setting, tmp_path, {})
    left_out = ("large-separate-seed2", "pr")
    write_students(out / "result/superb", setting, skip=[left_out])
    reference = tmp_path / "reference"
    write_run(reference, "fbank", "pr", pairs("pr", 20), seed=1)
    docs.mkdir()
    prose = f"# Ours\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    (docs / "study.md").write_text(prose)
    words = [str(tmp_path), "-o", str(out), "--docs", str(docs), "--seeds", "1", "2"]
    assert tool.main([*words, "--report-only", "--reference", str(reference)]) == 0
    assert "95 of 96 downstream models are finished" in capsys.readouterr().out
    text = (docs / "study.md").read_text()
    assert text.startswith("# Ours\n\nbefore\n\n" + BEGIN) and text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    # PR of one row under two conditions lacks a seed
    assert "95 of 96 downstream models are finished; 118 of 120 cells have all 2 seeds." in text
    assert sum(line.count("†") for line in text.splitlines() if line.startswith("|")) == 2
    row = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert [c.strip() for c in row.split("|")[2:5]][0] == "fbank" and "83.3 [" in row
    assert "best on dev, clean, over the seeds (PR at small: tiny_hubert;" in text
    assert "tie on dev" not in text and "so its CER takes the same choice." in text
    assert "not run like the students" not in text and "(--cache-features)" not in text
    with open(docs / "study.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sum(line["kind"] == "mean" for line in lines) == 12 * 5 * 2 + 1
    assert sum(line["kind"] == "difference" for line in lines) == 100
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
    Folder(out).begin(typed(), tmp_path, {})
    assert tool.main([str(tmp_path), "-o", str(out), "--docs", str(docs), "--report-only"]) == 0
    text = (docs / "study.md").read_text()
    assert "0 of 144 downstream models are finished; 0 of 120 cells" in text


def test_sentences_say_what_the_numbers_say(tmp_path):
    setting = typed()
    write_students(tmp_path, setting)
    study = make_study(setting, read_study(setting, tmp_path), 200)
    c = next(
        c for c in study.comparisons
        if (c.size, c.metric, c.condition, c.one) == ("small", SID, "clean", "average")
    )  # fmt: skip
    estimate = dataclasses.replace(c.estimate, value=12.34, low=2.0, high=22.68)
    assert sentence(dataclasses.replace(c, estimate=estimate)) == (
        "SID accuracy, clean, size small: average beats the best single teacher (tiny_hubert) by "
        "12.3 [2.0, 22.7] points."
    )
    c = dataclasses.replace(c, metric=CER, condition="esc10_snr5", other="average", one="concat",
                            best_single=False, estimate=estimate)  # fmt: skip
    assert sentence(c) == (
        "ASR CER, under noise: esc10, 5 dB SNR, size small: concat is behind average by 12.3 "
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
    Folder(out).begin(setting, tmp_path, {})
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
    assert not any(c.best_single and c.metric.task == "asr" for c in study.comparisons)
    assert any(c.best_single and c.metric.task == "sid" for c in study.comparisons)
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
    Folder(out).begin(setting, tmp_path, {})
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
    assert found.differing == {
        "padded/pr": ("features",),
        "longer/pr": ("steps", "recipe"),
        "deep/pr": ("probe",),
        "fewer/sid": ("test set",),
    }
    assert found.alone == ("pr", "sid", "er")
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
    assert read_study(setting, tmp_path).alone == ("sid",)


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
