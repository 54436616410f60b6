"""tools/study.py runs each job once, stops and resumes. The commands are replaced by a script."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import study as tool
from study_parts import children, run
from study_parts.folder import StudyFolder, TimeSpent
from study_parts.parts import plan

from s3prl_ekd.errors import SetupError

from .conftest import REPO
from .study_cases import parse

pytestmark = pytest.mark.slow  # of the developers' tools

FAKE = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
with open("calls.txt", "a") as file:
    file.write(" ".join(argv) + chr(10))
def mark(event):
    with open("times.txt", "a") as file:
        file.write(event + " " + argv[0] + chr(10))
mark("begin")
if argv[0] == "superb":
    time.sleep(float(os.environ.get("SLOW", 0)))
if argv[0] == "run_pretrain.py":
    run = pathlib.Path(argv[argv.index("-p") + 1])
    run.mkdir(parents=True, exist_ok=True)
    if os.environ.get("FAIL", "?") in run.name:
        sys.exit("error: no luck with " + run.name)
    while os.environ.get("HANG", "?") in run.name and not (run / "half").exists():
        (run / "half").touch()
        time.sleep(60)
if argv[0] == "export":
    pathlib.Path(argv[argv.index("-o") + 1]).touch()
if argv[0] in ("cache", "prepare"):
    pathlib.Path(argv[argv.index("-o") + 1]).mkdir(parents=True, exist_ok=True)
mark("end")
"""


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """A study of 6 students of one seed, with fake commands.

    Returns:
        A function that runs it and returns (exit code, the command lines that it ran).
    """
    speech, out = tmp_path / "speech", tmp_path / "out"
    (speech / "esc10").mkdir(parents=True)
    for name in ("pr", "asr", "sid", "er", "unlabeled"):
        (speech / f"{name}.tsv").touch()
    for name in ("lexicon.txt", "esc10/1.wav"):
        (speech / name).touch()
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(children, "LAUNCH_ARGV", (sys.executable, "-IS", str(tmp_path / "fake.py")))
    monkeypatch.setattr(run, "POLL_SECONDS", 0.02)
    argv = [str(speech), "-o", str(out), "--docs", str(tmp_path / "docs"), "--seeds", "7"]
    argv += ["--size", "s=16,32,1", "--init", "none", "--teacher", "a", "--teacher", "b"]
    argv += ["--noise", str(speech / "esc10")]

    def start(*more: str) -> tuple[int, list[str]]:
        calls = out / "calls.txt"
        calls.unlink(missing_ok=True)
        code = tool.main([*argv, *more])
        return code, calls.read_text().splitlines() if calls.exists() else []

    start.argv, start.out = argv, out
    return start


def test_each_job_runs_once(faked, capsys):
    code, calls = faked("--jobs", "2")
    assert code == 0
    names = [call.split()[0] for call in calls]
    assert names.count("prepare") == 5 and names.count("cache") == 1
    assert names.count("run_pretrain.py") == names.count("export") == 6
    assert names.count("superb") == 1 and names[-1] == "superb"
    assert names.index("cache") < names.index("run_pretrain.py")
    assert "0 of 24 " in capsys.readouterr().out  # the fake command writes no results
    assert faked("--jobs", "2") == (0, [])


def test_an_evaluation_runs_alone(faked, monkeypatch):
    monkeypatch.setenv("SLOW", "0.5")
    code, calls = faked("--jobs", "2", "--seeds", "7", "8")
    assert code == 0 and sum(call.startswith("superb") for call in calls) == 2
    assert calls[-1].startswith("superb")
    times = (faked.out / "times.txt").read_text().splitlines()
    for i, line in enumerate(times):
        if line == "begin superb":  # no other job runs at the same time
            events = [entry.split()[0] for entry in times[:i]]
            assert events.count("begin") == events.count("end")
            assert times[i + 1] == "end superb"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_study_cannot_resume_with_another_corpus(faked, tmp_path, capsys):
    assert faked()[0] == 0
    before = contents(faked.out)
    other = tmp_path / "other"
    (other / "esc10").mkdir(parents=True)
    (other / "esc10/1.wav").touch()
    assert tool.main([str(other), *faked.argv[1:], "--report-only"]) == 0
    assert contents(faked.out) == before
    for path in (tmp_path / "speech").glob("*.t*"):
        (other / path.name).write_bytes(path.read_bytes())
    (other / "asr.tsv").write_text("another one")
    capsys.readouterr()
    assert tool.main([str(other), *faked.argv[1:]]) == 2
    error = capsys.readouterr().err
    assert " asr.tsv (" in error and "\n" not in error.strip()
    noise = tmp_path / "noise"
    noise.mkdir()
    assert faked("--noise", str(noise)) == (2, [])
    assert str(noise) in capsys.readouterr().err
    (noise / "1.wav").touch()
    assert faked("--noise", str(noise)) == (2, [])
    assert " noise (" in capsys.readouterr().err
    assert faked("--report-only", "--steps", "10")[0] == 2
    assert re.search(r"\bsteps\b.*200.*10", capsys.readouterr().err)
    after = contents(faked.out)
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k not in (".lock", "calls.txt")
    }


def test_nothing_is_written_into_a_locked_folder(faked, capsys):
    faked.out.mkdir()
    code = (
        "import sys; from s3prl_ekd.system.lock import FolderLock\n"
        f"with FolderLock({str(faked.out)!r}): print('locked', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        assert faked() == (2, [])
        holder.stdin.close()
    assert str(faked.out) in capsys.readouterr().err
    assert [path.name for path in faked.out.iterdir()] == [".lock"]


def test_a_failed_job_is_named_and_the_others_run(faked, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "s-concat")
    code, calls = faked()
    assert code == 2
    error = capsys.readouterr().err
    assert re.search(r"distil-s-concat-seed7\b.*no luck with s-concat-seed7", error)
    evaluated = [call for call in calls if call.startswith("superb")]
    assert len(evaluated) == 1 and "s-concat" not in evaluated[0] and "s-average" in evaluated[0]
    monkeypatch.delenv("FAIL")
    code, calls = faked()
    assert code == 0
    assert [call.split()[0] for call in calls] == ["run_pretrain.py", "export", "superb"]
    assert "s-concat" in calls[0] and "s-concat" in calls[2] and "s-average" in calls[2]


def test_minutes_stop_the_study_and_the_next_start_resumes(faked, monkeypatch, capsys):
    monkeypatch.setenv("HANG", "s-b-")
    half = faked.out / "result/pretrain/s-b-seed7/half"
    clock = SimpleNamespace(monotonic=lambda: 1e9 if half.exists() else 0.0)
    monkeypatch.setattr(tool, "time", clock)
    code, calls = faked("--minutes", "5")
    assert code == 0 and str(faked.out) in capsys.readouterr().out
    assert "s-b-seed7" in calls[-1]
    assert not (faked.out / "running.json").exists()
    monkeypatch.setattr(tool, "time", time)
    code, calls = faked()
    assert code == 0
    assert "s-b-seed7" in calls[0]  # the stopped job runs again, finished ones do not
    trained = [call for call in calls if call.startswith("run_pretrain.py")]
    assert len(trained) == 4 and not any("s-a-seed7" in call for call in trained)


def test_a_killed_study_resumes(faked, tmp_path):
    code = (
        "import sys; sys.path.insert(0, {tools!r})\n"
        "import study; from study_parts import children\n"
        "children.LAUNCH_ARGV = {launch!r}\n"
        "sys.exit(study.main({argv!r}))\n"
    ).format(tools=str(REPO / "tools"), launch=children.LAUNCH_ARGV, argv=faked.argv)
    env = {**os.environ, "HANG": "s-b-"}
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL) as process:
        half = faked.out / "result/pretrain/s-b-seed7/half"
        deadline = time.monotonic() + 240
        while not half.exists() or not (faked.out / "running.json").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # to write running.json
        process.send_signal(signal.SIGKILL)
    groups = json.loads((faked.out / "running.json").read_text())["groups"]
    assert len(groups) == 1
    try:
        with pytest.raises(SetupError, match=f"kill -- -{next(iter(groups))}"):
            children.check_no_leftovers(faked.out / "running.json")
        assert faked() == (2, [])  # while the process still runs
    finally:
        for pid in groups:
            os.killpg(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(children._start_time(int(pid)) for pid in groups) and time.monotonic() < deadline:
        time.sleep(0.05)
    code, calls = faked()
    assert code == 0 and "s-b-seed7" in calls[0]
    assert sum(call.startswith("run_pretrain.py") for call in calls) == 4


def test_cpu_time_includes_child_processes_that_are_not_waited_for(tmp_path, monkeypatch):
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    busy = "import os, time\nif os.fork() == 0:\n while time.process_time() < 0.6: pass\n"
    busy += " open('done', 'w').close()\n time.sleep(60)\n"
    busy += "while not os.path.exists('done'): time.sleep(0.01)\ntime.sleep(0.3)\n"
    monkeypatch.setattr(children, "LAUNCH_ARGV", (sys.executable, "-IS", "-c", busy))
    monkeypatch.setattr(children, "CPU_POLL_SECONDS", 0.01)
    process = children.JobProcess([()], tmp_path, tmp_path / "log")
    try:
        while process.poll() is None:
            time.sleep(0.01)
        assert 0.55 <= process.spent.cpu < 3
    finally:
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_a_signal_to_an_ended_process_group_is_ignored(tmp_path, monkeypatch, error):
    """macOS raises PermissionError for such a group, Linux ProcessLookupError."""
    monkeypatch.setattr(children, "LAUNCH_ARGV", (sys.executable, "-IS", "-c", ""))
    process = children.JobProcess([()], tmp_path, tmp_path / "log")
    while process.poll() is None:
        time.sleep(0.01)
    sent = []

    def killpg(group, number):
        sent.append((group, number))
        raise error

    monkeypatch.setattr(os, "killpg", killpg)
    process.send_signal(signal.SIGKILL)
    assert sent == [(process.process.pid, signal.SIGKILL)]


def test_dry_run_prints_the_unfinished_commands_and_writes_nothing(faked, capsys):
    assert faked("--dry-run") == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("run_pretrain.py") for line in lines) == 6
    argv = shlex.split(next(line for line in lines if line.startswith("s3prl-ekd superb")))
    for pair in (
        ["--lr", "pr=1e-2"],
        ["--lr", "asr=3e-3"],
        ["--steps", "pr=1000"],
        ["--steps", "asr=400"],
        ["--override", "pr=config.downstream_expert.model.select='FrameLevel'"],
    ):
        assert pair in [argv[i : i + 2] for i in range(len(argv))]
    assert not faked.out.exists()
    faked()
    capsys.readouterr()
    faked("--dry-run")
    assert not any("s3prl-ekd" in line for line in capsys.readouterr().out.splitlines())


def test_time_left_is_the_mean_of_finished_jobs(faked, tmp_path):
    setting = parse("--seeds", "7", "--size", "s=16,32,1", "--teacher", "a", "--teacher", "b")
    folder = StudyFolder(tmp_path / "f")
    folder.start(setting, tmp_path, {})
    jobs = plan(setting, tmp_path, tmp_path, 2)
    for job in jobs[:7]:
        (folder.root / job.output).mkdir(parents=True, exist_ok=True)
        folder.mark_done(job.name, TimeSpent(1.0, 1.0))
    distils = [job for job in jobs if job.kind == "distil"]
    for job in distils[:2]:
        (folder.root / job.output).touch()
        folder.mark_done(job.name, TimeSpent(600.0, 600.0))
    with run.ProgressBar(jobs, setting, folder, parallel=2) as progress:
        progress.show({}, always=True)
        assert (progress.bar.n, progress.total) == (9, 13 + 24)
        guessed = 6 * sum(run.GUESSED_SECONDS[task] for task in ("pr", "asr", "sid", "er"))
        minutes = (run.GUESSED_SECONDS["start"] + 3 * 600 + guessed) / 2 / 60
        assert re.search(rf"\b{minutes:.0f} min\b", progress.bar.postfix)
