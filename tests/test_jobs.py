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

import pytest
import torch

from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.errors import DataError, SetupError
from s3prl_ekd.superb import run as superb
from s3prl_ekd.system import jobs
from s3prl_ekd.system.jobs import Jobs

from .conftest import make_sound
from .superb_workspace import last_states, make_workspace, short_runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("superb"))


@pytest.fixture
def here(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


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


def test_a_second_ctrl_c_terminates_a_process_that_ignores_the_first(monkeypatch):
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
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(jobs.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
            processes.stop()
        assert child.wait(timeout=10) == -signal.SIGTERM
    finally:
        child.kill()


def test_training_and_tests_in_one_process_give_the_results_of_the_commands(here, tmp_path):
    import soundfile

    (tmp_path / "rain").mkdir()
    soundfile.write(tmp_path / "rain/rain.wav", make_sound(1.0), 16000)
    noise = {"noise": [str(tmp_path / "rain")], "snr": [0.0]}
    typed, run = (short_runs(tmp_path, out, **noise)[0] for out in ("typed", "superb"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for argv in superb.commands(typed):
        subprocess.run([sys.executable, "-m", "s3prl_ekd", *argv], env=environment, check=True)
    superb.run_plan([run])
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


def test_a_training_on_several_gpus_is_a_process_of_its_own(here, tmp_path, monkeypatch):
    (run,) = short_runs(tmp_path, "out")
    started = []

    def record(self, argv, log, environment, stdin=b""):
        started.append(argv)
        raise SetupError("no GPU")

    monkeypatch.setattr(Jobs, "run", record)
    with pytest.raises(SetupError, match="no GPU"):
        superb.run_plan([run], gpus=2)
    assert [shlex.join(argv) for argv in started] == [shlex.join(superb.commands(run, 2)[0])]


def test_errors_of_a_command(here, tmp_path):
    (run,) = short_runs(tmp_path, "out")
    run.folder.mkdir(parents=True)
    log = run.folder / "log.txt"
    processes = Jobs()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = ["run_downstream.py", "-m", "train", "-d", "nothing", "-n", "x"]
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
