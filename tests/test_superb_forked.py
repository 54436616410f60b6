"""The runs of `s3prl-ekd superb` in forked processes behave as in new processes."""

import atexit
import dataclasses
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest
import torch

from s3prl_ekd.compat import voxceleb1_cache
from s3prl_ekd.downstream.tasks import TASKS
from s3prl_ekd.errors import SetupError
from s3prl_ekd.launch import forked as forking
from s3prl_ekd.launch.forked import ForkServerRunner
from s3prl_ekd.superb import run as superb
from s3prl_ekd.superb.run import run_command
from s3prl_ekd.system import jobs
from s3prl_ekd.system.jobs import CommandRunner

from .superb_workspace import last_states, make_workspace, short_runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("superb"))


@pytest.fixture
def here(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


@pytest.fixture(scope="module")
def server():
    """A fork server with our imports; one that another test started is stopped first."""
    forkserver._forkserver._stop()
    yield ForkServerRunner()
    forkserver._forkserver._stop()


def _act(connection, *arguments):
    parts = (_start_method, _leave_folder, _print, _compute)
    forking.SCRIPTS["acting"] = lambda: connection.send({part.__name__: part() for part in parts})
    forking._child(*arguments)


@pytest.fixture(scope="module")
def forked(server, tmp_path_factory):
    """Results and log of functions of this test that run as a forked command with two threads."""
    folder = tmp_path_factory.mktemp("forked")
    (folder / "tmp").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["TMPDIR"] = str(folder / "tmp")
    receiver, sender = server._context.Pipe()
    arguments = (["acting"], str(folder / "log.txt"), environment, str(folder), "fork", 2)
    child = server._context.Process(target=_act, args=(sender, *arguments))
    child.start()
    try:
        sender.close()
        assert receiver.poll(300), "no result in five minutes"
        results = receiver.recv()  # EOFError: see the log
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    return SimpleNamespace(folder=folder, log=(folder / "log.txt").read_text(), **results)


def _start_method():
    return multiprocessing.get_start_method()


def test_a_forked_command_forks_its_workers(forked):
    """As a new process does, not by another fork server, which would import torch again."""
    assert forked._start_method == "fork"


_FOLDERS = []


def _leave_folder():
    atexit.register(print, "at the end")
    _FOLDERS.append(voxceleb1_cache.EmptyFolder())  # referenced by a module, as in s3prl
    folder = os.fspath(_FOLDERS[0])
    assert os.path.isdir(folder)
    return folder


def test_a_forked_command_cleans_up_at_exit(forked):
    assert forked._leave_folder.startswith(str(forked.folder / "tmp/s3prl_ekd_sid_"))
    assert not list(forked.folder.glob("tmp/s3prl_ekd_sid_*"))
    assert forked.log.endswith("at the end\n")


def _print():
    print("on stdout", flush=True)
    handlers, misdirected = 0, []
    for reference in logging._handlerList:
        handler = reference()
        if type(handler) is logging.StreamHandler:  # made by the imports; s3prl has some thirty
            handler.handle(logging.LogRecord("x", logging.ERROR, "", 0, "by a handler", (), None))
            handlers += 1
            if handler.stream not in (sys.stdout, sys.stderr):
                misdirected.append(repr(handler))
    os.write(2, b"by descriptor\n")
    print("on stderr \udcff", file=sys.stderr)  # not flushed here
    return misdirected, handlers, sys.stdin.read()


def test_all_output_of_a_forked_command_is_in_its_log(forked):
    misdirected, handlers, stdin = forked._print
    assert not misdirected and handlers > 5 and stdin == ""
    assert forked.log.startswith("on stdout\n")
    assert "\nby descriptor\non stderr \\udcff\n" in forked.log
    assert forked.log.count("by a handler") == handlers


def _compute():
    a = torch.arange(400 * 400.0).view(400, 400).sin()
    sound = torch.nn.functional.conv1d(a[:1, None], a[:8, None, :9])
    value = (a @ a.T).abs().sum() + sound.abs().sum() + torch.cat([a] * 20).exp().sum()
    return torch.get_num_threads(), float(value)


def test_threads_after_the_fork(forked):
    """The forked process starts its own threads: waiting for the fork server's would hang."""
    threads, value = forked._compute
    assert threads == 2 and value == pytest.approx(_compute()[1], rel=1e-5)


def test_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # 1 was read when torch was imported: conftest.py
    processes = ForkServerRunner()
    for value, threads in (("7", 1), ("3", 3), ("4,2", 4), ("", 1), ("many", 1), ("0", 1)):
        assert processes._threads_of({"OMP_NUM_THREADS": value}) == threads
    assert processes._threads_of({}) == 1


def test_the_fork_server_imports_what_a_run_needs():
    code = (
        "import os, sys, weakref; before = [os.fstat(i).st_ino for i in (1, 2)]\n"
        "from s3prl_ekd.launch import forked_imports as w\n"
        "assert [os.fstat(i).st_ino for i in (1, 2)] == before and sys.stderr is sys.__stderr__\n"
        "print([name for name in w._MODULES if name not in sys.modules])\n"
        "kinds = [type(f.peek()[0]).__name__ for f in list(weakref.finalize._registry)]\n"
        "print(kinds.count('TemporaryDirectory'))  # the first child would remove them\n"
        "import torch; print(torch.get_num_threads(), torch.cuda.is_initialized())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    argv = [sys.executable, "-c", code]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "0", "1 False"] and result.stderr == ""


@pytest.mark.parametrize(
    "version, private",
    [
        ((3, 10, 8), False),
        ((3, 10, 9), True),
        ((3, 11, 0), False),
        ((3, 11, 1), True),
        ((3, 13, 0), True),
    ],
)
def test_python_versions_with_an_authenticated_fork_server(version, private):
    assert forking.has_private_server(version) == private


def test_stopping_a_process_that_has_exited(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    monkeypatch.setattr(jobs, "_GRACE", 0.0)
    monkeypatch.setattr(jobs, "_TO_INTERRUPT", 0.0)
    processes = CommandRunner()
    processes._live.add(process)
    processes.stop()


def test_a_process_that_ignores_ctrl_c_is_terminated(monkeypatch):
    monkeypatch.setattr(jobs, "_GRACE", 0.1)
    monkeypatch.setattr(jobs, "_TO_INTERRUPT", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', "
    child = subprocess.Popen(
        [sys.executable, "-c", code + "flush=True); time.sleep(600)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"ready\n"
        processes = CommandRunner()
        processes._live.add(child)
        processes.stop()
        assert child.wait(timeout=10) == -signal.SIGTERM
    finally:
        child.kill()


def test_forked_and_new_processes_give_the_same_results(here, tmp_path, monkeypatch, server):
    runs = [short_runs(tmp_path, out)[0] for out in ("forked", "new")]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # torch's number here: conftest.py
    assert superb.run_plan(runs[:1], processes=ForkServerRunner()) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert superb.run_plan(runs[1:]) == []
    assert not list((tmp_path / "tmp").glob("s3prl_ekd_sid_*"))
    first, second = map(last_states, runs)
    for part in ("Featurizer", "Downstream", "Optimizer"):
        assert str(first[part]) == str(second[part])
    for key, value in first["Downstream"].items():
        assert torch.equal(value, second["Downstream"][key]), key
    for name in TASKS["sid"].files(None):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes()
    assert "test acc" in (runs[0].folder / "log.txt").read_text()


@pytest.mark.parametrize("fork", [True, False])
def test_errors_of_a_command(here, tmp_path, fork, server):
    (run,) = short_runs(tmp_path, "out")
    run.folder.mkdir(parents=True)
    processes = ForkServerRunner() if fork else CommandRunner()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = ["run_downstream.py", "-m", "train", "-d", "nothing", "-n", "x"]
    with pytest.raises(SetupError, match="downstream/nothing"):
        run_command(run.folder, argv, environment, processes)
    with pytest.raises(SetupError, match="unrecognized arguments"):  # argparse's own message
        run_command(run.folder, ["doctor", "--nonsense"], environment, processes)

    def end(kill):
        deadline = time.monotonic() + 120
        log = run.folder / "log.txt"
        try:
            while not log.is_file() or "overall:" not in log.read_text():  # training has started
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:  # otherwise the run would not end
            kill()

    override = "config.runner.total_steps=1000000"
    endless = dataclasses.replace(run.training(), override=override).command()
    with ThreadPoolExecutor(1) as pool:
        (run.folder / "log.txt").unlink()
        pool.submit(end, lambda: [os.kill(c.pid, signal.SIGKILL) for c in processes._live])
        with pytest.raises(SetupError, match="SIGKILL"):
            run_command(run.folder, endless, environment, processes)
        (run.folder / "log.txt").unlink()
        pool.submit(end, processes.stop)
        with pytest.raises(SetupError, match="Ctrl-C"):
            run_command(run.folder, endless, environment, processes)
    size = (run.folder / "log.txt").stat().st_size
    with pytest.raises(SetupError):  # no command starts after a stop
        run_command(run.folder, ["doctor", "--nonsense"], environment, processes)
    assert (run.folder / "log.txt").stat().st_size == size


def test_commands_are_new_processes_if_no_fork_server_can_start(
    tmp_path, monkeypatch, caplog, server
):
    forkserver._forkserver._stop()
    folder = tmp_path / ("x" * 120)  # longer than the path of a socket may be
    folder.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))
    processes = ForkServerRunner()
    monkeypatch.chdir(tmp_path)
    for log in ("a.txt", "b.txt"):
        argv = ["run_downstream.py", "-m", "train", "-d", "nothing", "-n", "x"]
        assert processes.call(argv, tmp_path / log, dict(os.environ)) == 2
        assert "downstream/nothing" in (tmp_path / log).read_text()
    assert len([r for r in caplog.records if r.name == forking.__name__]) == 1
