"""Training in several processes of torchrun, with gloo on the CPU."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from s3prl_ekd.data.sampling import EpochSampler, FixedOrderSampler
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.run_checkpoints import newest_checkpoint, read_checkpoint
from s3prl_ekd.pretrain.checkpoints import Progress
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.distributed import ProcessGroup, join_process_group, mean_records
from s3prl_ekd.pretrain.interrupts import StoppedDevLoss, StopSignals
from s3prl_ekd.pretrain.trainer import Trainer

from .conftest import NO_DROPOUT, edit_yaml, write_configs

ARGV = ("run_pretrain.py", "-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml")
PYTHON = (sys.executable, "-m", "s3prl_ekd")


def torchrun(count):
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={count}", "-m", "s3prl_ekd"),
    )


STEPS = 20


@pytest.fixture
def folder(pretrain_folder, teachers, corpus):
    """With a student without dropout, because random numbers depend on the number of processes."""
    write_configs(pretrain_folder, teachers, corpus, student=NO_DROPOUT)
    return pretrain_folder


def change(folder, **changes):
    """Set keys of ``runner`` or ``datarc`` in runner.yaml."""
    with edit_yaml(folder / "runner.yaml") as config:
        data = config["pretrain_expert"]["datarc"]
        for key, value in changes.items():
            part = (
                data if key in ("train_batch_size", "dev_sets", "num_workers") else config["runner"]
            )
            part[key] = value


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(folder, start, name, *argv, code=0):
    done = subprocess.run(
        [*start, *ARGV, "-n", name, "--device", "cpu", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def states(folder, name):
    return read_checkpoint(newest_checkpoint(folder / "result/pretrain" / name))


def weights(folder, name):
    saved = states(folder, name)["EKD"]
    return torch.cat([v.flatten() for part in ("student", "heads") for v in saved[part].values()])


END = """
import atexit, os, sys, threading, time
from s3prl_ekd import __main__

class Aborting:
    def __del__(self):
        os.abort()  # like a thread of torch.distributed while Python shuts down

def main():
    global aborting
    aborting = Aborting()
    atexit.register(print, "at the end")
    threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()
    print("not flushed", end=" ")
    {how}

__main__.main = main
__main__.process()
"""


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("return 0", 0, ""),
        ("return 130", 130, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('a reason')", 1, "a reason\n"),
    ],
)
def test_one_of_several_processes_exits_without_python_shutdown(how, code, message):
    argv = [sys.executable, "-c", END.format(how=how)]
    for count, expected in (("1", -signal.SIGABRT), ("2", code)):
        env = {**environment(), "WORLD_SIZE": count, "RANK": "0"}
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        assert done.returncode == expected
        if count == "2":
            assert done.stdout == "not flushed a thread\nat the end\n" and done.stderr == message


def test_two_processes_equal_one_with_two_accumulated_batches(folder):
    """After 20 steps."""
    change(folder, total_steps=STEPS, save_step=10, log_step=5, train_batch_size=2)
    output = run(folder, torchrun(2), "two")
    change(folder, gradient_accumulate_steps=2)
    run(folder, PYTHON, "one")
    one, two = weights(folder, "one"), weights(folder, "two")
    assert (one - two).abs().max() < 1e-5
    start = read_checkpoint(folder / "result/pretrain/one/states-10.ckpt")["EKD"]["student"]
    end = states(folder, "one")["EKD"]["student"]
    moved = max((start[name] - end[name]).abs().max() for name in start)
    assert moved > 1e-3  # more than a hundred times the tolerance
    scalars = [read_scalars(folder / "result/pretrain" / name) for name in ("one", "two")]
    assert scalars[0].keys() == scalars[1].keys()
    for name, points in scalars[0].items():
        assert scalars[1][name] == pytest.approx(points, rel=2e-3, abs=1e-5), name
    runs = [states(folder, name)["EKD_Run"] for name in ("one", "two")]
    assert [(r["epoch"], r["batch"], len(r["random"])) for r in runs] == [(6, 4, 1), (6, 4, 2)]
    # Only rank 0 prints and writes.
    assert len(re.findall(r"batch size: 4\b", output)) == 1
    assert output.count("s3prl-ekd export student result/pretrain/two") == 1
    assert len(list((folder / "result/pretrain/two").glob("events*"))) == 1


@pytest.mark.slow
def test_resume_with_another_number_of_processes(folder):
    """10 steps of two processes, then 10 of one with two accumulated batches, equal 20 steps of
    two. So do the target statistics, which are of all processes."""
    with edit_yaml(folder / "model.yaml") as model:
        model |= {"target_norm": "mean_std", "target_norm_steps": 12}
    change(folder, total_steps=STEPS, save_step=10, log_step=5, train_batch_size=2)
    run(folder, torchrun(2), "x", "-o", "config.runner.total_steps=11")
    for path in (folder / "result/pretrain/x").glob("*.ckpt"):
        if path.name != "states-10.ckpt":
            path.unlink()
    more = "config.runner.total_steps=20,,config.runner.gradient_accumulate_steps=2"
    done = subprocess.run(
        [*PYTHON, "run_pretrain.py", "-u", "ekd", "-n", "x", "-a", "-o", more],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\b2 processes\b.*\b1\b", done.stderr)
    run(folder, torchrun(2), "two")
    assert (weights(folder, "x") - weights(folder, "two")).abs().max() < 1e-2
    assert states(folder, "x")["EKD_Run"]["batch"] == states(folder, "two")["EKD_Run"]["batch"]


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_run_with_a_checkpoint(folder, lost):
    change(folder, total_steps=100000, save_step=90000, log_step=1)
    with open(folder / "log.txt", "w") as log:
        running = subprocess.Popen(
            [*torchrun(2), *ARGV, "-n", "x", "--device", "cpu"],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment(),
        )
        events = folder / "result/pretrain/x"
        wait_for(lambda: any(map(points, events.glob("events*"))), running)
        os.kill(rank_of(running.pid, lost), signal.SIGKILL)
        assert running.wait(60) != 0
    output = (folder / "log.txt").read_text(errors="replace")
    saved = states(folder, "x")
    assert saved["Step"] >= 1 and newest_checkpoint(events).name == "last.ckpt"
    error = rf"\berror\b.*\b{saved['Step']}\b.*run_pretrain.py -u ekd -n x -a"
    assert re.search(error, output), output[-3000:]
    if lost == 0:  # resuming is tested with the other case
        return
    more = f"config.runner.total_steps={saved['Step'] + 1},,config.runner.save_step=1"
    argv = [*ARGV[:3], "-n", "x", "-a", "-o", more]
    done = subprocess.run([*torchrun(2), *argv], cwd=folder, env=environment())
    assert done.returncode == 0 and states(folder, "x")["Step"] == saved["Step"] + 1


def test_a_signal_to_one_process_stops_all(folder):
    change(folder, total_steps=100000, save_step=90000, log_step=1)
    with open(folder / "log.txt", "w") as log:
        running = subprocess.Popen(
            [*torchrun(2), *ARGV, "-n", "x", "--device", "cpu"],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment(),
        )
        wait_for(lambda: any(map(points, (folder / "result/pretrain/x").glob("events*"))), running)
        os.kill(rank_of(running.pid, 1), signal.SIGUSR1)
        running.wait(60)
    output = (folder / "log.txt").read_text(errors="replace")
    (line,) = [
        line for line in output.splitlines() if "SIGUSR1" in line and "run_pretrain.py" in line
    ]
    step = states(folder, "x")["Step"]
    assert re.search(rf"\b{step}\b.*\b100000\b.*\b{step}\b", line)
    assert len(states(folder, "x")["EKD_Run"]["random"]) == 2


def test_bad_audio_and_few_dev_batches(folder, corpus):
    """Batches of one utterance, one of them bad: its process runs the step with an empty batch."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    name = next(cell for cell in rows[4].split(",") if cell.endswith(".flac"))
    missing = rows[4].replace(name, "missing.flac")
    (folder / "some.csv").write_text("\n".join([*rows[:4], missing]) + "\n")
    (folder / "dev.csv").write_text("\n".join(rows[:2]) + "\n")
    change(folder, total_steps=8, save_step=4, log_step=2, train_batch_size=1, dev_sets=["dev"])
    data = "config.pretrain_expert.datarc"
    overrides = f"{data}.file_path='{folder}',,{data}.sets=['some'],,{data}.on_bad_audio='skip'"
    run(folder, torchrun(2), "x", "-o", overrides)
    listed = (folder / "result/pretrain/x/bad_audio.tsv").read_text().splitlines()
    # 8 steps of 2 batches are 4 epochs of 4 batches
    assert len(listed) == 2 and listed[1].startswith("missing.flac\t")
    assert listed[1].split("\t")[2] == "4"
    assert list(read_scalars(folder / "result/pretrain/x")["ekd/dev-loss"]) == [4, 8]


@pytest.mark.parametrize("stop_at", [0, 2, None])
def test_processes_leave_the_dev_loss_together(stop_at):
    """Although one has a batch less: each asks the others as often."""
    ends, usable = [], SimpleNamespace(names=["a"])
    for rank in range(2):
        sampler = FixedOrderSampler(2 * 8 * 3 + 1)
        sampler.rank, sampler.processes = rank, 2
        answers = []

        class Two(ProcessGroup):
            def any(self, value, answers=answers):
                answers.append(value)
                return len(answers) - 1 == stop_at

        loader = DataLoader(range(sampler.count), sampler=sampler, batch_size=None)
        trainer = object.__new__(Trainer)
        trainer.processes, trainer.stop_signals = Two(rank, 2), StopSignals()
        trainer.upstream = SimpleNamespace(dev_dataloader=loader)
        trainer.progress = Progress()
        trainer.bad_audio = SimpleNamespace(usable=lambda read, epoch: usable)
        batches = 0
        stopped = contextlib.nullcontext() if stop_at is None else pytest.raises(StoppedDevLoss)
        with stopped:
            for _ in trainer.dev_batches():
                batches += 1
        ends.append((len(answers), batches))
    expected = {0: [(1, 0)] * 2, 2: [(3, 16)] * 2, None: [(4, 25), (4, 24)]}
    assert ends == expected[stop_at]


def points(path):
    return path.stat().st_size > 2000


def wait_for(ready, running):
    end = time.monotonic() + 90
    while not ready():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def rank_of(agent, rank):
    """The process id of a rank, among the children of torchrun."""
    for child in open(f"/proc/{agent}/task/{agent}/children").read().split():
        variables = open(f"/proc/{child}/environ").read().split("\0")
        if f"RANK={rank}" in variables:
            return int(child)
    raise AssertionError("no such process")


# The order of utterances


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (7, 3), (8, 4), (2, 5), (1, 3)])
def test_ranks_take_turns_in_the_order_of_one_process(count, processes):
    order = EpochSampler(count, seed=3)
    items = [item for _ in range(4 * processes**2 + 3) for item in order]
    for start in (0, 1, count - 1):
        by_rank = []
        for rank in range(processes):
            order = EpochSampler(count, seed=3)
            order.seek(0, start, rank, processes)
            by_rank.append([item for _ in range(3 * processes) for item in order])
        for i in range(min(map(len, by_rank))):
            position = start + i * processes
            assert [own[i] for own in by_rank] == items[position : position + processes]


def test_ranks_take_turns_in_the_fixed_order():
    orders = [FixedOrderSampler(5) for _ in range(3)]
    for rank, order in enumerate(orders):
        order.rank, order.processes = rank, 3
    assert [list(order) for order in orders] == [[0, 3], [1, 4], [2]]
    assert [len(order) for order in orders] == [2, 2, 1]


def test_means_over_the_processes_that_have_a_value():
    records = [{"a": [1.0, 2.0], "b": [4.0]}, {"a": [3.0, 2.0, 7.0]}]
    assert mean_records(records) == {"a": [2.0, 2.0, 7.0], "b": [4.0]}


def test_one_gpu_for_all_processes_is_rejected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SetupError, match="--device cuda:1"):
        join_process_group("cuda:1")


def test_processes_at_different_steps_are_rejected():
    class Two(ProcessGroup):
        def all_gather(self, value):
            return [value, (value[0] + 5, *value[1:])]

    trainer = object.__new__(Trainer)
    trainer.progress, trainer.processes = Progress(step=10), Two(0, 2)
    with pytest.raises(SetupError, match=r"\b10, 15\b"):
        trainer.check_same_progress()
    trainer.processes = ProcessGroup()
    trainer.check_same_progress()


def test_processes_that_would_compute_in_different_precisions_are_rejected(
    pretrain_with, monkeypatch
):
    """As on two GPUs, of which one has no bfloat16."""

    def all_gather(self, value):
        other = ("bfloat16", *value[1:]) if value == ("float32", "float32") else value
        return [value, other]

    monkeypatch.setattr(ProcessGroup, "all_gather", all_gather)
    code, output = pretrain_with("x", precision="float32")
    assert code == 2 and re.search(r"bfloat16, float32.*runner\.precision", output)


def test_one_process_does_not_communicate():
    alone = ProcessGroup()
    assert alone.any(True) and not alone.any(False)
    assert alone.sum(1.0, 2.0) == [1.0, 2.0] and alone.all_gather("x") == ["x"]
    assert alone.first_not_none(None) is None and alone.first_not_none("x") == "x"
