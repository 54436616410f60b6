"""A run that failed ends, and so does one that waits for a batch; ten of each: time_to_exit.py."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import Dataset

from s3prl_ekd.data import loader as loaders
from s3prl_ekd.data.batches import DistillationDataset, leave_signals_to_the_main_process
from s3prl_ekd.data.loader import BatchLoader, workers_end
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.errors import ConfigError, SetupError
from s3prl_ekd.pretrain.interrupts import StoppedWaiting, StopSignals, explain_worker_errors
from s3prl_ekd.pretrain.settings import check_runner_config
from s3prl_ekd.pretrain.tensorboard import read_scalars
from s3prl_ekd.pretrain.trainer import dev_loss
from s3prl_ekd.workspace import write_workspace

from .cache_cases import cache
from .conftest import REPO, write_configs
from .kill_and_resume import unequal
from .test_runner import run, saved  # noqa: F401 (a fixture)
from .time_to_exit import CASES, end_of

SOON = 30  # seconds: 10 on a machine that does nothing else


@pytest.fixture
def folder(tmp_path, teachers, corpus, monkeypatch):
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, corpus)
    config = yaml.safe_load((tmp_path / "runner.yaml").read_text())
    config["pretrain_expert"]["datarc"] |= {"num_workers": 2, "loader_timeout": 60}
    config["runner"]["save_step"] = 5
    (tmp_path / "runner.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Numbers(Dataset):
    """0 to 9; at one of them a worker stays for ever."""

    def __init__(self, stuck=None):
        self.stuck = stuck

    def __len__(self):
        return 10

    def __getitem__(self, index):
        while index == self.stuck:
            time.sleep(1)
        return torch.tensor(index)


def numbers(stuck=None, **more):
    more = {"num_workers": 2, "worker_init_fn": leave_signals_to_the_main_process, **more}
    return BatchLoader(Numbers(stuck), **more)


def ended(begin):
    return time.monotonic() - begin < SOON and not multiprocessing.active_children()


# The loader


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("stuck", [None, 3])
def test_closing_ends_the_workers(persistent, stuck):
    loader = numbers(stuck, persistent_workers=persistent)
    batches = iter(loader)
    assert next(batches) == 0 and len(multiprocessing.active_children()) == 2
    begin = time.monotonic()
    loader.close()
    assert ended(begin)
    loader.dataset.stuck = None
    assert len(list(loader)) == 10  # it can be used again
    loader.close()
    loader.close()
    assert not multiprocessing.active_children()


def test_workers_that_are_spawned_end_too():
    loader = numbers(3, multiprocessing_context="spawn", num_workers=1)
    assert next(iter(loader)) == 0
    begin = time.monotonic()
    loader.close()
    assert ended(begin)


FAILS = """
import sys
from tests.test_exit import numbers
if __name__ == "__main__":
    next(iter(numbers(3, num_workers=int(sys.argv[1]))))
    raise RuntimeError("a defect")
"""


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_that_nobody_catches_ends_the_process(workers):
    """As with s3prl's own Runner, which closes nothing."""
    done = subprocess.run(
        [sys.executable, "-c", FAILS, str(workers)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("RuntimeError: a defect")


def test_without_workers_there_is_no_timeout():
    loader = numbers(num_workers=0, timeout=3, worker_init_fn=None)
    assert len(list(loader)) == 10 and loader.timeout == 0
    loader.close()


def test_a_timeout_is_a_sentence():
    loader = numbers(0, timeout=1)
    batches = iter(loader)
    with pytest.raises(SetupError, match=r"no batch for 1 s.*/dev/shm.*num_workers.*; go on$"):
        with explain_worker_errors("go on"):
            next(batches)
    loader.close()
    assert not multiprocessing.active_children()


def test_no_room_for_a_semaphore(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loaders.multiprocessing, "Lock", full)
    with pytest.raises(SetupError, match=r"cannot start the 2 .*/dev/shm has .*num_workers=0"):
        iter(numbers())


def test_without_shared_memory_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(loaders, "SHARED_MEMORY", str(tmp_path / "none"))
    assert loaders.shared_memory() == f"{tmp_path / 'none'} is not there"


def test_loaders_of_others_end_with_a_run_that_fails():
    """s3prl's: torch would wait five seconds for each worker."""
    loader = torch.utils.data.DataLoader(Numbers(3), num_workers=2)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="a defect"), workers_end():
        for number in loader:
            if number == 2:
                raise RuntimeError("a defect")
    assert ended(begin)


# A run


def spoil(monkeypatch, stuck_at=None, error_at=None, share=None, number=None):
    """Workers that give no more once a step has begun, and a signal a second later; a step that
    fails; no shared memory."""
    begun = multiprocessing.Event()
    forward, item = EnsembleDistiller.forward, DistillationDataset.__getitem__

    def spoiled_forward(self, *args, step=1, **kwargs):
        if step == error_at:
            raise RuntimeError("a defect")
        if step == stuck_at:
            begun.set()
            if number is not None:
                threading.Timer(1, os.kill, (os.getpid(), number)).start()
        return forward(self, *args, step=step, **kwargs)

    def spoiled_item(self, index):
        while begun.is_set():
            time.sleep(1)
        return item(self, index)

    monkeypatch.setattr(EnsembleDistiller, "forward", spoiled_forward)
    monkeypatch.setattr(DistillationDataset, "__getitem__", spoiled_item)
    if share is not None:
        monkeypatch.setattr(torch.UntypedStorage, "share_memory_", share)


def test_a_failed_step_leaves_no_worker(run, folder, monkeypatch):  # noqa: F811
    spoil(monkeypatch, error_at=4, stuck_at=2)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="a defect"):
        run("x")
    assert ended(begin) and saved("x")["Step"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_waits_for_a_batch_obeys(run, folder, monkeypatch, number):  # noqa: F811
    """It saves its last step, and goes on as one that was left alone."""
    with monkeypatch.context() as patches:
        spoil(patches, stuck_at=2, number=number)
        begin = time.monotonic()
        code, said = run("x")
    assert code == 128 + number and ended(begin) and "Traceback" not in said
    assert f"stopped by {number.name} at step " in said and "all saved; go on with: run_" in said
    step = saved("x", "last.ckpt")["Step"]
    assert 2 <= step < 6 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    if number == signal.SIGTERM:
        assert run("x", "-a")[0] == 0 and run("alone")[0] == 0
        for part in ("student", "heads"):
            assert not unequal(saved("x")["EKD"][part], saved("alone")["EKD"][part])


def test_a_loader_that_gives_nothing_ends_the_run(run, folder, monkeypatch):  # noqa: F811
    spoil(monkeypatch, stuck_at=2)
    code, said = run("x", "-o", "config.pretrain_expert.datarc.loader_timeout=1")
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in said and not multiprocessing.active_children()
    for part in ("1 s", "/dev/shm", "num_workers", "loader_timeout", "run_pretrain.py -u ekd -n x"):
        assert part in error
    assert saved("x")["Step"] >= 2


def test_no_shared_memory_is_a_sentence_at_once(run, folder, monkeypatch):  # noqa: F811
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    spoil(monkeypatch, share=full)
    begin = time.monotonic()
    code, said = run("x")
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and ended(begin) and "Traceback" not in said
    assert "/dev/shm has " in error and "MB free" in error and "num_workers=0" in error


def with_dev_table(folder):
    """The corpus under two names; gives what ``-o`` says of it."""
    tables = folder / "tables"
    tables.mkdir()
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    table = f"{config['pretrain_expert']['datarc']['file_path']}/train.csv"
    for name in ("train", "dev"):
        (tables / f"{name}.csv").write_text(open(table).read())
    return f"config.pretrain_expert.datarc.file_path='{tables}'"


def test_dev_batches_are_waited_for_in_the_same_way(run, folder, monkeypatch):  # noqa: F811
    begun = multiprocessing.Event()
    item = DistillationDataset.__getitem__

    def stuck(self, index):
        while begun.is_set():
            time.sleep(1)
        return item(self, index)

    def measure(*args):
        begun.set()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return dev_loss(*args)

    monkeypatch.setattr(DistillationDataset, "__getitem__", stuck)
    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", measure)
    where = with_dev_table(folder)
    code, said = run("x", "-o", where, dev_sets=["dev"], eval_step=2)
    assert code == 143 and "stopped by SIGTERM at step 2 of 6, all saved" in said
    assert saved("x")["Step"] == 2 and not multiprocessing.active_children()
    # what was to be measured is measured when the run goes on, and then at each of its own steps
    begun.clear()
    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", dev_loss)
    code, said = run("x", "-a", "-o", where, dev_sets=["dev"], eval_step=2)
    assert code == 0
    measured = read_scalars("result/pretrain/x")["ekd/dev-loss"]
    assert sorted(measured) == [2, 4, 6]
    code, said = run("whole", "-o", where, dev_sets=["dev"], eval_step=2)
    assert code == 0 and read_scalars("result/pretrain/whole")["ekd/dev-loss"] == measured


def test_a_signal_in_the_last_dev_pass_loses_no_checkpoint(run, folder, monkeypatch):  # noqa: F811
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise StoppedWaiting

    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", interrupted)
    where, more = with_dev_table(folder), {"dev_sets": ["dev"], "eval_step": 6}
    code, said = run("x", "-o", where, **more)
    assert code == 143 and not Path("result/pretrain/x/states-6.ckpt").exists()
    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", dev_loss)
    code, said = run("x", "-a", "-o", where, **more)
    assert code == 0 and Path("result/pretrain/x/states-6.ckpt").exists()
    assert list(read_scalars("result/pretrain/x")["ekd/dev-loss"]) == [6]


@pytest.mark.parametrize("value", [0.5, -1, 1e300, "600 s", True, None])
def test_timeouts_that_are_refused(folder, value):
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    config["pretrain_expert"]["datarc"]["loader_timeout"] = value
    with pytest.raises(ConfigError, match=r"pretrain_expert\.datarc.*(loader_timeout|number)"):
        check_runner_config(config, "x")


def test_the_timeouts_that_are_allowed(folder):
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    data = config["pretrain_expert"]["datarc"]
    data.pop("loader_timeout")
    assert check_runner_config(config, "x").pretrain_expert.datarc.loader_timeout == 600
    for value in (0, 1, 604800):
        data["loader_timeout"] = value
        assert check_runner_config(config, "x").pretrain_expert.datarc.loader_timeout == value


def test_stored_targets_are_not_waited_for_without_end(folder, monkeypatch, capfd):
    item = DistillationDataset.__getitem__

    def stuck(self, index):
        while index == 4:
            time.sleep(1)
        return item(self, index)

    monkeypatch.setattr(DistillationDataset, "__getitem__", stuck)
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    config["pretrain_expert"]["datarc"]["loader_timeout"] = 1
    (folder / "runner.yaml").write_text(yaml.safe_dump(config))
    assert cache(folder, folder / "cache") == 2
    (error,) = [e for e in capfd.readouterr().err.splitlines() if e.startswith("error:")]
    assert "/dev/shm" in error and "type the same command again" in error
    assert not multiprocessing.active_children()
    monkeypatch.setattr(DistillationDataset, "__getitem__", item)
    assert cache(folder, folder / "cache") == 0  # it goes on


# Signals


def test_waiting_ends_only_after_some_seconds():

    def slow():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        yield 1  # the batch of the step that is made yet
        time.sleep(30)

    with StopSignals(quiet=True) as stop:
        batches = stop.batches(slow())
        assert next(batches) == 1 and stop.received == signal.SIGTERM
        time.sleep(1.5)  # a step may take its time
        begin = time.monotonic()
        with pytest.raises(StoppedWaiting):
            next(batches)
        assert 0.5 < time.monotonic() - begin < 20
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_torchrun_hands_on_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignals(quiet=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        assert stop.received == signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "codes", "said"),
    [
        ("an error in a step", {1}, "RuntimeError: a defect"),
        ("two SIGTERM", {-signal.SIGTERM}, "a second signal leaves at once"),
        ("two SIGTERM, in code that is not Python's", {143}, "a second signal leaves at once"),
    ],
)
def test_a_process_ends(folder, title, codes, said):
    end = end_of(folder, CASES[title])
    assert end.code in codes and end.seconds < SOON and end.left == 0 and said in end.said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("an error in the second process of two", "[rank1]: RuntimeError: a defect"),
        ("SIGTERM while the second of two waits", "stopped by SIGTERM at step "),
    ],
)
def test_the_other_processes_end_too(folder, title, said):
    end = end_of(folder, CASES[title])
    assert end.code != 0 and end.seconds < SOON and end.left == 0 and end.step >= 2
    assert said in end.said
