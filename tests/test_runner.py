"""The trainer: the same numbers as s3prl's Runner; signals, errors and checkpoints."""

import argparse
import copy
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch

from s3prl_ekd.distill.distiller import EnsembleDistiller
from s3prl_ekd.distill.moments import Moments
from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.config import to_plain_data
from s3prl_ekd.files.run_checkpoints import newest_checkpoint
from s3prl_ekd.pretrain import interrupts as signals
from s3prl_ekd.pretrain.checkpoints import Progress
from s3prl_ekd.pretrain.curves import read_scalars
from s3prl_ekd.pretrain.distributed import ProcessGroup
from s3prl_ekd.pretrain.optim import OptimizerStep, add_to_s3prl, not_finite_error
from s3prl_ekd.pretrain.settings import load_model_config, load_runner_config
from s3prl_ekd.pretrain.trainer import resume_command
from s3prl_ekd.system.random_states import random_states, set_random_states
from s3prl_ekd.workspace import write_workspace

from .conftest import edit_yaml, saved_states
from .kill_and_resume import outcome, unequal

RUN = ("-u", "ekd", "-c", "runner.yaml", "-g", "model.yaml")


ADAMW = {"name": "AdamW_with_schedule", "lr": 1e-3, "warmup_proportion": 0.1}
FUSED = {"name": "FusedAdamW", "lr": 1e-3, "warmup_proportion": 0.3}
ADAM = {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-3}
LINEAR = {"name": "linear_schedule_with_warmup", "num_warmup_steps": 2}


def use_shipped_files():
    """Take all settings of ``s3prl_distiller.yaml`` and ``s3prl_runner.yaml`` except sizes."""
    model = load_model_config("pretrain/ekd/experiments/s3prl_distiller.yaml")
    run = load_runner_config("pretrain/ekd/s3prl_runner.yaml")
    with edit_yaml("model.yaml") as config:
        small = {"teachers": {"hubert": config["teachers"]["hubert"]}, "student": config["student"]}
        config.clear()
        config.update({**to_plain_data(model), **small})
    return {"precision": run.runner.precision, "optimizer": dict(run.optimizer)}


def test_a_resumed_run_of_s3prls_runner_goes_on_with_the_schedule_of_fused_adamw(monkeypatch):
    """This Runner saves the optimizer only: 50 of 100 steps warm up, then the rate falls to 0."""
    module = ModuleType("optimizers")
    monkeypatch.setitem(sys.modules, "optimizers", module)
    add_to_s3prl()

    def new():
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
        return module.get_FusedAdamW([model], 100, lr=1e-3, warmup_proportion=0.5)

    def rate_of_step(optimizer):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        optimizer.step()
        return optimizer.param_groups[0]["lr"]

    first, second = new(), new()
    rates = [rate_of_step(first) for _ in range(60)]
    assert [rates[0], rates[49]] == pytest.approx([1e-3 / 50, 1e-3])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert rate_of_step(second) == rate_of_step(first) == pytest.approx(1e-3 * 40 / 50)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": ADAM, "scheduler": LINEAR}, {"optimizer": FUSED}, "s3prl_distiller"],
    ids=str,
)
def test_equals_s3prls_runner(pretrain_with, pretrain_folder, changes, monkeypatch):
    """With the same config and seed: weights, optimizer and scalars, bit for bit."""
    if changes == "s3prl_distiller":
        write_workspace(pretrain_folder, ["experiments/s3prl_distiller"])
        changes = use_shipped_files()
        assert changes["precision"] == "float32"
    changes = {"gradient_accumulate_steps": 2, "log_step": 2, **changes}
    assert pretrain_with("ours", **changes)[0] == 0
    classes = []

    def make(args, config, s3prl_runner, overridden):
        classes.append(s3prl_runner)
        return s3prl_runner(args, config)

    monkeypatch.setattr("s3prl_ekd.pretrain.trainer.Trainer", make)
    assert pretrain_with("s3prl")[0] == 0
    assert [runner.__module__ for runner in classes] == ["s3prl.pretrain.runner"]
    one, two = saved_states("ours"), saved_states("s3prl")
    assert "EKD_Run" in one and "EKD_Run" not in two and one["Step"] == two["Step"] == 6
    for part in ("student", "heads"):
        assert not unequal(one["EKD"][part], two["EKD"][part])
    states = [checkpoint["Optimizer"]["state"].values() for checkpoint in (one, two)]
    for state_one, state_two in zip(*states, strict=True):
        assert not unequal(state_one, state_two)
    scalars = [read_scalars(f"result/pretrain/{name}") for name in ("ours", "s3prl")]
    rates = [points.pop("ekd/train-lr") for points in scalars]
    assert scalars[0] == scalars[1]
    if len(changes) == 2 or "precision" in changes:  # otherwise s3prl logs another step's rate
        assert rates[0] == rates[1]


@pytest.mark.parametrize("changes", [{}, {"optimizer": ADAM, "scheduler": LINEAR}], ids=str)
def test_resume_after_a_signal_is_exact(pretrain_with, changes, monkeypatch, pretrain_folder):
    number, exit_code = (signal.SIGTERM, 143) if changes else (signal.SIGUSR1, 138)
    changes = {"gradient_accumulate_steps": 2, "save_step": 5, **changes}
    assert pretrain_with("alone", **changes)[0] == 0
    forward = EnsembleDistiller.forward
    seen = []

    def signalled(self, *args, step=1, **kwargs):
        seen.append(step)
        if seen == [1, 1, 2]:  # in the middle of an accumulated batch
            os.kill(os.getpid(), number)
        return forward(self, *args, step=step, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    code, output = pretrain_with("cut")
    assert code == exit_code and seen == [1, 1, 2, 2]
    assert re.search(rf"{number.name}\b.*\b2\b.*\b6\b.*run_pretrain.py -u ekd -n cut -a", output)
    assert "Traceback" not in output
    assert [path.name for path in pretrain_folder.glob("result/pretrain/cut/*.ckpt")] == [
        "last.ckpt"
    ]
    assert signal.getsignal(number) == signal.SIG_DFL
    code, output = pretrain_with("cut", "-a")
    assert code == 0 and seen[4:] == [3, 3, 4, 4, 5, 5, 6, 6]
    shutil.copytree("result/pretrain/alone", "a/result/pretrain/x")
    shutil.copytree("result/pretrain/cut", "b/result/pretrain/x")
    one, two = _outcome(pretrain_folder / "a"), _outcome(pretrain_folder / "b")
    assert len(one) > 100 and not unequal(one, two)


def _outcome(folder):
    run = folder / "result/pretrain/x"
    (run / "dev-best.ckpt").write_bytes(newest_checkpoint(run).read_bytes())
    return outcome(folder)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_during_the_dev_loss(pretrain_with, pretrain_folder, corpus, monkeypatch, step):
    """The dev loss is left at once, and measured by the resumed run; also that of the last step."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name, count in (("train", len(rows)), ("dev", 6)):
        (pretrain_folder / f"{name}.csv").write_text("\n".join(rows[:count]) + "\n")
    tables = f"config.pretrain_expert.datarc.file_path='{pretrain_folder}'"
    data = ("-o", f"{tables},,config.pretrain_expert.datarc.train_batch_size=1")
    assert pretrain_with("alone", *data, dev_sets=["dev"], log_step=1)[0] == 0
    forward, seen = EnsembleDistiller.forward, []

    def signalled(self, *args, **kwargs):
        if not self.student.training and kwargs["step"] == step:
            seen.append(step)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    code, output = pretrain_with("cut", *data)
    assert code == 143 and len(seen) == 2 and re.search(rf"SIGTERM\b.*\b{step}\b.*-a\b", output)
    saved = saved_states("cut")
    assert saved["Step"] == step and saved["EKD_Run"]["dev_due"]
    code, output = pretrain_with("cut", "-a", *data)
    assert code == 0 and len(seen) == 2 + 5, output
    shutil.copytree("result/pretrain/alone", "a/result/pretrain/x")
    shutil.copytree("result/pretrain/cut", "b/result/pretrain/x")
    assert not unequal(outcome(pretrain_folder / "a"), outcome(pretrain_folder / "b"))


def test_ctrl_c_to_the_process_group(pretrain_folder):
    """As from a terminal: the loader's workers get SIGINT too, and the run still saves."""
    more = "config.runner.total_steps=100000,,config.pretrain_expert.datarc.num_workers=2"
    argv = ["run_pretrain.py", *RUN, "-n", "x", "-o", more]
    with open(pretrain_folder / "log.txt", "w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "s3prl_ekd", *argv],
            start_new_session=True,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while "states-3.ckpt" not in (pretrain_folder / "log.txt").read_text(errors="replace"):
            assert running.poll() is None, (pretrain_folder / "log.txt").read_text()
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) == 130
    output = (pretrain_folder / "log.txt").read_text(errors="replace")
    assert re.search(r"SIGINT\b.*run_pretrain.py -u ekd -n x -a", output)
    assert "Traceback" not in output
    assert saved_states("x", "last.ckpt")["Step"] >= 3


def test_a_second_ctrl_c_exits_at_once(pretrain_with, monkeypatch):
    forward = EnsembleDistiller.forward

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", signalled)
    code, output = pretrain_with("once")
    # Within SAME_SIGNAL the second one repeats the first.
    assert code == 130 and re.search(r"SIGINT\b.*\b1\b.*-n once -a", output)
    assert saved_states("once")["Step"] == 1
    monkeypatch.setattr(signals, "SAME_SIGNAL", -1.0)
    code, output = pretrain_with("twice")
    assert code == 130 and re.search(r"Ctrl-C\b.* -a\b", output)
    assert not os.path.exists("result/pretrain/twice/last.ckpt")


def spoiled(monkeypatch, how, steps):
    forward = EnsembleDistiller.forward

    def forward_spoiled(self, *args, step=1, **kwargs):
        loss, logs = forward(self, *args, step=step, **kwargs)
        if step in steps:
            if how == "loss":
                loss = loss * math.nan
            elif how == "gradient":
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                raise how
        return loss, logs

    monkeypatch.setattr(EnsembleDistiller, "forward", forward_spoiled)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [ADAMW, FUSED], ids=lambda optimizer: optimizer["name"])
def test_steps_that_are_not_finite_are_skipped(pretrain_with, monkeypatch, how, optimizer, caplog):
    spoiled(monkeypatch, how, {2, 4})
    assert pretrain_with("x", save_step=2, log_step=1, optimizer=optimizer)[0] == 0
    records = [r for r in caplog.records if r.name == "s3prl_ekd.pretrain.trainer"]
    messages = [r.getMessage() for r in records]
    for step in (2, 4):
        assert any(re.search(rf"\b{step}\b.*\b1\b.*\bu\d+\.flac", text) for text in messages)
    assert sum(".flac" in text for text in messages) == 2 and re.search(r"\b2\b", messages[-1])
    one, three = saved_states("x", "states-2.ckpt"), saved_states("x")
    assert three["EKD_Run"]["skipped"] == 2 and three["EKD_Run"]["skipped_in_a_row"] == 0
    # The optimizer has made 1 of 2 steps, then 4 of 6.
    assert {int(state["step"]) for state in one["Optimizer"]["state"].values()} == {1}
    assert {int(state["step"]) for state in three["Optimizer"]["state"].values()} == {4}
    assert all(torch.isfinite(value).all() for value in three["EKD"]["student"].values())
    scalars = read_scalars("result/pretrain/x")
    assert list(scalars["ekd/train-loss_mean"]) == [
        1,
        3,
        5,
        6,
    ]  # no point if the window has only a skipped step
    assert scalars["ekd/train-skipped"] == {2: 1, 3: 1, 4: 2, 5: 2, 6: 2}


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_steps_read_late_are_skipped_all_the_same(pretrain_with, monkeypatch, how, caplog):
    """Steps read together at a log point, or one by one: the same weights, counts and means."""
    spoiled(monkeypatch, how, {2, 4})
    states, scalars, messages = [], [], []
    for name, max_nonfinite in (("late", 20), ("at_once", 1 + 1)):
        caplog.clear()
        reads = {"log_step": 5, "save_step": 5, "max_nonfinite": max_nonfinite}
        assert pretrain_with(name, optimizer=FUSED, **reads)[0] == 0
        states.append(saved_states(name))
        scalars.append(read_scalars(f"result/pretrain/{name}"))
        messages.append([text for text in caplog.messages if ".flac" in text])
    assert not unequal(*(state["EKD"]["student"] for state in states))
    assert [state["EKD_Run"]["skipped"] for state in states] == [2, 2]
    assert scalars[0] == scalars[1] and messages[0] == messages[1]
    assert [re.search(r"step (\d)", text)[1] for text in messages[0]] == ["2", "4"]


def test_too_many_skipped_steps_stop_the_run(pretrain_with, monkeypatch):
    spoiled(monkeypatch, "loss", {2, 3, 4, 5})
    code, output = pretrain_with("x", max_nonfinite=3, save_step=1)
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and re.search(r"\b3\b.*\b4\b.*\.flac", error)
    assert error.count(".flac") == 3 and "runner.max_nonfinite" in error
    assert newest_checkpoint("result/pretrain/x").name == "states-3.ckpt"


def test_a_message_names_48_utterances():
    names = [f"u{i}.flac" for i in range(100)]
    message = str(not_finite_error(5, 2, names, "HINT"))
    assert re.search(r"u47\.flac\b.*\b52\b", message) and "u48.flac" not in message


def test_a_nan_is_left_out_of_the_target_statistics():
    moments, clean = Moments(1, 2, full=False), Moments(1, 2, full=False)
    frames = torch.randn(1, 1, 5, 2, generator=torch.Generator().manual_seed(0))
    clean.update(frames[:, :, :4], torch.ones(1, 4))
    frames[0, 0, 4, 1] = math.nan
    moments.update(frames, torch.ones(1, 5))
    assert torch.equal(moments.mean, clean.mean) and moments.count == clean.count == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_the_size_of_the_batch(pretrain_with, monkeypatch, error):
    spoiled(monkeypatch, error, {3})
    code, output = pretrain_with("x", save_step=5, sequence_length=4000)
    assert code == 2 and "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert re.search(r"\bcpu\b.*\b3\b.*\b3\b.*\b0\.2 s\b.*\b1 s\b", error)
    for text in ("train_batch_size", "sequence_length", "run_pretrain.py -u ekd -n x -a"):
        assert text in error
    # The step before is saved.
    assert (
        saved_states("x")["Step"] == 2
        and newest_checkpoint("result/pretrain/x").name == "last.ckpt"
    )


def test_out_of_memory_on_the_dev_set(pretrain_with, pretrain_folder, corpus, monkeypatch):
    """The step before is saved, and the message is that of a training step."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name in ("train", "dev"):
        (pretrain_folder / f"{name}.csv").write_text("\n".join(rows[:4]) + "\n")
    forward = EnsembleDistiller.forward

    def without_memory(self, *args, **kwargs):
        if not self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EnsembleDistiller, "forward", without_memory)
    tables = f"config.pretrain_expert.datarc.file_path='{pretrain_folder}'"
    code, output = pretrain_with("x", "-o", tables, dev_sets=["dev"], eval_step=2)
    assert code == 2 and "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "train_batch_size" in error and "run_pretrain.py -u ekd -n x -a" in error
    assert saved_states("x")["Step"] == 2


def test_a_run_of_several_processes_is_resumed_by_torchrun():
    args = argparse.Namespace(expname="x", expdir="result/pretrain/x", upstream="ekd")
    assert resume_command(args) == "run_pretrain.py -u ekd -n x -a"
    words = resume_command(args, processes=8).split()
    assert words[0] == "torchrun" and "--nproc_per_node=8" in words
    assert words[-6:] == ["run_pretrain.py", "-u", "ekd", "-n", "x", "-a"]


def test_other_errors_save_the_last_step(pretrain_with, monkeypatch):
    spoiled(monkeypatch, RuntimeError("a defect"), {4})
    with pytest.raises(RuntimeError, match="a defect"):
        pretrain_with("x", save_step=5)
    assert saved_states("x")["Step"] == 3


@pytest.mark.parametrize("exchange", range(6))
def test_a_step_is_saved_if_another_process_is_lost(pretrain_with, monkeypatch, exchange):
    """One collective call of step 3 fails, as if another process was killed."""
    remaining = [None]
    methods = {
        name: getattr(ProcessGroup, name)
        for name in ("any", "sum", "all_gather", "first_not_none", "barrier")
    }

    def failing(name):
        def method(self, *values):
            if remaining[0] is not None:
                if remaining[0] == 0:
                    remaining[0] = None
                    raise RuntimeError("[gloo] Connection closed by peer")
                remaining[0] -= 1
            return methods[name](self, *values)

        return method

    for name in methods:
        monkeypatch.setattr(ProcessGroup, name, failing(name))
    begin = OptimizerStep.begin

    def third_step(self):
        begin(self)
        calls.append(1)
        if len(calls) == 4:  # the first call is in __init__
            remaining[0] = exchange

    calls = []
    monkeypatch.setattr(OptimizerStep, "begin", third_step)
    with pytest.raises(RuntimeError, match="Connection closed"):
        pretrain_with("x", save_step=5, log_step=1)
    assert (
        saved_states("x")["Step"] in (2, 3)
        and newest_checkpoint("result/pretrain/x").name == "last.ckpt"
    )


def test_a_full_disk_keeps_the_checkpoints(pretrain_with, pretrain_folder):
    assert pretrain_with("x", total_steps=5)[0] == 0
    before = {path: path.read_bytes() for path in pretrain_folder.glob("result/pretrain/x/*.ckpt")}
    assert len(before) == 3
    overrides = "config.runner.total_steps=9,,config.runner.save_step=6,,config.runner.max_keep=1"
    argv = ["run_pretrain.py", "-u", "ekd", "-n", "x", "-a", "-o", overrides]

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-m", "s3prl_ekd", *argv],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "result/pretrain/x/states-6.ckpt" in error and "File too large" in error
    assert "run_pretrain.py -u ekd -n x -a" in error
    after = {path: path.read_bytes() for path in pretrain_folder.glob("result/pretrain/x/*.ckpt*")}
    assert after == before


@pytest.mark.parametrize("max_keep", [1, 2])
def test_newest_and_last(pretrain_with, pretrain_folder, max_keep):
    code, output = pretrain_with("x", total_steps=6, save_step=1, log_step=1, max_keep=max_keep)
    assert code == 0
    names = {path.name for path in pretrain_folder.glob("result/pretrain/x/*.ckpt")}
    assert names == {"last.ckpt", *(f"states-{7 - i}.ckpt" for i in range(1, max_keep + 1))}
    assert os.path.samefile("result/pretrain/x/last.ckpt", "result/pretrain/x/states-6.ckpt")
    assert newest_checkpoint("result/pretrain/x").name == "states-6.ckpt"


def test_the_best_checkpoint_by_dev_loss(pretrain_with, pretrain_folder, corpus):
    assert pretrain_with("without", log_step=1, save_step=5)[0] == 0
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name in ("train", "dev"):
        (pretrain_folder / f"{name}.csv").write_text(
            "\n".join(rows if name == "train" else rows[:5]) + "\n"
        )
    tables = f"config.pretrain_expert.datarc.file_path='{pretrain_folder}'"
    code, output = pretrain_with("with", "-o", tables, dev_sets=["dev"], eval_step=1)
    assert code == 0, output
    losses = read_scalars("result/pretrain/with")["ekd/dev-loss"]
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    best = min(losses, key=losses.get)
    states = saved_states("with", "dev-best.ckpt")
    assert states["Step"] == best and states["EKD_Run"]["best_step"] == best
    assert states["EKD_Run"]["best_loss"] == pytest.approx(losses[best], rel=1e-6)
    # The dev loss does not change the training.
    for part in ("student", "heads"):
        assert not unequal(saved_states("without")["EKD"][part], saved_states("with")["EKD"][part])


@pytest.mark.parametrize(
    "change", ["dev_sets=['other']", "sequence_length=4000", "table", "names", None, "dev_sets=[]"]
)
def test_the_best_checkpoint_is_one_of_the_same_dev_data(
    pretrain_with, pretrain_folder, corpus, change, caplog
):
    """With other data, the first dev loss is the lowest, and the former checkpoint is kept."""
    rows = (corpus / "tables/train.csv").read_text().splitlines()
    for name, count in (("train", len(rows)), ("dev", 5), ("other", 3)):
        (pretrain_folder / f"{name}.csv").write_text("\n".join(rows[:count]) + "\n")
    tables = f"config.pretrain_expert.datarc.file_path='{pretrain_folder}'"
    assert pretrain_with("x", "-o", tables, dev_sets=["dev"], log_step=1)[0] == 0
    best = pretrain_folder / "result/pretrain/x/dev-best.ckpt"
    before, old = best.read_bytes(), best.with_name("dev-best.ckpt.old")
    states = saved_states("x")
    states["EKD_Run"]["best_loss"] = 0.0  # lower than any
    if change in ("names", None):  # a checkpoint of an earlier version
        del states["EKD_Run"]["dev_tables"]
    torch.save(states, "new.ckpt")  # the other file is mapped into memory
    os.replace("new.ckpt", best.with_name("states-6.ckpt"))
    best.with_name("last.ckpt").unlink()
    more = f"{tables},,config.runner.total_steps=8"
    if change == "table":
        shutil.copy("other.csv", "dev.csv")
    elif change is not None:
        value = "dev_sets=['other']" if change == "names" else change
        more += f",,config.pretrain_expert.datarc.{value}"
    caplog.clear()
    code, output = pretrain_with("x", "-a", "-o", more)
    assert code == 0, output
    if change in (None, "dev_sets=[]"):
        assert best.read_bytes() == before and not old.exists()
        assert saved_states("x")["EKD_Run"]["best_loss"] == 0
    else:
        assert old.read_bytes() == before and saved_states("x", "dev-best.ckpt")["Step"] == 8
        assert "dev loss changed" in caplog.text and "dev-best.ckpt.old" in caplog.text


def test_autosave_minutes(pretrain_with, pretrain_folder):
    code, output = pretrain_with("x", autosave_minutes=1e-9, save_step=5, total_steps=6, log_step=1)
    assert code == 0 and saved_states("x", "last.ckpt")["Step"] == 6
    assert "states-5.ckpt" in output and "states-4.ckpt" not in output


def test_random_states_are_restored():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(1).item()

    random.gauss(0, 1), np.random.normal()  # each keeps a second number for the next call
    states = random_states()
    first = draw()
    assert draw() != first
    set_random_states(states)
    assert draw() == first
    with pytest.raises(ValueError):
        set_random_states({**states, "torch": torch.zeros(3)})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 7},
        {"epoch": "1"},
        {"batch": -1},
        {"records": {"a": 3}},
        {"tables": 3},
        {"random": None},
        None,
    ],
    ids=str,
)
def test_an_invalid_run_state(change):
    data = Progress().state_dict([{}])
    assert Progress.from_state_dict(data, "x") == Progress()
    with pytest.raises(CheckpointError, match=r"\bx\b"):
        Progress.from_state_dict(None if change is None else {**data, **change}, "x")


def test_s3prls_runner_is_restored_afterwards(pretrain_with):
    import s3prl.run_pretrain as script

    before = script.Runner, script.get_pretrain_args, script.override
    assert pretrain_with("x", total_steps=3, save_step=1, log_step=1)[0] == 0
    assert (script.Runner, script.get_pretrain_args, script.override) == before
    assert script.Runner.__module__ == "s3prl.pretrain.runner"
