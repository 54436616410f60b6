"""Child processes: several at once, errors, Ctrl-C; a downstream run in one process."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.superb import run as superb
from s3prl_ekd.system import jobs
from s3prl_ekd.system.jobs import Jobs

from .conftest import make_sound
from .superb_workspace import last_states, short_runs


def test_jobs_run_at_once_and_a_failed_one_does_not_stop_the_others(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    both, done = threading.Barrier(2, timeout=60), []

    def job(item, environment):
        both.wait()
        if item == "b":
            raise DataError("b is damaged")
        return item, environment["OMP_NUM_THREADS"]

    with pytest.raises(SetupError, match=r"^1 of 4 runs failed.*b is damaged"):
        Jobs(2).run_all(job, ["a", "b", "c", "d"], done.append)
    assert sorted(done) == ["a", "c", "d"]
    assert Jobs(2).run_all(job, ["d", "a"]) == [("d", "3"), ("a", "3")]


def test_each_job_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    visible = [jobs._slot_environment(i, 3)["CUDA_VISIBLE_DEVICES"] for i in range(3)]
    assert visible == ["4", "7", "4"]
    assert jobs._slot_environment(0, 1) == dict(os.environ)


@pytest.mark.parametrize("end", ["time", "second Ctrl-C"])
def test_a_process_that_ignores_ctrl_c_is_terminated(monkeypatch, end):
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', "
    child = subprocess.Popen(
        [sys.executable, "-c", code + "flush=True); time.sleep(600)"], stdout=subprocess.PIPE
    )
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    try:
        assert child.stdout.readline() == b"ready\n"
        processes = Jobs()
        processes._children |= {child, ended}
        with monkeypatch.context() as patch:
            if end == "time":
                patch.setattr(jobs, "_SAVE_SECONDS", 0.3)
                processes.stop()
            else:
                again = lambda seconds: signal.raise_signal(signal.SIGINT)  # noqa: E731
                patch.setattr(jobs.time, "sleep", again)
                with pytest.raises(KeyboardInterrupt):
                    processes.stop()
        assert child.wait(timeout=10) == -signal.SIGTERM
    finally:
        child.kill()


def test_ctrl_z_pauses_the_children(tmp_path):
    """The state of a process is the third field of /proc/PID/stat: T if stopped."""
    code = """
import os, signal, sys, threading, time
from s3prl_ekd.system import jobs
jobs.child_command = lambda argv: [sys.executable, "-c", "import time; time.sleep(600)"]
runner = jobs.Jobs()
threading.Timer(1.0, lambda: print([c.pid for c in runner._children][0], flush=True)).start()
runner.call([])
"""

    def state(pid):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    def wait(pid, states):
        deadline = time.monotonic() + 30
        while state(pid) not in states:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGTSTP)
        wait(process.pid, "T")
        wait(child, "T")
        process.send_signal(signal.SIGCONT)
        wait(child, "SR")
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def test_training_and_tests_in_one_process_give_the_results_of_the_commands(
    in_superb_workspace, tmp_path, monkeypatch
):
    import soundfile

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the file lists that s3prl's SID caches
    (tmp_path / "rain").mkdir()
    soundfile.write(tmp_path / "rain/rain.wav", make_sound(1.0), 16000)
    noise = {"noise": [str(tmp_path / "rain")], "snr": [0.0]}
    typed, run = (short_runs(tmp_path, out, **noise)[0] for out in ("typed", "superb"))
    for argv in superb.commands(typed):
        subprocess.run([sys.executable, "-m", "s3prl_ekd", *argv], check=True)
    superb.run_plan([run])
    assert not list(tmp_path.glob("s3prl_ekd_sid_*"))
    first, second = map(last_states, (typed, run))
    for part in ("Featurizer", "Downstream", "Optimizer"):
        assert str(first[part]) == str(second[part])
    for key, value in first["Downstream"].items():
        assert torch.equal(value, second["Downstream"][key]), key
    for name in TASKS["sid"].files(None):
        for condition in (".", "noisy/rain_snr0"):
            paths = [folder / condition / name for folder in (typed.folder, run.folder)]
            assert paths[0].read_bytes() == paths[1].read_bytes()
    log = (run.folder / "log.txt").read_text()
    assert log.count("test acc") == 2 and log.count("Start a new experiment") == 1
    # as for an interruption between the tests: the training is not repeated
    record = superb.read_record(run.folder)
    superb._write(run, dataclasses.replace(record, tested={"clean": "."}))
    superb.run_plan([run])
    more = (run.folder / "log.txt").read_text()[len(log) :]
    assert more.count("test acc") == 1 and "overall" not in more
    assert superb.read_record(run.folder) == record


def test_a_training_on_several_gpus_is_a_process_of_its_own(
    in_superb_workspace, tmp_path, monkeypatch
):
    (run,) = short_runs(tmp_path, "out")
    started = []

    def record(self, argv, log, environment, stdin=b""):
        started.append(argv)
        raise SetupError("no GPU")

    monkeypatch.setattr(Jobs, "run", record)
    with pytest.raises(SetupError, match="no GPU"):
        superb.run_plan([run], gpus=2)
    assert [shlex.join(argv) for argv in started] == [shlex.join(superb.commands(run, 2)[0])]


def test_errors_of_a_command(in_superb_workspace, tmp_path):
    (run,) = short_runs(tmp_path, "out")
    run.folder.mkdir(parents=True)
    log = run.folder / "log.txt"
    processes = Jobs()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = ["run_downstream.py", "-m", "train", "-u", "fbank", "-d", "nothing"]
    argv += ["-n", "x"]
    with pytest.raises(SetupError, match=f"downstream/nothing.*{log}"):
        processes.run(argv, log, environment)
    with pytest.raises(SetupError, match="unrecognized arguments"):  # argparse's own message
        processes.run(["doctor", "--nonsense"], log, environment)

    def end(kill):
        deadline = time.monotonic() + 120
        try:
            while not log.is_file() or "overall:" not in log.read_text():  # training has started
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:  # otherwise the run would not end
            kill()

    override = "config.runner.total_steps=1000000"
    endless = dataclasses.replace(run.training(), override=override).command()
    with ThreadPoolExecutor(1) as pool:
        log.unlink()
        pool.submit(end, lambda: [child.kill() for child in processes._children])
        with pytest.raises(SetupError, match="SIGKILL"):
            processes.run(endless, log, environment)
        log.unlink()
        pool.submit(end, processes.stop)
        with pytest.raises(SetupError, match="Ctrl-C"):
            processes.run(endless, log, environment)
    size = log.stat().st_size
    with pytest.raises(SetupError):  # no command starts after a stop
        processes.run(["doctor", "--nonsense"], log, environment)
    assert log.stat().st_size == size
