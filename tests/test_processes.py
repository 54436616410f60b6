"""Several processes, started by torchrun, train one student: with gloo, on the CPU."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from s3prl_ekd.data.sampling import EpochOrder, FixedOrder
from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.run_checkpoints import newest, read_run
from s3prl_ekd.pretrain.checkpoints import Progress
from s3prl_ekd.pretrain.distributed import ProcessGroup, join_process_group, mean_records
from s3prl_ekd.pretrain.tensorboard import read_scalars
from s3prl_ekd.pretrain.trainer import Trainer
from s3prl_ekd.workspace import write_workspace

from .conftest import STUDENT, write_configs

WORDS = ("run_pretrain.py", "-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml")
ALONE = (sys.executable, "-m", "s3prl_ekd")


def together(count):
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={count}", "-m", "s3prl_ekd"),
    )


# Nothing random in the student: two processes draw other numbers than one.
STILL = {**STUDENT, **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)}
STEPS = 20


@pytest.fixture
def folder(tmp_path, teachers, corpus):
    write_workspace(tmp_path)
    write_configs(tmp_path, teachers, corpus, student=STILL)
    return tmp_path


def change(folder, **changes):
    """Set keys of runner.yaml, of the runner or the data."""
    config = yaml.safe_load((folder / "runner.yaml").read_text())
    data = config["pretrain_expert"]["datarc"]
    for key, value in changes.items():
        part = data if key in ("train_batch_size", "dev_sets", "num_workers") else config["runner"]
        part[key] = value
    (folder / "runner.yaml").write_text(yaml.safe_dump(config))


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(folder, start, name, *words, code=0):
    done = subprocess.run(
        [*start, *WORDS, "-n", name, "--device", "cpu", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def states(folder, name):
    return read_run(newest(folder / "result/pretrain" / name))


def weights(folder, name):
    saved = states(folder, name)["EKD"]
    return torch.cat([v.flatten() for part in ("student", "heads") for v in saved[part].values()])


END = """
import atexit, os, sys, threading, time
from s3prl_ekd import __main__

class Left:
    def __del__(self):
        os.abort()  # as a thread of torch.distributed's may while Python takes itself down

def main():
    global left
    left = Left()
    atexit.register(print, "at the end")
    threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()
    print("not flushed", end=" ")
    {how}

__main__.main = main
__main__.process()
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("return 0", 0, ""),
        ("return 130", 130, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('a reason')", 1, "a reason\n"),
    ],
)
def test_one_of_several_ends_before_python_is_taken_down(how, code, said):
    words = [sys.executable, "-c", END.format(how=how)]
    for count, expected in (("1", -signal.SIGABRT), ("2", code)):
        several = {**environment(), "WORLD_SIZE": count, "RANK": "0"}
        done = subprocess.run(words, capture_output=True, text=True, env=several)
        assert done.returncode == expected
        if count == "2":
            assert done.stdout == "not flushed a thread\nat the end\n" and done.stderr == said


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(folder):
    """After 20 steps; twice the batch by accumulation, so that the batches are the same."""
    change(folder, total_steps=STEPS, save_step=10, log_step=5, train_batch_size=2)
    said = run(folder, together(2), "two")
    change(folder, gradient_accumulate_steps=2)
    run(folder, ALONE, "one")
    one, two = weights(folder, "one"), weights(folder, "two")
    assert (one - two).abs().max() < 1e-5
    start = read_run(folder / "result/pretrain/one/states-10.ckpt")["EKD"]["student"]
    end = states(folder, "one")["EKD"]["student"]
    moved = max((start[name] - end[name]).abs().max() for name in start)
    assert moved > 1e-3  # more than a hundred times what they may differ by
    scalars = [read_scalars(folder / "result/pretrain" / name) for name in ("one", "two")]
    assert scalars[0].keys() == scalars[1].keys()
    for name, points in scalars[0].items():
        assert scalars[1][name] == pytest.approx(points, rel=2e-3, abs=1e-5), name
    places = [states(folder, name)["EKD_Run"] for name in ("one", "two")]
    assert [(p["epoch"], p["batch"], len(p["random"])) for p in places] == [(6, 4, 1), (6, 4, 2)]
    # one of them speaks and writes
    assert said.count("Accumulated batch size: 4") == 1 and said.count("done: the student") == 1
    assert len(list((folder / "result/pretrain/two").glob("events*"))) == 1


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batches(folder):
    """10 steps of two, then 10 of one with two batches each: as 20 steps of either. The statistics
    of the targets are of all processes, so they are the same too."""
    write_model = yaml.safe_load((folder / "model.yaml").read_text())
    write_model["targets"] = {"standardise": "running", "standardise_steps": 12}
    (folder / "model.yaml").write_text(yaml.safe_dump(write_model))
    change(folder, total_steps=STEPS, save_step=10, log_step=5, train_batch_size=2)
    run(folder, together(2), "x", "-o", "config.runner.total_steps=11")
    for path in (folder / "result/pretrain/x").glob("*.ckpt"):
        if path.name != "states-10.ckpt":
            path.unlink()
    more = "config.runner.total_steps=20,,config.runner.gradient_accumulate_steps=2"
    done = subprocess.run(
        [*ALONE, "run_pretrain.py", "-u", "ekd", "-n", "x", "-a", "-o", more],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "another number of processes than before: random numbers begin anew" in done.stderr
    run(folder, together(2), "whole")
    assert (weights(folder, "x") - weights(folder, "whole")).abs().max() < 1e-2
    assert states(folder, "x")["EKD_Run"]["batch"] == states(folder, "whole")["EKD_Run"]["batch"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_with_a_checkpoint_and_a_sentence(folder, lost):
    change(folder, total_steps=100000, save_step=90000, log_step=1)
    with open(folder / "log.txt", "w") as log:
        running = subprocess.Popen(
            [*together(2), *WORDS, "-n", "x", "--device", "cpu"],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment(),
        )
        events = folder / "result/pretrain/x"
        wait_for(lambda: any(map(points, events.glob("events*"))), running)
        os.kill(rank_of(running.pid, lost), signal.SIGKILL)
        assert running.wait(60) != 0
    said = (folder / "log.txt").read_text(errors="replace")
    assert "another process of this run has ended after step" in said
    assert "go on with: run_pretrain.py -u ekd -n x -a" in said
    saved = states(folder, "x")
    assert saved["Step"] >= 1 and newest(events).name == "last.ckpt"
    if lost == 0:  # the second one has saved; once is enough to see it go on
        return
    more = f"config.runner.total_steps={saved['Step'] + 1},,config.runner.save_step=1"
    go_on = [*WORDS[:3], "-n", "x", "-a", "-o", more]
    done = subprocess.run([*together(2), *go_on], cwd=folder, env=environment())
    assert done.returncode == 0 and states(folder, "x")["Step"] == saved["Step"] + 1


@pytest.mark.slow
def test_a_signal_to_one_stops_all(folder):
    change(folder, total_steps=100000, save_step=90000, log_step=1)
    with open(folder / "log.txt", "w") as log:
        running = subprocess.Popen(
            [*together(2), *WORDS, "-n", "x", "--device", "cpu"],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment(),
        )
        wait_for(lambda: any(map(points, (folder / "result/pretrain/x").glob("events*"))), running)
        os.kill(rank_of(running.pid, 1), signal.SIGUSR1)
        running.wait(60)
    said = (folder / "log.txt").read_text(errors="replace")
    assert said.count("stopped by SIGUSR1 at step") == 1 and "all saved" in said
    assert len(states(folder, "x")["EKD_Run"]["random"]) == 2


@pytest.mark.slow
def test_bad_audio_and_few_dev_batches(folder, corpus):
    """One bad utterance a batch of one: its process takes part with an empty batch."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    name = next(cell for cell in rows[4].split(",") if cell.endswith(".flac"))
    gone = rows[4].replace(name, "gone.flac")
    (folder / "some.csv").write_text("\n".join([*rows[:4], gone]) + "\n")
    (folder / "dev.csv").write_text("\n".join(rows[:2]) + "\n")
    change(folder, total_steps=8, save_step=4, log_step=2, train_batch_size=1, dev_sets=["dev"])
    data = "config.pretrain_expert.datarc"
    words = f"{data}.file_path='{folder}',,{data}.sets=['some'],,{data}.on_bad_audio='skip'"
    run(folder, together(2), "x", "-o", words)
    listed = (folder / "result/pretrain/x/bad_audio.tsv").read_text().splitlines()
    # 8 steps of 2 batches are 4 passes over 4 batches, and the table has 4 rows
    assert len(listed) == 2 and listed[1].startswith("gone.flac\t")
    assert listed[1].split("\t")[2] == "4"
    assert list(read_scalars(folder / "result/pretrain/x")["ekd/dev-loss"]) == [4, 8]


def points(path):
    return path.stat().st_size > 2000


def wait_for(ready, running):
    end = time.monotonic() + 90
    while not ready():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def rank_of(agent, rank):
    """The process of that rank, among the children of torchrun's."""
    for child in open(f"/proc/{agent}/task/{agent}/children").read().split():
        told = open(f"/proc/{child}/environ").read().split("\0")
        if f"RANK={rank}" in told:
            return int(child)
    raise AssertionError("no such process")


# The order


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (7, 3), (8, 4), (2, 5), (1, 3)])
def test_processes_deal_out_the_passes_like_cards(count, processes):
    alone = EpochOrder(count, seed=3)
    stream = [item for _ in range(4 * processes**2 + 3) for item in alone]
    for begin in (0, 1, count - 1):
        hands = []
        for rank in range(processes):
            mine = EpochOrder(count, seed=3)
            mine.go_to(0, begin, rank, processes)
            hands.append([item for _ in range(3 * processes) for item in mine])
        for i in range(min(map(len, hands))):
            here = begin + i * processes
            assert [hand[i] for hand in hands] == stream[here : here + processes]


def test_the_fixed_order_is_dealt_out_too():
    orders = [FixedOrder(5) for _ in range(3)]
    for rank, order in enumerate(orders):
        order.rank, order.processes = rank, 3
    assert [list(order) for order in orders] == [[0, 3], [1, 4], [2]]
    assert [len(order) for order in orders] == [2, 2, 1]


def test_means_of_what_processes_have():
    every = [{"a": [1.0, 2.0], "b": [4.0]}, {"a": [3.0, 2.0, 7.0]}]
    assert mean_records(every) == {"a": [2.0, 2.0, 7.0], "b": [4.0]}


def test_one_gpu_for_all_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SetupError, match="--device cuda:1 is one GPU"):
        join_process_group("cuda:1")


def test_processes_at_different_steps_are_refused():
    class Two(ProcessGroup):
        def all_gather(self, value):
            return [value, (value[0] + 5, *value[1:])]

    trainer = object.__new__(Trainer)
    trainer.progress, trainer.processes = Progress(step=10), Two(0, 2)
    with pytest.raises(SetupError, match=r"do not stand at the same step .* \(steps 10, 15\)"):
        trainer.check_same_progress()
    trainer.processes = ProcessGroup()
    trainer.check_same_progress()


def test_one_process_asks_nobody():
    alone = ProcessGroup()
    assert alone.any(True) and not alone.any(False)
    assert alone.sum(1.0, 2.0) == [1.0, 2.0] and alone.all_gather("x") == ["x"]
    assert alone.first_not_none(None) is None and alone.first_not_none("x") == "x"
