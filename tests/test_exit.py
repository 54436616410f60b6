"""Runs that fail, or wait for a batch, end soon; time_to_exit.py measures how soon."""

import errno
import multiprocessing
import os
import re
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
from s3prl_ekd.data.batches import DistillationDataset, ignore_stop_signals
from s3prl_ekd.data.loader import BatchLoader, kill_workers_on_error
from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.errors import ConfigError, SetupError
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.interrupts import StoppedWaiting, StopSignals, explain_worker_errors
from s3prl_ekd.pretrain.settings import check_runner_config
from s3prl_ekd.pretrain.trainer import dev_loss

from .cache_cases import cache
from .conftest import REPO, edit_yaml, saved_states
from .kill_and_resume import unequal
from .time_to_exit import CASES, end_of

SOON = 30  # seconds; 10 on an idle machine


@pytest.fixture
def pretrain_folder(pretrain_folder):
    """With two workers; its run saves at 5 and 6."""
    with edit_yaml(pretrain_folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"] |= {"num_workers": 2, "loader_timeout": 60}
        config["runner"]["save_step"] = 5
    return pretrain_folder


class Numbers(Dataset):
    """0 to 9; a worker hangs at ``stuck``."""

    def __init__(self, stuck=None):
        self.stuck = stuck

    def __len__(self):
        return 10

    def __getitem__(self, index):
        while index == self.stuck:
            time.sleep(1)
        return torch.tensor(index)


def numbers(stuck=None, **more):
    more = {"num_workers": 2, "worker_init_fn": ignore_stop_signals, **more}
    return BatchLoader(Numbers(stuck), **more)


def has_ended(start):
    return time.monotonic() - start < SOON and not multiprocessing.active_children()


# The loader


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("stuck", [None, 3])
def test_closing_ends_the_workers(persistent, stuck):
    loader = numbers(stuck, persistent_workers=persistent)
    batches = iter(loader)
    assert next(batches) == 0 and len(multiprocessing.active_children()) == 2
    start = time.monotonic()
    loader.close()
    assert has_ended(start)
    loader.dataset.stuck = None
    assert len(list(loader)) == 10  # it can be iterated again
    loader.close()
    loader.close()
    assert not multiprocessing.active_children()


def test_closing_ends_spawned_workers():
    loader = numbers(3, multiprocessing_context="spawn", num_workers=1)
    assert next(iter(loader)) == 0
    start = time.monotonic()
    loader.close()
    assert has_ended(start)


FAILS = """
from tests.test_exit import numbers
if __name__ == "__main__":
    next(iter(numbers(3, num_workers=4)))
    raise RuntimeError("a defect")
"""


def test_an_uncaught_error_ends_the_process():
    """As with s3prl's own Runner, which does not close its loaders: one worker of four hangs."""
    done = subprocess.run(
        [sys.executable, "-c", FAILS],
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


def test_a_loader_timeout_is_explained():
    loader = numbers(0, timeout=1)
    batches = iter(loader)
    with pytest.raises(SetupError, match=r"\b1 s\b.*/dev/shm.*num_workers.*HINT$"):
        with explain_worker_errors("HINT"):
            next(batches)
    loader.close()
    assert not multiprocessing.active_children()


def test_no_room_for_a_semaphore(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loaders.multiprocessing, "Lock", full)
    with pytest.raises(SetupError, match=r"\b2\b.*/dev/shm.*num_workers=0"):
        iter(numbers())


def test_no_shared_memory_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(loaders, "SHARED_MEMORY", str(tmp_path / "none"))
    assert str(tmp_path / "none") in loaders.shared_memory_usage()


def test_workers_of_other_loaders_end_with_a_failed_run():
    """Those of s3prl: torch would wait five seconds for each worker."""
    loader = torch.utils.data.DataLoader(Numbers(3), num_workers=2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="a defect"), kill_workers_on_error():
        for number in loader:
            if number == 2:
                raise RuntimeError("a defect")
    assert has_ended(start)


# A run


def spoil(monkeypatch, stuck_at=None, error_at=None, share=None, number=None):
    """Patch a run: an error in step ``error_at``; workers that hang from step ``stuck_at`` on, with
    signal ``number`` a second later; ``share`` for torch's move of a tensor to shared memory."""
    started = multiprocessing.Event()
    forward, item = EnsembleDistiller.forward, DistillationDataset.__getitem__

    def spoiled_forward(self, *args, step=1, **kwargs):
        if step == error_at:
            raise RuntimeError("a defect")
        if step == stuck_at:
            started.set()
            if number is not None:
                threading.Timer(1, os.kill, (os.getpid(), number)).start()
        return forward(self, *args, step=step, **kwargs)

    def spoiled_item(self, index):
        while started.is_set():
            time.sleep(1)
        return item(self, index)

    monkeypatch.setattr(EnsembleDistiller, "forward", spoiled_forward)
    monkeypatch.setattr(DistillationDataset, "__getitem__", spoiled_item)
    if share is not None:
        monkeypatch.setattr(torch.UntypedStorage, "share_memory_", share)


def test_a_failed_step_ends_all_workers(pretrain_with, monkeypatch):
    spoil(monkeypatch, error_at=4, stuck_at=2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="a defect"):
        pretrain_with("x")
    assert has_ended(start) and saved_states("x")["Step"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_waiting_for_a_batch(pretrain_with, monkeypatch, number):
    """The run saves its last step, and resuming equals an uninterrupted run."""
    with monkeypatch.context() as patches:
        spoil(patches, stuck_at=2, number=number)
        start = time.monotonic()
        code, output = pretrain_with("x")
    assert code == 128 + number and has_ended(start) and "Traceback" not in output
    step = saved_states("x", "last.ckpt")["Step"]
    pattern = rf"{number.name}\b.*\b{step}\b.*\b6\b.*run_pretrain.py -u ekd -n x -a"
    assert re.search(pattern, output)
    assert 2 <= step < 6 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    if number == signal.SIGTERM:
        assert pretrain_with("x", "-a")[0] == 0 and pretrain_with("alone")[0] == 0
        for part in ("student", "heads"):
            assert not unequal(saved_states("x")["EKD"][part], saved_states("alone")["EKD"][part])


def test_a_loader_timeout_ends_the_run(pretrain_with, monkeypatch):
    spoil(monkeypatch, stuck_at=2)
    code, output = pretrain_with("x", "-o", "config.pretrain_expert.datarc.loader_timeout=1")
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in output and not multiprocessing.active_children()
    for text in ("1 s", "/dev/shm", "num_workers", "loader_timeout", "run_pretrain.py -u ekd -n x"):
        assert text in error
    assert saved_states("x")["Step"] >= 2


def test_no_shared_memory_ends_the_run(pretrain_with, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    spoil(monkeypatch, share=full)
    start = time.monotonic()
    code, output = pretrain_with("x")
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and has_ended(start) and "Traceback" not in output
    assert re.search(r"/dev/shm\b.*\d.*\bnum_workers=0", error)


def with_dev_table(folder):
    """Write the length table under two names; return the override of ``file_path``."""
    tables = folder / "tables"
    tables.mkdir()
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    table = f"{config['pretrain_expert']['datarc']['file_path']}/train.csv"
    for name in ("train", "dev"):
        (tables / f"{name}.csv").write_text(open(table).read())
    return f"config.pretrain_expert.datarc.file_path='{tables}'"


def test_a_signal_while_waiting_for_a_dev_batch(pretrain_with, pretrain_folder, monkeypatch):
    started = multiprocessing.Event()
    item = DistillationDataset.__getitem__

    def stuck(self, index):
        while started.is_set():
            time.sleep(1)
        return item(self, index)

    def measure(*args):
        started.set()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return dev_loss(*args)

    monkeypatch.setattr(DistillationDataset, "__getitem__", stuck)
    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", measure)
    tables = with_dev_table(pretrain_folder)
    code, output = pretrain_with("x", "-o", tables, dev_sets=["dev"], eval_step=2)
    assert code == 143 and re.search(r"SIGTERM\b.*\b2\b.*\b6\b.*\b2\b", output)
    assert saved_states("x")["Step"] == 2 and not multiprocessing.active_children()
    # The resumed run computes the dev loss of step 2, and then at the usual steps.
    started.clear()
    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", dev_loss)
    code, output = pretrain_with("x", "-a", "-o", tables, dev_sets=["dev"], eval_step=2)
    assert code == 0
    measured = read_scalars("result/pretrain/x")["ekd/dev-loss"]
    assert sorted(measured) == [2, 4, 6]
    code, output = pretrain_with("uninterrupted", "-o", tables, dev_sets=["dev"], eval_step=2)
    assert code == 0 and read_scalars("result/pretrain/uninterrupted")["ekd/dev-loss"] == measured


def test_a_signal_during_the_last_dev_loss(pretrain_with, pretrain_folder, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise StoppedWaiting

    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", interrupted)
    tables, more = with_dev_table(pretrain_folder), {"dev_sets": ["dev"], "eval_step": 6}
    code, output = pretrain_with("x", "-o", tables, **more)
    assert code == 143 and not Path("result/pretrain/x/states-6.ckpt").exists()
    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.dev_loss", dev_loss)
    code, output = pretrain_with("x", "-a", "-o", tables, **more)
    assert code == 0 and Path("result/pretrain/x/states-6.ckpt").exists()
    assert list(read_scalars("result/pretrain/x")["ekd/dev-loss"]) == [6]


@pytest.mark.parametrize("value", [0.5, -1, 1e300, "600 s", True, None])
def test_invalid_timeouts(pretrain_folder, value):
    config = yaml.safe_load((pretrain_folder / "runner.yaml").read_text())
    config["pretrain_expert"]["datarc"]["loader_timeout"] = value
    with pytest.raises(ConfigError, match=r"loader_timeout"):
        check_runner_config(config, "x")


def test_valid_timeouts(pretrain_folder):
    config = yaml.safe_load((pretrain_folder / "runner.yaml").read_text())
    data = config["pretrain_expert"]["datarc"]
    data.pop("loader_timeout")
    assert check_runner_config(config, "x").pretrain_expert.datarc.loader_timeout == 600
    for value in (0, 1, 604800):
        data["loader_timeout"] = value
        assert check_runner_config(config, "x").pretrain_expert.datarc.loader_timeout == value


def test_building_a_cache_times_out(pretrain_folder, monkeypatch, capfd):
    item = DistillationDataset.__getitem__

    def stuck(self, index):
        while index == 4:
            time.sleep(1)
        return item(self, index)

    monkeypatch.setattr(DistillationDataset, "__getitem__", stuck)
    with edit_yaml(pretrain_folder / "runner.yaml") as config:
        config["pretrain_expert"]["datarc"]["loader_timeout"] = 1
    assert cache(pretrain_folder, pretrain_folder / "cache") == 2
    (error,) = [e for e in capfd.readouterr().err.splitlines() if e.startswith("error:")]
    assert "1 s" in error and "/dev/shm" in error
    assert not multiprocessing.active_children()
    monkeypatch.setattr(DistillationDataset, "__getitem__", item)
    assert cache(pretrain_folder, pretrain_folder / "cache") == 0  # it continues


# Signals


def test_the_wait_for_a_batch_after_a_signal():
    def slow():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        yield 1  # a batch in time
        time.sleep(30)

    with StopSignals(quiet=True) as stop:
        batches = stop.batches(slow())
        assert next(batches) == 1 and stop.received == signal.SIGTERM
        time.sleep(1.5)  # the time of a step does not count
        start = time.monotonic()
        with pytest.raises(StoppedWaiting):
            next(batches)
        assert 0.5 < time.monotonic() - start < 20
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_that_torchrun_forwards_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignals(quiet=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        assert stop.received == signal.SIGINT


@pytest.mark.parametrize(
    ("title", "codes", "output"),
    [
        ("an error in a step", {1}, "RuntimeError: a defect"),
        pytest.param("two SIGTERM", {-signal.SIGTERM}, "SIGTERM", marks=pytest.mark.slow),
        ("two SIGTERM in native code", {143}, "SIGTERM"),
    ],
)
def test_a_process_ends(pretrain_folder, title, codes, output):
    end = end_of(pretrain_folder, CASES[title])
    assert end.code in codes and end.seconds < SOON and end.left == 0 and output in end.output


@pytest.mark.parametrize(
    ("title", "output"),
    [
        pytest.param(
            "an error in the second process of two",
            "[rank1]: RuntimeError: a defect",
            marks=pytest.mark.slow,
        ),
        ("SIGTERM while the second of two waits", "run_pretrain.py -u ekd -n x -a"),
    ],
)
def test_the_other_processes_end_too(pretrain_folder, title, output):
    end = end_of(pretrain_folder, CASES[title])
    assert end.code != 0 and end.seconds < SOON and end.left == 0 and end.step >= 2
    assert output in end.output
